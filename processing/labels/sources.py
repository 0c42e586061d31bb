"""Sources of images: folders, files, data sets and tars. An image has the same key in every run."""

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import numpy as np

from ..many_images.key_index import KeyIndex, as_text
from ..many_images.sources import (
    IMAGE_SUFFIXES,
    TAR_SUFFIXES,
    ImageSource,
    ListedImages,
    path_as_key,
    walk_files,
)
from .manifest import MANIFEST_FILE
from .shards import README_FILE, is_shard_name
from .tars import read_tar


KEY_COLUMNS = ("key", "id", "image_id", "file_name", "__key__")
"""Columns that hold the keys of a data set if `key_column` is not given; the first one that exists is used."""

ACCEPTED_SOURCES = (
    "accepted are a folder of images, of webdataset tars or of a data set that was saved, a file or a glob of them, a "
    "list of files, a dict from keys to images, and a data set of `datasets`"
)


class DatasetImages(ListedImages):
    """
    The images of a `datasets.Dataset`, one for each key.

    Args:
        dataset (`datasets.Dataset`): with a column of images, or of paths to them.
        image_column (`str`, *optional*): by default the first column of images.
        key_column (`str`, *optional*):
            The column with the keys, strings or numbers. By default the first of `key`, `id`, `image_id`, `file_name`
            and `__key__` that exists. If none exists, the keys are the numbers of the rows in 12 digits.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from modeling_prismer.processing.labels import DatasetImages

    >>> rows = Dataset.from_dict({"id": [7], "photo": ["modeling_prismer/assets/shape.png"]})
    >>> list(DatasetImages(rows, image_column="photo"))
    [('7', 'modeling_prismer/assets/shape.png')]
    ```
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str | None = None, key_column: str | None = None):
        image_column = _image_column(dataset, image_column)
        key_column = _key_column(dataset, key_column)
        if key_column is None:
            keys = [f"{row:012d}" for row in range(len(dataset))]
        else:
            values = dataset.with_format(None).select_columns(key_column)[:][key_column]
            if empty := [row for row, value in enumerate(values) if value is None]:
                raise ValueError(
                    f"the column '{key_column}' names no image in row {empty[0]} ({len(empty)} of {len(values)} "
                    "rows); give another key_column"
                )
            keys = [as_text(str(value)) for value in values]
        super().__init__(keys, _undecoded(dataset, image_column))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for key, row in zip(self.keys, self.images):
            (image,) = row.values()
            yield key, image

    def _select(self, rows: np.ndarray) -> "DatasetImages":
        selected = object.__new__(DatasetImages)
        ListedImages.__init__(selected, [self.keys[row] for row in rows], self.images.select(rows))
        return selected


class StreamedImages(ImageSource):
    """
    Images of files that are read from beginning to end.

    If a file cannot be read to its end, the rest is left out. The name of the file is then yielded as a key, with the
    error.

    Args:
        files (`Sequence[tuple[str, Callable]]`):
            The name of each file, and a function without arguments that opens it as a `datasets.IterableDataset`.
        image_column (`str`, *optional*): by default the first column of images.
        key_column (`str`, *optional*):
            The column with the keys. By default the first of `key`, `id`, `image_id`, `file_name` and `__key__` that
            exists.
        files_in_keys (`bool`, *optional*, defaults to `False`):
            Put the name of the file without its suffix and a `/` before each key.

    Example:

    ```python
    >>> from datasets import Features, IterableDataset, Value
    >>> from modeling_prismer.processing.labels import StreamedImages

    >>> def open_file():
    ...     rows = [{"id": "triangle", "image": "modeling_prismer/assets/shape.png"}]
    ...     features = Features({"id": Value("string"), "image": Value("string")})
    ...     return IterableDataset.from_generator(lambda: iter(rows), features=features)

    >>> list(StreamedImages([("shapes", open_file)], image_column="image", files_in_keys=True))
    [('shapes/triangle', 'modeling_prismer/assets/shape.png')]
    ```
    """

    def __init__(
        self,
        files: Sequence[tuple[str, Any]],
        image_column: str | None = None,
        key_column: str | None = None,
        files_in_keys: bool = False,
    ):
        self.files = list(files)
        self.image_column = image_column
        self.key_column = key_column
        self.files_in_keys = files_in_keys
        self._every: tuple[int, int] = (0, 1)
        self._done: KeyIndex | None = None
        self._files_read = 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        process, num_processes = self._every
        position = -1
        for number, (name, file) in enumerate(self.files):
            self._files_read = number
            for key, image in self._read(name, file):
                position += 1
                if position % num_processes == process and (self._done is None or self._done.find([key])[0] < 0):
                    yield key, image
        self._files_read = len(self.files)

    def _read(self, name: str, file: Any) -> Iterator[tuple[str, Any]]:
        try:
            dataset: datasets.IterableDataset = file()
        except Exception as error:  # each reader raises its own errors
            yield name, OSError(f"{name} cannot be read: {error}")
            return
        image_column, key_column = _image_column(dataset, self.image_column), _key_column(dataset, self.key_column)
        if key_column is None:
            raise ValueError(f"no column of {name} names the images; give key_column, one of {_columns(dataset)}")
        seen: set[str] = set()
        try:
            for number, row in enumerate(_undecoded(dataset, image_column, key_column)):
                if row[key_column] is None:
                    yield f"{name}, row {number}", ValueError(f"the column '{key_column}' names no image in this row")
                    continue
                key = self._key(name, row[key_column])
                if key not in seen:
                    seen.add(key)
                    yield key, row[image_column]
        except Exception as error:
            yield name, OSError(f"{name} cannot be read to its end: {error}")

    def _key(self, name: str, image: Any) -> str:
        return as_text(f"{_without_suffix(name)}/{image}" if self.files_in_keys else str(image))

    def share(self, process: int, num_processes: int) -> "StreamedImages":
        if len(self.files) >= num_processes:
            return self._with(files=self.files[process::num_processes])
        return self._with(_every=(process, num_processes))

    def without(self, done: KeyIndex) -> "StreamedImages":
        return self._with(_done=done) if len(done) else self

    def parts(self, images: int) -> list[ImageSource]:
        if self._every != (0, 1):  # shares are counted over all files
            return [self]
        return [self._with(files=[file]) for file in self.files]

    def progress(self) -> tuple[int, int]:
        return self._files_read, len(self.files)

    def _with(self, **changes: Any) -> "StreamedImages":
        changed = object.__new__(type(self))
        vars(changed).update({**vars(self), **changes})
        return changed


class TarImages(StreamedImages):
    """
    The images of webdataset tars, under the keys `<name of the tar without suffix>/<name of the sample>`.

    A damaged sample has an error and does not affect the others. Only images are read; the other files of a sample may
    be damaged, missing, or in any order. If a tar is damaged, its name is yielded as a key too, with the error.

    Args:
        files (`Sequence[tuple[str, str]]`): the name of each tar, and its path or URL.
        image_type (`str`, *optional*):
            The type of the images, such as `jpg` or `seg.png`. By default the first image of each sample counts, and
            `SAMPLE.MORE.png` belongs to the sample `SAMPLE`. If `SAMPLE` has no other image, it is a sample of its
            own, `SAMPLE.MORE`.

    Example:

    ```python
    >>> import tarfile
    >>> from modeling_prismer.processing.labels import TarImages

    >>> with tarfile.open("a.tar", "w") as tar:
    ...     tar.add("modeling_prismer/assets/shape.png", "triangle.png")

    >>> [key for key, image in TarImages([("a.tar", "a.tar")])]
    ['a/triangle']
    ```
    """

    def __init__(self, files: Sequence[tuple[str, str]], image_type: str | None = None):
        super().__init__(files, image_type, files_in_keys=True)

    def _read(self, name: str, file: str) -> Iterator[tuple[str, Any]]:
        try:
            for sample, image in read_tar(file, self.image_column):
                yield self._key(name, sample), image
        except Exception as error:
            yield as_text(name), OSError(f"{name} cannot be read to its end: {error}")


# ---- sources given by a user ----


def open_source(
    source: Any, image_column: str | None = None, key_column: str | None = None, root: str | Path | None = None
) -> ImageSource:
    """
    Opens a source of images.

    Args:
        source:
            - a folder of images, at any depth. The keys are paths relative to it, with `/`. The files of label stores
              are left out;
            - a folder that `datasets` saved (`save_to_disk`), or a folder of Parquet files;
            - a file or a glob (`"photos/**/*.jpg"`): images, webdataset tars, or Parquet files. The keys are relative
              to the part before the first wildcard. Tars and Parquet files may be URLs that `datasets` reads;
            - a list of such files. The keys are the paths as given;
            - a dict from keys to anything that [`load_image`] takes;
            - a `datasets.Dataset` or `datasets.IterableDataset`;
            - an [`ImageSource`].
        image_column (`str`, *optional*): the column of images in a data set, see [`DatasetImages`], or the type of
            images in tars, see [`TarImages`].
        key_column (`str`, *optional*): the column of keys in a data set; see [`DatasetImages`]. An image of a tar has
            the key `<path of the tar without suffix>/<__key__>`.
        root (`str` or `Path`, *optional*): make keys relative to this folder.

    Returns:
        [`ImageSource`]

    Raises:
        FileNotFoundError: if the file does not exist, or the folder has no images.
        ValueError: if the source is empty, mixes kinds of files, or lacks a column.
        TypeError: if the source is of another type.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import open_source

    >>> source = open_source("modeling_prismer/assets")
    >>> [key for key, image in source]
    ['scene.png', 'shape.png']
    ```
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, datasets.Dataset):
        return DatasetImages(source, image_column, key_column)
    if isinstance(source, datasets.IterableDataset):
        parts = [(f"part {number} of the data set", _OpenShard(source, number)) for number in range(source.num_shards)]
        return _open_stream(parts, image_column, key_column)
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(
            f"the data set has the splits {', '.join(source)}; give one of them: dataset['{[*source][0]}']"
        )
    if isinstance(source, Mapping):
        return ListedImages([as_text(str(key)) for key in source], list(source.values()))
    if isinstance(source, list | tuple) and all(isinstance(path, str | os.PathLike) for path in source):
        return _open_files([os.fspath(path) for path in source], root, image_column, key_column)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is a {type(source).__name__}; {ACCEPTED_SOURCES}")

    source = os.fspath(source)
    if os.path.isdir(source):
        return _open_folder(Path(source), root, image_column, key_column)
    if os.path.exists(source) or "://" in source:
        return _open_files([source], root or os.path.dirname(source), image_column, key_column)
    if glob.has_magic(source):
        before = source[: next(place for place, letter in enumerate(source) if letter in "*?[")]
        matches = glob.glob(source, recursive=True)
        files = sorted(path for path in matches if os.path.isfile(path) and not _is_of_a_store(path))
        return _open_files(files, root or os.path.dirname(before), image_column, key_column, f"'{source}' matches")
    raise FileNotFoundError(
        f"there is no file or folder '{source}'; {ACCEPTED_SOURCES}. A data set of the Hub: "
        "datasets.load_dataset(…) first"
    )


def _open_folder(
    folder: Path, root: str | Path | None, image_column: str | None, key_column: str | None
) -> ImageSource:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return open_source(datasets.load_from_disk(str(folder)), image_column, key_column)
    images, tables, tars = [], [], []
    for path in walk_files(folder):
        if _is_of_a_store(path):
            continue
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif suffix == ".parquet":
            tables.append(path)
        elif path.lower().endswith(TAR_SUFFIXES):
            tars.append(path)
    kinds = {"images": images, "Parquet files": tables, "tars": tars}
    found = [name for name, files in kinds.items() if files]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(found)}; say which are meant by a glob: '{folder}/**/*.jpg'")
    if not found:
        raise FileNotFoundError(f"there are no images in {folder}; {ACCEPTED_SOURCES}")
    return _open_files(kinds[found[0]], root or folder, image_column, key_column)


def _is_of_a_store(path: str) -> bool:
    """Whether a file belongs to a label store; a store may lie among the images."""
    folder, name = os.path.split(path)
    if name in (MANIFEST_FILE, README_FILE):
        return any(is_shard_name(other) for other in os.listdir(folder or "."))
    return is_shard_name(name)


def _open_files(
    files: list[str],
    root: str | Path | None,
    image_column: str | None,
    key_column: str | None,
    whose: str = "the source has",
) -> ImageSource:
    if not files:
        raise ValueError(f"{whose} no files; {ACCEPTED_SOURCES}")
    are_tars = [urlsplit(file).path.lower().endswith(TAR_SUFFIXES) for file in files]
    are_tables = [urlsplit(file).path.lower().endswith(".parquet") for file in files]
    names = [path_as_key(file, root) for file in files]
    if all(are_tars):
        if key_column not in (None, "__key__"):
            raise ValueError(f"key_column is '{key_column}'; the images of tars are named by their files, '__key__'")
        return TarImages(list(zip(names, files)), image_column)
    if all(are_tables):
        return _open_stream([(name, _OpenTable(file)) for name, file in zip(names, files)], image_column, key_column)
    if any(are_tars) or any(are_tables):
        raise ValueError(f"{whose} files of different kinds: {names[0]}, {names[-1]}, …; give those of one kind")
    return ListedImages(names, files)


class _OpenShard:
    """Opens one shard of a data set when it is called."""

    def __init__(self, dataset: datasets.IterableDataset, number: int):
        self.dataset, self.number = dataset, number

    def __call__(self) -> datasets.IterableDataset:
        return self.dataset.shard(self.dataset.num_shards, self.number)


class _OpenTable:
    """Opens a Parquet file when it is called. It is pickled as its path."""

    def __init__(self, path: str):
        self.path = path

    def __call__(self) -> datasets.IterableDataset:
        return datasets.load_dataset("parquet", data_files={"train": [self.path]}, split="train", streaming=True)


def _open_stream(
    files: Sequence[tuple[str, Callable[[], datasets.IterableDataset]]],
    image_column: str | None,
    key_column: str | None,
) -> StreamedImages:
    for _, open_file in files:
        try:
            dataset = open_file()
        except Exception:  # a damaged file is recorded when it is read
            continue
        _image_column(dataset, image_column)
        if _key_column(dataset, key_column) is None:
            raise ValueError(f"no column names the images; give key_column, one of {_columns(dataset)}")
        break
    return StreamedImages(files, image_column, key_column)


def _without_suffix(name: str) -> str:
    for suffix in sorted(TAR_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


# ---- columns ----


def _columns(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    return ", ".join(dataset.features or dataset.column_names or ["unknown"])


def _image_column(dataset: datasets.Dataset | datasets.IterableDataset, column: str | None) -> str:
    if dataset.features is None:
        raise ValueError("the data set does not know its columns; cast it: dataset.cast(datasets.Features(…))")
    if column is None:
        images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise ValueError(f"no column holds images; give image_column, one of {_columns(dataset)}")
        return images[0]
    if column not in dataset.features:
        raise ValueError(f"there is no column '{column}'; there are {_columns(dataset)}")
    return column


def _key_column(dataset: datasets.Dataset | datasets.IterableDataset, column: str | None) -> str | None:
    if column is None:
        return next((name for name in KEY_COLUMNS if name in dataset.features), None)
    if column not in dataset.features:
        raise ValueError(f"there is no column '{column}'; there are {_columns(dataset)}")
    return column


def _undecoded(dataset: Any, image_column: str, *others: str) -> Any:
    """The data set with these columns. Its images stay bytes or paths, so that a damaged one does not end the run."""
    dataset = dataset.with_format(None) if isinstance(dataset, datasets.Dataset) else dataset
    dataset = dataset.select_columns([image_column, *others])
    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset
