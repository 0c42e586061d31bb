"""One image's expert labels as one row of a table, and back."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image


# of zlib: on maps a twentieth larger than at 6, in half the time
PNG_COMPRESSION = 3


def label_parts(description: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of an expert's label beside its map: none, `("classes",)` or `("words", "features")`."""
    if description["kind"] == "dense":
        return ()
    if description.get("instances"):
        return ("classes",)
    return () if description.get("num_classes") else ("words", "features")


def label_features(descriptions: list[dict[str, Any]]) -> Features:
    """
    The columns of a store, for `datasets`.

    Args:
        descriptions (`list[dict]`): the experts' entries as in `PrismerConfig.experts`.

    Returns:
        `datasets.Features`: `key`; `error`, null unless something failed; and one column for each expert, null where
        its label is missing: an image for a dense expert, `{"ids": image, …}` for a label expert.
    """
    parts = {"classes": List(Value("int32")), "words": List(Value("string"))}
    columns: dict[str, Any] = {"key": Value("string"), "error": Value("string")}
    for description in descriptions:
        name = description["name"]
        if name in columns:
            raise ValueError(f"an expert has the name '{name}'; the columns {', '.join(columns)} exist already")
        if description["kind"] == "dense":
            columns[name] = ImageFeature()
        else:
            parts["features"] = List(List(Value("float32"), length=description["channels"]))
            columns[name] = {"ids": ImageFeature(), **{part: parts[part] for part in label_parts(description)}}
    return Features(columns)


def encode_labels(
    labels: Mapping[str, Any], descriptions: list[dict[str, Any]], map_size: int | None = None
) -> dict[str, Any]:
    """
    Encodes the labels of one image.

    Args:
        labels (`dict`): each expert's label by its name, as experts return them; `None` or absent if it is missing.
            Maps are uint8 (H, W), or (H, W, C) for dense experts of C channels.
        descriptions (`list[dict]`): the experts' entries as in `PrismerConfig.experts`.
        map_size (`int`, *optional*): reduce every map to this many pixels square, by nearest neighbour.

    Returns:
        `dict`: a value for each expert's column, maps as the bytes of a PNG.

    Raises:
        ValueError: if a label does not fit the description of its expert.
    """
    return {
        description["name"]: _encode(labels.get(description["name"]), description, map_size)
        for description in descriptions
    }


def _encode(label: Any, description: Mapping[str, Any], map_size: int | None) -> dict[str, Any] | None:
    name, parts = description["name"], label_parts(description)
    if label is None:
        return None
    if description["kind"] == "dense":
        return _encode_map(_to_array(label, name), description, map_size)
    label = label if isinstance(label, Mapping) else {"ids": label}
    missing = [part for part in ("ids", *parts) if part not in label and part != "words"]
    if missing:
        raise ValueError(f"the label of '{name}' has no '{missing[0]}'; it has {', '.join(label) or 'nothing'}")
    row: dict[str, Any] = {"ids": _encode_map(_to_array(label["ids"], name), {**description, "channels": 1}, map_size)}
    if "classes" in parts:
        row["classes"] = [int(number) for number in label["classes"]]
    if "features" in parts:
        channels = description["channels"]
        features = np.asarray(label["features"], np.float32)
        features = features if features.size else features.reshape(0, channels)
        words = label.get("words")
        if (
            features.ndim != 2
            or features.shape[1] != channels
            or len(features) != len(features if words is None else words)
        ):
            raise ValueError(
                f"the label of '{name}' has features of shape {features.shape} and "
                f"{'no' if words is None else len(words)} words; (words, {channels}) is needed"
            )
        row["words"] = None if words is None else [str(word) for word in words]
        row["features"] = list(features)
    return row


def _to_array(values: Any, name: str) -> np.ndarray:
    values = values.numpy(force=True) if isinstance(values, torch.Tensor) else np.asarray(values)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"the map of '{name}' is {values.dtype} {values.shape}; uint8 (H, W) or (H, W, C) is needed")
    return values


def _encode_map(values: np.ndarray, description: Mapping[str, Any], map_size: int | None) -> dict[str, Any]:
    """uint8 (H, W) or (H, W, C) as a PNG; other than 3 channels are stacked vertically in a grey one."""
    channels = description["channels"]
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] != channels:
        raise ValueError(
            f"the map of '{description['name']}' has shape {values.shape}; its expert has {channels} channels"
        )
    if map_size is not None:
        size = (map_size, map_size)
        planes = [
            Image.fromarray(values[..., channel]).resize(size, Image.Resampling.NEAREST) for channel in range(channels)
        ]
        values = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    if channels != 3:
        values = values.transpose(2, 0, 1).reshape(-1, values.shape[1])  # (C·H, W)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(file, "PNG", compress_level=PNG_COMPRESSION)
    return {"bytes": file.getvalue(), "path": None}


def decode_labels(row: Mapping[str, pa.Scalar], descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Decodes the labels of one row, to what the experts returned.

    Args:
        row (`dict`): a pyarrow scalar for each expert's column.
        descriptions (`list[dict]`): the experts' entries as in `PrismerConfig.experts`.

    Returns:
        `dict`: for each expert `None` where its label is missing; uint8 (H, W), or (H, W, C) for C > 1 channels, if
        it is dense; else `{"ids": uint8 (H, W)}` with `classes` (`list[int]`), or with `words` (`list[str]`) and
        `features` (float32 (words, channels)). The arrays are writable.

    Raises:
        ValueError: if a column is damaged or does not fit the description of its expert.
    """
    labels = {}
    for description in descriptions:
        name = description["name"]
        try:
            labels[name] = _decode(row[name], description)
        except Exception as error:  # a damaged row can fail at any step
            key = row["key"].as_py() if "key" in row else None
            raise ValueError(f"the label of '{name}' for '{key}' cannot be decoded: {error}") from error
    return labels


def _decode(stored: pa.Scalar, description: Mapping[str, Any]) -> Any:
    if not stored.is_valid:
        return None
    if description["kind"] == "dense":
        return _decode_map(stored, description["channels"])
    label: dict[str, Any] = {"ids": _decode_map(stored["ids"], 1)}
    for part in label_parts(description):
        if part != "features":
            if stored[part].is_valid:
                label[part] = stored[part].as_py()
            continue
        numbers = stored[part].values.flatten().to_numpy(zero_copy_only=False)
        label[part] = np.array(numbers, np.float32).reshape(-1, description["channels"])
    return label


def _decode_map(stored: pa.Scalar, channels: int) -> np.ndarray:
    # PNG alone: no other decoder of Pillow is offered the bytes of a file that may come from anywhere
    with Image.open(io.BytesIO(stored["bytes"].as_buffer()), formats=["PNG"]) as image:
        needed = "RGB" if channels == 3 else "L"
        if image.mode != needed or image.height % (1 if channels == 3 else channels):
            raise ValueError(f"its PNG is {image.mode} of {image.width}×{image.height}; {needed} is needed")
        values = np.array(image)
    if channels in (1, 3):
        return values
    return np.ascontiguousarray(values.reshape(channels, -1, values.shape[1]).transpose(1, 2, 0))
