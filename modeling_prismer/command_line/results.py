"""Files of results: JSON lines, one for each image, which an interrupted run continues."""

import errno
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from modeling_prismer.processing.labels.durable_files import publish
from modeling_prismer.processing.many_images.key_index import KeyIndex, key_digests


SUFFIXES = (".jsonl", ".ndjson", ".json")
SECONDS_PER_SYNC = 5.0  # a power failure loses the lines of this time, a killed process none
ROWS_PER_FILE = 100_000  # in a folder
BEGINNING = b'{"file": '  # of each line
_SHARD_NAME = re.compile(r"results-(\d{5,})-of-(\d{5,})-(\d{6,})\.jsonl")


class ResultFiles:
    """
    Writes one JSON object per line, either into a file or, if `path` has no suffix of JSON lines, into a folder with
    files of at most 100,000 lines, `results-<process>-of-<processes>-<number>.jsonl`. Several processes can write into
    one folder.

    Each line is written as a whole and handed to the system at once. If a process is killed within a line, or the disk
    is full, the next run cuts the unfinished line off.

    Args:
        path (`Path`): the file or folder. It is made if it does not exist, and continued if it does.
        same (`dict`): values that all objects have, such as the model. A file with other values is not continued.
        process (`tuple[int, int]`, *optional*): number of this process and of all processes.
        retry_failed (`bool`, *optional*, defaults to `False`): remove objects with an `error`, to try them again.

    Attributes:
        done ([`KeyIndex`]): the files of all objects that were there at the start.
        failed_before (`int`): how many of these have an `error`.

    Raises:
        ValueError: if a file has other lines than results, or results with other values, or if several processes write
            one file.
        OSError: if another run writes into it, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        same: Mapping[str, Any],
        process: tuple[int, int] = (0, 1),
        retry_failed: bool = False,
    ):
        self.path, self.same, self.process, self.retry_failed = path, dict(same), process, retry_failed
        self.is_folder = path.suffix.lower() not in SUFFIXES or path.is_dir()
        if process[1] > 1 and not self.is_folder:
            raise ValueError(f"--output {path} is one file, and {process[1]} processes write; name a folder")
        if self.is_folder and path.exists() and not path.is_dir():
            raise ValueError(f"--output {path} is no folder; the name of a file ends with {', '.join(SUFFIXES)}")
        self.folder = path if self.is_folder else path.parent
        self.prefix = f"results-{process[0]:05d}-of-{process[1]:05d}-"
        self.failed_before = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ResultFiles":
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.prefix}lock" if self.is_folder else f"{self.path.name}.lock"
        self._lock = FileLock(self.folder / f".{name}")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(f"another run writes into {self.path}; wait until it ends") from error
        try:
            if self.is_folder:
                self._require_no_other_run()
            else:
                self.path.touch()
            for path in self.own_files():
                _cut_unfinished_line(path)
                if self.retry_failed:
                    self._remove_failed(path)
            self.done = self._read_done()
            self._open_last()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self._close()
        finally:
            self._lock.release()

    def files(self) -> list[Path]:
        """The files of all processes."""
        if not self.is_folder:
            return [self.path]
        return sorted(path for path in self.folder.glob("results-*.jsonl") if _SHARD_NAME.fullmatch(path.name))

    def own_files(self) -> list[Path]:
        """The files that this process writes. Those of a run with other processes belong to the first process."""
        files, ours = self.files(), f"-of-{self.process[1]:05d}-"
        if not self.is_folder:
            return files
        others = [path for path in files if ours not in path.name] if self.process[0] == 0 else []
        return [path for path in files if path.name.startswith(self.prefix)] + others

    def _require_no_other_run(self) -> None:
        for path in self.folder.glob(".results-*-of-*-lock"):
            if f"-of-{self.process[1]:05d}-" in path.name:
                continue
            try:
                with FileLock(path).acquire(timeout=0):
                    pass
            except Timeout as error:
                raise OSError(f"a run with another number of processes writes into {self.path}") from error

    # ---- reading ----

    def _read_done(self) -> KeyIndex:
        digests = [key_digests([])]
        for path in self.files():
            keys: list[str] = []
            for row in read_rows(path):
                if not keys:
                    self._require_same(row, path)
                keys.append(row["file"])
                self.failed_before += row.get("error") is not None
            digests.append(key_digests(keys))
        return KeyIndex(np.concatenate(digests))

    def _require_same(self, row: Mapping[str, Any], path: Path) -> None:
        for name, value in self.same.items():
            if row.get(name) != value:
                raise ValueError(
                    f"{path} has results with {name} {json.dumps(row.get(name), ensure_ascii=False)}; this run has "
                    f"{json.dumps(value, ensure_ascii=False)}. Choose another --output"
                )

    def _remove_failed(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line, row in zip(lines, read_rows(path)) if row.get("error") is None]
        if len(kept) < len(lines):
            temporary = path.with_name(f".{path.name}.unfinished")
            temporary.write_bytes(b"".join(kept))
            publish(temporary, path)

    # ---- writing ----

    def write(self, line: str) -> None:
        """Adds an object, as one line of JSON without its end."""
        if self._file is None:
            self._open(self._number + 1)
        assert self._file is not None
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SECONDS_PER_SYNC:
                self._sync()
        except OSError as error:
            with suppress(OSError):
                self._file.close()
            self._file = None
            raise OSError(
                error.errno,
                f"{self.path} cannot be written: {os.strerror(error.errno or errno.EIO)}. Make room, then run the "
                "same command again; it continues",
            ) from error
        self._rows_in_file += 1
        if self.is_folder and self._rows_in_file >= ROWS_PER_FILE:
            self._close()

    def _open_last(self) -> None:
        """Opens the file that this process wrote last, if it has room."""
        self._number = -1
        for path in self.files():
            if self.is_folder and path.name.startswith(self.prefix):
                self._number = max(self._number, int(path.stem[len(self.prefix) :]))
        if self.is_folder and self._number >= 0:
            with self._path(self._number).open("rb") as file:
                self._rows_in_file = sum(1 for _ in file)
            if self._rows_in_file < ROWS_PER_FILE:
                self._open(self._number, self._rows_in_file)
        elif not self.is_folder:
            self._open(0)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.prefix}{number:06d}.jsonl" if self.is_folder else self.path

    def _open(self, number: int, rows: int = 0) -> None:
        self._number, self._rows_in_file, self._synced = number, rows, time.monotonic()
        self._file = self._path(number).open("ab")

    def _sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _close(self) -> None:
        if self._file is not None:
            self._sync()
            self._file.close()
            self._file = None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """
    Reads the objects of a file of results. An unfinished last line, which another process may be writing, is left out.

    Raises:
        ValueError: naming the first line that is no result.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                if not isinstance(row["file"], str):
                    raise TypeError("its 'file' is no text")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"line {number} of {path} is no result of this command ({error}); repair it, or choose another "
                    "--output"
                ) from error
            yield row


def _cut_unfinished_line(path: Path) -> None:
    with path.open("rb+") as file:
        beginning = file.read(len(BEGINNING))
        if beginning != BEGINNING[: len(beginning)]:
            raise ValueError(f"{path} has other lines than results of this command; choose another --output")
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            end = start if place < 0 else start + place + 1
            if place >= 0:
                break
        if end < size:
            file.truncate(end)
