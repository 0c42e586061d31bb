"""The images that a command gets: files, URLs, folders, globs, tars, data sets, and lists on the standard input."""

import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterable
from urllib.parse import urlsplit

from modeling_prismer.processing.many_images.sources import (
    IMAGE_SUFFIXES,
    TAR_SUFFIXES,
    ImageSource,
    JoinedImages,
    ListedImages,
    path_as_key,
    walk_files,
)

from .arguments import exists, is_url


ACCEPTED = "accepted are files, folders, globs, http(s) URLs, webdataset tars, Parquet files, saved data sets, and -"
_DATASET_FILES = ("dataset_dict.json", "state.json")  # of a folder that `datasets` saved


def open_images(
    arguments: Iterable[str], image_column: str | None = None, key_column: str | None = None
) -> ImageSource:
    """
    Opens the images of a command.

    Args:
        arguments (`Iterable[str]`): files, folders and so on; `-` reads a list of them from the standard input.
        image_column, key_column (`str`, *optional*): as in `open_source`.

    Returns:
        [`ImageSource`]: the key of a file is its path as given, that of an image in a tar the path of the tar without
        suffix and the name of the sample, that of a row in a data set its key there.

    Raises:
        FileNotFoundError: if there is no image, or if the only argument does not exist. One of several that does not
            exist is an image that fails.
        ValueError: if a data set lacks a column, or a folder mixes kinds of files.
    """
    names = _read_list(arguments)
    sources: list[tuple[str, ImageSource]] = []
    listed: list[str] = []

    def add_listed() -> None:
        if listed:
            sources.append(("", ListedImages([_key_of(file) for file in listed], list(listed))))
            listed.clear()

    for name in names:
        files = list_files(name, must_exist=len(names) == 1)
        if files is None:
            add_listed()
            sources.append(_open_collection(name, len(names) == 1, image_column, key_column))
        else:
            listed += files
    add_listed()
    return JoinedImages(sources)


def _read_list(arguments: Iterable[str]) -> list[str]:
    names: list[str] = []
    for argument in arguments:
        if argument == "-":
            lines = sys.stdin.buffer.read().splitlines()
            names += [os.fsdecode(line) for line in lines if line.strip()]
        else:
            names.append(argument)
    if not names:
        raise FileNotFoundError("IMAGES: the list on the standard input is empty; one file on each line is needed")
    return names


def list_files(name: str, must_exist: bool = True) -> list[str] | None:
    """The image files of an argument, or `None` if the library for data sets opens it."""
    if is_url(name) and not _is_collection(name):
        return [name]
    if _is_collection(name) or any(os.path.isfile(os.path.join(name, file)) for file in _DATASET_FILES):
        return None
    if os.path.isdir(name):
        files = list(walk_files(name))
        if any(map(_is_collection, files)):
            return None
        images = [file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
        if not images:
            raise FileNotFoundError(f"IMAGES: there are no images in {name!r}; {ACCEPTED}")
        return images
    if not exists(name) and glob.has_magic(name):
        files = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if any(map(_is_collection, files)):
            return None
        if files:
            return files
        raise FileNotFoundError(f"IMAGES: no file matches {name!r}")
    if must_exist and not exists(name):
        raise FileNotFoundError(f"IMAGES: there is no file {name!r}; {ACCEPTED}")
    return [name]


def _is_collection(name: str) -> bool:
    """Whether a file holds many images."""
    return urlsplit(name).path.lower().endswith((*TAR_SUFFIXES, ".parquet"))


def _open_collection(
    name: str, is_only: bool, image_column: str | None, key_column: str | None
) -> tuple[str, ImageSource]:
    """A prefix for the keys, so that they begin with the path of their tar, and the source."""
    from modeling_prismer.processing.labels import TarImages, open_source

    source = open_source(name, image_column, key_column)
    if isinstance(source, TarImages) or not is_only:
        beginning = name if exists(name) else re.split(r"[*?[]", name)[0]  # of a glob
        before = name if os.path.isdir(name) else os.path.dirname(beginning)
        prefix = f"{path_as_key(before, None)}/" if before else ""
        return prefix, source
    return "", source


def _key_of(file: str) -> str:
    if file.lower().startswith("data:"):
        digest = hashlib.sha256(file.encode(errors="surrogatepass")).hexdigest()
        return f"{file.partition(',')[0][:40]},#{digest[:12]}"
    return file if is_url(file) else path_as_key(file, None)
