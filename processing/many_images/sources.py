"""Sources of images: an image has the same key in every run. This file needs no library for data sets."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .key_index import KeyIndex, as_text, key_digests


logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .jp2 .j2k .ppm .pgm .pbm .pnm .tga "
    ".pcx .ico".split()
)
"""Suffixes of image files in a folder or a tar, in upper or lower case."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Suffixes of webdataset tars."""


class ImageSource:
    """
    Images with their keys. Iterating yields `(key, image)`. The image is anything that [`load_image`] takes, not yet
    opened, or an exception that says why there is no image.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import open_source

    >>> source = open_source({"a": image, "b": image, "c": image})
    >>> source.num_images, [key for key, _ in source.share(0, 2)]
    (3, ['a', 'c'])
    ```
    """

    num_images: int | None = None  # None if it is not known

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        raise NotImplementedError

    def share(self, process: int, num_processes: int) -> "ImageSource":
        """The share of one of n processes: every n-th image, or every n-th file of a stream."""
        raise NotImplementedError

    def without(self, done: KeyIndex) -> "ImageSource":
        """The images whose keys are not in `done`."""
        raise NotImplementedError

    def parts(self, images: int) -> list["ImageSource"]:
        """The same images in parts of about `images` images. A part is small when it is sent to another process."""
        raise NotImplementedError

    def progress(self) -> tuple[int, int] | None:
        """The number of files read and of all files of a stream; `None` if `num_images` is known."""
        return None


class ListedImages(ImageSource):
    """
    Images whose keys are all known: files, or rows of a data set.

    Args:
        keys (`Sequence[str]`): the keys. If a key occurs twice, its first image counts.
        images (`Sequence`): one image for each key; anything that [`load_image`] takes.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import ListedImages

    >>> list(ListedImages(["triangle"], ["modeling_prismer/assets/shape.png"]))
    [('triangle', 'modeling_prismer/assets/shape.png')]
    ```
    """

    def __init__(self, keys: Sequence[str], images: Sequence[Any]):
        if len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images")
        self.keys = keys
        self.images: Any = images
        self.num_images = len(keys)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from zip(self.keys, self.images)

    def share(self, process: int, num_processes: int) -> "ListedImages":
        return self._select(KeyIndex(key_digests(self.keys)).rows()[process::num_processes])

    def without(self, done: KeyIndex) -> "ListedImages":
        return self._select(np.flatnonzero(done.find(self.keys) < 0)) if len(done) else self

    def parts(self, images: int) -> list[ImageSource]:
        starts = range(0, len(self.keys), images)
        return [self._select(np.arange(start, min(start + images, len(self.keys)))) for start in starts]

    def _select(self, rows: np.ndarray) -> "ListedImages":
        return ListedImages([self.keys[row] for row in rows], [self.images[row] for row in rows])


class JoinedImages(ImageSource):
    """
    Several sources one after the other. The keys of a source may get a prefix, such as its folder.

    Args:
        sources (`Sequence[tuple[str, ImageSource]]`): pairs of a prefix, which may be empty, and a source.
    """

    def __init__(self, sources: Sequence[tuple[str, ImageSource]]):
        self.sources = list(sources)
        numbers = [source.num_images for _, source in self.sources]
        self.num_images = None if None in numbers else sum(filter(None, numbers))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for prefix, source in self.sources:
            for key, image in source:
                yield prefix + key, image

    def share(self, process: int, num_processes: int) -> "JoinedImages":
        return JoinedImages([(prefix, source.share(process, num_processes)) for prefix, source in self.sources])

    def without(self, done: KeyIndex) -> "JoinedImages":
        return JoinedImages([(prefix, source.without(_Prefixed(done, prefix))) for prefix, source in self.sources])

    def parts(self, images: int) -> list[ImageSource]:
        return [JoinedImages([(prefix, part)]) for prefix, source in self.sources for part in source.parts(images)]

    def progress(self) -> tuple[int, int] | None:
        found = [source.progress() or (0, 0) for _, source in self.sources]
        return sum(read for read, _ in found), sum(files for _, files in found)


class _Prefixed(KeyIndex):
    """Finds keys of a joined source, as the source knows them: without their prefix."""

    def __init__(self, index: KeyIndex, prefix: str):
        self.index, self.prefix = index, prefix

    def __len__(self) -> int:
        return len(self.index)

    def rows(self) -> np.ndarray:
        return self.index.rows()

    def find(self, keys: Iterable[str]) -> np.ndarray:
        return self.index.find(self.prefix + key for key in keys)


# ---- files ----


def walk_files(folder: str | Path) -> Iterator[str]:
    """All files except hidden ones, sorted by name. Links to folders are followed once."""

    def warn(error: OSError) -> None:
        logger.warning(f"The folder {error.filename} is left out: {error.strerror}")

    visited = set()
    for directory, folders, files in os.walk(folder, onerror=warn, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(directory, name) for name in sorted(files) if not name.startswith("."))


def path_as_key(file: str, root: str | Path | None) -> str:
    """The path of a file relative to `root`, or as given if it does not lie below `root`; always with `/`."""
    if "://" in file:
        return file.removeprefix(f"{root}/") if root else file
    if root:
        relative = os.path.relpath(file, root)
        file = file if Path(relative).parts[:1] == ("..",) else relative
    return as_text(Path(file).as_posix())
