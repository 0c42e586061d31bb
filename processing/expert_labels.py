"""Reads expert labels and checks them against the experts' descriptions. This file is saved with a processor."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image


BACKGROUND = 255  # the id of pixels where a label expert found nothing
_TAKEN_NAMES = ("pixel", "input")  # `pixel_values` and `input_ids` belong to image and text


class ExpertFields(NamedTuple):
    """
    The fields of an expert's description that the processor reads. Files that are saved with a processor cannot import
    `ExpertSpec`, which has all fields. A test checks that both agree.
    """

    name: str
    kind: str
    channels: int
    num_classes: int | None
    instances: bool | None

    @property
    def is_dense(self) -> bool:
        """Whether its map has values: a dense map, or a grid of vectors."""
        return self.kind in ("dense", "features")

    @property
    def is_features(self) -> bool:
        return self.kind == "features"

    @property
    def tensor_suffixes(self) -> tuple[str, ...]:
        """The suffixes of the expert's tensors. They are also the keys of its label."""
        if self.is_dense:
            return ("values",)
        if self.num_classes is None:
            return ("ids", "features")
        return ("ids", "classes") if self.instances else ("ids",)


def read_experts(experts: Sequence[Mapping[str, Any]]) -> list[ExpertFields]:
    """
    Reads the fields of expert descriptions.

    Raises:
        ValueError: if a description is incomplete or wrong. `ExpertSpec` gives a more detailed message.
    """
    if not isinstance(experts, list | tuple) or not all(isinstance(expert, Mapping) for expert in experts):
        raise ValueError(f"experts is {experts!r}; a list of descriptions is needed, one dict for each expert")
    read = [ExpertFields(*map(expert.get, ExpertFields._fields)) for expert in experts]
    names = [expert.name for expert in read]
    for expert, description in zip(read, experts):
        is_named = isinstance(expert.name, str) and expert.name.isidentifier() and expert.name not in _TAKEN_NAMES
        counts = [expert.channels, 1 if expert.num_classes is None else expert.num_classes]
        are_counts = all(type(number) is int and number >= 1 for number in counts)
        if not (is_named and are_counts and expert.kind in ("dense", "label", "features")):
            raise ValueError(
                f"experts has {description}; it needs a 'name' that is an identifier (not "
                f"{' or '.join(map(repr, _TAKEN_NAMES))}), the 'kind' 'dense', 'label' or 'features', and positive "
                "integers as 'channels' and 'num_classes'"
            )
        if names.count(expert.name) > 1:
            raise ValueError(f"expert '{expert.name}' is described twice")
        if not expert.instances and counts[1] > BACKGROUND:
            raise ValueError(
                f"expert '{expert.name}' has {counts[1]} classes; a map of 8-bit ids has at most {BACKGROUND} "
                "(with 'instances': True the ids are instances, and the number of classes is free)"
            )
    return read


# ---- labels of a batch ----


def match_expert_labels(
    expert_labels: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    num_images: int,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """
    Returns one dict of labels for each image.

    Args:
        expert_labels: the argument of [`PrismerImageProcessor.preprocess`].
        num_images (`int`): number of images.
        names (`Sequence[str]`): names of the configured experts.

    Returns:
        `list[dict]`: a dict for each image, empty for images without labels.

    Raises:
        TypeError: if an entry is not a dict.
        ValueError: if the number of entries and of images differ, or if a name is not among the experts.
    """
    if expert_labels is None:
        return [{} for _ in range(num_images)]
    if isinstance(expert_labels, Mapping):
        expert_labels = [expert_labels]
    if not isinstance(expert_labels, list | tuple) or not all(
        labels is None or isinstance(labels, Mapping) for labels in expert_labels
    ):
        raise TypeError("expert_labels must be a dict {expert name: label}, or a list of them, one for each image")
    if len(expert_labels) != num_images:
        raise ValueError(
            f"expert_labels has {len(expert_labels)} entries for {num_images} images; one for each image is needed"
        )
    for labels in expert_labels:
        for name in labels or ():
            if name not in names:
                raise ValueError(f"expert_labels has '{name}'; the config's experts are: {', '.join(names) or 'none'}")
    return [dict(labels or {}) for labels in expert_labels]


def check_expert_labels(labels: Mapping[str, Any], experts: Sequence[ExpertFields], sample: str) -> None:
    """
    Checks the labels of one image.

    Args:
        labels (`dict`): the label of each expert by name; `None` if the label is missing.
        experts: the configured experts, from [`read_experts`].
        sample (`str`): the name of the image in error messages.

    Raises:
        ValueError, TypeError: if a label is wrong. The message names the expert, the sample and what is accepted.
    """
    for expert in experts:
        label = labels.get(expert.name)
        if label is None:
            continue
        try:
            if expert.is_features:
                read_vectors(label, expert)
            elif expert.is_dense:
                read_values(label, expert)
            else:
                read_ids(label, expert)
                read_items(label, expert)
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix(f"{expert.name} label ")
            raise type(error)(f"{expert.name} label of {sample} {reason}") from error


# ---- the parts of one label ----


def label_parts(label: Any, is_dense: bool) -> dict[str, Any]:
    """
    The parts of a label: `values` of a dense expert, with `low` and `high` for a grid of vectors; `ids` of a label
    expert, with `classes`, or `features` and `words`. A bare map stands for its `values` or `ids`.
    """
    return dict(label) if isinstance(label, Mapping) else {"values" if is_dense else "ids": label}


def read_values(label: Any, expert: ExpertFields) -> np.ndarray:
    """The map of a dense label as (C, H, W) uint8."""
    name, channels = expert.name, expert.channels
    values = _values_of_8_bits(_part(label, "values", expert), name)
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and values.shape[-1] == channels:
        values = values.transpose(2, 0, 1)
    if values.ndim != 3:
        raise ValueError(f"{name} label has shape {values.shape}; (H, W), (H, W, C) or (C, H, W) is accepted")
    if len(values) != channels:
        found = values.shape[0] if values.shape[0] < values.shape[-1] else values.shape[-1]
        raise ValueError(f"{name} label has {found} channels; the config's expert '{name}' has {channels}")
    return values


def read_vectors(label: Any, expert: ExpertFields) -> np.ndarray:
    """
    The vectors of a grid as (C, h, w) float32. A label is `{"values": (h, w, C) uint8, "low": (groups,), "high":
    (groups,)}`: 0 to 255 stand for `low` to `high` of the channel's group. All groups have the same size.
    """
    name, channels = expert.name, expert.channels
    if not isinstance(label, Mapping) or any(label.get(part) is None for part in ("values", "low", "high")):
        raise ValueError(f"{name} label is not {{'values': (h, w, {channels}), 'low': (groups,), 'high': (groups,)}}")
    values = _values_of_8_bits(label["values"], name)
    if values.ndim != 3 or values.shape[2] != channels:
        raise ValueError(f"{name} label has values of shape {values.shape}; (h, w, {channels}) is needed")
    low, high = (np.asarray(label[part], np.float32) for part in ("low", "high"))
    if low.ndim != 1 or low.shape != high.shape or not low.size or channels % low.size:
        raise ValueError(
            f"{name} label has low of shape {low.shape} and high of shape {high.shape}; one number for each group is "
            f"needed, and the groups share the {channels} channels equally"
        )
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"{name} label has NaN or inf in low or high; finite numbers are accepted")
    low, high = (np.repeat(bound, channels // low.size) for bound in (low, high))
    return (low + values.astype(np.float32) * ((high - low) / 255)).transpose(2, 0, 1)


def grid_side(expert_size: int) -> int:
    """The side of a grid of vectors among maps of `expert_size`: one vector for 16 pixels."""
    return max(1, expert_size // 16)


def read_ids(label: Any, expert: ExpertFields) -> np.ndarray:
    """The map of ids as (H, W) uint8; see [`ids_of_8_bits`]."""
    name = expert.name
    ids = ids_of_8_bits(_to_array(_part(label, "ids", expert), name, "ids"), f"{name} label")
    if ids.ndim == 3 and 1 in (ids.shape[0], ids.shape[-1]):
        ids = ids[0] if ids.shape[0] == 1 else ids[..., 0]
    if ids.ndim != 2:
        raise ValueError(f"{name} label has ids of shape {ids.shape}; one id for each pixel, (H, W), is needed")
    return np.ascontiguousarray(ids)


def read_items(label: Any, expert: ExpertFields) -> np.ndarray | None:
    """The class of each instance, or the features of each word; `None` if the ids are classes."""
    if "classes" in expert.tensor_suffixes:
        return _instance_classes(label["classes"], expert)
    return _word_features(label, expert) if "features" in expert.tensor_suffixes else None


def _part(label: Any, part: str, expert: ExpertFields) -> Any:
    """Returns one part of a label, and checks that all parts are there."""
    others = expert.tensor_suffixes[1:]
    if others and not isinstance(label, Mapping):
        raise ValueError(f"{expert.name} label is a bare map; {{'ids': map, '{others[0]}': …}} is needed")
    parts = label_parts(label, expert.is_dense)
    missing = [key for key in (part, *others) if parts.get(key) is None]
    if missing:
        keys = ", ".join(map(str, parts)) or "none"
        raise ValueError(f"{expert.name} label has no '{missing[0]}'; its keys are: {keys}")
    return parts[part]


def _instance_classes(values: Any, expert: ExpertFields) -> np.ndarray:
    """(number of instances,) int64"""
    name, num_classes = expert.name, expert.num_classes
    classes = np.asarray(values)
    if classes.ndim != 1 or (classes.size and classes.dtype.kind not in "iu"):
        raise ValueError(f"{name} label has 'classes' that are not a list of class numbers: {classes!r}")
    if classes.size and classes.min() < 0:
        raise ValueError(f"{name} label has the class {classes.min()}; class numbers start at 0")
    if classes.size and num_classes is not None and classes.max() >= num_classes:
        raise ValueError(
            f"{name} label has the class {classes.max()}; the config's expert '{name}' has {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )
    return classes.astype(np.int64)


def _word_features(label: Mapping[str, Any], expert: ExpertFields) -> np.ndarray:
    """(number of words, channels) float32"""
    name, channels = expert.name, expert.channels
    features = np.asarray(label["features"], np.float32)
    if features.size == 0:
        features = features.reshape(0, channels)
    if features.ndim != 2 or features.shape[1] != channels:
        raise ValueError(
            f"{name} label has features of shape {features.shape}; (number of words, {channels}) is needed"
        )
    if not np.isfinite(features).all():
        raise ValueError(f"{name} label has NaN or inf in its features; accepted are finite numbers")
    words = label.get("words")
    if words is not None and len(words) != len(features):
        raise ValueError(f"{name} label has {len(words)} words and {len(features)} features; they must be equal")
    return features


def ids_of_8_bits(ids: np.ndarray, name: str) -> np.ndarray:
    """
    Converts a map of ids from any integer type to uint8. Negative ids, 255 and larger ids become 255, background.

    Args:
        ids (`np.ndarray`): of any shape.
        name (`str`): the name of the map in the error message.

    Raises:
        ValueError: if they are not integers.
    """
    if ids.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has {ids.dtype} ids; integers are accepted; {BACKGROUND} and negative ones are background"
        )
    if ids.dtype == np.uint8:
        return ids
    return np.where((ids < 0) | (ids > BACKGROUND), BACKGROUND, ids).astype(np.uint8)


def _values_of_8_bits(values: Any, name: str) -> np.ndarray:
    values = _to_array(values, name, "values")
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{name} label has NaN or inf; 8-bit integers, 0 to 255, are accepted")
    if values.dtype.kind not in "iub":
        raise ValueError(f"{name} label has {values.dtype} values; 8-bit integers, 0 to 255, are accepted")
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"{name} label has values from {values.min()} to {values.max()}; 0 to 255 is accepted")
    return values.astype(np.uint8)


def _to_array(values: Any, name: str, part: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
    elif isinstance(values, Image.Image):
        values = np.asarray(values)
    elif not isinstance(values, np.ndarray):
        raise TypeError(
            f"{name} label has {part} of type {type(values).__name__}; a NumPy array, a torch tensor or a PIL image "
            "is accepted"
        )
    if values.size == 0:
        raise ValueError(f"{name} label has an empty map: its shape is {values.shape}")
    return values
