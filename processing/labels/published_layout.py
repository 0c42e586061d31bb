"""Reads and writes labels in the layout of the published checkpoints, `<folder>/<expert>/<image>.png`."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ...expert_spec import BACKGROUND, PUBLISHED_EXPERTS, ExpertSpec, read_specs
from ..expert_labels import label_parts
from .tars import IMAGE_SUFFIXES


logger = logging.get_logger(__name__)

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
        ValueError: if a file is damaged or does not fit its expert; it names the file.

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
    folder = Path(folder)
    specs = read_specs(PUBLISHED_EXPERTS if experts is None else experts)
    places = {spec.name: _place(folder, spec.name, folders) for spec in specs}
    lacking = [place.name for place in places.values() if not place.is_dir()]
    if len(lacking) == len(places) or (lacking and experts is not None):
        raise FileNotFoundError(f"{folder} has no folder {', '.join(lacking)}; it has {_listed(folder, ())}")
    if experts is None and (others := _listed(folder, [place.name for place in places.values()])):
        logger.warning(
            f"{folder} has folders that belong to no published expert and are not read: {others}. Name the experts' "
            "folders by the argument folders, or give the argument experts"
        )
    specs = [spec for spec in specs if places[spec.name].is_dir()]
    published = [_place(folder, spec.name, folders) for spec in PUBLISHED_EXPERTS]
    return _read_images(specs, places, [*places.values(), *published], keys)


def _place(folder: Path, name: str, folders: Mapping[str, str] | None) -> Path:
    """The folder of an expert: the given one, the published one, or one with the name of the expert."""
    if folders and name in folders:
        return folder / folders[name]
    published = folder / PUBLISHED_FOLDERS.get(name, name)
    return folder / name if (folder / name).is_dir() and not published.is_dir() else published


def _listed(folder: Path, without: Iterable[str]) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return ", ".join(name for name in names if name not in without and not name.startswith("."))


def _read_images(
    specs: Sequence[ExpertSpec], places: Mapping[str, Path], all_places: list[Path], keys: Iterable[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    if keys is None:
        found = {
            path.relative_to(places[spec.name]).with_suffix("").as_posix()
            for spec in specs
            for path in places[spec.name].rglob("*.png")
            if not path.name.startswith(".")
        }
        keys = sorted(found)
    for key in keys:
        labels: dict[str, Any] = {}
        for spec in specs:
            path = _find_map(places[spec.name], key)
            if path is not None:
                labels[spec.name] = _read(path, spec)
            elif "words" in spec.label_parts and (size := _map_size(all_places, key)):
                ids = np.full(size, BACKGROUND, np.uint8)
                labels[spec.name] = {"ids": ids, "words": [], "features": _no_words(spec.channels)}
            else:
                labels[spec.name] = None
        yield key, labels


def _find_map(place: Path, key: str) -> Path | None:
    path = PurePosixPath(key)
    names = [key, path.with_suffix("").as_posix()] if path.suffix.lower() in IMAGE_SUFFIXES else [key]
    return next((place / f"{name}.png" for name in names if (place / f"{name}.png").is_file()), None)


def _map_size(places: Iterable[Path], key: str) -> tuple[int, int] | None:
    """The height and width of the first map that an image has."""
    for place in places:
        path = _find_map(place, key)
        if path is not None and path.stat().st_size:
            with _open_map(path) as image:
                return image.height, image.width
    return None


def _no_words(channels: int) -> np.ndarray:
    return np.zeros((0, channels), np.float32)


def _open_map(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=["PNG"])
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a PNG: {error}") from error


def _read(path: Path, spec: ExpertSpec) -> Any:
    if path.stat().st_size == 0:
        return None
    with _open_map(path) as image:
        try:
            values = np.array(image)
        except Exception as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    channels = spec.channels if spec.is_dense else 1
    if values.ndim == 3 and values.shape[2] > channels:
        values = values[..., 0] if channels == 1 else values[..., :channels]
    if values.dtype != np.uint8 or values.shape[2:] != ((channels,) if channels > 1 else ()):
        raise ValueError(f"{path} is {values.dtype} {values.shape}; a map of {channels} × 8 bits is needed")
    if spec.is_dense:
        return values
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
    return label


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
        ValueError: if two keys would be one file, if a key leads out of the folder, or if a label has neither one
            channel nor three.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.labels import write_published_layout

    >>> edge = {"name": "edge", "kind": "dense", "channels": 1}
    >>> write_published_layout([("coco/1.jpg", {"edge": np.zeros((480, 640), np.uint8)})], "labels", [edge])
    1
    ```
    """
    folder = Path(folder)
    specs = read_specs(experts)
    names = {**PUBLISHED_FOLDERS, **(folders or {})}
    written: dict[str, str] = {}
    for key, own in labels:
        path = PurePosixPath(key)
        stem = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
        if not stem.name or path.is_absolute() or ".." in path.parts or Path(key).drive:
            raise ValueError(f"the key '{key}' leads out of {folder}, or to no file")
        if stem.as_posix() in written:
            raise ValueError(f"the labels of '{key}' and '{written[stem.as_posix()]}' would be one file")
        written[stem.as_posix()] = key
        for spec in specs:
            target = folder / names.get(spec.name, spec.name) / f"{stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, own.get(spec.name), spec)
    return len(written)


def _write(path: Path, label: Any, spec: ExpertSpec) -> None:
    if label is None:
        return _write_file(path, b"")
    parts = label_parts(label, spec.is_dense)
    values = np.asarray(parts["values" if spec.is_dense else "ids"])
    if values.ndim == 3 and values.shape[2] != 3:
        raise ValueError(f"the label of '{spec.name}' has {values.shape[2]} channels; a PNG has 1 or 3")
    words = path.with_suffix(".pt")
    if "classes" in spec.label_parts:
        classes = {str(number): int(kind) for number, kind in enumerate(parts["classes"])}
        _write_file(path.with_suffix(".json"), json.dumps(classes).encode())
    elif "words" in spec.label_parts and len(parts["features"]):
        texts = parts.get("words") or [""] * len(parts["features"])
        features = torch.from_numpy(np.array(parts["features"], np.float32))
        content = {
            i: {"features": feature.clone(), "text": text} for i, (feature, text) in enumerate(zip(features, texts))
        }
        file = io.BytesIO()
        torch.save(content, file)
        _write_file(words, file.getvalue())
    else:
        words.unlink(missing_ok=True)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    _write_file(path, file.getvalue())  # last, so that a new map always has its words


def _write_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
