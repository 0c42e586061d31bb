"""Which kind of source a user means: a folder, a list, tars, or a data set; and which split of it."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from modeling_prismer.processing.labels import KEY_COLUMNS, TAR_SUFFIXES

from .lists import LIST_SUFFIXES, columns_in, fits, load, read_list
from .rows import ROW_NUMBER, TASKS


# the names of `datasets` for splits
SPLITS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}

# What opens each split: its records, and the columns that are known already, {"image": "file_name", …}.
Tables = dict[str, Callable[[], tuple[Dataset | IterableDataset, dict[str, str]]]]


def open_tables(
    source: Any, task: str, image_folder: str | Path | None, columns: dict[str, str], streaming: bool
) -> tuple[Tables, str]:
    """The splits of a source, as far as possible not yet read, and the folder that its pictures' paths start from."""
    if isinstance(source, Dataset | IterableDataset | dict):
        return _opened(source, streaming), os.path.abspath(image_folder or ".")
    source = os.fspath(source)
    if os.path.isdir(source):
        return _open_folder(source, task, image_folder, columns, streaming)
    if "://" in source or os.path.isfile(source):
        files, before_wildcard = [source], source
    else:
        files = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else []
        before_wildcard = re.split(r"[*?\[]", source)[0]
    root = os.path.abspath(image_folder or os.path.dirname(before_wildcard))
    suffix = Path(source).suffix.lower()
    if files and suffix in LIST_SUFFIXES:
        return _lists(_by_split(files), root, streaming, join=True), root
    if files and source.lower().endswith(TAR_SUFFIXES):
        return _opened(load("webdataset", _by_split(files), streaming)), root
    if files and suffix == ".parquet":
        return _opened(load("parquet", _by_split(files), streaming)), root
    is_path = suffix in (*LIST_SUFFIXES, *TAR_SUFFIXES, ".parquet") or source.startswith((".", "/", "~"))
    if files or is_path or source.count("/") > 1:
        raise FileNotFoundError(
            f"{source} is no file that can be read; accepted are a folder, lists ({', '.join(LIST_SUFFIXES)}), "
            "webdataset tars, Parquet files, and the name of a data set"
        )
    name, _, configuration = source.partition(":")
    try:
        splits = load(name, None, streaming, name=configuration or None)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"there is no file or folder {source}, and no such data set: {error}") from error
    return _opened(splits), os.path.abspath(image_folder or ".")


def _open_folder(
    folder: str, task: str, image_folder: str | Path | None, columns: dict[str, str], streaming: bool
) -> tuple[Tables, str]:
    root = os.path.abspath(image_folder or folder)
    files = sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith("."))
    names = {path.name for path in files}
    if "dataset_dict.json" in names or "state.json" in names:
        return _opened(datasets.load_from_disk(folder), streaming), root
    tars = [str(path) for path in files if path.name.lower().endswith(TAR_SUFFIXES)]
    if tars:
        return _opened(load("webdataset", _by_split(tars), streaming)), root
    lists = [path for path in files if path.suffix.lower() in LIST_SUFFIXES]
    fitting = [path for path in lists if fits(path, task, columns)]
    if fitting:
        by_split = _by_split(map(str, fitting))
        for split, paths in by_split.items():
            if len(paths) > 1:  # one of tests may be among them
                by_split[split] = [path for path in paths if fits(Path(path), task, columns, with_texts=True)] or paths
        return _lists(by_split, root, streaming), root
    if glob.has_magic(folder) and not (lists and task != "classification"):
        raise ValueError(f"{folder} has one of * ? [ in its name, which `datasets` takes for a pattern; rename it")
    if task == "classification":
        options = {"data_dir": folder, "drop_labels": False, "drop_metadata": True}
        return _opened(load("imagefolder", None, streaming, **options)), root
    if lists and not names & {"dataset_infos.json", "dataset_info.json"}:
        there = "; ".join(f"{path.name} has {columns_in(path)}" for path in lists)
        needed = ", ".join(role for role in TASKS[task] if role != "answer")
        raise ValueError(f"no list in {folder} has columns known as {needed}: {there}. Name them by {needed}_column")
    return _opened(load(folder, None, streaming)), root


def _opened(splits: Any, streaming: bool = False) -> Tables:
    splits = splits if isinstance(splits, dict) else {"train": splits}
    if streaming:
        splits = {name: _stream(table) for name, table in splits.items()}
    return {str(name): lambda table=table: (table, {}) for name, table in splits.items()}


def _stream(table: Dataset | IterableDataset) -> IterableDataset:
    return table.to_iterable_dataset(num_shards=min(64, len(table))) if isinstance(table, Dataset) else table


def _lists(by_split: dict[str, list[str]], root: str, streaming: bool, join: bool = False) -> Tables:
    def read(paths: list[str]):
        if len(paths) > 1 and not join:
            raise ValueError(f"several lists could be meant: {', '.join(paths)}; give one of them")
        tables = [read_list(Path(path), root, streaming) for path in paths]
        return _joined([_stream(table) if streaming else table for table, _ in tables]), tables[0][1]

    def read_part(path: Path, value: str):
        records, known = read_list(path, root)
        records = records.filter(lambda values: [v == value for v in values], batched=True, input_columns="split")
        return (_stream(records) if streaming else records), known

    files = [Path(path) for paths in by_split.values() for path in paths]
    if len(files) == 1 and "split" in columns_in(files[0]):
        values = read_list(files[0], root)[0].unique("split")
        return {SPLITS.get(value, value): partial(read_part, files[0], value) for value in sorted(values)}
    return {split: partial(read, paths) for split, paths in by_split.items()}


def _by_split(files: Any) -> dict[str, list[str]]:
    """Files by the split that their names say: {"train": ["a_train.csv"], "validation": ["a_val.csv"]}."""
    words = r"(?<![a-z])(training|train|validation|valid|val|test-dev|dev|testing|test)(?![a-z])"
    splits = defaultdict(list)
    for file in files:
        word = re.search(words, os.path.basename(file).lower())
        name = word.group(1) if word else "train"
        splits[SPLITS.get(name, name)].append(file)
    return dict(splits)


def choose_split(
    tables: Tables, split: str | None, train: bool, source: str
) -> tuple[Dataset | IterableDataset, dict[str, str]]:
    """The records of a split as `datasets` writes it, `train+validation` or `train[:90%]`, and their known columns."""
    if split is None:
        usual = [name for name in (("train",) if train else ("validation", "test")) if name in tables]
        if not usual and len(tables) > 1:
            raise ValueError(f"{source} has the splits {', '.join(tables)}; say which is meant")
        split = (usual or list(tables))[0]
    parts = [part.strip().partition("[") for part in split.split("+")]
    parts = [(SPLITS.get(name, name), bracket + slice_) for name, bracket, slice_ in parts]
    for name, _ in parts:
        if name not in tables:
            raise ValueError(
                f"{source} has no split '{name}'; there are {', '.join(tables)} ('train[90%:]' is a part)"
            )
    opened = {name: tables[name]() for name, _ in parts}
    known = next(iter(opened.values()))[1]
    records = {name: table for name, (table, _) in opened.items()}
    if any(isinstance(table, IterableDataset) for table in records.values()):
        if any(slice_ for _, slice_ in parts):
            raise ValueError(f"split is '{split}'; a stream has no parts, only whole splits: {', '.join(tables)}")
        return _joined([records[name] for name, _ in parts]), known
    start = 0
    for name, table in records.items():
        has_images = any(isinstance(feature, datasets.Image) for feature in table.features.values())
        if has_images and not set(table.column_names) & set(KEY_COLUMNS):  # pictures go by the number of their row
            numbers = np.arange(start, start + len(table)).astype(str)
            records[name] = table.add_column(ROW_NUMBER, np.char.zfill(numbers, 12))
            start += len(table)
    return _joined([_slice(records[name], slice_) for name, slice_ in parts]), known


def _slice(table: Dataset, slice_: str) -> Dataset:
    """What `[:90%]` means of a table."""
    if not slice_:
        return table
    (part,) = datasets.ReadInstruction.from_spec(f"all{slice_}").to_absolute({"all": len(table)})
    return table.select(range(part.from_, part.to))


def _joined(tables: list) -> Dataset | IterableDataset:
    return datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
