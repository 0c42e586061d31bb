"""A store's Parquet files: written whole or not at all, by any number of processes."""

import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from .encoding import encode_labels, label_features
from .key_index import KeyIndex, key_digests
from .manifest import claim_folder, read_manifest, write_durably


# rows that are read together to get at one of them
ROW_GROUP_SIZE = 32
README_FILE = "README.md"
# lets `datasets.load_dataset(folder)` and the Hub's viewer find the shards
_README = """---
configs:
- config_name: default
  data_files: "labels-*.parquet"
---
Labels of frozen experts, one row an image; manifest.json says how they were made.
"""
_SHARD_NAME = re.compile(r"labels-(\d{5})-of-(\d{5})-(\d{6})\.parquet")


def shard_files(folder: str | Path) -> list[Path]:
    """The finished shards of a store, in the order of their names."""
    return sorted(path for path in Path(folder).glob("labels-*.parquet") if _SHARD_NAME.fullmatch(path.name))


def read_key_digests(files: Iterable[Path]) -> list[np.ndarray]:
    """The hashes of the keys of each shard; only the column `key` is read."""

    def read(file: Path) -> np.ndarray:
        return key_digests(pq.ParquetFile(file).read(columns=["key"], use_threads=False)["key"].to_pylist())

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, files))


def index_keys(folder: str | Path) -> KeyIndex:
    """The keys of all finished shards of a store, those of failed images included."""
    return KeyIndex(np.concatenate([key_digests([]), *read_key_digests(shard_files(folder))]))


class LabelWriter:
    """
    Writes labels into a store, for as many images as there are, shard by shard.

    A shard gets its name, `labels-<process>-of-<processes>-<number>.parquet`, when it is complete and on the disk: a
    process that is killed loses the labels of the shard at which it was, and leaves nothing half-written. Rows do not
    wait in memory: they go to the unfinished file in groups of 32.

    Args:
        folder (`str` or `Path`): the store; made if it does not exist.
        manifest (`dict`): from [`make_manifest`]; its `descriptions` say which experts there are.
        process (`tuple[int, int]`, *optional*, defaults to `(0, 1)`): number of this process and of all processes.
        rows_per_shard (`int`, *optional*, defaults to 1024): rows of a complete shard.
        seconds_per_shard (`float`, *optional*, defaults to 600):
            A shard that has been open for longer is complete with fewer rows.
        allow_other_versions (`bool`, *optional*, defaults to `False`): see [`claim_folder`].

    Raises:
        ValueError: if the store holds labels that were made otherwise.
        RuntimeError: if another process writes in its place, or one of another number of processes.

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
        self.descriptions = list(manifest["descriptions"].values())
        self.map_size = manifest["settings"].get("map_size")
        self.schema = label_features(self.descriptions).arrow_schema
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
        for left_over in self.folder.glob(f".{self._prefix}*"):
            left_over.unlink()
        if not (self.folder / README_FILE).exists():
            write_durably(self.folder / README_FILE, _README)
        numbers = [
            int(match[3])
            for path in shard_files(self.folder)
            if path.name.startswith(self._prefix) and (match := _SHARD_NAME.fullmatch(path.name))
        ]
        self._number = max(numbers, default=-1) + 1
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        # what is labelled is kept, whatever has ended the run
        try:
            self.finish_shard()
        finally:
            self._lock.release()

    @property
    def done(self) -> KeyIndex:
        """The keys in the store when it was first asked for."""
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
            key (`str`): its name.
            labels (`dict`): from an expert's name to its label, `None` or absent = missing; see [`encode_labels`].
            error (`str`, *optional*): what went wrong with it.
        """
        self.write_row({"key": key, "error": error, **encode_labels(labels or {}, self.descriptions, self.map_size)})

    def write_row(self, row: dict[str, Any]) -> None:
        """Adds a row: `key`, `error` and the experts' columns as [`encode_labels`] makes them."""
        self._rows.append(row)
        if len(self._rows) >= min(ROW_GROUP_SIZE, self.rows_per_shard - self._rows_in_file):
            self._write_waiting_rows()

    def _write_waiting_rows(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self.write_table(pa.Table.from_pylist(rows, self.schema))

    def write_table(self, table: pa.Table) -> None:
        """Adds the rows of a table with the columns of `schema`."""
        self._write_waiting_rows()
        if self._file is None:
            self._temporary = self.folder / f".{self._prefix}{self._number:06d}.parquet.unfinished"
            self._opened = time.monotonic()
            self._file = pq.ParquetWriter(self._temporary, self.schema, compression="zstd")
        try:
            self._file.write_table(table, row_group_size=ROW_GROUP_SIZE)
        except BaseException:  # the disk is full, or Ctrl-C: half a group is in the file
            self._file, self._rows_in_file = None, 0
            raise
        self._rows_in_file += len(table)
        full = self._rows_in_file >= self.rows_per_shard
        if full or time.monotonic() - self._opened > self.seconds_per_shard:
            self._publish()

    def finish_shard(self) -> None:
        """Completes the shard with the rows that it has, if any."""
        self._write_waiting_rows()
        if self._file is not None:
            self._publish()

    def _publish(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
        path = self.folder / f"{self._prefix}{self._number:06d}.parquet"
        publish(self._temporary, path)
        self.rows_written += self._rows_in_file
        self.bytes_written += path.stat().st_size
        self._number += 1
        self._rows_in_file = 0


def publish(temporary: Path, path: Path) -> None:
    """Gives a complete file its name, once its content is on the disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def lock_place(folder: Path, process: tuple[int, int]) -> FileLock:
    """
    Takes the place of one of n writing processes, until it is released or the process ends, however it ends.

    Raises:
        RuntimeError: if the place is taken, or if processes write that are not of the same n.
    """
    own = f".lock-{process[0]:05d}-of-{process[1]:05d}"
    lock = FileLock(folder / own)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
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
            raise RuntimeError(
                f"a run of {int(path.name[-5:])} processes writes into {folder}; this one, of {process[1]}, would "
                "share the images out in another way. Wait until it ends"
            ) from error
    return lock


def forget_failed(folder: str | Path) -> int:
    """
    Takes the images with an `error` out of a store, so that the next run labels them again. No run may be writing.

    Args:
        folder (`str` or `Path`): the store.

    Returns:
        `int`: how many there were.

    Raises:
        RuntimeError: if a run writes into the store.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import CannyEdges
    >>> from modeling_prismer.processing.labels import forget_failed, label_images

    >>> images = {"good": "modeling_prismer/assets/shape.png", "bad": b"no picture"}
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
            if pq.ParquetFile(path).read(columns=["error"])["error"].null_count == pq.read_metadata(path).num_rows:
                continue
            table = pq.read_table(path)
            kept = table.filter(pc.is_null(table["error"]))
            forgotten += len(table) - len(kept)
            if len(kept):
                temporary = path.with_name(f".{path.name}.unfinished")
                pq.write_table(kept, temporary, compression="zstd", row_group_size=ROW_GROUP_SIZE)
                publish(temporary, path)
            else:
                path.unlink()
    finally:
        lock.release()
    return forgotten
