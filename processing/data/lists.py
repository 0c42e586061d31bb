"""
Reads lists of images and texts: CSV, TSV, JSON, JSON lines, and the text files of Flickr8k and Flickr30k.

Cells keep their text. Nothing is parsed as a number, a date or a missing value: 007 stays 007, 2.50 stays 2.50, and
None and NA are words. A line that cannot be read is a fault of its row.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..labels import IMAGE_SUFFIXES
from ..tasks import Task
from .faults import BadRecord, checked
from .published_lists import published_list


# Known column names by role. The first one present is used; a column of images has precedence. "json.caption" is the
# caption in the .json of a sample in a tar.
COLUMN_NAMES = {
    "image": (
        *("image", "images", "file_name", "filename", "path", "image_path", "file"),
        *("image_file", "image_name", "img", "img_path"),
    ),
    "caption": ("caption", "captions", "text", "description", "sentences", "comment", "txt", "json.caption"),
    "question": ("question", "json.question"),
    "answer": ("answer", "answers", "json.answer", "json.answers"),
    "class": ("label", "class", "class_name", "category", "cls", "json.label"),
    "weight": ("weight",),
    "question_id": ("question_id", "json.question_id"),
    "image_number": ("image_number", "cocoid", "img_id", "image_id"),
}

DELIMITED = (".csv", ".tsv", ".txt", ".token")
LIST_SUFFIXES = (*DELIMITED, ".jsonl", ".json")
# fields that can hold the records if a .json is an object, {"annotations": [{…}, …]}
RECORD_FIELDS = ("questions", "annotations", "images", "data")

Record = dict[str, Any] | BadRecord


def column_names(task: Task) -> dict[str, tuple[str, ...]]:
    """The known column names by role. The columns of your own task are known by their own names."""
    return {**{role: (role,) for role in task.columns}, **COLUMN_NAMES}


def is_list(path: Path) -> bool:
    """Whether a file in a folder can be a list. A text file needs a usual name; others are captions of one image."""
    if path.suffix.lower() in (".txt", ".token"):
        return re.search(r"(captions[^/]*|token)\.txt$|\.token$", path.name.lower()) is not None
    return path.suffix.lower() in LIST_SUFFIXES


def read_list(path: Path, root: str) -> Iterator[Record]:
    """
    The records of a list, in order. In place of a record that cannot be read, there is a [`BadRecord`].

    Raises:
        ValueError: The whole list cannot be read.
    """
    if path.suffix.lower() in DELIMITED:
        return _read_delimited(path)
    field, first = _peek(path)
    published = published_list(field, first)
    if published is not None:
        return published.read(path, root, load_json)
    if field == "":
        return _read_lines(path)
    return iter(_records_in(load_json(path), path))


def columns_in(path: Path) -> list[str]:
    """The columns of a list, from its first record."""
    return _Delimited(path).names if path.suffix.lower() in DELIMITED else [*_peek(path)[1]]


def fits(path: Path, task: Task, columns: dict[str, str], with_texts: bool = False) -> bool:
    """
    Whether a list has the columns that a task needs. Captions or answers are needed only `with_texts`, since lists for
    testing have none.
    """
    try:
        field, first = ("", {}) if path.suffix.lower() in DELIMITED else _peek(path)
        published = published_list(field, first)
        if published is not None:
            return published.columns == task.columns and (field != "annotations" or "answers" not in first)
        names = {name.strip().lower() for name in columns_in(path)} | set(columns_in(path))
    except ValueError:
        return False
    known = {role: {columns[role]} if role in columns else set(usual) for role, usual in column_names(task).items()}
    if "{" in columns.get("image", ""):
        known["image"] = names
    if "caption" in task.columns and names & known["question"]:
        return False
    needed = task.columns if with_texts or "class" in task.columns else task.columns[:-1]
    return all(names & known[role] for role in ("image", *needed))


def open_text(path: Path) -> io.TextIOWrapper:
    """Opens a text file in UTF-8, or UTF-16 if it has that mark. Invalid bytes become faults of their rows."""
    with open(path, "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if is_utf16:
        return open(path, encoding="utf-16", errors="backslashreplace", newline="")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


# ---- CSV and the like ----


class _Delimited:
    """The layout of a delimited file: its separator, its quoting, its columns, and whether it has a header."""

    def __init__(self, path: Path):
        csv.field_size_limit(1 << 30)  # a cell can be an image
        with open_text(path) as file:
            first_line = file.readline()
            file.seek(0)
            self.is_published = re.match(r"[^\t]+\.\w+#\d+\t", first_line) is not None  # Flickr's "a.jpg#0<tab>text"
            tabs = path.suffix.lower() == ".tsv" or self.is_published
            self.separator = "\t" if tabs else max(",;\t|", key=first_line.count)
            # spreadsheets quote texts; files separated by tabs or | do not
            self.quotes = path.suffix.lower() == ".csv" and self.separator != "|" or self.separator in ",;"
            try:
                names = next((cells for cells in self.reader(file) if cells), None)
            except csv.Error as error:
                raise ValueError(f"{path}, line 1 cannot be read: {error}") from error
        if names is None:
            raise ValueError(f"{path} is empty; its first line must name the columns, such as image,caption")
        try:
            checked("".join(names), "line of column names")
        except BadRecord as error:
            raise ValueError(f"{path}: {error}") from None
        self.names = [name.strip() or f"column {number}" for number, name in enumerate(names, 1)]
        are_files = [re.sub(r"^.*\.", ".", name).lower() in IMAGE_SUFFIXES for name in self.names]
        self.has_header = not (self.is_published or (len(names) == 2 and any(are_files)))
        if self.is_published:
            self.names = ["image", "text"]
        elif not self.has_header:
            self.names = ["image" if is_file else "text" for is_file in are_files]
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise ValueError(f"{path} has two columns called '{min(twice)}'; rename one of them")

    def reader(self, lines: Iterable[str]) -> Any:
        if self.quotes:
            return csv.reader(lines, delimiter=self.separator, strict=True)
        spaces = self.separator == "|"
        return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, skipinitialspace=spaces)


def _read_delimited(path: Path) -> Iterator[Record]:
    layout = _Delimited(path)
    with open_text(path) as file:
        reader = layout.reader(file)
        waits_for_header = layout.has_header
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = "a double quote is never closed" if "unexpected end" in str(error) else str(error)
                yield BadRecord(f"line {line} cannot be read: {why}; double a quote inside a quoted text")
                continue
            if not cells:
                continue
            if waits_for_header:
                waits_for_header = False
                continue
            while len(cells) > len(layout.names) and not cells[-1].strip():  # spreadsheets add empty cells
                cells.pop()
            if len(cells) != len(layout.names):
                yield BadRecord(_wrong_number_of_fields(line, cells, layout))
                continue
            record = dict(zip(layout.names, cells))
            if layout.is_published:
                record["image"] = re.sub(r"#\d+$", "", record["image"])
            yield record


def _wrong_number_of_fields(line: int, cells: list[str], layout: _Delimited) -> str:
    columns = f"there are {len(layout.names)} columns: {', '.join(layout.names)}"
    remedy = f'Put texts that contain "{layout.separator}" in double quotes'
    if not layout.quotes or len(cells) < len(layout.names):
        remedy = f"Columns are separated by {layout.separator!r}"
    return f"line {line} has {len(cells)} fields, but {columns}. {remedy}"


# ---- JSON ----


def load_json(path: Path) -> Any:
    """The content of a .json file. Numbers with a point or an exponent stay texts, so that 2.50 keeps its zero."""
    return _load_json(path, os.stat(path).st_mtime_ns)


@lru_cache(1)  # a file is inspected first and then read
def _load_json(path: Path, changed: int) -> Any:
    with open_text(path) as file:
        return parse_json(file.read(), str(path))


def forget_json() -> None:
    """Frees the memory of the last .json file."""
    _load_json.cache_clear()


def parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{source} cannot be read: {what}") from error


def _is_lines(path: Path) -> bool:
    """Whether a file has one object per line, whatever its suffix."""
    with open_text(path) as file:
        start = file.read(1 << 16).lstrip()
        if not start.startswith("{"):
            return False
        if path.suffix.lower() == ".jsonl":
            return True
        file.seek(0)
        first_line = next((line for line in file if line.strip()), "")
        try:
            json.loads(first_line)
            return next((True for line in file if line.strip()), False)  # a single object is the whole file
        except (ValueError, RecursionError):
            return False


def _read_lines(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = parse_json(line, f"line {number}")
                except ValueError as error:
                    record = BadRecord(error)
                yield record if isinstance(record, dict | BadRecord) else _no_object(record)


def _no_object(value: Any) -> BadRecord:
    return BadRecord(f'{str(value)[:50]!r} is not an object; accepted are objects: {{"image": …, "caption": …}}')


def _records_in(content: Any, path: Path) -> list[Record]:
    """The records of a .json: a list of objects, a field of an object, or any orientation of `pandas.to_json`."""
    if isinstance(content, dict):
        content = _records_in_object(content, path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} has no records; accepted are objects, one per line or in a list")
    return [record if isinstance(record, dict) else _no_object(record) for record in content]


def _records_in_object(content: dict[str, Any], path: Path) -> Any:
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):  # orient="split"
        names = content["columns"]
        rows = [row if isinstance(row, list) and len(row) == len(names) else None for row in content["data"]]
        return [dict(zip(names, row)) if row is not None else None for row in rows]
    lists = [value for value in content.values() if isinstance(value, list) and value]
    of_objects = [value for value in lists if isinstance(value[0], dict)]
    if len(of_objects) == 1:
        return of_objects[0]
    values = list(content.values())
    if values and all(isinstance(value, dict) for value in values):
        if not _are_columns(content):
            return values  # orient="index"
        keys = dict.fromkeys(key for column in values for key in column)  # orient="columns"
        return [{name: column.get(key) for name, column in content.items()} for key in keys]
    if len(lists) == len(values) and len({len(value) for value in lists}) == 1:  # a list for each column
        return [dict(zip(content, row)) for row in zip(*values)]
    if not of_objects and content:
        return [content]
    raise ValueError(f"{path} is an object with {', '.join(content) or 'nothing'}; accepted is a list of objects")


def _are_columns(content: dict[str, dict]) -> bool:
    """Whether the outer keys are the columns and the inner keys the rows, rather than the reverse."""
    usual = {name for names in COLUMN_NAMES.values() for name in names}
    inner = next(iter(content.values()))
    outer_known, inner_known = (len({str(name).lower() for name in names} & usual) for names in (content, inner))
    return outer_known > inner_known or (outer_known == inner_known and next(iter(inner), "") == "0")


def _peek(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The field that holds the records of a list, and the first record; see [`published_list`]."""
    if _is_lines(path):
        records = _read_lines(path)
        first = next(records)
        if isinstance(first, BadRecord):
            later = next((record for record in records if isinstance(record, dict)), None)
            if later is None:
                raise ValueError(f"{path} cannot be read: {first}; accepted are objects, one per line or in a list")
            first = later
        return "", first
    size = 1 << 20
    while True:
        with open_text(path) as file:
            start = file.read(size)
            at_end = not file.read(1)
        field, array = None, re.match(r"\s*\[\s*", start)
        if array is None:
            array = re.search(rf'"({"|".join(RECORD_FIELDS)})"\s*:\s*\[\s*(?={{)', start)
            field = array and array.group(1)
        try:
            if array is None:
                return None, _first_of(_records_in(load_json(path), path), path)
            record, _ = json.JSONDecoder(parse_float=str).raw_decode(start, array.end())
            return field, _first_of([record], path)
        except (json.JSONDecodeError, RecursionError) as error:
            if at_end or isinstance(error, RecursionError):
                message = f"{path} cannot be read: {error}; accepted are objects, one per line or in a list"
                raise ValueError(message) from error
            size *= 8  # a record can be long


def _first_of(records: list[Any], path: Path) -> dict[str, Any]:
    for record in records:
        if isinstance(record, dict):
            return record
    raise ValueError(f'{path} holds {str(records[0])[:50]!r}; accepted are objects: {{"image": …, "caption": …}}')
