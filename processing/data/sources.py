"""Opens a source, which is a folder, a list, tars or a data set, and chooses its split."""

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
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..labels import KEY_COLUMNS, TAR_SUFFIXES
from ..tasks import Task
from .images import is_image, undecoded
from .lists import LIST_SUFFIXES, columns_in, fits, is_list
from .rows import ROW_NUMBER
from .tables import SPLIT, is_packed, open_packed


# split names of `datasets`
SPLITS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}

Tables = dict[str, Callable[[], Dataset | IterableDataset]]  # a function for each split that opens it


def open_tables(
    source: Any, task: Task, image_folder: str | Path | None, columns: dict[str, str], streaming: bool
) -> tuple[Tables, str]:
    """The splits of a source, read as late as possible, and the folder that image paths are relative to."""
    if isinstance(source, dict) and not all(isinstance(one, Dataset | IterableDataset) for one in source.values()):
        raise ValueError(
            f"the data are a dict with {', '.join(map(str, source))}; make a data set of it with Dataset.from_list"
        )
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
    if files and (suffix in LIST_SUFFIXES or source.lower().endswith(TAR_SUFFIXES)):
        return _packed(_by_split(files), root, columns, streaming, join=True), root
    if files and suffix == ".parquet":
        return _opened(load("parquet", _by_split(files), streaming)), root
    is_path = suffix in (*LIST_SUFFIXES, *TAR_SUFFIXES, ".parquet") or source.startswith((".", "/", "~"))
    if files or is_path or source.count("/") > 1:
        raise FileNotFoundError(
            f"{source} is not a readable file; accepted are a folder, lists ({', '.join(LIST_SUFFIXES)}), "
            "webdataset tars, Parquet files, and the name of a data set"
        )
    name, _, configuration = source.partition(":")
    try:
        splits = load(name, None, streaming, name=configuration or None)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"{source} is neither a file or folder, nor a data set: {error}") from error
    return _opened(splits), os.path.abspath(image_folder or ".")


def _open_folder(
    folder: str, task: Task, image_folder: str | Path | None, columns: dict[str, str], streaming: bool
) -> tuple[Tables, str]:
    root = os.path.abspath(image_folder or folder)
    files = sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith("."))
    names = {path.name for path in files}
    if "dataset_dict.json" in names or "state.json" in names:
        return _opened(datasets.load_from_disk(folder), streaming), root
    tars = [str(path) for path in files if path.name.lower().endswith(TAR_SUFFIXES)]
    if tars:
        return _packed(_by_split(tars), root, columns, streaming, join=True), root
    lists = [path for path in files if is_list(path)]
    fitting = [path for path in lists if fits(path, task, columns)]
    if fitting:
        by_split = _by_split(map(str, fitting))
        for split, paths in by_split.items():
            if len(paths) > 1:  # a list without texts, for testing, may be among them
                by_split[split] = [path for path in paths if fits(Path(path), task, columns, with_texts=True)] or paths
        return _packed(by_split, root, columns, streaming), root
    has_classes = "class" in task.columns
    if glob.has_magic(folder) and not (lists and not has_classes):
        raise ValueError(f"{folder} has * ? or [ in its name, which `datasets` reads as a pattern; rename it")
    if has_classes:
        options = {"data_dir": folder, "drop_labels": False, "drop_metadata": True}
        return _opened(load("imagefolder", None, streaming, **options)), root
    if lists and not names & {"dataset_infos.json", "dataset_info.json"}:
        there = "; ".join(f"{path.name} {_describe(path)}" for path in lists)
        needed = [role for role in ("image", *task.columns) if role != "answer"]
        remedy = ", ".join(f"{role}_column" for role in needed)
        raise ValueError(f"no list in {folder} has columns known as {', '.join(needed)}: {there}. Pass {remedy}")
    return _opened(load(folder, None, streaming)), root


def _describe(path: Path) -> str:
    try:
        return f"has {columns_in(path)}"
    except ValueError as error:
        return f"cannot be read: {error}"


def load(builder: str, files: dict[str, list[str]] | None, streaming: bool, **options: Any) -> dict:
    """`datasets.load_dataset` for all splits, with errors that name the file and the reason."""
    if files is not None:
        files = {split: [path if "://" in path else glob.escape(path) for path in files[split]] for split in files}
    try:
        return datasets.load_dataset(builder, data_files=files, streaming=streaming, **options)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        named = builder if files is None else ", ".join(path for paths in files.values() for path in paths[:3])
        raise ValueError(f"{named} cannot be read: {error.__cause__ or error}") from error


def _opened(splits: Any, streaming: bool = False) -> Tables:
    splits = splits if isinstance(splits, dict) else {"train": splits}
    if streaming:
        splits = {name: _stream(table) for name, table in splits.items()}
    return {str(name): partial(_itself, table) for name, table in splits.items()}


def _itself(table: Dataset | IterableDataset) -> Dataset | IterableDataset:
    return table


def _stream(table: Dataset | IterableDataset) -> IterableDataset:
    if isinstance(table, Dataset):
        return table.to_iterable_dataset(num_shards=max(1, min(64, len(table))))
    return table


def _packed(
    by_split: dict[str, list[str]], root: str, columns: dict[str, str], streaming: bool, join: bool = False
) -> Tables:
    def read(paths: list[str], streaming: bool) -> Dataset | IterableDataset:
        if len(paths) > 1 and not join:
            raise ValueError(f"several lists fit: {', '.join(paths)}; pass one of them")
        return open_packed(paths, root, streaming, columns.get("split"))

    if len(by_split) == 1:
        (paths,) = by_split.values()
        first, column = Path(paths[0]), columns.get("split", "split")
        if first.suffix.lower() in LIST_SUFFIXES and column in columns_in(first):
            streaming = False  # the splits are known only after reading everything
    return {split: partial(read, paths, streaming) for split, paths in by_split.items()}


def _by_split(files: Any) -> dict[str, list[str]]:
    """Files by the split in their names: {"train": ["a_train.csv"], "validation": ["a_val.csv"]}."""
    words = r"(?<![a-z])(training|train|validation|valid|val|test-dev|dev|testing|test)(?![a-z])"
    splits = defaultdict(list)
    for file in files:
        word = re.search(words, os.path.basename(file).lower())
        name = word.group(1) if word else "train"
        splits[SPLITS.get(name, name)].append(file)
    return dict(splits)


def choose_split(
    tables: Tables, split: str | None, train: bool, source: str, split_column: str | None, streaming: bool
) -> tuple[Dataset | IterableDataset, str | None]:
    """
    The records of a split such as `train+validation` or `train[:90%]`, and the column with the split, if there is one.
    """
    column = None
    if len(tables) == 1:
        ((name, open_table),) = tables.items()
        table = open_table()
        tables = {name: lambda: table}
        by_column = _by_column(table, split_column, source)
        if by_column is not None:
            tables, column = by_column, split_column or "split"
    if split is None and not train and isinstance(tables, _StreamSplits):
        raise ValueError(f"{source} is a stream with a column of splits; pass the split to evaluate on")
    if split is None:
        usual = [name for name in (("train",) if train else ("validation", "test")) if name in tables]
        if not usual and len(tables) > 1:
            raise ValueError(f"{source} has the splits {', '.join(tables)}; pass one as split")
        split = (usual or list(tables))[0]
    pieces = [part.strip().partition("[") for part in split.split("+")]
    parts = [(SPLITS.get(name, name), bracket + slice_) for name, bracket, slice_ in pieces]
    for name, _ in parts:
        if name not in tables:
            raise ValueError(
                f"{source} has no split '{name}'; accepted are {', '.join(tables)}, and parts such as 'train[90%:]'"
            )
    records = {name: tables[name]() for name, _ in parts}
    if any(isinstance(table, IterableDataset) for table in records.values()):
        if any(slice_ for _, slice_ in parts):
            raise ValueError(f"split is '{split}'; a stream has whole splits only: {', '.join(tables)}")
        return _joined([records[name] for name, _ in parts]), column
    start = 0
    for name, table in records.items():
        records[name] = _numbered(table, start)
        start += len(table)
    chosen = _joined([_slice(records[name], slice_) for name, slice_ in parts])
    return (_stream(chosen) if streaming else chosen), column


def _numbered(table: Dataset, start: int = 0) -> Dataset:
    """The table with a column of row numbers, the keys of images without names."""
    if is_packed(table) or {ROW_NUMBER, *KEY_COLUMNS} & set(table.column_names):
        return table
    numbers = np.arange(start, start + len(table)).astype(str)
    return table.add_column(ROW_NUMBER, np.char.zfill(numbers, 12))


def _by_column(table: Dataset | IterableDataset, split_column: str | None, source: str) -> Tables | None:
    """The splits in the column of splits, if it exists. A row without a split is in each, so that it is reported."""
    features = table.features or {}
    column = SPLIT if is_packed(table) else split_column or "split"
    feature = features.get(column)
    if split_column is not None and feature is None:
        raise ValueError(f"{source} has no column '{split_column}'; it has {', '.join(features)}")
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names is None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        return None
    if isinstance(table, IterableDataset):
        return None if is_packed(table) else _StreamSplits(table, column, names)
    table = _numbered(table)
    values = table.with_format(None).select_columns(column).with_format("arrow")[:][column].combine_chunks()
    given = [value for value in pc.unique(values).to_pylist() if value is not None]
    if not given:
        if split_column is not None:
            raise ValueError(f"{source} has no column '{split_column}', or the column is empty")
        return None
    by_split = defaultdict(list)
    for value in given:
        by_split[_split_name(value, names)].append(value)
    empty = by_split.pop("", [])

    def part(members: list) -> Dataset:
        chosen = pc.or_kleene(pc.is_null(values), pc.is_in(values, value_set=pa.array(members + empty, values.type)))
        return table.select(np.flatnonzero(chosen.to_numpy(zero_copy_only=False)))

    return {split: partial(part, by_split[split]) for split in sorted(by_split)}


def _split_name(value: Any, names: list[str] | None) -> str:
    text = str(names[value] if names is not None and isinstance(value, int) else value).strip()
    return SPLITS.get(text.lower(), text)


class _StreamSplits(dict):
    """The splits in a column of a stream. Their names are unknown until the whole stream has been read."""

    def __init__(self, table: IterableDataset, column: str, names: list[str] | None):
        super().__init__(train=None)
        for name, feature in table.features.items():
            if is_image(feature):  # a filter would decode them
                table = table.cast_column(name, undecoded(feature))
        self.table, self.column, self.names = table, column, names

    def __contains__(self, split: object) -> bool:
        return True

    def __getitem__(self, split: str) -> Callable[[], IterableDataset]:
        belongs = partial(_belong, split=split, names=self.names)
        return lambda: self.table.filter(belongs, batched=True, batch_size=16, input_columns=self.column)


def _belong(values: list, split: str, names: list[str] | None) -> list[bool]:
    return [value is None or _split_name(value, names) == split for value in values]


def _slice(table: Dataset, slice_: str) -> Dataset:
    """The part of a table that `[:90%]` names."""
    if not slice_:
        return table
    (part,) = datasets.ReadInstruction.from_spec(f"all{slice_}").to_absolute({"all": len(table)})
    return table.select(range(part.from_, part.to))


def _joined(tables: list) -> Dataset | IterableDataset:
    return datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
