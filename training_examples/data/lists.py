"""Lists of pictures and texts that a user wrote: CSV, TSV, JSON and JSON lines."""

import csv
import glob
import io
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value

from modeling_prismer.processing.labels import IMAGE_SUFFIXES

from .published_lists import published_reader
from .rows import COLUMN_NAMES, TASKS


LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


def read_list(path: Path, root: str, streaming: bool = False) -> tuple[Dataset | IterableDataset, dict[str, str]]:
    """The lines of a list, and its columns where they are known by its kind."""
    if path.suffix.lower() in (".csv", ".tsv"):
        options = _csv_options(path)
        # All columns are text: 007 stays 007, None and NA are words, and no later line is of another type.
        features = Features({name: Value("string") for name in options["names"]})
        options |= {"features": features, "keep_default_na": False}
        return load("csv", {"train": [str(path)]}, streaming, **options)["train"], {}
    field, first = _first_object(path)
    published = published_reader(field, first)
    if published is not None:
        return published[1](path, root, load_json)
    return load_json(path, None, streaming), {}


def load_json(path: Path, field: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    return load("json", {"train": [str(path)]}, streaming, field=field)["train"]


def load(builder: str, files: dict[str, list[str]] | None, streaming: bool, **options) -> dict:
    """`datasets.load_dataset`, all splits, whose errors name the file that cannot be read and why."""
    if files is not None:
        files = {split: [path if "://" in path else glob.escape(path) for path in files[split]] for split in files}
    try:
        return datasets.load_dataset(builder, data_files=files, streaming=streaming, **options)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        named = builder if files is None else ", ".join(path for paths in files.values() for path in paths[:3])
        raise ValueError(f"{named} cannot be read: {error.__cause__ or error}") from error


def fits(path: Path, task: str, columns: dict[str, str], with_texts: bool = False) -> bool:
    """Whether a list has the columns that a task needs, captions or answers (tests have none) if `with_texts`."""
    try:
        field, first = ("", {}) if path.suffix.lower() in (".csv", ".tsv") else _first_object(path)
        published = published_reader(field, first)
        if published is not None:
            return published[0] == task and (field != "annotations" or "answers" not in first)
        names = {name.strip().lower() for name in columns_in(path)} | set(columns_in(path))
    except ValueError:
        return False
    known = {role: {columns[role]} if role in columns else set(COLUMN_NAMES[role]) for role in COLUMN_NAMES}
    if "{" in columns.get("image", ""):
        known["image"] = names
    if task == "caption" and names & known["question"]:
        return False
    needed = TASKS[task] if with_texts or task == "classification" else TASKS[task][:-1]
    return all(names & known[role] for role in needed)


def columns_in(path: Path) -> list[str]:
    """The columns of a list's first line."""
    return _csv_options(path)["names"] if path.suffix.lower() in (".csv", ".tsv") else [*_first_object(path)[1]]


def _csv_options(path: Path) -> dict[str, Any]:
    """How to read a CSV or TSV file: the separator, and the names of the columns."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            start = "".join(islice(file, 100))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8: {error}; save it as UTF-8") from error
    first_line = start.partition("\n")[0]
    is_tsv = path.suffix.lower() == ".tsv"
    separator = "\t" if is_tsv else max(",;\t", key=first_line.count)
    quoting = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    lines = list(islice(csv.reader(io.StringIO(start, newline=""), delimiter=separator, quoting=quoting), 2))
    if not lines:
        raise ValueError(f"{path} is empty; a line with the columns' names is needed, such as image,caption")
    options = {"sep": separator, "quoting": quoting, "header": 0}
    names = [name.strip() or f"column {number}" for number, name in enumerate(lines[0], 1)]
    if len(lines) > 1 and len(lines[1]) > len(names):
        raise ValueError(
            f"{path}, line 2 has {len(lines[1])} fields, but there are {len(names)} columns: {', '.join(names)}. Put "
            f'texts that have a "{separator}" in them in double quotes'
        )
    are_files = [re.sub(r"^.*\.", ".", name).lower() in IMAGE_SUFFIXES for name in names]
    if len(names) == 2 and any(are_files):  # no header
        names, options["header"] = ["image" if is_file else "text" for is_file in are_files], None
    return {**options, "names": names}


def _first_object(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The field of a .json file that holds its records (`None` if it is they), and the first of them."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            start = file.read(1 << 20)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8: {error}; save it as UTF-8") from error
    field = None
    array = re.match(r"\s*\[\s*", start)
    if array is None and path.suffix.lower() == ".json":
        array = re.search(r'"(questions|images|annotations)"\s*:\s*\[\s*', start)
        field = array and array.group(1)
    try:
        record, _ = json.JSONDecoder().raw_decode(start, array.end() if array else len(start) - len(start.lstrip()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}; objects are needed, one a line or in a list") from error
    if not isinstance(record, dict):
        raise ValueError(f'{path} holds {str(record)[:50]!r}; objects are needed: {{"image": …, "caption": …}}')
    return field, record
