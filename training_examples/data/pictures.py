"""Where the pictures of rows are, and whether they are there."""

import io
import os
from pathlib import PurePath

import datasets
import numpy as np
import PIL.Image
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset


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
    except OSError:
        return False


def has_header(content: bytes) -> bool:
    """Whether bytes begin as a picture; they are not decoded."""
    try:
        with PIL.Image.open(io.BytesIO(content)):
            return True
    except Exception:  # every format fails in its own way
        return False


def pictures_there(dataset: Dataset, column: str) -> np.ndarray:
    """(rows,) bool: which rows have a picture, as bytes or as a file."""
    there, path, found = [], None, False
    for batch in dataset.select_columns(column).with_format("arrow").iter(10_000):
        images = batch.column(column).combine_chunks()
        given = pc.struct_field(images, "bytes").is_valid().to_numpy(zero_copy_only=False).copy()
        if not given.all():
            for row, next_path in enumerate(pc.struct_field(images, "path").to_pylist()):
                if next_path != path:  # the texts of a picture mostly follow each other
                    path, found = next_path, next_path is not None and is_there(next_path)
                given[row] |= found
        there.append(given)
    return np.concatenate(there) if there else np.zeros(0, bool)


def describe_missing(names: list[str], missing: int, total: int, source: str, root: str) -> str:
    """What to say about pictures that are not there, with the folder in which they would be found."""
    shown = ", ".join(names) + (", …" if missing > len(names) else "")
    message = f"{source}: the pictures of {missing} of {total} rows are missing or empty in {root}: {shown}"
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
    found = next((folder for folder in folders if is_there(os.path.join(folder, names[0]))), None)
    return message + (f" ({names[0]} is in {found}: give that as image_folder)" if found else "")


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


def pictures_of(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    The pictures of rows, not decoded, and their `image_id`, some perhaps several times: for `label_images`, with
    `key_column="image_id"`.
    """
    transform = rows.format["format_kwargs"].get("transform") if isinstance(rows, Dataset) else None
    if isinstance(transform, WithPictures):
        rows = rows.with_format(None)
        names = dict(zip(rows["picture"][:], rows["image_id"][:]))
        pictures = transform.pictures
        pictures = pictures.add_column("image_id", [names.get(number) for number in range(len(pictures))])
        rows = pictures.select(sorted(names))
    return rows.select_columns(["image_id", "image"]).cast_column("image", datasets.Image(decode=False))
