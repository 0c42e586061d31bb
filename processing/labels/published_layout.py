"""Reads and writes labels in the layout of the published checkpoints, `<folder>/<expert>/<image>.png`."""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ...expert_spec import BACKGROUND, PUBLISHED_EXPERTS, ExpertSpec, read_specs
from .encoding import encode_labels
from .tars import IMAGE_SUFFIXES


logger = logging.get_logger(__name__)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_EXTRA_BYTES = 1 << 16  # of a PNG beyond its pixels; a larger one is encoded anew for a store
# the published folders that are not named after their experts
PUBLISHED_FOLDERS = {"segmentation": "seg_coco", "detection": "obj_detection", "ocr": "ocr_detection"}
_REBUILDERS: tuple[Any, ...] = (np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0])
# torch.load needs these for NumPy's arrays and numbers; NumPy 2 has moved the functions
_NUMPY_ARRAYS = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64)),
    *(
        (function, f"{module}.multiarray.{function.__name__}")
        for function in _REBUILDERS
        for module in ("numpy.core", "numpy._core")
    ),
]


def read_published_layout(
    folder: str | Path,
    experts: list[dict[str, Any]] | None = None,
    keys: Iterable[str] | None = None,
    folders: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Reads labels in the published layout: `<folder>/<expert>/<data set>/<image path>.png`. Instances also have a
    `.json` with their classes, and words a `.pt` with their texts and features.

    Args:
        folder (`str` or `Path`): the folder that contains the experts' folders.
        experts (`list[dict]`, *optional*):
            The experts, as in `PrismerConfig.experts`. By default the published experts that have a folder; a warning
            names the folders that are not read.
        keys (`Iterable[str]`, *optional*):
            Images, `<data set>/<image path>`, with or without suffixes. By default every image that has a file of any
            expert, without suffixes.
        folders (`dict[str, str]`, *optional*):
            Folders by the expert's name. By default they have the name of the expert, or the published one: `seg_coco`
            for segmentation, `obj_detection` for detection and `ocr_detection` for OCR.

    Returns:
        `Iterator[tuple[str, dict]]`: key and labels, as [`LabelWriter.write`] takes them.

        - The label is `None` if the map has no file or an empty file.
        - OCR has no file for an image without words. If another expert has a file, the label of OCR is an empty map.

    Raises:
        FileNotFoundError: if a folder of the experts does not exist.
        ValueError: if a file is damaged or does not fit its expert, or if a key leads out of the folder; it names the
            file or the key.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.labels import read_published_layout, write_published_layout

    >>> edge = {"name": "edge", "kind": "dense", "channels": 1}
    >>> write_published_layout([("coco/1.jpg", {"edge": np.zeros((480, 640), np.uint8)})], "labels", [edge])
    1
    >>> [(key, labels["edge"].shape) for key, labels in read_published_layout("labels")]
    [('coco/1', (480, 640))]
    ```
    """
    layout = PublishedLayout(folder, experts, folders)
    keys = layout.keys() if keys is None else keys
    return ((key, {spec.name: layout.read(key, spec)[0] for spec in layout.specs}) for key in keys)


class PublishedLayout:
    """
    A folder with labels in the published layout. Arguments and errors are those of [`read_published_layout`].

    Attributes:
        specs (`list[ExpertSpec]`): the experts whose labels are there.
    """

    def __init__(
        self,
        folder: str | Path,
        experts: list[dict[str, Any]] | None = None,
        folders: Mapping[str, str] | None = None,
    ):
        self.folder = Path(folder)
        specs = read_specs(PUBLISHED_EXPERTS if experts is None else experts)
        _require_maps(specs)
        self._places = {spec.name: _place(self.folder, spec.name, folders) for spec in specs}
        lacking = [place.name for place in self._places.values() if not place.is_dir()]
        if len(lacking) == len(specs) or (lacking and experts is not None):
            there = _listed(self.folder, ())
            raise FileNotFoundError(f"{self.folder} has no folder {', '.join(lacking)}; it has {there}")
        others = _listed(self.folder, [place.name for place in self._places.values()])
        if experts is None and others:
            logger.warning(
                f"{self.folder} has folders that belong to no published expert and are not read: {others}. Name the "
                "experts' folders by the argument folders, or give the argument experts"
            )
        self.specs = [spec for spec in specs if self._places[spec.name].is_dir()]
        published = [_place(self.folder, spec.name, folders) for spec in PUBLISHED_EXPERTS]
        self._all_places = [*self._places.values(), *published]

    def keys(self) -> Iterator[str]:
        """The images that have a map of any expert, folder by folder. Only one folder is kept in memory."""
        places = [self._places[spec.name] for spec in self.specs]
        waiting = [""]
        while waiting:
            relative = waiting.pop()
            names, folders = set(), set()
            for place in places:
                for entry in _entries(place / relative):
                    if entry.is_dir(follow_symlinks=False):
                        folders.add(entry.name)
                    elif entry.name.endswith(".png"):
                        names.add(entry.name.removesuffix(".png"))
            yield from (f"{relative}{name}" for name in sorted(names))
            waiting += [f"{relative}{name}/" for name in sorted(folders, reverse=True)]

    def read(self, key: str, spec: ExpertSpec) -> tuple[Any, bytes | None]:
        """The label of an expert for an image, and its map as the bytes of a PNG, if a store can keep these."""
        _require_inside(key, self.folder)
        path = _find_map(self._places[spec.name], key)
        if path is not None:
            return _read(path, spec)
        if "words" in spec.label_parts and (size := _map_size(self._all_places, key)):
            ids = np.full(size, BACKGROUND, np.uint8)
            return {"ids": ids, "words": [], "features": _no_words(spec.channels)}, None
        return None, None


def _require_maps(specs: Iterable[ExpertSpec]) -> None:
    """Refuses experts whose maps no PNG can hold."""
    for spec in specs:
        if spec.is_features:
            raise ValueError(f"the expert '{spec.name}' gives grids of vectors; the published layout has maps alone")
        if spec.is_dense and spec.channels not in (1, 3):
            raise ValueError(f"the expert '{spec.name}' is {spec.kind} of {spec.channels} channels; a PNG has 1 or 3")


def _require_inside(key: str, folder: Path) -> None:
    """Refuses a key that names a file outside the folder, or none."""
    paths = PurePosixPath(key), Path(key)
    if not paths[0].name or any(path.is_absolute() or path.drive or ".." in path.parts for path in paths):
        raise ValueError(f"the key '{key}' leads out of {folder}, or to no file")


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _place(folder: Path, name: str, folders: Mapping[str, str] | None) -> Path:
    """The folder of an expert: the given one, the published one, or one with the name of the expert."""
    if folders and name in folders:
        return folder / folders[name]
    published = folder / PUBLISHED_FOLDERS.get(name, name)
    return folder / name if (folder / name).is_dir() and not published.is_dir() else published


def _listed(folder: Path, without: Iterable[str]) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return ", ".join(name for name in names if name not in without and not name.startswith("."))


def _find_map(place: Path, key: str) -> Path | None:
    path = PurePosixPath(key)
    names = [key, path.with_suffix("").as_posix()] if path.suffix.lower() in IMAGE_SUFFIXES else [key]
    return next((place / f"{name}.png" for name in names if (place / f"{name}.png").is_file()), None)


def _map_size(places: Iterable[Path], key: str) -> tuple[int, int] | None:
    """The height and width of the first map that an image has."""
    for place in places:
        path = _find_map(place, key)
        if path is not None and path.stat().st_size:
            with _open_map(path, path) as image:
                return image.height, image.width
    return None


def _no_words(channels: int) -> np.ndarray:
    return np.zeros((0, channels), np.float32)


def _open_map(file: Path | io.BytesIO, path: Path) -> Image.Image:
    try:
        return Image.open(file, formats=["PNG"])
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a PNG: {error}") from error


def _read(path: Path, spec: ExpertSpec) -> tuple[Any, bytes | None]:
    data = path.read_bytes()
    if not data:
        return None, None
    channels = spec.channels if spec.is_dense else 1
    values, is_plain = _decode_map(data, path, channels)
    png = data if is_plain and len(data) <= values.nbytes + MAX_EXTRA_BYTES else None
    if spec.is_dense:
        return values, png
    label: dict[str, Any] = {"ids": values}
    if "classes" in spec.label_parts:
        label["classes"] = _read_classes(path.with_suffix(".json"), spec.num_classes)
    elif "words" in spec.label_parts:
        label["words"], label["features"] = _read_words(path.with_suffix(".pt"), spec.channels)
    items = label.get("classes", label.get("words"))
    if items is not None:
        ids = values[values != BACKGROUND]
        if ids.size and ids.max() >= len(items):
            raise ValueError(f"{path} has the id {ids.max()}, but {len(items)} {spec.label_parts[0]} belong to it")
    return label, png


def _decode_map(data: bytes, path: Path, channels: int) -> tuple[np.ndarray, bool]:
    """The map in a PNG, uint8 (H, W) or (H, W, channels), and whether the PNG has just these channels."""
    with _open_map(io.BytesIO(data), path) as image:
        is_plain = image.mode == ("RGB" if channels == 3 else "L")
        try:
            values = np.array(image)
        except Exception as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if values.ndim == 3 and values.shape[2] > channels:
        values = values[..., 0] if channels == 1 else values[..., :channels]
    if values.dtype != np.uint8 or values.shape[2:] != ((channels,) if channels > 1 else ()):
        raise ValueError(f"{path} is {values.dtype} {values.shape}; a map of {channels} × 8 bits is needed")
    return values, is_plain


def _read_classes(path: Path, num_classes: int | None) -> list[int]:
    if not path.is_file() or path.stat().st_size == 0:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = {_number(number, BACKGROUND): _number(kind, num_classes) for number, kind in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not {{instance number: class}}: {error}") from error
    return [classes.get(number, 0) for number in range(max(classes, default=-1) + 1)]


def _number(value: Any, end: int | None) -> int:
    number = int(value)
    if number != float(value) or number < 0 or (end is not None and number >= end):
        raise ValueError(f"{value} is not a whole number from 0 to {'…' if end is None else end - 1}")
    return number


def _read_words(path: Path, channels: int) -> tuple[list[str], np.ndarray]:
    if not path.is_file() or path.stat().st_size == 0:
        return [], _no_words(channels)
    try:
        with torch.serialization.safe_globals(_NUMPY_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=True)
        words = {_number(number, BACKGROUND): word for number, word in content.items()}
        number_of_words = max(words, default=-1) + 1
        features = np.zeros((number_of_words, channels), np.float32)
        for number, word in words.items():
            features[number] = torch.as_tensor(word["features"], dtype=torch.float32).reshape(channels).numpy()
        if not np.isfinite(features).all():
            raise ValueError("a feature is not finite")
        return [str(words[number]["text"]) if number in words else "" for number in range(number_of_words)], features
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not {{word number: {{features: {channels} numbers, text}}}}: {reason}") from error


def write_published_layout(
    labels: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | Path,
    experts: list[dict[str, Any]],
    folders: Mapping[str, str] | None = None,
) -> int:
    """
    Writes labels in the published layout; see [`read_published_layout`]. A missing label becomes an empty PNG file.

    Args:
        labels (`Iterable[tuple[str, dict]]`):
            Keys, `<data set>/<image path>`, and labels as experts return them; `store.items()` of a [`LabelStore`].
            `.png` replaces an image's suffix.
        folder (`str` or `Path`): created if it does not exist.
        experts (`list[dict]`): the experts, as in `PrismerConfig.experts`; for a store `store.descriptions`.
        folders (`dict[str, str]`, *optional*): as in [`read_published_layout`].

    Returns:
        `int`: the number of images.

    Raises:
        ValueError: if two keys would be one file, if a key leads out of the folder, if a label does not fit its
            expert, or if an expert has neither one channel nor three.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.labels import write_published_layout

    >>> edge = {"name": "edge", "kind": "dense", "channels": 1}
    >>> write_published_layout([("coco/1.jpg", {"edge": np.zeros((480, 640), np.uint8)})], "labels", [edge])
    1
    ```
    """
    writer = PublishedLayoutWriter(folder, experts, folders)
    for key, own in labels:
        writer.write(key, encode_labels(own, writer.specs))
    return writer.images


class PublishedLayoutWriter:
    """
    Writes labels in the published layout, as a label store keeps them. Arguments and errors are those of
    [`write_published_layout`].

    Attributes:
        images (`int`): the number of images written.
    """

    def __init__(self, folder: str | Path, experts: list[dict[str, Any]], folders: Mapping[str, str] | None = None):
        self.folder = Path(folder)
        self.specs = read_specs(experts)
        names = {**PUBLISHED_FOLDERS, **(folders or {})}
        self._places = {spec.name: self.folder / names.get(spec.name, spec.name) for spec in self.specs}
        _require_maps(self.specs)
        self._written: set[bytes] = set()

    @property
    def images(self) -> int:
        return len(self._written)

    def write(self, key: str, row: Mapping[str, Any]) -> None:
        """Writes the files of an image. `row` is from [`encode_labels`]."""
        _require_inside(key, self.folder)
        stem = _stem_of(key)
        digest = hashlib.blake2b(stem.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        if digest in self._written:
            raise ValueError(f"the labels of '{key}' and of another key would be one file, {stem}.png")
        self._written.add(digest)
        for spec in self.specs:
            path = self._places[spec.name] / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            label = row.get(spec.name)
            if (
                label is not None
                and _has_no_words(label, spec)
                and self._other_sizes(row, spec) == {_size(label, spec)}
            ):
                _remove(path)  # as published; the other maps tell the size
            else:
                _write(path, label, spec)

    def _other_sizes(self, row: Mapping[str, Any], spec: ExpertSpec) -> set[bytes]:
        others = [(row.get(other.name), other) for other in self.specs if other is not spec]
        return {_size(label, other) for label, other in others if label is not None}


def _stem_of(key: str) -> str:
    """The path of a key's files without `.png`: an image's suffix is removed."""
    path = PurePosixPath(key)
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def _png(label: Any, spec: ExpertSpec) -> bytes:
    data = (label if spec.is_dense else label["ids"])["bytes"]
    if not isinstance(data, bytes) or not data.startswith(PNG_SIGNATURE):
        raise ValueError(f"the stored map of '{spec.name}' is not a PNG")
    return data


def _size(label: Any, spec: ExpertSpec) -> bytes:
    """Width and height, as in the header of the PNG."""
    return _png(label, spec)[16:24]


def _has_no_words(label: Any, spec: ExpertSpec) -> bool:
    return "words" in spec.label_parts and not len(label["features"])


def _write(path: Path, label: Any, spec: ExpertSpec) -> None:
    if label is None:
        _remove(path)
        return _write_file(path, b"")
    if "classes" in spec.label_parts:
        classes = {str(number): int(kind) for number, kind in enumerate(label["classes"])}
        _write_file(path.with_suffix(".json"), json.dumps(classes).encode())
    elif _has_no_words(label, spec):
        path.with_suffix(".pt").unlink(missing_ok=True)
    elif "words" in spec.label_parts:
        texts = label["words"] or [""] * len(label["features"])
        features = torch.from_numpy(np.array(label["features"], np.float32))
        content = {
            i: {"features": feature.clone(), "text": text} for i, (feature, text) in enumerate(zip(features, texts))
        }
        file = io.BytesIO()
        torch.save(content, file)
        _write_file(path.with_suffix(".pt"), file.getvalue())
    _write_file(path, _png(label, spec))  # last, so that a new map always has its words


def _remove(path: Path) -> None:
    """Removes the files of an earlier label."""
    for suffix in (".png", ".json", ".pt"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def _write_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
