"""Turns the records of a list or a data set into rows of one image and one text."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.utils.file_utils import xopen

from ..labels import KEY_COLUMNS
from ..tasks import Task
from .faults import SHOWN, BadRecord, Faults, MissingFile, checked, place_of_record
from .grouping import draw_shots, join_references
from .images import (
    fault_of,
    faults_of,
    find_file,
    hint_about,
    image_in,
    is_image,
    is_remote,
    is_there,
    place_of,
    undecoded,
    with_images,
)
from .lists import column_names
from .tables import CODE, FILE, NUMBER, is_packed, unpack
from .texts import IS_NUMBER, as_text, named, one_text_of, texts_of


logger = logging.getLogger(__name__)

ROW_NUMBER = "number of the row"  # the key of an image if the data set has no names
READ_AHEAD = 100  # records of a list that are read to find its columns


def find_columns(
    records: Dataset | IterableDataset,
    task: Task,
    train: bool,
    known: dict[str, str],
    source: str,
    kept: Sequence[str] = (),
) -> dict[str, str]:
    """
    Finds the column for each role: `{"image": "file_name", "caption": "text"}`. The role of a
    column that is kept is `"kept <name>"`.

    Raises:
        ValueError: A column that the task needs is missing, or a column of `known` is.
    """
    if records.features is None:
        raise ValueError(f"{source} has unknown columns; name them by dataset.cast(datasets.Features(…))")
    fields = columns_of(records, source)
    features = dict(fields)
    for name, inner in fields.items():
        if isinstance(inner, dict):
            features |= {f"{name}.{key}": feature for key, feature in inner.items()}
    spelled = {name.strip().lower(): name for name in reversed(features)}
    columns = {}
    names = column_names(task)
    for role, usual in {**names, "key": (*KEY_COLUMNS, ROW_NUMBER)}.items():
        candidates = [spelled[name] for name in usual if name in spelled]
        if role == "image":
            candidates = [name for name in features if is_image(features[name])] + candidates
        if role == "image_number":  # "coco_522418" is not a number
            candidates = [name for name in candidates if features[name] is None or _is_integer(features[name])]
        if role in known:
            candidates = [known[role]]
            lacking = set(_parts(known[role])) - features.keys()
            if lacking:
                raise ValueError(f"{source} has no column '{min(lacking)}'; it has {_listed(features)}")
        if candidates:
            columns[role] = candidates[0]
    for role in ("image", *(task.columns if train else task.columns[:-1])):
        if role not in columns:
            raise ValueError(
                f"{source} has no column that is known as {role}: it has {_listed(features)}; known are "
                f"{', '.join(names[role])}. Name another by {role}_column"
            )
    for name in kept:
        if name not in features:
            raise ValueError(f"{source} has no column '{name}'; it has {_listed(features)}")
        columns[f"kept {name}"] = name
    return columns


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(name for name in columns if name != ROW_NUMBER)


def columns_of(records: Dataset | IterableDataset, source: str) -> dict[str, Any]:
    """The columns and their features. The cells of a list have no fixed type, so its features are `None`."""
    if not is_packed(records):
        return dict(records.features)
    columns: dict[str, Any] = {"image": Image(decode=False)} if "image" in records.features else {}
    faults = Faults(source, 0)
    for packed in islice(records, READ_AHEAD):
        faults.total += 1
        try:
            record = unpack(packed)
        except BadRecord as problem:
            faults.add(place_of_record(packed[FILE], packed[NUMBER], source), problem)
            continue
        for name, cell in record.items():
            inner = dict.fromkeys(cell) if isinstance(cell, dict) and name != "image" else None
            columns[name] = {**columns[name], **inner} if inner and columns.get(name) else columns.get(name) or inner
    if len(faults.lines) == faults.total:
        faults.report(skip=False)
    return columns


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and "int" in feature.dtype


def _parts(column: str) -> list[str]:
    """The columns in a pattern such as `"{folder}/{name}.jpg"`; otherwise the column itself."""
    return re.findall(r"\{(\w+)", column) if "{" in column else [column]


@dataclass
class RowMaker:
    """
    Turns a batch of records into rows. If a record is faulty, its row has the reason in the column `fault`.

    Args:
        source (`str`): Name of the records in messages.
        task ([`Task`]): The task of the rows.
        train (`bool`): Whether each text has a row. Otherwise one row has all texts as references.
        root (`str`): The folder that paths are relative to.
        skip (`bool`): Whether a stream leaves out faulty records with a warning, rather than raise a `ValueError`.
        check_images (`bool`): Whether a stream opens the images.
        columns (`dict`): The column for each role.
        features (`Features`): The features of the records.
        class_names (`dict`, *optional*): The names of classes in words.
        kept (`Sequence[str]`): Further columns of the rows, as texts.
        is_stream (`bool`): Whether the records are a stream, so that images and faults are handled at once.
        numbered (`bool`): Whether rows have the number of the image's record, `image_row`, in place of `image`.
    """

    source: str
    task: Task
    train: bool
    root: str
    skip: bool
    check_images: bool
    columns: dict[str, str]
    features: Features
    class_names: dict[str, str] | None = None
    kept: Sequence[str] = ()
    is_stream: bool = False
    numbered: bool = False
    code: str = CODE
    warnings: int = field(default=0, init=False)

    @property
    def row_features(self) -> Features:
        features = {"image_row": Value("int64")} if self.numbered else {"image": Image()}
        is_in_data_set = is_image(self.features.get(self.columns["image"]))
        if not is_in_data_set or "key" in self.columns:
            features["image_id"] = Value("string")
        if self.task.prompt is None:
            features["text"] = Value("string")
        learned = self.task.suffix_column
        known = learned in self.columns
        if self.train or (known and learned == "class"):
            features["suffix"] = Value("string")
        if self.train:
            features["weight"] = Value("float32")
        else:
            if known:
                features["references"] = List(Value("string"))
            if "question_id" in self.columns:
                features["question_id"] = Value("string")
            if not is_in_data_set or "image_number" in self.columns:
                features["image_number"] = Value("int64")
        if known_names := sorted(features.keys() & set(self.kept)):
            raise ValueError(f"kept_columns has '{known_names[0]}', which rows have with another content")
        features |= {name: Value("string") for name in self.kept}
        if not self.is_stream:
            features |= {"place": Value("string"), "fault": Value("string")}
        return Features(features)

    def needed(self) -> list[str]:
        """The columns of the records that are read."""
        if FILE in self.features:
            return list(self.features)
        names = {part for column in self.columns.values() for part in _parts(column)} | {"__url__"}
        names |= {name.partition(".")[0] for name in names if name not in self.features}
        return [name for name in self.features if name in names]

    def __call__(self, batch: dict[str, list], numbers: list[int] | None = None) -> dict[str, list]:
        rows: dict[str, list] = {name: [] for name in self.row_features}
        records = (dict(zip(batch, values)) for values in zip(*batch.values()))
        for number, record in zip(repeat(None) if numbers is None else numbers, records):
            try:
                made = self.rows_of(self.opened(record), number)
            except BadRecord as problem:
                made = self.faulty(record, number, problem)
            place = None if self.is_stream else self.place(record, number)
            for row in made:
                for name, values in rows.items():
                    values.append(place if name == "place" else row.get(name))
        return rows

    def place(self, record: dict[str, Any], number: int | None) -> str:
        own_number = record.get(NUMBER) or (None if number is None else number + 1)
        return place_of_record(record.get(FILE), own_number, self.source)

    def faulty(self, record: dict[str, Any], number: int | None, problem: BadRecord) -> list[dict[str, Any]]:
        """A row with the fault of a record. A stream has no such row: it skips the record or raises."""
        message = str(problem).encode(errors="backslashreplace").decode()
        if not self.is_stream:
            return [{"fault": message, "image_row": number}]
        where = self.place(record, number)
        if not self.skip:
            raise ValueError(f"{where}: {message}. Pass bad_rows='skip' to leave such rows out") from None
        self.warnings += 1
        if self.warnings <= SHOWN:
            logger.warning("%s: %s. This row is left out.", where, message)
        if self.warnings == SHOWN:
            logger.warning("%s: further rows are left out without a message.", self.source)
        return []

    def opened(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record, unpacked, with class names in place of class numbers."""
        if FILE in self.features:
            record = {**unpack(record), FILE: record[FILE], NUMBER: record[NUMBER]}
        else:
            record = {name: named(value, self.features.get(name)) for name, value in record.items()}
        if "split" in self.columns and not str(record.get(self.columns["split"]) or "").strip():
            raise BadRecord("the split is empty; other rows have one")
        return record

    def rows_of(self, record: dict[str, Any], number: int | None) -> list[dict[str, Any]]:
        common = {"image_row": number, "image_id": self.key(record)} if self.numbered else self.image(record)
        if self.task.prompt is None:
            asked = self.task.prompt_column
            common["text"] = one_text_of(self.value(record, asked), asked)
        common |= {name: one_text_of(self.value(record, f"kept {name}"), name) for name in self.kept}
        learned = self.task.suffix_column
        texts: Any = None  # a list of str; None where the data have no such column
        if learned == "class" and learned in self.columns:
            texts = [self.class_name(one_text_of(self.value(record, learned), learned))]
            common["suffix"] = texts[0]
        elif learned in self.columns:
            texts = texts_of(self.value(record, learned), learned)
        if not self.train:
            question_id = self.value(record, "question_id")
            numbers = {"question_id": None if question_id is None else as_text(question_id)}
            return [{**common, **numbers, "image_number": self.image_number(record), "references": texts}]
        weight = self.weight(record)
        if self.task.prompt is None:
            shares = Counter(texts)
            return [{**common, "suffix": text, "weight": weight * n / len(texts)} for text, n in shares.items()]
        return [{**common, "suffix": text, "weight": weight} for text in texts]

    def value(self, record: dict[str, Any], role: str) -> Any:
        column = self.columns.get(role)
        if column is None:
            return None
        if column in record:
            return record[column]
        if "{" in column:
            lacking = [part for part in _parts(column) if record.get(part) is None]
            if lacking:
                raise BadRecord(f"{lacking[0]} is empty; the name of the image is made from it")
            return column.format(**record)
        outer, _, inner = column.partition(".")
        fields = record.get(outer)
        return fields.get(inner) if isinstance(fields, dict) else None

    def weight(self, record: dict[str, Any]) -> float:
        weight = self.value(record, "weight")
        try:
            number = 1.0 if weight in (None, "") else float(weight)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < float("inf"):
            raise BadRecord(f"the weight is {weight!r}; accepted is a number of at least 0")
        return number

    def key(self, record: dict[str, Any]) -> str | None:
        """
        The name of an image inside a data set, as in `prismer label`: its key. For a sample of a tar, the name of the
        tar comes first. A row of a list without a key has the name of the list and its number.
        """
        key = self.value(record, "key")
        file = record.get(FILE)
        if key is None:
            return None if file is None else f"{file}/{record[NUMBER] - 1:012d}"
        tar = file if file is not None and "__key__" in record else None
        if "__url__" in record:
            tar = place_of(record["__url__"], self.root)[1]
        if tar is not None:
            return re.sub(r"\.(tgz|tar|tar\.\w+)$", "", tar, flags=re.IGNORECASE) + f"/{key}"
        return checked(as_text(key), "key")

    def image(self, record: dict[str, Any]) -> dict[str, Any]:
        cell = self.value(record, "image")
        image = image_in(cell)
        if isinstance(image, bytes):
            key = self.key(record)
            if self.is_stream and self.check_images:
                self.look_at(image, key)
            # no path: `datasets` would search it in the current folder
            return {"image": {"bytes": image, "path": None}, "image_id": key}
        path, name = place_of(checked(image, "name of the image"), self.root)
        if self.is_stream and self.check_images:
            if not is_there(path):
                path, name = place_of(find_file(path, self.root) or path, self.root)
            self.look_at(path, name)
        if self.is_stream and is_remote(path):  # the collator can only fetch http(s)
            with xopen(path, "rb") as file:
                return {"image": {"bytes": file.read(), "path": None}, "image_id": name}
        in_cache = isinstance(cell, dict) and (path == name)
        return {"image": {"bytes": None, "path": path}, "image_id": (in_cache and self.key(record)) or name}

    def look_at(self, image: bytes | str, name: str | None) -> None:
        problem = fault_of(image, name, streamed=True)
        if problem is not None:
            raise problem

    def image_number(self, record: dict[str, Any]) -> int | None:
        number = self.value(record, "image_number")
        text = "" if number is None else as_text(number)
        if not IS_NUMBER(text) and not self.numbered:
            named_by_coco = re.search(r"COCO_\w+_0*(\d+)\.", str(self.value(record, "image"))[-1000:])
            text = named_by_coco.group(1) if named_by_coco else ""
        return int(text) if IS_NUMBER(text) else None

    def class_name(self, name: str) -> str:
        if self.class_names is not None and name not in self.class_names:
            raise BadRecord(f"class '{name}' is not among the {len(self.class_names)} of class_names")
        return name if self.class_names is None else self.class_names[name]


def make_rows(
    records: Dataset,
    maker: RowMaker,
    shots: int | None = None,
    seed: int = 0,
    max_records: int | None = None,
) -> Dataset:
    """
    Turns a data set into rows, which are on disk as well.

    Raises:
        FileNotFoundError, ValueError: Rows cannot be used, and they are not to be left out.
    """
    if max_records is not None:
        records = records.select(range(min(max_records, len(records))))
    image, images = maker.columns["image"], None
    records = _with_undecoded_images(records, maker)
    if isinstance(maker.features.get(image), Image):
        first = records[0][image] if len(records) else None
        maker.numbered = first is None or first["bytes"] is not None
    if maker.numbered:  # bytes are not copied
        images = records.select_columns(image).cast_column(image, Image())
        images = images if image == "image" else images.rename_column(image, "image")
    records = records.select_columns([name for name in maker.needed() if not maker.numbered or name != image])
    rows = records.map(
        maker,
        batched=True,
        batch_size=_rows_at_once(records),
        with_indices=True,
        remove_columns=records.column_names,
        features=maker.row_features,
        desc=f"rows of {place_of_record(None, None, maker.source)}",
    )
    if maker.check_images and not maker.numbered:
        rows = _with_found_files(rows, maker.root)
    rows = _without_faults(rows, images, maker)
    if not len(rows):
        raise ValueError(f"{maker.source} has no rows that can be used")
    rows = _with_plain_numbers(rows)
    if shots:
        rows = draw_shots(rows, shots, seed)
    if not maker.train:
        rows = join_references(rows)
    if not maker.train and maker.task.prompt is None and "question_id" not in rows.column_names:
        rows = rows.add_column("question_id", np.arange(len(rows)))
    return rows if images is None else with_images(rows, images)


def _with_undecoded_images(records: Dataset | IterableDataset, maker: RowMaker) -> Dataset | IterableDataset:
    """The records with images as bytes or paths, whatever their feature. Updates the features of `maker`."""
    column = maker.columns["image"]
    feature = maker.features.get(column)
    is_struct = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    if is_struct or (isinstance(feature, Value) and "binary" in feature.dtype):
        feature = Image()
    if not is_image(feature):
        return records
    records = records.cast_column(column, undecoded(feature))
    maker.features = records.features
    return records


def _rows_at_once(records: Dataset) -> int:
    """The number of records in a batch of about 64 MB."""
    return int(np.clip(2**26 * len(records) // max(1, records.data.nbytes), 1, 1000))


def _with_found_files(rows: Dataset, root: str) -> Dataset:
    """Corrects file names that differ from those on disk in case or Unicode normalisation only."""
    renamed = {}
    paths = rows.select_columns("image").cast_column("image", Image(decode=False)).with_format("arrow")
    for batch in paths.iter(10_000):
        for path in pc.unique(pc.struct_field(batch.column("image").combine_chunks(), "path")).to_pylist():
            if path is not None and path not in renamed and not is_there(path):
                found = find_file(path, root)
                if found is not None:
                    renamed[path] = found
    if not renamed:
        return rows

    def rename(batch: dict[str, list]) -> dict[str, list]:
        places = [renamed.get(image["path"]) if image is not None else None for image in batch["image"]]
        images = [
            image if place is None else {"bytes": None, "path": place} for image, place in zip(batch["image"], places)
        ]
        names = [name if place is None else place_of(place, root)[1] for name, place in zip(batch["image_id"], places)]
        return {"image": images, "image_id": names}

    logger.warning("%d images are used that differ in case or Unicode normalisation from the given name", len(renamed))
    rows = rows.cast_column("image", Image(decode=False)).map(rename, batched=True, load_from_cache_file=False)
    return rows.cast_column("image", Image())


def _without_faults(rows: Dataset, images: Dataset | None, maker: RowMaker) -> Dataset:
    """Returns the rows that can be used and reports the others together."""
    total = len(rows)
    told = rows.select_columns("fault").with_format("arrow")[:]["fault"]
    problems: dict[int, BadRecord] = {
        row: BadRecord(told[row].as_py()) for row in np.flatnonzero(told.is_valid().to_numpy()).tolist()
    }
    if maker.check_images and len(problems) < total:
        usable = np.setdiff1d(np.arange(total), list(problems))
        if images is None:
            found = faults_of(rows.select(usable), rows.select_columns("image_id").select(usable)["image_id"])
            problems |= {int(usable[row]): problem for row, problem in found.items()}
        else:
            of_row = np.asarray(rows["image_row"][:])[usable]
            looked_at, first = np.unique(of_row, return_index=True)
            names = rows.select_columns("image_id").select(usable[first])["image_id"]
            found = faults_of(images.select(looked_at), names)
            found = {int(looked_at[number]): problem for number, problem in found.items()}
            problems |= {int(row): found[int(number)] for row, number in zip(usable, of_row) if int(number) in found}
    faults = Faults(maker.source, total)
    places = rows.select(sorted(problems)).select_columns("place")["place"][:]
    for place, row in zip(places, sorted(problems)):
        faults.add(place, problems[row])
    missing = [row for row, problem in problems.items() if isinstance(problem, MissingFile)]
    if missing:
        (name,) = rows.select([min(missing)]).select_columns("image_id")["image_id"]
        faults.hints += filter(None, [name and hint_about(name, maker.root)])
    faults.report(maker.skip)
    rows = rows.remove_columns(["place", "fault"])
    return rows.select(np.setdiff1d(np.arange(total), list(problems))) if problems else rows


def _with_plain_numbers(rows: Dataset) -> Dataset:
    """Removes `image_number` unless all rows have it, and makes `question_id` integers if all ids are numbers."""
    if "image_number" in rows.column_names and None in rows["image_number"][:]:
        rows = rows.remove_columns("image_number")
    if "question_id" in rows.column_names:
        texts = rows["question_id"][:]
        if None in texts:
            rows = rows.remove_columns("question_id")
        elif all(map(IS_NUMBER, texts)):
            rows = rows.cast_column("question_id", Value("int64"))
    return rows


def stream_rows(records: IterableDataset, maker: RowMaker) -> IterableDataset:
    """Turns a stream into rows while it is read."""
    records = _with_undecoded_images(records, maker)
    maker.is_stream = True
    records = records.select_columns(maker.needed())
    rows = records.map(maker, batched=True, batch_size=16, remove_columns=records.column_names)
    return rows.cast(maker.row_features)  # features= in map would leave images undecoded
