"""Reads webdataset tars. A sample is an image and its text files, which follow each other in the tar."""

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import fsspec

from ..labels import IMAGE_SUFFIXES
from .faults import BadRecord
from .lists import parse_json


TEXT_SUFFIXES = ("txt", "caption", "cls", "text", "question", "answer")
MAX_BYTES = 1 << 30  # largest member; it is read into memory
MAX_IMAGES = 16  # in a sample; further images are samples of their own

Record = dict[str, Any] | BadRecord


def read_tar(path: str) -> Iterator[Record]:
    """
    The samples of a tar, `{"__key__": "0001", "image": b"…", "txt": "a cat", "json": {…}}`, with the same keys as in
    `prismer label`. As in webdataset, the key is the file name up to its first dot, and a sample has its first image.
    If there are only images named `KEY.MORE.jpg`, each is a sample with the key `KEY.MORE`.
    """
    last = None
    try:
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for name, members in groupby(_members(tar), lambda named: named[0]):
                sample = _Sample(name)
                for _, kind, member in members:
                    if len(sample.parts) > MAX_IMAGES and kind.rpartition(".")[0] not in sample.parts:
                        yield from sample.records()
                        sample = _Sample(name)
                    sample.add(kind, member, tar)
                yield from sample.records()
                last = name
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError) or last is None:
            raise ValueError(f"{path} cannot be read: {error}") from error
        yield BadRecord(f"the tar cannot be read after sample {last}: {error}")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The key, the rest of the name and the member, for each file that belongs to a sample."""
    for member in tar:
        named = re.fullmatch(r"((?:.*/)?(?!__)[^./][^./]*)\.([^/]+)", member.name, re.DOTALL)
        if named is not None and member.isreg():
            yield named[1], named[2], member


class _Sample:
    """The members with one key: those named KEY.jpg, and the parts named KEY.MORE.jpg."""

    def __init__(self, name: str):
        self.name = name
        self.members: list[str] = []
        self.parts: dict[str, dict[str, Any]] = {"": {}}
        self.problems: list[str] = []

    def add(self, kind: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        self.members.append(kind)
        more, _, suffix = kind.lower().rpartition(".")
        more = kind[: len(more)]  # in its own case
        is_image = f".{suffix}" in IMAGE_SUFFIXES
        fields = self.parts.setdefault(more, {})
        if not is_image and suffix != "json" and suffix not in TEXT_SUFFIXES or (is_image and "image" in fields):
            return
        if member.size > MAX_BYTES:
            self.problems.append(f"{kind} has {member.size:,} bytes; at most {MAX_BYTES:,} are read")
            return
        file = tar.extractfile(member)
        content = file.read() if file is not None else b""
        if is_image:
            fields["image"] = content
            return
        # bytes that are not UTF-8 become faults of the rows that use them
        text = content.decode("utf-8-sig", "surrogateescape")
        try:
            fields[suffix] = parse_json(text, kind) if suffix == "json" else text
        except ValueError as error:
            self.problems.append(str(error))

    def records(self) -> Iterator[Record]:
        own = self.parts.pop("")
        samples = {f"{self.name}.{more}": fields for more, fields in self.parts.items() if "image" in fields}
        if "image" in own:
            samples = {self.name: own}
        elif len(samples) == 1:
            samples = {name: {**own, **fields} for name, fields in samples.items()}
        if self.problems:
            yield BadRecord(f"sample {self.name}: {'; '.join(self.problems)}")
        elif not samples:
            there = ", ".join(self.members)
            yield BadRecord(
                f"sample {self.name} has no image, only {there}; the members of a sample must follow each other"
            )
        else:
            yield from ({"__key__": name, **fields} for name, fields in samples.items())
