"""Converts labels between the published layout and a label store, in either direction."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...expert_spec import ExpertSpec
from .encoding import encode_labels
from .label_images import MAX_ERRORS, LabelReport
from .manifest import MANIFEST_FILE, make_manifest
from .published_layout import PublishedLayout, PublishedLayoutWriter
from .shards import LabelWriter
from .store import LabelStore


CHUNK = 256  # images that are read at a time


def convert_published_labels(
    source: str | Path,
    output: str | Path,
    experts: list[dict[str, Any]] | None = None,
    folders: Mapping[str, str] | None = None,
    *,
    keys: Iterable[str] | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> LabelReport:
    """
    Reads labels in the published layout into a label store, or writes a store in the published layout. The source
    decides: a folder with a `manifest.json` is a store. Maps are copied as they are, without encoding them again.

    Call it again to continue a store after an interruption. A file that is damaged is left out: the image has no label
    of that expert, and its row has the `error`.

    Args:
        source (`str` or `Path`): the folder of the published labels, or a store.
        output (`str` or `Path`): the store or the folder to write. It is created if it does not exist.
        experts (`list[dict]`, *optional*):
            The experts, as in `PrismerConfig.experts`, whose labels are read; by default the published experts that
            have a folder. A store knows its experts.
        folders (`dict[str, str]`, *optional*): folders by the expert's name; see [`read_published_layout`].
        keys (`Iterable[str]`, *optional*):
            The keys of the images in the store to write, with or without suffixes such as `.jpg`. By default every
            image that has a file of any expert, without suffix.
        num_workers (`int`, *optional*): threads that read files; by default one per core, at most 8.
        progress (`bool`, *optional*, defaults to `True`): show a bar.

    Returns:
        [`LabelReport`] with the numbers of images and of failed ones, the errors and the seconds.

    Raises:
        FileNotFoundError: if the source, or a folder of the `experts` in it, does not exist.
        ValueError: if `experts` or `keys` is given for a store, if a key of a store leads out of `output`, or if a
            store has an expert whose maps no PNG can hold.
        StoreInUseError: if another run writes into the store.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.labels import LabelStore, convert_published_labels, write_published_layout

    >>> edge = {"name": "edge", "kind": "dense", "channels": 1}
    >>> write_published_layout([("coco/1.jpg", {"edge": np.zeros((480, 640), np.uint8)})], "published", [edge])
    1
    >>> convert_published_labels("published", "my_labels", progress=False).images
    1
    >>> LabelStore("my_labels")["coco/1"]["edge"].shape
    (480, 640)
    >>> convert_published_labels("my_labels", "published_again", progress=False).images
    1
    ```
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source}; published labels or a label store is needed")
    start = time.perf_counter()
    if (source / MANIFEST_FILE).is_file():
        if experts is not None or keys is not None:
            raise ValueError(f"{source} is a label store, which has experts and keys; leave both out")
        report = _write_layout(LabelStore(source), output, folders, progress)
    else:
        layout = PublishedLayout(source, experts, folders)
        report = _read_layout(layout, layout.keys() if keys is None else keys, output, num_workers, progress)
    report.seconds = time.perf_counter() - start
    return report


def _read_layout(
    layout: PublishedLayout, keys: Iterable[str], output: Path, num_workers: int | None, progress: bool
) -> LabelReport:
    descriptions = [spec.to_dict() for spec in layout.specs]
    report = _empty_report()
    with LabelWriter(output, make_manifest(None, descriptions, {"source": "published layout"})) as writer:
        new_keys = (key for key in keys if key not in writer)
        rows = _rows(layout, new_keys, num_workers or min(8, os.cpu_count() or 1))
        for row in tqdm(rows, desc="labels", unit=" images", disable=not progress):
            writer.write_row(row)
            _count(report, row)
    report.bytes = writer.bytes_written
    return report


def _rows(layout: PublishedLayout, keys: Iterator[str], num_workers: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(num_workers) as pool:
        while chunk := list(islice(keys, CHUNK)):
            yield from pool.map(lambda key: _read_row(layout, key), chunk)


def _read_row(layout: PublishedLayout, key: str) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key, "error": None}
    errors = []
    for spec in layout.specs:
        row[spec.name] = None
        try:
            row[spec.name] = _encode(*layout.read(key, spec), spec)
        except (ValueError, OSError) as error:
            errors.append(f"{spec.name}: {error}")
    row["error"] = "; ".join(errors) or None
    return row


def _encode(label: Any, png: bytes | None, spec: ExpertSpec) -> Any:
    """The column of a label, as by [`encode_labels`], with its map as it was published."""
    if label is None or png is None:
        return encode_labels({spec.name: label}, [spec])[spec.name]
    stored = {"bytes": png, "path": None}
    if spec.is_dense:
        return stored
    return {**label, "ids": stored, **({"features": list(label["features"])} if "features" in label else {})}


def _write_layout(store: LabelStore, output: Path, folders: Mapping[str, str] | None, progress: bool) -> LabelReport:
    writer = PublishedLayoutWriter(output, store.descriptions, folders)
    report = _empty_report()
    for row in tqdm(store.encoded_rows(), "labels", len(store), unit=" images", disable=not progress):
        writer.write(row["key"], row)
        _count(report, row)
    return report


def _empty_report() -> LabelReport:
    return LabelReport(images=0, failed=0, seconds=0.0, bytes=0, expert_seconds={})


def _count(report: LabelReport, row: Mapping[str, Any]) -> None:
    report.images += 1
    if row["error"] is not None:
        report.failed += 1
        if len(report.errors) < MAX_ERRORS:
            report.errors[row["key"]] = row["error"]
