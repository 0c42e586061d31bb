"""The images of rows: reads the cells of a data set, finds files and checks that they can be opened."""

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

from ..image_loading import load_image
from .faults import SHOWN, BadRecord, MissingFile


logger = logging.getLogger(__name__)

ACCEPTED_CELLS = (
    "a path, a URL, the bytes of an image file, base64, a data: URI, or {'bytes': …, 'path': …}; a list of one of them"
)
SHORTEST_BASE64 = 60  # characters; no image file is shorter


def image_in(cell: Any) -> bytes | str:
    """
    The image in a cell of a data set: the bytes of a file, or a path. `ACCEPTED_CELLS` lists the accepted forms.

    Raises:
        BadRecord: The cell has no image, or more than one.
    """
    if isinstance(cell, PIL.Image.Image | np.ndarray):  # from a stream that decodes images itself
        return image_in(Image().encode_example(cell))
    if isinstance(cell, list | tuple):
        if len(cell) == 1:
            return image_in(cell[0])
        if all(isinstance(value, int | float | list) for value in cell) and cell:
            raise BadRecord(f"the image is a list of numbers; accepted are {ACCEPTED_CELLS}")
        raise BadRecord(f"the cell has {len(cell)} images; accepted is one per row")
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
    # a path can consist of base64 characters too, but it does not decode to an image
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
    """Whether a column holds images or lists of images, according to its feature."""
    return isinstance(feature, Image) or (isinstance(feature, datasets.List) and is_image(feature.feature))


def undecoded(feature: Any) -> Any:
    """The same feature with `decode=False`: its images come as bytes or paths."""
    if isinstance(feature, Image):
        return Image(decode=False)
    return datasets.List(undecoded(feature.feature)) if isinstance(feature, datasets.List) else feature


# ---- files ----


def place_of(path: str, root: str) -> tuple[str, str]:
    """
    The file of an image, and the image's name: the path relative to the root, with /, as in `prismer label`. For URLs
    and for files outside the root the name is the whole path.
    """
    if "://" in path:
        return path, path
    path = os.path.normpath(path.replace("\\", "/"))
    if os.path.isabs(path):
        return path, PurePath(path.removeprefix(root.rstrip(os.sep) + os.sep)).as_posix()
    return os.path.join(root, path), PurePath(path).as_posix()


def is_there(path: str) -> bool:
    """Whether the file exists and is not empty. URLs are not checked."""
    try:
        return "://" in path or os.stat(path).st_size > 0
    except (OSError, ValueError):  # ValueError: the name has a zero byte
        return False


def find_file(path: str, root: str) -> str | None:
    """
    Finds the file for a `path` that does not exist: the only file in `root` whose name differs in case or Unicode
    normalisation alone, such as `a.jpg` for `A.JPG`. `None` if there is no such file, or more than one.
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


# ---- checks ----


def is_remote(path: str) -> bool:
    """Whether a path is a URL other than http(s), such as hf://."""
    return "://" in path and not path.startswith(("http://", "https://"))


def fault_of(cell: Any, name: str | None = None, streamed: bool = False) -> BadRecord | None:
    """The reason why the image in a cell cannot be used, or `None`. Opens it as training does; skips http(s) URLs."""
    try:
        image = image_in(cell)
    except BadRecord as problem:
        return problem
    if isinstance(image, str):
        if "://" in image:
            not_here = f"{image} cannot be opened; accepted are files and http(s) URLs. Other URLs need streaming=True"
            return None if streamed or not is_remote(image) else BadRecord(not_here)
        if not is_there(image):
            return MissingFile(f"image {image} is missing or empty")
    try:
        load_image(image, name=name)
    except Exception as error:  # each format raises errors of its own
        return BadRecord(str(error))
    return None


def faults_of(images: Dataset, names: Sequence[str | None] | None = None) -> dict[int, BadRecord]:
    """
    Opens all images and returns the faults by row number. A file that several rows name is opened once.

    Args:
        images (`Dataset`): Has a column `image`.
        names (`Sequence[str]`, *optional*): Names of the images, for those that come as bytes.
    """
    images = images.with_format(None).select_columns("image").cast_column("image", Image(decode=False))
    _, first, same_as = np.unique(_identities(images), return_index=True, return_inverse=True)
    order = np.argsort(first)  # the order on disk
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
        logger.warning("%d images share their name with a different image, and so its labels: %s", len(doubled), shown)
    return {int(row): faulty[int(same_as[row])] for row in np.flatnonzero(np.isin(same_as, list(faulty)))}


def _identities(images: Dataset) -> np.ndarray:
    """(rows,) int: equal for rows that name the same file."""
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
        ValueError: Two data sets use one name for different images, which a label store would mix up.
    """
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for part in parts if len(parts) > 1 else []:
        if not isinstance(part, Dataset) or "image_id" not in part.column_names:
            continue
        ids = part.with_format(None).select_columns("image_id")
        names = _hashes_of(ids, lambda batch: batch.column("image_id").to_pylist())
        files = np.zeros(0, np.int64)  # stays empty for bytes, which belong to one data set only
        if "image" in part.column_names and not _images_behind(part):
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
    """A hint for an image that is missing in the root but exists in a folder inside the root."""
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
    found = next((folder for folder in folders if is_there(os.path.join(folder, name))), None)
    return f"{name} is in {found}: give that as image_folder (--image_folder)" if found else None


# ---- rows that refer to their images ----


class WithImages:
    """
    A transform for rows: replaces the column `image_row` by the image in that row of `images`. So the bytes of an
    image are stored once, however many texts it has.
    """

    def __init__(self, images: Dataset):
        self.images = images

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "image_row" not in batch:  # another column is read
            return batch
        others = {name: values for name, values in batch.items() if name != "image_row"}
        return {"image": self.images[batch["image_row"]]["image"], **others}


def with_images(rows: Dataset, images: Dataset) -> Dataset:
    """Replaces `image_row` by the images it refers to: by a column if the order is the same, else by a transform."""
    if images._indices is None and np.array_equal(rows["image_row"][:], np.arange(len(images))):
        return datasets.concatenate_datasets([images, rows.remove_columns("image_row")], axis=1)
    return rows.with_transform(WithImages(images))


def _images_behind(rows: Dataset | IterableDataset) -> Dataset | None:
    transform = rows.format["format_kwargs"].get("transform") if isinstance(rows, Dataset) else None
    return transform.images if isinstance(transform, WithImages) else None


def images_of(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    The columns `image` (not decoded) and `image_id` of rows, for `label_images(…, key_column="image_id")`. An image
    can occur more than once.
    """
    images = _images_behind(rows)
    if images is not None:
        rows = rows.with_format(None)
        names = dict(zip(rows["image_row"][:], rows["image_id"][:]))
        images = images.add_column("image_id", [names.get(number) for number in range(len(images))])
        rows = images.select(sorted(names))
    return rows.select_columns(["image_id", "image"]).cast_column("image", Image(decode=False))


def leave_undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows with images as bytes or paths, so that the collator opens them and its errors name them."""
    images = _images_behind(rows)
    if images is not None:
        return rows.with_transform(WithImages(images.cast_column("image", Image(decode=False))))
    own_transform = isinstance(rows, Dataset) and rows.format["type"] is not None
    if own_transform or rows.features is None or not isinstance(rows.features.get("image"), Image):
        return rows
    return rows.cast_column("image", Image(decode=False))
