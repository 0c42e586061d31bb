"""The labels of the published checkpoints on the disk, `<folder>/<expert>/<image>.png` and more, read and written."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from .encoding import label_parts


# the folders of the experts, where their names differ
PUBLISHED_FOLDERS = {"detection": "obj_detection", "ocr": "ocr_detection"}
PUBLISHED_EXPERTS: list[dict[str, Any]] = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "normal", "kind": "dense", "channels": 3},
    {"name": "segmentation", "kind": "label", "channels": 64, "num_classes": 133},
    {"name": "edge", "kind": "dense", "channels": 1},
    {"name": "detection", "kind": "label", "channels": 64, "num_classes": 722, "instances": True},
    {"name": "ocr", "kind": "label", "channels": 64},
]

_REBUILDERS: tuple[Any, ...] = (np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0])
# what NumPy's arrays and numbers consist of in a file that torch saved, under their old and their new names
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
    Reads labels as they were published: `<folder>/<expert>/<data set>/<image path>.png`, for instances also `.json`
    with the class of each, for words also `.pt` with their texts and features.

    Args:
        folder (`str` or `Path`): the folder of the experts' folders.
        experts (`list[dict]`, *optional*): the experts' entries as in `PrismerConfig.experts`; by default the six
            published ones, as far as they have a folder.
        keys (`Iterable[str]`, *optional*):
            Images, `<data set>/<image path>`, with their suffixes or without. By default all that any expert has a
            file for, without suffixes.
        folders (`dict[str, str]`, *optional*):
            Experts' folders that are not called like the expert; `detection` is `obj_detection` and `ocr` is
            `ocr_detection` unless given.

    Returns:
        `Iterator[tuple[str, dict]]`: key and labels, as [`LabelWriter.write`] takes them. A map without a file and one
        of zero bytes are `None`; a map of words without `.pt` has no words.

    Raises:
        FileNotFoundError: if the folder has none of the experts.
        ValueError: if a file is damaged, or does not fit the expert's entry; it names the file.

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
    names = {**PUBLISHED_FOLDERS, **(folders or {})}
    entries = PUBLISHED_EXPERTS if experts is None else experts
    places = {entry["name"]: folder / names.get(entry["name"], entry["name"]) for entry in entries}
    entries = [entry for entry in entries if places[entry["name"]].is_dir()]
    lacking = [] if experts is None else [entry["name"] for entry in experts if entry not in entries]
    if not entries or lacking:
        looked_for = ", ".join(places[name].name for name in (lacking or places))
        raise FileNotFoundError(f"{folder} has no folder {looked_for}")
    if keys is None:
        found = {
            path.relative_to(place).with_suffix("").as_posix()
            for place in places.values()
            for path in place.rglob("*.png")
        }
        keys = sorted(found)
    for key in keys:
        yield key, {entry["name"]: _read(places[entry["name"]], key, entry) for entry in entries}


def _read(place: Path, key: str, entry: Mapping[str, Any]) -> Any:
    # the image's suffix is replaced; a key without one can have a dot in its name
    path = next((path for path in (place / f"{key}.png", (place / key).with_suffix(".png")) if path.is_file()), None)
    if path is None or path.stat().st_size == 0:
        return None
    try:
        with Image.open(path) as image:
            values = np.array(image)
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if values.ndim == 3 and entry["channels"] != values.shape[2]:
        values = values[..., : entry["channels"]] if entry["kind"] == "dense" else values[..., 0]
    if values.dtype != np.uint8 or values.ndim not in (2, 3):
        raise ValueError(f"{path} holds {values.dtype} {values.shape}; a map of 8 bits is needed")
    if entry["kind"] == "dense":
        return values
    parts = label_parts(entry)
    label: dict[str, Any] = {"ids": values}
    if "classes" in parts:
        label["classes"] = _read_classes(path.with_suffix(".json"))
    elif "words" in parts:
        label["words"], label["features"] = _read_words(path.with_suffix(".pt"), entry["channels"])
    items = label.get("classes", label.get("words"))
    if items is not None:
        ids = values[values != 255]
        if ids.size and ids.max() >= len(items):
            raise ValueError(f"{path} has the id {ids.max()}, but {len(items)} {parts[0]} belong to it")
    return label


def _read_classes(path: Path) -> list[int]:
    if not path.is_file() or path.stat().st_size == 0:
        return []
    try:
        classes = {int(number): int(kind) for number, kind in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not {{instance number: class}}: {error}") from error
    return [classes.get(number, 0) for number in range(max(classes, default=-1) + 1)]


def _read_words(path: Path, channels: int) -> tuple[list[str], np.ndarray]:
    if not path.is_file() or path.stat().st_size == 0:
        return [], np.zeros((0, channels), np.float32)
    try:
        with torch.serialization.safe_globals(_NUMPY_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=True)
        words = {int(number): word for number, word in content.items()}
        number_of_words = max(words, default=-1) + 1
        features = np.zeros((number_of_words, channels), np.float32)
        for number, word in words.items():
            features[number] = torch.as_tensor(word["features"], dtype=torch.float32).reshape(channels).numpy()
    except Exception as error:
        raise ValueError(f"{path} is not {{word number: {{features: {channels} numbers, text}}}}: {error}") from error
    return [str(words[number]["text"]) if number in words else "" for number in range(number_of_words)], features


def write_published_layout(
    labels: Iterable[tuple[str, Mapping[str, Any]]],
    folder: str | Path,
    experts: list[dict[str, Any]],
    folders: Mapping[str, str] | None = None,
) -> int:
    """
    Writes labels as they were published; see [`read_published_layout`]. A missing label becomes a png of zero bytes.

    Args:
        labels (`Iterable[tuple[str, dict]]`): keys, `<data set>/<image path>`, whose suffixes become `.png`, and
            labels as experts return them; `store.items()` of a [`LabelStore`].
        folder (`str` or `Path`): made if it does not exist.
        experts (`list[dict]`): the experts' entries as in `PrismerConfig.experts`; `store.descriptions`.
        folders (`dict[str, str]`, *optional*): as in [`read_published_layout`].

    Returns:
        `int`: the number of images.

    Raises:
        ValueError: if two keys differ in their suffix alone, if a key leads out of the folder, or if a label has
            neither one nor three channels.

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
    names = {**PUBLISHED_FOLDERS, **(folders or {})}
    written: dict[str, str] = {}
    for key, own in labels:
        path = PurePosixPath(key)
        stem = path.with_suffix("").as_posix()
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the key '{key}' leads out of {folder}")
        if stem in written:
            raise ValueError(f"the labels of '{key}' and '{written[stem]}' would be one file")
        written[stem] = key
        for entry in experts:
            target = folder / names.get(entry["name"], entry["name"]) / f"{stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, own.get(entry["name"]), entry)
    return len(written)


def _write(path: Path, label: Any, entry: Mapping[str, Any]) -> None:
    if label is None:
        return _write_file(path, b"")
    label = label if isinstance(label, Mapping) else {"ids": label}
    values = np.asarray(label["ids"])
    if values.ndim == 3 and values.shape[2] != 3:
        raise ValueError(f"the label of '{entry['name']}' has {values.shape[2]} channels; a png has 1 or 3")
    parts = label_parts(entry)
    path.with_suffix(".pt").unlink(missing_ok=True)
    if "classes" in parts:
        classes = {str(number): int(kind) for number, kind in enumerate(label["classes"])}
        _write_file(path.with_suffix(".json"), json.dumps(classes).encode())
    elif "words" in parts and len(label["features"]):
        words = label.get("words") or [""] * len(label["features"])
        features = torch.from_numpy(np.array(label["features"], np.float32))
        content = {
            i: {"features": feature.clone(), "text": word} for i, (feature, word) in enumerate(zip(features, words))
        }
        file = io.BytesIO()
        torch.save(content, file)
        _write_file(path.with_suffix(".pt"), file.getvalue())
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    _write_file(path, file.getvalue())  # the last: a map is never there without its words


def _write_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    temporary.write_bytes(content)
    temporary.replace(path)
