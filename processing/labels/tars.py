"""Reads the images of a webdataset tar one by one. Damage only affects the samples in which it lies."""

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from tarfile import (  # type: ignore[attr-defined]
    EmptyHeaderError,
    EOFHeaderError,
    InvalidHeaderError,
    TruncatedHeaderError,
)
from typing import Any

from datasets.utils.file_utils import xopen

from ..many_images.sources import IMAGE_SUFFIXES


# an image is read into memory, and a small compressed tar can contain a huge one
MAX_IMAGE_BYTES = 1 << 30
# as in webdataset, the name of a sample ends at the first dot, and the type follows
_MEMBER_NAME = re.compile(r"((?:.*/)?(?!__)[^./][^./]*)\.([^/]+)", re.DOTALL)
# if a sample has more images named SAMPLE.MORE.png, each of them is a sample
_MAX_MAPS = 16


class _Header(tarfile.TarInfo):
    """Remembers where a tar is damaged."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_Header":
        try:
            header = super().fromtarfile(tarfile)
        except EOFHeaderError:
            tarfile.is_complete = True
            raise
        except (EmptyHeaderError, TruncatedHeaderError):
            if not tarfile.is_complete:
                tarfile.damage = tarfile.damage or "it is cut off"
            raise
        except InvalidHeaderError as error:
            tarfile.is_complete = False
            tarfile.damage = tarfile.damage or f"it is damaged at byte {tarfile.offset:,} ({error})"
            raise
        tarfile.is_complete = False
        return header


class _Tar(tarfile.TarFile):
    tarinfo = _Header
    members: list[tarfile.TarInfo]
    ignore_zeros = True  # searches for the next member after a damaged header
    is_complete = False
    damage: str | None = None


def read_tar(path: str, image_type: str | None = None) -> Iterator[tuple[str, bytes | Exception]]:
    """
    Reads the images of a tar from beginning to end. The other files of a sample are not read.

    Args:
        path (`str`): a file, or a URL that `datasets` reads.
        image_type (`str`, *optional*):
            The type of the images, such as `jpg` or `seg.png`. By default the first image of each sample counts, and
            `SAMPLE.MORE.png` belongs to the sample `SAMPLE`. If `SAMPLE` has no other image, it is a sample of its
            own, `SAMPLE.MORE`.

    Returns:
        `Iterator[tuple[str, bytes | Exception]]`: the name of each sample with the content of its image file, or with
        the error.

    Raises:
        OSError: at the end, if the tar cannot be read completely or has no images.
    """
    found: set[str] = set()
    dotted: set[str] = set()  # SAMPLE of samples named SAMPLE.MORE
    others: dict[str, set[str]] = {}  # the types of the files of each sample without an image
    damage = None
    try:
        with xopen(path, "rb") as file, _Tar.open(fileobj=file, mode="r|*") as tar:
            for beginning, files in groupby(_files(tar), lambda named: named[0]):
                maps: dict[str, bytes | Exception] = {}
                for _, kind, member in files:
                    sample = _sample_of_image(beginning, kind, image_type)
                    if beginning in found or sample in found:
                        continue
                    if sample is None:
                        others.setdefault(beginning, set()).add(kind)
                    elif sample == beginning:
                        found.add(sample)
                        others.pop(sample, None)
                        yield sample, _read(tar, member)
                    else:
                        maps[sample] = _read(tar, member)
                    if len(maps) > _MAX_MAPS:
                        found.update(maps)
                        dotted.add(beginning)
                        yield from maps.items()
                        maps = {}
                if maps and beginning not in found:
                    found.update(maps)
                    dotted.add(beginning)
                    yield from maps.items()
            damage = tar.damage
    except Exception as error:  # each kind of compression raises its own errors
        damage = str(error)
    if not found and not damage:
        there = ", ".join(sorted(set().union(*others.values()))[:10])
        damage = f"it has no {image_type or 'images'}; there are {there or 'no samples'}"
        others = {}
    for sample, types in others.items():
        if sample not in dotted:
            there = ", ".join(sorted(types)[:10])
            yield sample, ValueError(f"the sample '{sample}' has no {image_type or 'image'}; it has {there}")
    if damage:
        raise OSError(damage)


def _files(tar: _Tar) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yields (name up to the first dot, type, member) of each file that belongs to a sample."""
    while member := tar.next():
        tar.members.clear()  # the list would grow to millions
        match = _MEMBER_NAME.fullmatch(member.name)
        if match and member.isreg():
            yield match[1], match[2], member


def _sample_of_image(beginning: str, kind: str, image_type: str | None) -> str | None:
    """The name of the sample that an image belongs to; `None` if the file is not an image."""
    if image_type:
        return beginning if kind.lower() == image_type.lower() else None
    more, _, suffix = kind.rpartition(".")
    if f".{suffix.lower()}" not in IMAGE_SUFFIXES:
        return None
    return f"{beginning}.{more}" if more else beginning


def _read(tar: _Tar, member: tarfile.TarInfo) -> bytes | Exception:
    if not 0 <= member.size <= MAX_IMAGE_BYTES:
        return ValueError(f"'{member.name}' has {member.size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
    content = tar.extractfile(member)
    assert content is not None  # because it is a regular file
    try:
        return content.read()
    except Exception as error:
        return OSError(f"'{member.name}' is cut off or damaged: {error}")
