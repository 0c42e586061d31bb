"""Experts that take input instead of running: distances from a sensor, and regions that a person marks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...expert_spec import BACKGROUND
from .base import MAX_REGIONS, Expert
from .depth import DepthEstimator
from .look import ExpertLook
from .word_features import HashedNgrams, WordFeatures


class GivenExpert(Expert):
    """
    An expert whose label is made from input of your own instead of the image. Give the input as `expert_labels`, and
    the processor calls [`GivenExpert.label_from`]. Without input, the label is missing. See [`SensorDepth`] and
    [`UserRegions`].

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import GivenExpert

    >>> class Temperature(GivenExpert):
    ...     name, kind, channels = "temperature", "dense", 1
    ...
    ...     def label_from(self, given, image):  # degrees, 0 to 51
    ...         return np.clip(5 * given, 0, 255).astype(np.uint8)

    >>> Temperature().label_from(np.array([[10.0, 20.0]]), image).tolist()
    [[50, 100]]
    ```
    """

    license = "none needed: no weights"
    source = "your own input"
    batch_size = 32

    def label_from(self, given: Any, image: Image.Image) -> Any:
        """
        The label for an image. A finished label is returned as it is.

        Args:
            given: the input, see the class of the expert; or a finished label.
            image (`PIL.Image.Image`): the image.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `label_from`")

    def run(self, images: list[Image.Image]) -> list[None]:
        return [None] * len(images)


class SensorDepth(GivenExpert):
    """
    Depth from distances that a sensor measured, in any unit: 255 is the nearest point, 0 the farthest, and the map is
    linear in the inverse distance, as that of [`DepthEstimator`].

    Pixels without a measurement (0, negative, infinite or not a number) take the value of the nearest pixel with one.

    Label: uint8 (height, width). Input: an array, tensor or image (height, width) of floats, or of integers of more
    than 8 bits, such as millimetres. An 8-bit map is taken for a finished label. It may have another size than the
    image. Weights: none.

    Args:
        near, far (`float`, *optional*):
            The distances that become 255 and 0. By default the smallest and the largest in each map.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import SensorDepth

    >>> distances = np.array([[1000, 2000, 4000, 0]], np.uint16)  # millimetres; the last is unknown
    >>> print(SensorDepth().label_from(distances, image))
    [[255  85   0   0]]
    ```
    """

    type = "sensor_depth"
    name, kind, channels, look = "depth", "dense", 1, DepthEstimator.look

    def __init__(self, near: float | None = None, far: float | None = None):
        for name, value in {"near": near, "far": far}.items():
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"{name} is {value}; a distance above 0 is needed")
        if near is not None and far is not None and near >= far:
            raise ValueError(f"near is {near} and far {far}; near must be the smaller one")
        self.near = near
        self.far = far

    def label_from(self, given: Any, image: Image.Image) -> Any:
        if isinstance(given, Mapping):
            return given
        distances = given.numpy(force=True) if hasattr(given, "numpy") else np.asarray(given)
        if distances.dtype == np.uint8:
            return given
        if distances.ndim != 2 or distances.dtype.kind not in "fiu" or 0 in distances.shape:
            raise ValueError(
                f"'{self.name}' was given {distances.dtype} of shape {distances.shape}; distances (height, width) are "
                "needed"
            )
        distances = distances.astype(np.float64)
        known = np.isfinite(distances) & (distances > 0)
        if not known.any():
            return None
        inverse = 1 / np.where(known, distances, 1)
        high = inverse[known].max() if self.near is None else 1 / self.near
        low = inverse[known].min() if self.far is None else 1 / self.far
        stretched = np.clip((inverse - low) / max(high - low, 1e-12), 0, 1)
        depth = np.round(255 * stretched).astype(np.uint8)
        return depth if known.all() else _fill(depth, known)


class UserRegions(GivenExpert):
    """
    Regions that a person marks, each with a name: boxes, points and masks. They are painted like the words of a text,
    so a network reads where each region is and, through the features of its name, what it is.

    Label: `{"ids": uint8 (height, width), "words": [name, …], "features": float32 (regions, 64)}`, small regions over
    large ones, at most 254. Input: a list of dicts, each with one of these, in pixels of the image, and with a `name`
    (by default `"object"`):

    - `"box"`: left, top, right, bottom;
    - `"point"`: x, y; it is painted as a disc;
    - `"mask"`: bool (height, width), of the image's size.

    Weights: none of its own.

    Args:
        word_features ([`WordFeatures`], *optional*, defaults to [`HashedNgrams`]): The encoder of the names.
        point_radius (`float`, *optional*, defaults to 0.03): radius of a point's disc, as a share of the short side.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import UserRegions

    >>> regions = [{"box": (4, 4, 40, 30), "name": "Red Mug"}, {"point": (50, 50)}]
    >>> label = UserRegions().label_from(regions, image)
    >>> label["words"], label["features"].shape
    (['red mug', 'object'], (2, 64))
    ```
    """

    type = "user_regions"
    name, kind = "regions", "label"
    look = ExpertLook("Regions", "what somebody has marked")
    part_settings = {"word_features": WordFeatures}

    def __init__(self, word_features: WordFeatures | None = None, point_radius: float = 0.03):
        if not 0 < point_radius <= 1:
            raise ValueError(
                f"point_radius is {point_radius}; a share of the short side, above 0 and up to 1, is needed"
            )
        self.word_features = HashedNgrams() if word_features is None else word_features
        self.point_radius = point_radius

    @property
    def channels(self) -> int:
        return self.word_features.channels

    def to(self, device: Any = None, dtype: Any = None) -> "UserRegions":
        self.word_features.to(device, dtype)
        return super().to(device, dtype)

    def unload(self) -> None:
        self.word_features.unload()
        super().unload()

    def label_from(self, given: Any, image: Image.Image) -> Any:
        if isinstance(given, Mapping) and "ids" in given:
            return given
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise ValueError(f"'{self.name}' was given {given!r}; a list of regions is needed")
        if len(given) > MAX_REGIONS:
            raise ValueError(f"'{self.name}' was given {len(given)} regions; at most {MAX_REGIONS} are accepted")
        masks = [self._mask(region, image.size, f"region {index}") for index, region in enumerate(given)]
        ids = np.full((image.height, image.width), BACKGROUND, np.uint8)
        for number in sorted(range(len(masks)), key=lambda number: -int(masks[number].sum())):
            ids[masks[number]] = number
        words = [" ".join(str(region.get("name", "object")).lower().split()) for region in given]
        return {"ids": ids, "words": words, "features": self.word_features(words)}

    def _mask(self, region: Any, size: tuple[int, int], where: str) -> np.ndarray:
        """The pixels of a region, bool (height, width)."""
        kinds = [kind for kind in ("box", "point", "mask") if isinstance(region, Mapping) and kind in region]
        if len(kinds) != 1:
            raise ValueError(f"{where} is {region!r}; a dict with one of 'box', 'point' and 'mask' is needed")
        (kind,) = kinds
        if kind == "mask":
            mask = np.asarray(region["mask"])
            if mask.shape != (size[1], size[0]) or mask.dtype != bool:
                raise ValueError(
                    f"{where} has a mask of {mask.dtype} {mask.shape}; bool of the image's size, "
                    f"{(size[1], size[0])}, is needed"
                )
            return mask
        numbers = [float(number) for number in region[kind]]
        if len(numbers) != (4 if kind == "box" else 2) or not np.isfinite(numbers).all():
            needed = "left, top, right, bottom" if kind == "box" else "x, y"
            raise ValueError(f"{where} has the {kind} {region[kind]!r}; {needed} are needed")
        drawing = Image.new("1", size)
        if kind == "point":
            x, y = numbers
            radius = max(0.5, self.point_radius * min(size))
            ImageDraw.Draw(drawing).ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
        else:
            left, top, right, bottom = numbers
            if right <= left or bottom <= top:
                raise ValueError(f"{where} has the box {region[kind]!r}; right of left and below top are needed")
            ImageDraw.Draw(drawing).rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), fill=1)
        return np.array(drawing)


def _fill(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Gives every unknown pixel of (height, width) the value of the nearest known one."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return values[rows, columns]
