"""Rows of one picture and one text, made of the records of a list or a data set."""

import hashlib
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path, PurePath
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value

from modeling_prismer.processing.labels import KEY_COLUMNS

from .grouping import draw_shots, join_references
from .pictures import describe_missing, has_header, is_there, pictures_there, place_of, with_pictures


logger = logging.getLogger(__name__)

# What columns are called; the first that there is counts, and a column of images before all. "json.caption" is the
# caption in the .json of a tar's sample.
COLUMN_NAMES = {
    "image": ("image", "file_name", "filename", "path", "image_path", "file"),
    "caption": ("caption", "captions", "text", "description", "sentences", "txt", "json.caption"),
    "question": ("question", "json.question"),
    "answer": ("answer", "answers", "json.answer", "json.answers"),
    "class": ("label", "class", "class_name", "category", "cls", "json.label"),
    "weight": ("weight",),
    "question_id": ("question_id", "json.question_id"),
    "image_number": ("image_number", "cocoid", "img_id", "image_id"),
}
# the columns that each task needs; the last of them is learned, and may be missing from what is evaluated
TASKS = {"caption": ("image", "caption"), "vqa": ("image", "question", "answer"), "classification": ("image", "class")}
ROW_NUMBER = "number of the row"  # the column that stands in where a data set does not name its pictures
# `datasets` keeps the rows that were made by the same code: changed code must differ in what it looks at.
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def find_columns(
    records: Dataset | IterableDataset, task: str, train: bool, known: dict[str, str], source: str
) -> dict[str, str]:
    """
    Which column holds what: `{"image": "file_name", "caption": "text"}`.

    Raises:
        ValueError: if one that the task needs is missing, or one that is `known`.
    """
    if records.features is None:
        raise ValueError(f"{source} does not know its columns; cast it: dataset.cast(datasets.Features(…))")
    features = dict(records.features)
    for name, fields in records.features.items():
        if isinstance(fields, dict):
            features |= {f"{name}.{inner}": feature for inner, feature in fields.items()}
    spelled = {name.strip().lower(): name for name in reversed(features)}
    columns = {}
    for role, usual in {**COLUMN_NAMES, "key": (*KEY_COLUMNS, ROW_NUMBER)}.items():
        candidates = [spelled[name] for name in usual if name in spelled]
        if role == "image":
            candidates = [name for name in features if isinstance(features[name], datasets.Image)] + candidates
        if role == "image_number":  # "coco_522418" is none
            candidates = [name for name in candidates if _is_integer(features[name])]
        if role in known:
            candidates = [known[role]]
            lacking = set(_parts(known[role])) - features.keys()
            if lacking:
                raise ValueError(f"{source} has no column '{min(lacking)}'; it has {', '.join(features)}")
        if candidates:
            columns[role] = candidates[0]
    for role in TASKS[task] if train else TASKS[task][:-1]:
        if role not in columns:
            raise ValueError(
                f"{source} has no column that is known as {role}: it has {', '.join(features)}; known are "
                f"{', '.join(COLUMN_NAMES[role])}. Name another by {role}_column"
            )
    return columns


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and "int" in feature.dtype


def _parts(column: str) -> list[str]:
    """The columns that a path is put together from, `"{folder}/{name}.jpg"`; else the column itself."""
    return re.findall(r"\{(\w+)", column) if "{" in column else [column]


class BadRecord(Exception):
    """What is wrong with a record."""


@dataclass
class RowMaker:
    """
    Makes rows of a batch of records.

    Args:
        source (`str`): What messages call the records.
        task (`str`): `"caption"`, `"vqa"` or `"classification"`.
        train (`bool`): One row for each text, or one with all of them as references.
        root (`str`): The folder that paths start from.
        skip (`bool`): Leave bad records out, with a warning, rather than raise a `ValueError`.
        check_pictures (`bool`): Whether the files of pictures must be there.
        columns (`dict`): Which column holds what.
        features (`Features`): Of the records.
        class_names (`dict`, *optional*): What classes are called in words.
        is_stream (`bool`): Whether pictures are to be looked at here and now.
        numbered (`bool`): Whether to give the number of a picture's record as `picture`, and no `image`.
    """

    source: str
    task: str
    train: bool
    root: str
    skip: bool
    check_pictures: bool
    columns: dict[str, str]
    features: Features
    class_names: dict[str, str] | None = None
    is_stream: bool = False
    numbered: bool = False
    code: str = CODE
    warned: bool = field(default=False, init=False)

    @property
    def row_features(self) -> Features:
        is_image = isinstance(self.features.get(self.columns["image"]), datasets.Image)
        features = {"picture": Value("int64")} if self.numbered else {"image": datasets.Image()}
        if not is_image or "key" in self.columns:
            features["image_id"] = Value("string")
        if self.task == "vqa":
            features["text"] = Value("string")
        known = TASKS[self.task][-1] in self.columns
        if self.train or (known and self.task == "classification"):
            features["suffix"] = Value("string")
        if self.train:
            features["weight"] = Value("float32")
            return Features(features)
        if known:
            features["references"] = List(Value("string"))
        if "question_id" in self.columns:
            number = _is_integer(self.features.get(self.columns["question_id"]))
            features["question_id"] = Value("int64" if number else "string")
        if not is_image or "image_number" in self.columns:
            features["image_number"] = Value("int64")
        return Features(features)

    def needed(self) -> list[str]:
        """The columns of the records that are read."""
        names = {part for column in self.columns.values() for part in _parts(column)} | {"__url__"}
        names |= {name.partition(".")[0] for name in names if name not in self.features}
        return [name for name in self.features if name in names]

    def __call__(self, batch: dict[str, list], numbers: list[int] | None = None) -> dict[str, list]:
        rows = {name: [] for name in self.row_features}
        records = (dict(zip(batch, values)) for values in zip(*batch.values()))
        for number, record in zip(repeat(None) if numbers is None else numbers, records):
            try:
                made = self.rows_of(record, number)
            except BadRecord as problem:
                where = self.source if number is None else f"{self.source}, row {number + 1}"
                if not self.skip:
                    raise ValueError(f"{where}: {problem}. bad_rows='skip' leaves such rows out") from None
                if not self.warned:
                    logger.warning("%s: %s. Such rows are left out; this is said once.", where, problem)
                    self.warned = True
                continue
            for row in made:
                for name, values in rows.items():
                    values.append(row.get(name))
        return rows

    def rows_of(self, record: dict[str, Any], number: int | None) -> list[dict[str, Any]]:
        common = {"picture": number, "image_id": self.key(record)} if self.numbered else self.picture(record)
        if self.task == "vqa":
            common["text"] = texts_of(self.value(record, "question"), "question")[0]
        learned = TASKS[self.task][-1]
        texts = texts_of(self.value(record, learned), learned) if learned in self.columns else None
        if self.task == "classification" and texts:
            texts = [self.class_name(record)]
            common["suffix"] = texts[0]
        if not self.train:
            numbers = {"question_id": self.value(record, "question_id"), "image_number": self.image_number(record)}
            return [{**common, **numbers, "references": texts}]
        weight = self.value(record, "weight")
        weight = 1.0 if weight is None else float(weight)
        if self.task == "vqa":
            shares = Counter(texts)
            return [{**common, "suffix": text, "weight": weight * n / len(texts)} for text, n in shares.items()]
        return [{**common, "suffix": text, "weight": weight} for text in texts]

    def value(self, record: dict[str, Any], role: str) -> Any:
        column = self.columns.get(role)
        if column is None or column in record:
            return record.get(column)
        if "{" in column:
            return column.format(**record)
        outer, _, inner = column.partition(".")
        return (record[outer] or {}).get(inner)

    def key(self, record: dict[str, Any]) -> str | None:
        """The name of a data set's picture, as `prismer label` has it; of a tar's with the tar before it."""
        key = self.value(record, "key")
        if key is not None and "__url__" in record:
            tar = place_of(record["__url__"], self.root)[1]
            return re.sub(r"\.(tgz|tar|tar\.\w+)$", "", tar, flags=re.IGNORECASE) + f"/{key}"
        return None if key is None else str(key)

    def picture(self, record: dict[str, Any]) -> dict[str, Any]:
        image = self.value(record, "image")
        is_image = isinstance(image, dict)
        if is_image and image["bytes"] is not None:
            if not has_header(image["bytes"]):
                raise BadRecord(f"picture {self.key(record)} cannot be read")
            # without its path, which `datasets` would look for in the current folder
            return {"image": {"bytes": image["bytes"], "path": None}, "image_id": self.key(record)}
        path = image["path"] if is_image else image
        if not path or not path.strip():
            raise BadRecord("the name of the picture is empty")
        path, name = place_of(path.strip(), self.root)
        if self.is_stream and self.check_pictures and not is_there(path):
            raise BadRecord(f"picture {path} is missing or empty")
        in_cache = is_image and (os.path.isabs(name) or "://" in name)
        return {"image": path, "image_id": (in_cache and self.key(record)) or name}

    def image_number(self, record: dict[str, Any]) -> int | None:
        number = self.value(record, "image_number")
        if number is None and not self.numbered:
            name = re.search(r"COCO_\w+_(\d{12})\.", str(self.value(record, "image")))
            number = name and name.group(1)
        return None if number is None else int(number)

    def class_name(self, record: dict[str, Any]) -> str:
        name, feature = self.value(record, "class"), self.features.get(self.columns["class"])
        name = feature.int2str(name) if isinstance(feature, datasets.ClassLabel) else str(name)
        if self.class_names is not None and name not in self.class_names:
            raise BadRecord(f"class '{name}' is not among the {len(self.class_names)} of class_names")
        return name if self.class_names is None else self.class_names[name]


def texts_of(value: Any, role: str) -> list[str]:
    """The texts in "a cat", ["a cat", "a pet"], [{"raw": "a cat"}] (Karpathy) or [{"answer": "yes"}] (VQAv2)."""
    if isinstance(value, dict):
        value = value.get("answer", value.get("raw"))
    texts = value if isinstance(value, list) else [value]
    texts = [text.get("answer", text.get("raw")) if isinstance(text, dict) else text for text in texts]
    if not texts or any(text is None or not str(text).strip() for text in texts):
        raise BadRecord(f"the {role} is empty" if len(texts) < 2 else f"one of the {len(texts)} {role}s is empty")
    return [str(text) for text in texts]


def make_rows(
    records: Dataset,
    maker: RowMaker,
    shots: int | None = None,
    seed: int = 0,
    max_records: int | None = None,
) -> Dataset:
    """The rows of a data set, which lie in a file as it does."""
    if max_records is not None:
        records = records.select(range(min(max_records, len(records))))
    image, pictures = maker.columns["image"], None
    if isinstance(maker.features.get(image), datasets.Image):
        records = records.cast_column(image, datasets.Image(decode=False))
        first = records[0][image] if len(records) else None
        maker.numbered = first is None or first["bytes"] is not None
    if maker.numbered:  # bytes are not copied
        pictures = records.select_columns(image).cast_column(image, datasets.Image())
        pictures = pictures if image == "image" else pictures.rename_column(image, "image")
    records = records.select_columns([name for name in maker.needed() if not maker.numbered or name != image])
    options = {"remove_columns": records.column_names, "features": maker.row_features}
    rows = records.map(
        maker, batched=True, with_indices=True, desc=f"rows of {PurePath(maker.source).name}", **options
    )

    there = np.ones(len(rows), bool)
    if maker.numbered:
        there = pictures_there(pictures, "image")[rows["picture"][:]]
    elif maker.check_pictures:
        there = pictures_there(rows, "image")
    if not there.all():
        missing = np.flatnonzero(~there)
        names = rows.select(missing[:3])["image_id"][:]
        message = describe_missing(names, len(missing), len(rows), maker.source, maker.root)
        if not maker.skip:
            raise FileNotFoundError(f"{message}. bad_rows='skip' leaves such rows out")
        logger.warning("%s. They are left out.", message)
        rows = rows.select(np.flatnonzero(there))
    if not len(rows):
        raise ValueError(f"{maker.source} has no rows that can be used")

    unknown = [name for name in ("question_id", "image_number") if name in rows.column_names]
    rows = rows.remove_columns([name for name in unknown if rows.data.column(name).null_count == len(rows.data)])
    if shots:
        rows = draw_shots(rows, shots, seed)
    if not maker.train:
        rows = join_references(rows)
    if not maker.train and maker.task == "vqa" and "question_id" not in rows.column_names:
        rows = rows.add_column("question_id", np.arange(len(rows)))
    return rows if pictures is None else with_pictures(rows, pictures)


def stream_rows(records: IterableDataset, maker: RowMaker) -> IterableDataset:
    """The rows of a stream, made while it is read."""
    if isinstance(maker.features.get(maker.columns["image"]), datasets.Image):
        records = records.cast_column(maker.columns["image"], datasets.Image(decode=False))
    maker.is_stream = True
    records = records.select_columns(maker.needed())
    rows = records.map(maker, batched=True, batch_size=16, remove_columns=records.column_names)
    return rows.cast(maker.row_features)  # not features= in map, which leaves images undecoded
