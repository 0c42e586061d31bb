"""Webdataset tars: samples of an image and the files that say something about it, which follow each other."""

import re
import tarfile
from collections.abc import Iterator
from typing import Any

import fsspec

from modeling_prismer.processing.labels import IMAGE_SUFFIXES

from .faults import BadRecord
from .lists import parse_json


TEXT_SUFFIXES = ("txt", "caption", "cls", "text", "question", "answer")


def read_tar(path: str) -> Iterator[dict[str, Any] | BadRecord]:
    """
    The samples of a tar, `{"__key__": "0001", "image": b"…", "txt": "a cat", "json": {…}}`. As in webdataset, members
    with the same name up to its first dot are a sample; the last part of a name says what is in it.
    """
    sample = _Sample("")
    try:
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                named = re.match(r"((?:.*/|)[^./][^.]*)\.([^/]*)$", member.name)
                if named is None or not member.isfile():
                    continue
                if named.group(1) != sample.key:
                    yield from sample.record()
                    sample = _Sample(named.group(1))
                sample.add(named.group(2), tar.extractfile(member))
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError) or not sample.key:
            raise ValueError(f"{path} cannot be read: {error}") from error
        yield BadRecord(f"the tar cannot be read beyond sample {sample.key}: {error}")
        return
    yield from sample.record()


class _Sample:
    def __init__(self, key: str):
        self.key = key
        self.members: list[str] = []
        self.images: list[str] = []
        self.fields: dict[str, Any] = {}
        self.problem: str | None = None

    def add(self, name: str, file: Any) -> None:
        self.members.append(name)
        field = name.rpartition(".")[2].lower()
        if f".{field}" in IMAGE_SUFFIXES:
            self.images.append(name)
            self.fields["image"] = file.read()
        elif field == "json" or field in TEXT_SUFFIXES:
            # bytes that are no UTF-8 become faults where they are used
            text = file.read().decode("utf-8-sig", "surrogateescape")
            try:
                self.fields[field] = parse_json(text, f"{self.key}.{name}") if field == "json" else text
            except ValueError as error:
                self.problem = str(error)

    def record(self) -> Iterator[dict[str, Any] | BadRecord]:
        if not self.key:
            return
        there = ", ".join(self.members)
        if self.problem is not None:
            yield BadRecord(f"sample {self.key}: {self.problem}")
        elif not self.images:
            yield BadRecord(f"sample {self.key} has no image, but {there}; a sample's members must follow each other")
        elif len(self.images) > 1:
            yield BadRecord(
                f"sample {self.key} has {len(self.images)} images: {there}. A sample's name ends at its first dot; "
                "rename members that have more dots"
            )
        else:
            yield {"__key__": self.key, **self.fields}
