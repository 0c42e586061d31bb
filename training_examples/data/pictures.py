"""The images of rows: what a cell of a data set holds, where files are, and whether they can be opened."""

import base64
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset

from modeling_prismer.processing import load_image

from .faults import SHOWN, BadRecord, MissingFile


logger = logging.getLogger(__name__)

ACCEPTED_CELLS = (
    "a path, a URL, the bytes of an image file, base64, a data: URI, or {'bytes': …, 'path': …}; a list of one of them"
)
SHORTEST_BASE64 = 60  # letters; no image file is shorter


def image_in(cell: Any) -> bytes | str:
    """
    The bytes or the path that a cell of a data set holds, whichever way it was written.

    Raises:
        BadRecord: if there is none, or more than one.
    """
    if isinstance(cell, PIL.Image.Image | np.ndarray):  # a stream that decodes by itself
        return image_in(Image().encode_example(cell))
    if isinstance(cell, list | tuple):
        if len(cell) == 1:
            return image_in(cell[0])
        if all(isinstance(value, int | float | list) for value in cell) and cell:
            raise BadRecord(f"the image is a list of numbers; accepted are {ACCEPTED_CELLS}")
        raise BadRecord(f"the cell has {len(cell)} images; a row takes one, so write a row for each")
    if isinstance(cell, Mapping):
        content = cell.get("bytes") or cell.get("path")
        if content is None and cell.keys() - {"bytes", "path"}:
            raise BadRecord(f"the image is an object with {', '.join(cell)}; accepted are {ACCEPTED_CELLS}")
        if content is None:
            raise BadRecord("the image is empty")
        return image_in(content)
    if isinstance(cell, bytes):
        if not cell:
            raise BadRecord("the image is empty (0 bytes)")
        return cell
    if cell is None or not str(cell).strip():
        raise BadRecord("the name of the image is empty")
    if not isinstance(cell, str):
        raise BadRecord(f"the image is {cell!r}; accepted are {ACCEPTED_CELLS}")
    text = cell.strip()
    if text.startswith("file://"):
        return url2pathname(urlsplit(text).path)
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise BadRecord("the data: URI of the image is not base64; it looks like 'data:image/png;base64,…'")
        content = _from_base64(text)
        if content is None:
            raise BadRecord("the data: URI of the image holds damaged base64")
        return content
    # a path can consist of the letters of base64 as well, but does not decode to an image
    content = _from_base64(text) if len(text) >= SHORTEST_BASE64 else None
    return text if content is None or not _begins_as_image(content) else content


def _from_base64(text: str) -> bytes | None:
    text = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None


def _begins_as_image(content: bytes) -> bool:
    starts = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\x01\0", b"P4", b"P5", b"P6")
    return content.startswith(starts) or content[8:12] == b"WEBP" or content[4:8] in (b"ftyp", b"jP  ")


def is_image(feature: Any) -> bool:
    """Whether a data set says of a column that it holds images, or lists of them."""
    return isinstance(feature, Image) or (isinstance(feature, datasets.List) and is_image(feature.feature))


def undecoded(feature: Any) -> Any:
    """The same feature, whose images come as bytes or paths."""
    if isinstance(feature, Image):
        return Image(decode=False)
    return datasets.List(undecoded(feature.feature)) if isinstance(feature, datasets.List) else feature


# ---- files ----


def place_of(path: str, root: str) -> tuple[str, str]:
    """
    A picture's file, and its name: the path relative to the root, with /, as `prismer label` has it. Names of files
    outside of the root and of URLs are their whole paths.
    """
    if "://" in path:
        return path, path
    path = os.path.normpath(path.replace("\\", "/"))
    if os.path.isabs(path):
        return path, PurePath(path.removeprefix(root.rstrip(os.sep) + os.sep)).as_posix()
    return os.path.join(root, path), PurePath(path).as_posix()


def is_there(path: str) -> bool:
    """Whether there is such a file, and something in it; URLs are believed."""
    try:
        return "://" in path or os.stat(path).st_size > 0
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return False


def find_file(path: str, root: str) -> str | None:
    """
    The file that is meant where `path` is not there: the only one in `root` whose name differs in nothing but case or
    Unicode's normal form, as `A.JPG` and `a.jpg`.
    """
    folder = root.rstrip(os.sep)
    if not path.startswith(folder + os.sep):
        return None
    for part in path[len(folder) + 1 :].split(os.sep):
        found = os.path.join(folder, part)
        if not os.path.exists(found):
            try:
                alike = _names_in(folder, os.stat(folder).st_mtime_ns).get(_folded(part), [])
            except OSError:
                return None
            if len(alike) != 1:
                return None
            found = os.path.join(folder, alike[0])
        folder = found
    return folder if is_there(folder) else None


@lru_cache(64)
def _names_in(folder: str, changed: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        names.setdefault(_folded(name), []).append(name)
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


# ---- are they there, and whole ----


def is_remote(path: str) -> bool:
    """Whether a path is a URL of another kind than http(s), such as hf://."""
    return "://" in path and not path.startswith(("http://", "https://"))


def fault_of(cell: Any, name: str | None = None, streamed: bool = False) -> BadRecord | None:
    """Why the image of a cell cannot be used, or `None`. It is opened as in the training; URLs are believed."""
    try:
        image = image_in(cell)
    except BadRecord as problem:
        return problem
    if isinstance(image, str):
        if "://" in image:
            not_here = f"{image} cannot be opened; accepted are files and http(s) URLs, and streams read others"
            return None if streamed or not is_remote(image) else BadRecord(not_here)
        if not is_there(image):
            return MissingFile(f"image {image} is missing or empty")
    try:
        load_image(image, name=name)
    except Exception as error:  # every format fails in its own way
        return BadRecord(str(error))
    return None


def faults_of(images: Dataset, names: Sequence[str | None] | None = None) -> dict[int, BadRecord]:
    """
    What is wrong with images, by their rows. A file that several rows name is opened once.

    Args:
        images (`Dataset`): With a column `image`.
        names (`Sequence[str]`, *optional*): What images that come as bytes are called.
    """
    images = images.with_format(None).select_columns("image").cast_column("image", Image(decode=False))
    _, first, same_as = np.unique(_identities(images), return_index=True, return_inverse=True)
    order = np.argsort(first)  # as they lie on the disk
    faulty: dict[int, BadRecord] = {}
    distinct = images.select(first[order])
    in_bytes = images.data.nbytes > 1024 * len(images)
    contents: dict[str, bytes] = {}  # digests by name
    doubled: list[str] = []
    progress = datasets.utils.tqdm(total=len(distinct), desc="opening the images", unit="image", mininterval=1)
    with progress, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        start = 0
        for batch in distinct.iter(32 if in_bytes else 1024):
            numbers = order[start : start + len(batch["image"])]
            called = [
                names[int(row)] if names is not None and cell is not None and cell["bytes"] else None
                for row, cell in zip(first[numbers], batch["image"])
            ]
            problems = list(pool.map(fault_of, batch["image"], called))
            for number, cell, name, problem in zip(numbers, batch["image"], called, problems):
                if problem is None and name is not None:
                    digest = hashlib.blake2b(cell["bytes"], digest_size=16).digest()
                    if contents.setdefault(name, digest) != digest:
                        doubled.append(name)
                if problem is not None:
                    faulty[int(number)] = problem
            start += len(called)
            progress.update(len(called))
    if doubled:
        shown = ", ".join(map(repr, list(dict.fromkeys(doubled))[:SHOWN]))
        logger.warning("%d images have the name of another one, whose labels they get: %s", len(doubled), shown)
    return {int(row): faulty[int(same_as[row])] for row in np.flatnonzero(np.isin(same_as, list(faulty)))}


def _identities(images: Dataset) -> np.ndarray:
    """(rows,) int: the same for rows that name the same file."""
    parts, start = [np.zeros(0, np.int64)], 0
    for batch in images.select_columns("image").with_format("arrow").iter(10_000):
        column = batch.column("image").combine_chunks()
        hashes = np.array([hash(path) for path in pc.struct_field(column, "path").to_pylist()], np.int64)
        given = pc.struct_field(column, "bytes").is_valid().to_numpy(zero_copy_only=False)
        parts.append(np.where(given, np.arange(start, start + len(hashes)), hashes))
        start += len(hashes)
    return np.concatenate(parts)


def refuse_doubled_names(parts: Sequence[Dataset | IterableDataset]) -> None:
    """
    Raises:
        ValueError: if data sets call different images alike: a label store would mix them up.
    """
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for part in parts if len(parts) > 1 else []:
        if not isinstance(part, Dataset) or "image_id" not in part.column_names:
            continue
        ids = part.with_format(None).select_columns("image_id")
        names = _hashes_of(ids, lambda batch: batch.column("image_id").to_pylist())
        files = np.zeros(0, np.int64)  # bytes are in this data set alone
        if "image" in part.column_names and not _pictures_behind(part):
            pairs = _hashes_of(
                part.cast_column("image", Image(decode=False)),
                lambda batch: zip(
                    batch.column("image_id").to_pylist(),
                    pc.struct_field(batch.column("image").combine_chunks(), "path").to_pylist(),
                ),
            )
            files = np.unique(pairs)
        for other_names, other_files in seen:
            shared = np.intersect1d(names, other_names)
            if len(shared) > len(np.intersect1d(files, other_files)):
                row = int(np.flatnonzero(np.isin(names, shared))[0])
                raise ValueError(
                    f"'{ids[row]['image_id']}' is an image of two data sets; give an image_folder above "
                    "both, so that their names tell them apart"
                )
        seen.append((names, files))


def _hashes_of(rows: Dataset, values_of: Callable[[pa.Table], Iterable]) -> np.ndarray:
    parts = [np.zeros(0, np.int64)]
    for batch in rows.with_format("arrow").iter(10_000):
        parts.append(np.array([hash(value) for value in values_of(batch)], np.int64))
    return np.concatenate(parts)


def hint_about(name: str, root: str) -> str | None:
    """Where a picture that is not in the root was found: in a folder next to it."""
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
    found = next((folder for folder in folders if is_there(os.path.join(folder, name))), None)
    return f"{name} is in {found}: give that as image_folder (--image_folder)" if found else None


# ---- rows that look their images up ----


class WithPictures:
    """
    A transform for rows: puts the picture of record number `picture` in their place. The bytes stay in the data set
    that brings them, however many texts there are about a picture.
    """

    def __init__(self, pictures: Dataset):
        self.pictures = pictures

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "picture" not in batch:  # another column is read
            return batch
        others = {name: values for name, values in batch.items() if name != "picture"}
        return {"image": self.pictures[batch["picture"]]["image"], **others}


def with_pictures(rows: Dataset, pictures: Dataset) -> Dataset:
    """Rows whose column `picture` counts the `pictures`, with a column `image`, or else a transform that gives it."""
    if pictures._indices is None and np.array_equal(rows["picture"][:], np.arange(len(pictures))):
        return datasets.concatenate_datasets([pictures, rows.remove_columns("picture")], axis=1)
    return rows.with_transform(WithPictures(pictures))


def _pictures_behind(rows: Dataset | IterableDataset) -> Dataset | None:
    transform = rows.format["format_kwargs"].get("transform") if isinstance(rows, Dataset) else None
    return transform.pictures if isinstance(transform, WithPictures) else None


def pictures_of(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    The pictures of rows, not decoded, and their `image_id`, some perhaps several times: for `label_images`, with
    `key_column="image_id"`.
    """
    pictures = _pictures_behind(rows)
    if pictures is not None:
        rows = rows.with_format(None)
        names = dict(zip(rows["picture"][:], rows["image_id"][:]))
        pictures = pictures.add_column("image_id", [names.get(number) for number in range(len(pictures))])
        rows = pictures.select(sorted(names))
    return rows.select_columns(["image_id", "image"]).cast_column("image", Image(decode=False))


def leave_undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows, with images as bytes or paths: the collator opens them, and its errors name them."""
    pictures = _pictures_behind(rows)
    if pictures is not None:
        return rows.with_transform(WithPictures(pictures.cast_column("image", Image(decode=False))))
    own_transform = isinstance(rows, Dataset) and rows.format["type"] is not None
    if own_transform or rows.features is None or not isinstance(rows.features.get("image"), Image):
        return rows
    return rows.cast_column("image", Image(decode=False))
