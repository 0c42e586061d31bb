"""Augmentation for training, which moves an image and its expert maps together."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .expert_labels import (
    BACKGROUND,
    ExpertFields,
    grid_side,
    read_experts,
    read_ids,
    read_values,
)


class JointAugmentation:
    """
    Random resized crop, horizontal flip and RandAugment, applied to an image and all its expert maps.

    1. Crop: a rectangle with a share of the image's area in `scale` and an aspect ratio in `ratio`. The image is
       resized to `size` with Pillow's antialiased bicubic filter, the maps to `expert_size` by nearest neighbour. A
       rectangle that does not fit is drawn again. After ten draws, the crop is the largest centred rectangle with an
       accepted ratio, as in [`torchvision.transforms.v2.RandomResizedCrop`].
    2. Flip, with `flip_probability`.
    3. RandAugment (https://arxiv.org/abs/1909.13719): `num_ops` operations in a row, each drawn from these ten. The
       strength is `magnitude / num_magnitude_bins` of the range:

       | operation | range | |
       | --- | --- | --- |
       | shear_x, shear_y | 0 to 0.3, either sign | geometric |
       | translate_x, translate_y | 0 to 0.33 of the width or height, either sign | geometric |
       | rotate | 0° to 30°, either sign | geometric |
       | brightness, sharpness | factors 0.1 to 1.9: 1, which changes nothing, at 5 of 10 | photometric |
       | identity, autocontrast, equalize | | photometric |

       Geometric operations move image and maps by nearest neighbour. Pixels from outside become 0 in the image and in
       dense maps, and 255 (background) in id maps. Photometric operations change only the image.

    All random numbers come from torch's global generator, so `torch.manual_seed` repeats a sample. Values in maps
    never change: ids keep their meaning, and surface normals keep their direction in the original image, even after a
    flip or a rotation.

    Args:
        experts (`list[dict]`):
            The descriptions of the experts, the same list as in [`PrismerConfig`]; an empty list for the image alone.
        size (`tuple[int, int]` or `int`):
            Height and width of the image that the network sees, in pixels.
        expert_size (`int`, *optional*, defaults to 224):
            Side of the expert maps in pixels.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.0)`):
            Bounds of the crop's share of the image's area. The published pre-training used `(0.5, 1.5)`.
        ratio (`tuple[float, float]`, *optional*, defaults to `(3/4, 4/3)`):
            Bounds of the crop's width divided by its height.
        flip_probability (`float`, *optional*, defaults to 0.5):
            Probability of a flip.
        num_ops (`int`, *optional*, defaults to 2):
            Number of RandAugment's operations per sample; 0 switches it off.
        magnitude (`float`, *optional*, defaults to 5):
            Strength of RandAugment's operations, from 0 to `num_magnitude_bins`.
        num_magnitude_bins (`int`, *optional*, defaults to 10):
            The magnitude of the end of an operation's range.

    Raises:
        ValueError: if an argument is outside its bounds.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from modeling_prismer.processing import JointAugmentation

    >>> augmentation = JointAugmentation([{"name": "depth", "kind": "dense", "channels": 1}], size=(480, 480))
    >>> image, labels = augmentation(Image.new("RGB", (640, 400)), {"depth": np.zeros((400, 640), np.uint8)})
    >>> image.size, labels["depth"].shape
    ((480, 480), (224, 224))
    ```
    """

    def __init__(
        self,
        experts: list[dict[str, Any]],
        size: tuple[int, int] | int,
        expert_size: int = 224,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        num_ops: int = 2,
        magnitude: float = 5,
        num_magnitude_bins: int = 10,
    ):
        for name, bounds in (("scale", scale), ("ratio", ratio)):
            if not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"{name} is {bounds}; two numbers above 0 are accepted, the smaller one first")
        self.experts = experts
        self.expert_size = expert_size
        self.transforms = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, ratio, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(flip_probability),
                JointRandAugment(num_ops, magnitude, num_magnitude_bins),
            ]
        )

    def __call__(
        self, image: Image.Image, labels: Mapping[str, Any] | None = None
    ) -> tuple[Image.Image, dict[str, Any] | None]:
        """
        Augments one sample.

        Args:
            image (`PIL.Image.Image`): The image, in mode RGB; see [`load_image`].
            labels (`dict`, *optional*):
                From an expert's name to its label, as [`PrismerImageProcessor`] takes them. Maps of another size are
                stretched over the image.

        Returns:
            The image, RGB of `size`, and labels of the same kinds (`None` if none were given). Their maps are uint8
            arrays, (expert_size, expert_size), or (expert_size, expert_size, channels) for dense experts with several
            channels. Classes, words and features stay the same, and so does `None` for a missing expert.

        Raises:
            TypeError, ValueError: if the image or a label is wrong. The message names it and what is accepted.
        """
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            found = f"a PIL image in mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
            raise TypeError(f"image is {found}; a PIL image in mode RGB is accepted, as load_image returns it")
        experts = {expert.name: expert for expert in read_experts(self.experts)}
        maps = {}
        for name, label in (labels or {}).items():
            if name not in experts:
                raise ValueError(f"labels has '{name}'; the experts are: {', '.join(experts) or 'none'}")
            if label is not None:
                maps[name] = self._lay_over(image, label, experts[name])
        image, maps = self.transforms(image, maps)
        if labels is None:
            return image, None
        return image, {name: _replace_map(label, maps.get(name)) for name, label in labels.items()}

    def _lay_over(self, image: Image.Image, label: Any, expert: ExpertFields) -> "ExpertMap":
        values = read_values(label, expert) if expert.is_dense else read_ids(label, expert)[None]
        values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        side = grid_side(self.expert_size) if expert.is_features else self.expert_size
        return (DenseMap if expert.is_dense else IdMap)(values, (image.height, image.width), side)


def _replace_map(label: Any, expert_map: "ExpertMap | None") -> Any:
    if expert_map is None:
        return None
    values = expert_map.as_subclass(torch.Tensor).numpy()
    values = values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))
    return {**label, "values" if "values" in label else "ids": values} if isinstance(label, Mapping) else values


# ---- RandAugment ----


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# Each operation's strongest value and its coefficients (a, b, c, d, e, f): the new pixel (x, y) comes from the pixel
# (a x + b y + c, d x + e y + f) of the image.
_GEOMETRIC = {
    "shear_x": (0.3, lambda value, height, width: (1, value, 0, 0, 1, 0)),
    "shear_y": (0.3, lambda value, height, width: (1, 0, 0, value, 1, 0)),
    "translate_x": (0.33, lambda value, height, width: (1, 0, value * width, 0, 1, 0)),
    "translate_y": (0.33, lambda value, height, width: (1, 0, 0, 0, 1, value * height)),
    "rotate": (30.0, _rotation),
}

# Each operation's weakest and strongest value, and its function.
_PHOTOMETRIC = {
    "identity": (0.0, 0.0, lambda image, value: image),
    "autocontrast": (0.0, 0.0, lambda image, value: F.autocontrast(image)),
    "equalize": (0.0, 0.0, lambda image, value: F.equalize(image)),
    "brightness": (0.1, 1.9, F.adjust_brightness),
    "sharpness": (0.1, 1.9, F.adjust_sharpness),
}

_OPERATIONS = (*_GEOMETRIC, *_PHOTOMETRIC)


class JointRandAugment(v2.Transform):
    """
    RandAugment for an image and the [`ExpertMap`]s over it. torchvision's own takes images only. See
    [`JointAugmentation`] for the arguments and the operations.
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 5, num_magnitude_bins: int = 10):
        super().__init__()
        if num_ops < 0:
            raise ValueError(f"num_ops is {num_ops}; 0 or more is accepted")
        if not 0 <= magnitude <= num_magnitude_bins or not num_magnitude_bins:
            raise ValueError(f"magnitude is {magnitude}; 0 to num_magnitude_bins={num_magnitude_bins} is accepted")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.num_magnitude_bins = num_magnitude_bins

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = next(F.get_size(inpt) for inpt in flat_inputs if not isinstance(inpt, ExpertMap))
        share = self.magnitude / self.num_magnitude_bins
        operations: list[tuple[str, Any]] = []
        for _ in range(self.num_ops):
            name = _OPERATIONS[int(torch.randint(len(_OPERATIONS), ()))]
            if name in _GEOMETRIC:
                strongest, coefficients = _GEOMETRIC[name]
                value = share * strongest if torch.rand(()) < 0.5 else -share * strongest
                operations.append((name, [float(number) for number in coefficients(value, height, width)]))
            else:
                weakest, strongest, _ = _PHOTOMETRIC[name]
                operations.append((name, weakest + share * (strongest - weakest)))
        return {"operations": operations}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        for name, value in params["operations"]:
            if name in _GEOMETRIC:
                inpt = F.perspective(
                    inpt,
                    None,
                    None,
                    interpolation=v2.InterpolationMode.NEAREST,
                    fill=inpt.fill if isinstance(inpt, ExpertMap) else 0,
                    coefficients=[*value, 0.0, 0.0],
                )
            elif not isinstance(inpt, ExpertMap):
                inpt = _PHOTOMETRIC[name][-1](inpt, value)
        return inpt


# ---- maps as tensors for torchvision's transforms ----


class ExpertMap(tv_tensors.TVTensor):
    """
    A map over an image of another size. torchvision's geometric operations take their parameters in pixels of the
    image, as for bounding boxes, and the map follows at its own resolution.

    Args:
        values (`torch.Tensor`): (channels, height, width) uint8.
        canvas_size (`tuple[int, int]`): height and width of the image.
        expert_size (`int`): side of the map after a resize, whatever the size of the image.
    """

    fill: int
    canvas_size: tuple[int, int]
    expert_size: int

    def __new__(cls, values: torch.Tensor, canvas_size: tuple[int, int], expert_size: int) -> "ExpertMap":
        expert_map = values.as_subclass(cls)
        expert_map.canvas_size = canvas_size
        expert_map.expert_size = expert_size
        return expert_map

    @property
    def pixels_per_image_pixel(self) -> tuple[float, float]:
        """Vertically and horizontally."""
        return self.shape[-2] / self.canvas_size[0], self.shape[-1] / self.canvas_size[1]

    def channels(self) -> list[Image.Image]:
        return [Image.fromarray(channel) for channel in self.as_subclass(torch.Tensor).numpy()]

    def with_channels(self, channels: list[Image.Image], canvas_size: tuple[int, int]) -> "ExpertMap":
        values = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))
        return type(self)(values, canvas_size, self.expert_size)


class DenseMap(ExpertMap):
    """Values of a dense expert, 0 outside."""

    fill = 0


class IdMap(ExpertMap):
    """Ids of a label expert, 255 (background) outside."""

    fill = BACKGROUND


@F.register_kernel(F.resized_crop, ExpertMap)
def _resized_crop(
    expert_map: ExpertMap, top: int, left: int, height: int, width: int, size: list[int], **kwargs: Any
) -> ExpertMap:
    y, x = expert_map.pixels_per_image_pixel
    bounds = expert_map.shape[-1], expert_map.shape[-2]
    box = left * x, top * y, min((left + width) * x, bounds[0]), min((top + height) * y, bounds[1])
    # First all whole pixels that the crop touches, then the exact rectangle in them. For a map of the image's size,
    # this is a crop with Pillow's plain nearest neighbour.
    first_x, first_y = math.floor(box[0]), math.floor(box[1])
    whole = first_x, first_y, math.ceil(box[2]), math.ceil(box[3])
    box = box[0] - first_x, box[1] - first_y, box[2] - first_x, box[3] - first_y
    side = (expert_map.expert_size, expert_map.expert_size)
    channels = [
        channel.crop(whole).resize(side, Image.Resampling.NEAREST, box=box) for channel in expert_map.channels()
    ]
    return expert_map.with_channels(channels, canvas_size=(size[0], size[1]))


@F.register_kernel(F.horizontal_flip, ExpertMap)
def _horizontal_flip(expert_map: ExpertMap) -> ExpertMap:
    flipped = F.horizontal_flip_image(expert_map.as_subclass(torch.Tensor))
    return type(expert_map)(flipped, expert_map.canvas_size, expert_map.expert_size)


@F.register_kernel(F.perspective, ExpertMap)
def _perspective(
    expert_map: ExpertMap, startpoints: None, endpoints: None, coefficients: list[float], **kwargs: Any
) -> ExpertMap:
    y, x = expert_map.pixels_per_image_pixel
    a, b, c, d, e, f, g, h = coefficients
    coefficients = [a, b * x / y, c * x, d * y / x, e, f * y, g / x, h / y]
    # by Pillow, as for the image: it rounds pixels in the same way, and takes a quarter of the time of tensors
    channels = [
        F.perspective(channel, startpoints, endpoints, coefficients=coefficients, **kwargs)
        for channel in expert_map.channels()
    ]
    return expert_map.with_channels(channels, expert_map.canvas_size)


__all__ = ["JointAugmentation"]
