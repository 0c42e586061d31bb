"""Experts for surface normals: models of AutoModelForNormalEstimation, and normals computed from a depth map."""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..expert_labels import label_parts
from .base import Expert, size_within
from .look import ExpertLook
from .pretrained import KnownModel, PretrainedExpert, resize_bilinear, within_aspect


NORMALS = ExpertLook(
    "Surface normals",
    "which way each surface faces",
    legend=(((255, 128, 128), "x"), ((128, 255, 128), "y"), ((128, 128, 255), "z")),
    paints=(
        ("facing us", (128, 128, 255)),
        ("facing up", (128, 255, 128)),
        ("facing left", (0, 128, 128)),
        ("facing right", (255, 128, 128)),
        ("facing down", (128, 0, 128)),
    ),
)


class NormalEstimator(PretrainedExpert):
    """
    Surface normals from a network: (n + 1) / 2 in 8 bits, the three components as red, green and blue.

    The published checkpoints were trained with normals of NLL-AngMF (ScanNet), which transformers does not have. The
    default is the one family of transformers for scenes, TIPSv2 with its head for normals. It was trained indoors
    (NYU Depth V2) and resizes the image to 448×448. The other family, Sapiens2 (`"facebook/sapiens2-normal-0.4b"`), is
    for people. Models differ in the direction of each axis; `signs` reverses axes for a checkpoint that was trained
    with other directions.

    Label: uint8 (height, width, 3). Weights of the default: 110 million parameters, 441 MB, of a file of 632 MB that
    holds two more heads; Apache-2.0.

    Args:
        model_id (`str`, *optional*, defaults to `"google/tipsv2-b14-dpt"`): Hub id or folder.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        signs (`tuple[int, int, int]`, *optional*, defaults to `(1, 1, 1)`):
            1 or -1 for x, y and z: the factor of each component.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import NormalEstimator

    >>> expert = NormalEstimator(signs=(1, -1, 1))  # loaded when it first runs
    >>> expert.description, expert.license
    ({'name': 'normal', 'kind': 'dense', 'channels': 3}, 'apache-2.0')
    ```
    """

    type = "normal_estimator"
    name, kind, channels, look = "normal", "dense", 3, NORMALS
    model_id = "google/tipsv2-b14-dpt"
    license = "apache-2.0"
    size_in_bytes = 441_000_000
    source = "transformers.AutoModelForNormalEstimation"
    auto_model = "AutoModelForNormalEstimation"
    known_models = {
        "google/tipsv2-b14-dpt": KnownModel("apache-2.0", 441_000_000),
        "facebook/sapiens2-normal-0.4b": KnownModel("sapiens2-license", 1_700_000_000),
    }

    def __init__(
        self,
        model_id: str | None = None,
        image_processor: dict[str, Any] | None = None,
        signs: tuple[int, int, int] = (1, 1, 1),
    ):
        super().__init__(model_id, image_processor)
        self.signs = _checked_signs(signs)

    def run(self, images: list[Image.Image]) -> list[np.ndarray]:
        labels: list[Any] = [None] * len(images)
        post_process = self._image_processor.post_process_normal_estimation
        pads = "source_sizes" in inspect.signature(post_process).parameters
        signs = torch.tensor(self.signs, device=self.device)[:, None, None]
        for indices, outputs in self.outputs(images):
            # one at a time: the normals of a large photograph take hundreds of megabytes
            for index, normals in zip(indices, outputs.normals.float()):  # (3, height, width)
                sizes: dict[str, Any] = {"target_sizes": [(images[index].height, images[index].width)]}
                if pads:
                    seen = within_aspect(images[index])
                    sizes["source_sizes"] = [(seen.height, seen.width)]
                    sizes["do_remove_padding"] = bool(self._image_processor.do_pad)
                (result,) = post_process(SimpleNamespace(normals=normals[None]), **sizes)
                labels[index] = to_rgb(result["normals"] * signs)
        return labels


class NormalsFromDepth(Expert):
    """
    Surface normals computed from the depth expert's map. It has no weights and needs no download.

    A pinhole camera places every pixel of the inverse-depth map in space, and the normal is that of the surface
    through its neighbours. x points right, y up and z towards the camera; the map is (n + 1) / 2 in 8 bits. The depth
    map gives distances only up to a scale and a shift, so the camera's angle of view and the ratio of the farthest to
    the nearest distance are settings.

    The expert needs the labels of `"depth"`. In a suite it gets them from the depth expert, which runs first; without
    one it raises an error. An image without a depth map gets no normals.

    Label: uint8 (height, width, 3). Weights: none.

    Args:
        field_of_view (`float`, *optional*, defaults to 60.0):
            Angle in degrees that the long side of the image spans.
        far_to_near (`float`, *optional*, defaults to 8.0):
            Distance of the farthest point divided by the distance of the nearest.
        sigma (`float`, *optional*, defaults to 2.5):
            Standard deviation in pixels of the Gaussian blur that smooths the steps of the 8-bit map.
        max_pixels (`int`, *optional*, defaults to 65536):
            Number of pixels (256×256) to which larger maps are reduced.
        signs (`tuple[int, int, int]`, *optional*, defaults to `(1, 1, 1)`):
            1 or -1 for x, y and z: the factor of each component.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import NormalsFromDepth

    >>> depth = np.tile(np.arange(64, dtype=np.uint8), (64, 1))  # nearer towards the right
    >>> (normals,) = NormalsFromDepth()([image], depth=[depth])
    >>> normals.shape, normals.dtype
    ((64, 64, 3), dtype('uint8'))
    ```
    """

    type = "normals_from_depth"
    name, kind, channels, look = "normal", "dense", 3, NORMALS
    license = "none needed: no weights"
    source = "computed here"
    needs = ("depth",)
    batch_size = 32

    def __init__(
        self,
        field_of_view: float = 60.0,
        far_to_near: float = 8.0,
        sigma: float = 2.5,
        max_pixels: int = 256 * 256,
        signs: tuple[int, int, int] = (1, 1, 1),
    ):
        if not 0 < field_of_view < 180:
            raise ValueError(f"field_of_view is {field_of_view}; an angle between 0 and 180 degrees is needed")
        if far_to_near <= 1:
            raise ValueError(f"far_to_near is {far_to_near}; a number above 1 is needed")
        if sigma < 0 or max_pixels < 1:
            raise ValueError(f"sigma is {sigma} and max_pixels {max_pixels}; at least 0 and 1 are needed")
        self.field_of_view = field_of_view
        self.far_to_near = far_to_near
        self.sigma = sigma
        self.max_pixels = max_pixels
        self.signs = _checked_signs(signs)

    def run(self, images: list[Image.Image], depth: list[Any]) -> list[np.ndarray | None]:
        return [None if own is None else self._normals(own, image) for own, image in zip(depth, images)]

    def _normals(self, depth: Any, image: Image.Image) -> np.ndarray:
        depth = label_parts(depth, is_dense=True)["values"]
        depth = torch.from_numpy(np.array(depth)).to(self.device).float()  # (height, width), or (height, width, 1)
        depth = depth.reshape(1, *depth.shape[:2]) / 255
        width, height = size_within((depth.shape[2], depth.shape[1]), self.max_pixels)
        inverse = resize_bilinear(depth, (width, height))
        inverse = _continued(_blurred(inverse, self.sigma), 1)[0].clamp(min=-0.5 / self.far_to_near)
        # the inverse of a distance between 1 and far_to_near; (height + 2, width + 2)
        z = 1 / (inverse * (1 - 1 / self.far_to_near) + 1 / self.far_to_near)

        # the distance between pixels is that of the image, also for a map of another shape
        long_side = max(image.size)
        focal = 0.5 / math.tan(math.radians(self.field_of_view) / 2)
        columns = torch.arange(-1, width + 1, device=self.device) - (width - 1) / 2
        rows = torch.arange(-1, height + 1, device=self.device) - (height - 1) / 2
        x = z * (columns * (image.width / width / long_side / focal))
        y = -z * (rows * (image.height / height / long_side / focal))[:, None]
        points = torch.stack([x, y, -z])  # (3, height + 2, width + 2); the camera looks along -z

        along = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
        up = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
        normals = torch.nn.functional.normalize(torch.linalg.cross(along, up, dim=0), dim=0)
        signs = torch.tensor(self.signs, device=self.device)[:, None, None]
        return to_rgb(resize_bilinear(normals * signs, image.size))


def _blurred(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blurs (1, height, width) by a Gaussian."""
    from kornia.filters import filter2d_separable, get_gaussian_kernel1d

    if sigma == 0:
        return maps
    reach = math.ceil(2 * sigma)
    kernel = get_gaussian_kernel1d(2 * reach + 1, sigma, device=maps.device, dtype=maps.dtype)
    return filter2d_separable(_continued(maps, reach)[None], kernel, kernel, padding="valid")[0]


def _continued(maps: torch.Tensor, reach: int) -> torch.Tensor:
    """Extends (1, height, width) beyond each border with the slope at the border."""
    for axis in (1, 2):
        places = torch.arange(-reach, maps.shape[axis] + reach, device=maps.device)
        nearest = places.clamp(0, maps.shape[axis] - 1)
        mirrored = (2 * nearest - places).clamp(0, maps.shape[axis] - 1)
        maps = 2 * maps.index_select(axis, nearest) - maps.index_select(axis, mirrored)
    return maps


def to_rgb(normals: torch.Tensor) -> np.ndarray:
    """(3, height, width) in [-1, 1] to uint8 (height, width, 3)."""
    return ((normals + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().cpu().numpy()


def _checked_signs(signs: Any) -> tuple[int, int, int]:
    signs = tuple(signs)
    if len(signs) != 3 or any(sign not in (1, -1) for sign in signs):
        raise ValueError(f"signs is {signs}; three numbers, each 1 or -1, are needed")
    return signs
