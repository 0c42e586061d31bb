"""
Opens lists and tars as data sets. One column has the record as JSON, which keeps the text of its cells; the other
columns tell its origin. The data set is in the cache of `datasets` on disk, or is a stream.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, Value

from ..labels import TAR_SUFFIXES
from .faults import BadRecord
from .images import place_of
from .lists import forget_json, read_list
from .tars import read_tar


FILE, NUMBER, SPLIT, RECORD, FAULT = "__file__", "__number__", "__split__", "__record__", "__fault__"
_PACKED = {FILE: Value("string"), NUMBER: Value("int64"), SPLIT: Value("string"), RECORD: Value("string")}
_PACKED |= {FAULT: Value("string")}
# `datasets` reuses cached results of equal arguments; this one differs as soon as the code does.
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def open_packed(
    paths: list[str], root: str, streaming: bool, split_column: str | None = None
) -> Dataset | IterableDataset:
    """
    The records of lists or of tars, joined in order.

    Raises:
        ValueError: A whole file cannot be read.
    """
    is_tar = paths[0].lower().endswith(TAR_SUFFIXES)
    features = Features(_PACKED | ({"image": Image(decode=False)} if is_tar else {}))
    files = [(path, *_stamp(path, root)) for path in paths]
    options: dict[str, Any] = {"files": files, "root": root, "split_column": split_column or "split", "code": CODE}
    if streaming:
        return IterableDataset.from_generator(_pack, features=features, gen_kwargs=options)
    try:
        return Dataset.from_generator(_pack, features=features, gen_kwargs=options)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        raise ValueError(f"{', '.join(paths[:3])} cannot be read: {cause}") from error
    finally:
        forget_json()


def is_packed(records: Dataset | IterableDataset) -> bool:
    return records.features is not None and RECORD in records.features


def unpack(packed: dict[str, Any]) -> dict[str, Any]:
    """
    The record as a dict of cells by column.

    Raises:
        BadRecord: The record could not be read.
    """
    if packed[FAULT] is not None:
        raise BadRecord(packed[FAULT])
    record = json.loads(packed[RECORD])
    return {**record, "image": packed["image"]} if "image" in packed else record


def _stamp(path: str, root: str) -> tuple:
    """Everything that the records of a file depend on, so that the cache notices changes."""
    if "://" in path:
        return ()
    status = os.stat(path)
    stamp = (status.st_mtime_ns, status.st_size)
    if not path.lower().endswith(".json") or not os.path.isdir(root):
        return stamp
    # published lists look for folders of images, and for files next to them
    folders = sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(root) if entry.is_dir())
    return (*stamp, os.stat(os.path.dirname(path) or ".").st_mtime_ns, *folders)


def _pack(files: list[tuple], root: str, split_column: str, code: str) -> Iterator[dict[str, Any]]:
    for path, *_ in files:
        number = 0
        is_tar = path.lower().endswith(TAR_SUFFIXES)
        name = place_of(path if "://" in path else os.path.abspath(path), root)[1]
        empty = {FILE: name, SPLIT: None, RECORD: None, FAULT: None} | ({"image": None} if is_tar else {})
        records = read_tar(path) if is_tar else read_list(Path(path), root)
        try:
            for number, record in enumerate(records, 1):
                packed: dict[str, Any] = {**empty, NUMBER: number}
                if isinstance(record, BadRecord):
                    packed[FAULT] = str(record).encode(errors="backslashreplace").decode()
                else:
                    split = record.get(split_column)
                    packed[SPLIT] = None if split is None else str(split).encode(errors="replace").decode()
                    if is_tar:
                        packed["image"] = {"bytes": record.pop("image"), "path": None}
                    packed[RECORD] = json.dumps(record)
                yield packed
        except (KeyError, TypeError, AttributeError) as error:  # a published list was changed
            what = f"an entry has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} differs from the published list: {what}") from error
        if not number:
            yield {**empty, NUMBER: 1, FAULT: "the file has no records"}
