"""Encodes the expert labels of one image as a row of a table, and decodes them."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from ...expert_spec import ExpertSpec
from ..expert_labels import label_parts


# zlib's level: files are 5 % larger than at level 6, in half the time
PNG_COMPRESSION = 3


def label_features(specs: Sequence[ExpertSpec]) -> Features:
    """
    Returns the columns of a store, for `datasets`.

    Args:
        specs (`Sequence[ExpertSpec]`): the experts.

    Returns:
        `datasets.Features`: `key`; `error`, null unless something failed; and one column for each expert: an image for
        a dense expert, `{"ids": image, …}` for a label expert, and null for a missing label.
    """
    parts: dict[str, Any] = {"classes": List(Value("int32")), "words": List(Value("string"))}
    parts.update({part: List(Value("float32")) for part in ("low", "high")})
    columns: dict[str, Any] = {"key": Value("string"), "error": Value("string")}
    for spec in specs:
        if spec.name in columns:
            raise ValueError(f"an expert has the name '{spec.name}'; the columns {', '.join(columns)} exist already")
        if spec.is_features:
            columns[spec.name] = {"values": ImageFeature(), **{part: parts[part] for part in spec.label_parts}}
        elif spec.is_dense:
            columns[spec.name] = ImageFeature()
        else:
            parts["features"] = List(List(Value("float32"), length=spec.channels))
            columns[spec.name] = {"ids": ImageFeature(), **{part: parts[part] for part in spec.label_parts}}
    return Features(columns)


def encode_labels(
    labels: Mapping[str, Any], specs: Sequence[ExpertSpec], map_size: int | None = None
) -> dict[str, Any]:
    """
    Encodes the labels of one image.

    Args:
        labels (`dict`): labels by the expert's name, as experts return them; `None` or left out if missing.
            Maps are uint8 (H, W), or (H, W, C) for dense experts of C channels.
        specs (`Sequence[ExpertSpec]`): the experts.
        map_size (`int`, *optional*): reduce every map to this many pixels square, by nearest neighbour.

    Returns:
        `dict`: a value for each expert's column, maps as the bytes of a PNG.

    Raises:
        ValueError: if a label does not fit the spec of its expert.
    """
    return {spec.name: _encode(labels.get(spec.name), spec, map_size) for spec in specs}


def _encode(label: Any, spec: ExpertSpec, map_size: int | None) -> dict[str, Any] | None:
    if label is None:
        return None
    parts = label_parts(label, spec.is_dense)
    needed = ("values" if spec.is_dense else "ids", *spec.label_parts)
    missing = [part for part in needed if part not in parts and part != "words"]
    if missing:
        raise ValueError(f"the label of '{spec.name}' has no '{missing[0]}'; it has {', '.join(parts) or 'nothing'}")
    if spec.is_features:  # a grid is small as it is
        grid = _encode_map(parts["values"], spec.name, spec.channels, None)
        return {"values": grid, **{part: np.asarray(parts[part], np.float32).tolist() for part in spec.label_parts}}
    if spec.is_dense:
        return _encode_map(parts["values"], spec.name, spec.channels, map_size)
    row: dict[str, Any] = {"ids": _encode_map(parts["ids"], spec.name, 1, map_size)}
    if "classes" in spec.label_parts:
        row["classes"] = [int(number) for number in parts["classes"]]
    if "features" in spec.label_parts:
        features = np.asarray(parts["features"], np.float32)
        features = features if features.size else features.reshape(0, spec.channels)
        words = parts.get("words")
        if (
            features.ndim != 2
            or features.shape[1] != spec.channels
            or len(features) != len(features if words is None else words)
        ):
            raise ValueError(
                f"the label of '{spec.name}' has features of shape {features.shape} and "
                f"{'no' if words is None else len(words)} words; (words, {spec.channels}) is needed"
            )
        row["words"] = None if words is None else [str(word) for word in words]
        row["features"] = list(features)
    return row


def _encode_map(values: Any, name: str, channels: int, map_size: int | None) -> dict[str, Any]:
    """Encodes uint8 (H, W) or (H, W, C) as a PNG: RGB for 3 channels, else one grey image of the stacked channels."""
    values = values.numpy(force=True) if isinstance(values, torch.Tensor) else np.asarray(values)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"the map of '{name}' is {values.dtype} {values.shape}; uint8 (H, W) or (H, W, C) is needed")
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] != channels:
        raise ValueError(f"the map of '{name}' has shape {values.shape}; its expert has {channels} channels")
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


def decode_labels(row: Mapping[str, pa.Scalar], specs: Sequence[ExpertSpec]) -> dict[str, Any]:
    """
    Decodes the labels of one row. They equal the labels that the experts returned.

    Args:
        row (`dict`): a pyarrow scalar for each expert's column.
        specs (`Sequence[ExpertSpec]`): the experts.

    Returns:
        `dict`: for each expert `None` if its label is missing; uint8 (H, W), or (H, W, C) for C > 1 channels, if it is
        dense; else `{"ids": uint8 (H, W)}` with `classes` (`list[int]`), or with `words` (`list[str]`) and `features`
        (float32 (words, channels)). The arrays are writable.

    Raises:
        ValueError: if a column is damaged or does not fit the spec of its expert.
    """
    labels = {}
    for spec in specs:
        try:
            labels[spec.name] = _decode(row[spec.name], spec)
        except Exception as error:  # decoding a damaged row can fail at any step
            key = row["key"].as_py() if "key" in row else None
            raise ValueError(f"the label of '{spec.name}' for '{key}' cannot be decoded: {error}") from error
    return labels


def _decode(stored: pa.Scalar, spec: ExpertSpec) -> Any:
    if not stored.is_valid:
        return None
    if spec.is_features:
        bounds = {part: np.array(stored[part].as_py(), np.float32) for part in spec.label_parts}
        values = _decode_map(stored["values"], spec.channels)
        return {"values": values[..., None] if spec.channels == 1 else values, **bounds}
    if spec.is_dense:
        return _decode_map(stored, spec.channels)
    label: dict[str, Any] = {"ids": _decode_map(stored["ids"], 1)}
    for part in spec.label_parts:
        if part == "features":
            numbers = stored[part].values.flatten().to_numpy(zero_copy_only=False)
            label[part] = np.array(numbers, np.float32).reshape(-1, spec.channels)
        elif stored[part].is_valid:
            label[part] = stored[part].as_py()
    return label


def _decode_map(stored: pa.Scalar, channels: int) -> np.ndarray:
    # only as PNG: a file from a stranger must not reach Pillow's other decoders
    with Image.open(io.BytesIO(stored["bytes"].as_buffer()), formats=["PNG"]) as image:
        needed = "RGB" if channels == 3 else "L"
        if image.mode != needed or image.height % (1 if channels == 3 else channels):
            raise ValueError(f"its PNG is {image.mode} of {image.width}×{image.height}; {needed} is needed")
        values = np.array(image)
    if channels in (1, 3):
        return values
    return np.ascontiguousarray(values.reshape(channels, -1, values.shape[1]).transpose(1, 2, 0))
