"""The images of a webdataset tar, one after the other; damage costs the samples that it hits, not the tar."""

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


IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .jp2 .j2k .ppm .pgm .pbm .pnm .tga "
    ".pcx .ico".split()
)
"""Suffixes of image files in a folder or a tar, in any case."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Suffixes of webdataset tars."""

# an image is read into memory, and a small compressed tar can hold one of any size
MAX_IMAGE_BYTES = 1 << 30
# webdataset's rule: the sample's name ends at the first dot of the file's name, and its type follows
_MEMBER_NAME = re.compile(r"((?:.*/)?(?!__)[^./][^./]*)\.([^/]+)", re.DOTALL)
# images named SAMPLE.MORE.png; of more than these, each is a sample
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
    Reads the images of a tar from its beginning to its end. The other files of a sample are not read.

    Args:
        path (`str`): a file, or a URL that `datasets` reads.
        image_type (`str`, *optional*):
            The type of the images, such as `jpg` or `seg.png`. By default each sample's first image counts, and
            `SAMPLE.MORE.png` belongs to the image of `SAMPLE`. If there is none, its sample is `SAMPLE.MORE`.

    Returns:
        `Iterator[tuple[str, bytes | Exception]]`: each sample's name with its image file, or with the reason why
        there is none.

    Raises:
        OSError: after everything else, if the tar could not be read completely or has no images at all.
    """
    found: set[str] = set()
    dotted: set[str] = set()  # the beginnings of samples with dots in their names
    others: dict[str, set[str]] = {}  # the types of the other files, for each sample without an image
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
    except Exception as error:  # every kind of compression fails in its own way
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
    """(beginning of the name, type, member) of each file that belongs to a sample."""
    while member := tar.next():
        tar.members.clear()  # there can be millions
        match = _MEMBER_NAME.fullmatch(member.name)
        if match and member.isreg():
            yield match[1], match[2], member


def _sample_of_image(beginning: str, kind: str, image_type: str | None) -> str | None:
    """The name of the sample whose image a file is, or `None` if it is no image."""
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
    assert content is not None  # it is a regular file
    try:
        return content.read()
    except Exception as error:
        return OSError(f"'{member.name}' is cut off or damaged: {error}")
