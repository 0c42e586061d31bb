"""The Parquet files of a store. Any number of processes write them, each file completely or not at all."""

import errno
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from transformers.utils import logging

from ...expert_spec import ExpertSpec, read_specs
from ..many_images.key_index import KeyIndex, as_text, key_digests
from .durable_files import publish, write_durably
from .encoding import decode_labels, encode_labels, label_features
from .manifest import claim_folder, manifest_lock, read_manifest


logger = logging.get_logger(__name__)

# number of rows that are read together
ROW_GROUP_SIZE = 32
README_FILE = "README.md"
# lets `datasets.load_dataset(folder)` and the Hub's viewer find the shards
_README = """---
configs:
- config_name: default
  data_files: "labels-*.parquet"
---
Labels of frozen experts, one row per image. manifest.json describes how they were made.
"""
_SHARD_NAME = re.compile(r"labels-(\d{5,})-of-(\d{5,})-(\d{6,})\.parquet")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# set_aside_damaged adds this to the name of a shard
_DAMAGED = ".damaged"


class DamagedShardError(ValueError):
    """
    A shard of a label store cannot be read.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from modeling_prismer.processing.experts import CannyEdges
    >>> from modeling_prismer.processing.labels import DamagedShardError, LabelStore, label_images

    >>> report = label_images("modeling_prismer/assets", [CannyEdges()], "my_labels", progress=False)
    >>> _ = Path("my_labels/labels-00000-of-00001-000000.parquet").write_bytes(b"PAR1")
    >>> try:
    ...     LabelStore("my_labels")
    ... except DamagedShardError:
    ...     report = label_images("modeling_prismer/assets", [CannyEdges()], "my_labels", progress=False, repair=True)
    >>> report.images
    2
    ```
    """


class StoreInUseError(RuntimeError, OSError):
    """
    Another run writes into the label store.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import LabelWriter, StoreInUseError, make_manifest

    >>> manifest = make_manifest(None, [{"name": "thermal", "kind": "dense", "channels": 1}], {})
    >>> with LabelWriter("my_labels", manifest):
    ...     try:
    ...         LabelWriter("my_labels", manifest).__enter__()
    ...     except StoreInUseError:
    ...         print("another run is not finished")
    another run is not finished
    ```
    """


def shard_files(folder: str | Path) -> list[Path]:
    """The finished shards of a store, in the order of their names."""
    return sorted(path for path in Path(folder).glob("labels-*.parquet") if _SHARD_NAME.fullmatch(path.name))


def is_shard_name(name: str) -> bool:
    """Whether a file with this name is a shard of a label store, or one that was set aside."""
    return _SHARD_NAME.fullmatch(name.removesuffix(_DAMAGED)) is not None


@contextmanager
def naming_the_shard(path: Path) -> Iterator[None]:
    """
    Turns errors in reading a shard into one error that names the shard.

    Raises:
        DamagedShardError: for all errors except a missing file, missing permission and lack of memory.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, MemoryError, DamagedShardError):
        raise
    except Exception as error:  # a damaged file can fail at any step of reading
        raise DamagedShardError(
            f"{path} is damaged: {' '.join(str(error).split())}. `prismer label IMAGES --out {path.parent} --repair` "
            "sets it aside and labels its images again"
        ) from error


def open_shard(path: Path, columns: Iterable[str] = ("key", "error"), memory_map: bool = False) -> pq.ParquetFile:
    """Opens a shard and checks that it has `columns`. Reading from it verifies the checksums."""
    with naming_the_shard(path):
        file = pq.ParquetFile(path, memory_map=memory_map, page_checksum_verification=True)
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise ValueError(f"it has no column '{missing[0]}'")
        return file


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """Reads some columns of a shard."""
    with open_shard(path, columns) as file, naming_the_shard(path):
        return file.read(columns=columns, use_threads=False)


def read_key_digests(files: Iterable[Path]) -> list[np.ndarray]:
    """The hashes of the keys of each shard. Only the column `key` is read."""

    def read(path: Path) -> np.ndarray:
        keys = read_columns(path, ["key"])["key"].to_pylist()
        with naming_the_shard(path):
            return key_digests(keys)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, files))


def index_keys(folder: str | Path) -> KeyIndex:
    """The keys of all finished shards of a store, including failed images."""
    return KeyIndex(np.concatenate([key_digests([]), *read_key_digests(shard_files(folder))]))


def count_failed(folder: str | Path) -> int:
    """The number of images in the finished shards of a store that have an error. Only the column `error` is read."""
    columns = (read_columns(path, ["error"])["error"] for path in shard_files(folder))
    return sum(len(column) - column.null_count for column in columns)


class LabelWriter:
    """
    Writes labels into a store, shard by shard.

    A shard gets its name, `labels-<process>-of-<processes>-<number>.parquet`, when it is complete and on the disk. If
    the process is killed or the disk is full, the labels of the unfinished shard are lost, and no incomplete file is
    left. Only 32 rows are kept in memory.

    Args:
        folder (`str` or `Path`): the store. It is made if it does not exist.
        manifest (`dict`): from [`make_manifest`]; its `descriptions` list the experts.
        process (`tuple[int, int]`, *optional*, defaults to `(0, 1)`): number of this process and of all processes.
        rows_per_shard (`int`, *optional*, defaults to 1024): number of rows in a shard.
        seconds_per_shard (`float`, *optional*, defaults to 600):
            A shard that has been open for this time is finished with fewer rows.
        allow_other_versions (`bool`, *optional*, defaults to `False`): see [`claim_folder`].

    Raises:
        ValueError: if the store holds labels that were made differently.
        StoreInUseError: if another run writes with the same process number, or with another number of processes.
        OSError: if a shard cannot be written. The message tells how many labels are lost. Finished shards are kept.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.labels import LabelStore, LabelWriter, make_manifest

    >>> thermal = {"name": "thermal", "kind": "dense", "channels": 1}
    >>> with LabelWriter("my_labels", make_manifest(None, [thermal], {"camera": "T-1000"})) as writer:
    ...     for key in ("a.jpg", "b.jpg"):
    ...         if key not in writer:
    ...             writer.write(key, {"thermal": np.zeros((480, 640), np.uint8)})

    >>> LabelStore("my_labels")["a.jpg"]["thermal"].shape
    (480, 640)
    ```
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Mapping[str, Any],
        process: tuple[int, int] = (0, 1),
        rows_per_shard: int = 1024,
        seconds_per_shard: float = 600.0,
        allow_other_versions: bool = False,
    ):
        if not 0 <= process[0] < process[1]:
            raise ValueError(f"process {process[0]} of {process[1]}; the first of n is 0, the last n - 1")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; at least 1 is needed")
        self.folder = Path(folder)
        self.specs = read_specs(list(manifest["descriptions"].values()))
        self.map_size = manifest["settings"].get("map_size")
        self.schema = label_features(self.specs).arrow_schema
        self.rows_per_shard = rows_per_shard
        self.seconds_per_shard = seconds_per_shard
        self.rows_written = 0
        self.bytes_written = 0
        self._manifest = manifest
        self._allow_other_versions = allow_other_versions
        self._process = process
        self._prefix = f"labels-{process[0]:05d}-of-{process[1]:05d}-"
        self._rows: list[dict[str, Any]] = []
        self._file: pq.ParquetWriter | None = None
        self._rows_in_file = 0
        self._index: KeyIndex | None = None

    # ---- the store ----

    def __enter__(self) -> "LabelWriter":
        claim_folder(self.folder, self._manifest, self._allow_other_versions)
        self._lock = lock_place(self.folder, self._process)
        try:
            for left_over in self.folder.glob(f".{self._prefix}*"):
                left_over.unlink()
            with manifest_lock(self.folder):
                if not (self.folder / README_FILE).exists():
                    write_durably(self.folder / README_FILE, _README)
        except BaseException:
            self._lock.release()
            raise
        numbers = [
            int(match[3])
            for path in self.folder.glob(f"{self._prefix}*")
            if (match := _SHARD_NAME.fullmatch(path.name.removesuffix(_DAMAGED)))
        ]
        self._number = max(numbers, default=-1) + 1
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        # keep the finished labels, whatever ended the run
        try:
            self.finish_shard()
        finally:
            self._lock.release()

    @property
    def done(self) -> KeyIndex:
        """The keys in the store at the first use of this property."""
        if self._index is None:
            self._index = index_keys(self.folder)
        return self._index

    def __contains__(self, key: str) -> bool:
        return self.done.find([key])[0] >= 0

    # ---- rows ----

    def write(self, key: str, labels: Mapping[str, Any] | None, error: str | None = None) -> None:
        """
        Adds an image.

        Args:
            key (`str`): the name of the image.
            labels (`dict`): the label of each expert by its name, `None` or absent if it is missing; see
                [`encode_labels`].
            error (`str`, *optional*): an error message.
        """
        error = error if error is None else as_text(error)
        key = as_text(key)
        self.write_row({"key": key, "error": error, **encode_labels(labels or {}, self.specs, self.map_size)})

    def write_row(self, row: dict[str, Any]) -> None:
        """Adds a row: `key`, `error` and the columns of [`encode_labels`]."""
        self._rows.append(row)
        if len(self._rows) >= min(ROW_GROUP_SIZE, self.rows_per_shard - self._rows_in_file):
            self._write_waiting_rows()

    def _write_waiting_rows(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        table = pa.Table.from_pylist(rows, self.schema)
        with self._discarding_on_failure(len(table)):
            if self._file is None:
                self._temporary = self.folder / f".{self._prefix}{self._number:06d}.parquet.unfinished"
                self._opened = time.monotonic()
                self._file = pq.ParquetWriter(
                    self._temporary, self.schema, compression="zstd", write_page_checksum=True
                )
            self._file.write_table(table, row_group_size=ROW_GROUP_SIZE)
        self._rows_in_file += len(table)
        full = self._rows_in_file >= self.rows_per_shard
        if full or time.monotonic() - self._opened > self.seconds_per_shard:
            self._publish()

    def finish_shard(self) -> None:
        """Finishes the current shard, if it has rows."""
        self._write_waiting_rows()
        self._publish()

    def _publish(self) -> None:
        if self._file is None:
            return
        path = self.folder / f"{self._prefix}{self._number:06d}.parquet"
        with self._discarding_on_failure():
            self._file.close()
            pq.read_metadata(self._temporary)  # fails if the end of the file is missing
            publish(self._temporary, path)
        self.rows_written += self._rows_in_file
        self.bytes_written += path.stat().st_size
        self._number += 1
        self._file, self._rows_in_file = None, 0

    @contextmanager
    def _discarding_on_failure(self, rows: int = 0) -> Iterator[None]:
        """Removes the unfinished shard if writing it fails."""
        try:
            yield
        except BaseException as error:
            lost = rows + self._rows_in_file
            file, self._file, self._rows_in_file = self._file, None, 0
            with suppress(Exception):  # fails again if the disk is full
                if file is not None:
                    file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            reason = os.strerror(error.errno) if error.errno else str(error)
            failure = OSError(
                f"the label store {self.folder} cannot be written: {reason}. {lost} labels of an unfinished shard are "
                f"lost, all finished shards are kept. {'Make room, then run' if error.errno in _FULL_DISK else 'Run'} "
                "the same command again"
            )
            failure.errno = error.errno
            raise failure from error


def lock_place(folder: Path, process: tuple[int, int]) -> FileLock:
    """
    Locks the store for process i of n, until the lock is released or the process ends.

    Raises:
        StoreInUseError: if another process has the same number, or if a run of another n is writing.
    """
    own = f".lock-{process[0]:05d}-of-{process[1]:05d}"
    lock = FileLock(folder / own)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreInUseError(
            f"another run writes into {folder} as process {process[0]} of {process[1]}; wait until it ends"
        ) from error
    for path in folder.glob(".lock-*-of-*"):
        if path.name.endswith(f"-of-{process[1]:05d}"):
            continue
        try:
            with FileLock(path).acquire(timeout=0):
                pass
        except Timeout as error:
            lock.release()
            raise StoreInUseError(
                f"a run of {int(path.name[-5:])} processes writes into {folder}, and this run has {process[1]}. Wait "
                "until the other run ends"
            ) from error
    return lock


def forget_failed(folder: str | Path) -> int:
    """
    Removes the images with an `error` from a store, so that the next run labels them again. No other run may be
    writing into the store.

    Args:
        folder (`str` or `Path`): the store.

    Returns:
        `int`: number of removed images.

    Raises:
        StoreInUseError: if a run writes into the store.
        DamagedShardError: if a shard cannot be read.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import CannyEdges
    >>> from modeling_prismer.processing.labels import forget_failed, label_images

    >>> images = {"good": "modeling_prismer/assets/shape.png", "bad": b"not an image"}
    >>> label_images(images, [CannyEdges()], "my_labels", progress=False).failed
    1
    >>> forget_failed("my_labels")
    1
    ```
    """
    folder = Path(folder)
    read_manifest(folder)
    forgotten = 0
    lock = lock_place(folder, (0, 1))
    try:
        for path in shard_files(folder):
            errors = read_columns(path, ["error"])["error"]
            if errors.null_count == len(errors):
                continue
            with open_shard(path) as file, naming_the_shard(path):
                table = file.read()
            kept = table.filter(pc.is_null(table["error"]))
            if len(kept):
                _replace_shard(path, kept)
            else:
                path.unlink()
            forgotten += len(table) - len(kept)
    finally:
        lock.release()
    return forgotten


def _replace_shard(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP_SIZE, write_page_checksum=True)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside_damaged(folder: str | Path) -> list[Path]:
    """
    Reads every label of a store and renames each shard that cannot be read to `<name>.damaged`. The store then opens,
    and the next run labels the images of these shards again. Other runs may be writing meanwhile.

    Args:
        folder (`str` or `Path`): the store.

    Returns:
        `list[Path]`: the former paths of the shards that were set aside.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from modeling_prismer.processing.experts import CannyEdges
    >>> from modeling_prismer.processing.labels import label_images, set_aside_damaged

    >>> report = label_images("modeling_prismer/assets", [CannyEdges()], "my_labels", progress=False)
    >>> _ = Path("my_labels/labels-00000-of-00001-000000.parquet").write_bytes(b"PAR1")
    >>> [path.name for path in set_aside_damaged("my_labels")]
    ['labels-00000-of-00001-000000.parquet']
    ```
    """
    specs = read_specs(list(read_manifest(folder)["descriptions"].values()))

    def set_aside(path: Path) -> bool:
        try:
            _check_shard(path, specs)
            return False
        except FileNotFoundError:  # another process has set it aside
            return False
        except DamagedShardError as error:
            logger.warning(str(error.__cause__ or error))
            os.replace(path, path.with_name(path.name + _DAMAGED))
            return True

    files = shard_files(folder)
    with ThreadPoolExecutor() as pool:
        return [path for path, damaged in zip(files, pool.map(set_aside, files)) if damaged]


def _check_shard(path: Path, specs: list[ExpertSpec]) -> None:
    """Reads every label of a shard."""
    names = ["key", "error", *(spec.name for spec in specs)]
    with open_shard(path, names) as file, naming_the_shard(path):
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            key_digests(table["key"].to_pylist())
            for row in range(len(table)):
                decode_labels({name: table[name][row] for name in names}, specs)
