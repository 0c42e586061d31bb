"""Experts for edges: weight-free Canny, and DexiNed, the expert of the published checkpoints."""

from functools import partial

import numpy as np
import torch
from PIL import Image

from .base import Expert, hub_file, load_network, read_weights, size_within
from .look import ExpertLook
from .pretrained import autocast, place


EDGES = ExpertLook(
    "Edges",
    "where outlines are, dark on white",
    ends=("outline", "no outline"),
    is_grey=True,
    paints=(("outline", 0), ("no outline", 255)),
)


class CannyEdges(Expert):
    """
    Edges by Canny's detector, from kornia and scipy. It has no weights and needs no download.

    The map is 0 on an edge and 255 elsewhere: dark lines on white, like the maps of DexiNed in the published data, so
    that either expert can replace the other. Edges are found in the image reduced to `max_pixels`, and the map is
    enlarged bilinearly to the image's size. Without that, the thin lines of a large image would break when the map is
    reduced to 224×224 by nearest neighbour.

    Label: uint8 (height, width). Weights: none.

    Args:
        low_threshold (`float`, *optional*, defaults to 0.1):
            Magnitude of the Sobel gradient, of grey values in [0, 1], above which a pixel continues an edge.
        high_threshold (`float`, *optional*, defaults to 0.2):
            Magnitude above which a pixel starts an edge.
        sigma (`float`, *optional*, defaults to 1.0):
            Standard deviation of the Gaussian blur before edges are found, in pixels.
        kernel_size (`int`, *optional*, defaults to 5):
            Side of the blur's kernel in pixels, odd.
        max_pixels (`int`, *optional*, defaults to 65536):
            Number of pixels (256×256) to which larger images are reduced; `None` keeps every image's own size.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import CannyEdges

    >>> (edges,) = CannyEdges(low_threshold=0.03, high_threshold=0.08)([image])
    >>> edges.shape, edges.dtype, int(edges.min()), int(edges.max())
    ((64, 64), dtype('uint8'), 0, 255)
    ```
    """

    type = "canny"
    name, kind, channels, look = "edge", "dense", 1, EDGES
    license = "none needed: no weights"
    source = "kornia.filters.Canny, scipy.ndimage.binary_propagation"
    batch_size = 32

    def __init__(
        self,
        low_threshold: float = 0.1,
        high_threshold: float = 0.2,
        sigma: float = 1.0,
        kernel_size: int = 5,
        max_pixels: int | None = 256 * 256,
    ):
        if not 0 < low_threshold <= high_threshold:
            raise ValueError(
                f"low_threshold is {low_threshold}, high_threshold {high_threshold}; needed is 0 < low <= high"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; an odd number is needed")
        if max_pixels is not None and max_pixels < 1:
            raise ValueError(f"max_pixels is {max_pixels}; at least 1, or None, is needed")
        self.low_threshold = low_threshold
        self.high_threshold = high_threshold
        self.sigma = sigma
        self.kernel_size = kernel_size
        self.max_pixels = max_pixels

    def load_model(self) -> torch.nn.Module:
        from kornia.filters import Canny

        return Canny(
            self.low_threshold,
            self.high_threshold,
            kernel_size=(self.kernel_size, self.kernel_size),
            sigma=(self.sigma, self.sigma),
            hysteresis=False,  # kornia convolves the whole map once for each pixel of the longest edge
        )

    def run(self, images: list[Image.Image]) -> list[np.ndarray]:
        reduced = []
        for image in images:
            size = size_within(image.size, self.max_pixels)
            reduced.append(image if size == image.size else image.resize(size, Image.Resampling.BICUBIC))
        # One by one on a CPU: it is faster there, and a batch rounds differently, which changes pixels right at a
        # threshold.
        one_by_one = self.device.type == "cpu"
        batches: dict[tuple[int, int] | int, list[int]] = {}
        for index, image in enumerate(reduced):
            batches.setdefault(index if one_by_one else image.size, []).append(index)

        labels: list[np.ndarray] = [np.empty(0)] * len(images)
        for indices in batches.values():
            pixels = np.stack([np.asarray(reduced[index]) for index in indices])
            for index, edges in zip(indices, self._edges(pixels)):
                labels[index] = _enlarge(edges, images[index].size)
        return labels

    def _edges(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (batch, height, width, 3) to uint8 (batch, height, width), 0 on edges."""
        height, width = pixels.shape[1:3]
        pixels = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        # the blur reflects half its kernel at the border, so a smaller image is extended first
        least = self.kernel_size // 2 + 1
        padding = (0, max(0, least - width), 0, max(0, least - height))
        _, edges = self.model(torch.nn.functional.pad(pixels, padding, mode="replicate"))
        edges = edges[:, 0].cpu().numpy()  # 0, 0.5 on weak edges, 1 on strong ones
        kept = np.stack([_continue_edges(own == 1, own > 0) for own in edges])
        return np.where(kept[:, :height, :width], np.uint8(0), np.uint8(255))


class DexiNedEdges(Expert):
    """
    Edges by DexiNed trained on BIPED, the edge expert of the published checkpoints, with its settings.

    The image is resized to 480×480 (bilinear), in blue-green-red order from 0 to 255, minus the mean of the training
    data. The fused map goes through a sigmoid, is stretched to 0..255, inverted (dark lines on white) and resized
    bilinearly to the image's size. On CUDA it runs in half precision unless a `dtype` is set.

    Label: uint8 (height, width). Weights: 35.2 million parameters, 141 MB, MIT licence.

    Args:
        checkpoint (`str`, *optional*):
            A local file of weights, from safetensors or `torch.save`, which is read without unpickling objects. By
            default kornia's copy is taken from the Hub or its cache.
        pretrained (`bool`, *optional*, defaults to `True`):
            `False` gives random weights, for tests.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import DexiNedEdges

    >>> expert = DexiNedEdges()  # loaded when it first runs
    >>> expert.description, expert.license, expert.size_in_bytes
    ({'name': 'edge', 'kind': 'dense', 'channels': 1}, 'mit', 140961380)
    ```
    """

    type = "dexined"
    name, kind, channels, look = "edge", "dense", 1, EDGES
    model_id = "kornia/dexined"
    license = "mit"
    size_in_bytes = 140_961_380
    source = "kornia.models.dexined; weights of xavysp/DexiNed, trained on BIPED"
    file_settings = ("checkpoint",)
    half_on_cuda = True

    filename = "DexiNed_BIPED_10.pth"
    input_size = (480, 480)
    mean = (103.939, 116.779, 123.68)  # blue, green, red

    def __init__(self, checkpoint: str | None = None, pretrained: bool = True):
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self.pretrained = pretrained

    def load_model(self) -> torch.nn.Module:
        from kornia.models.dexined import DexiNed

        if self.checkpoint is None and not self.pretrained:
            return DexiNed(pretrained=False)
        # kornia's own download ignores HF_HUB_OFFLINE
        remedy = "Give a local file, DexiNedEdges(checkpoint=…), or use CannyEdges, which needs no weights"
        weights = read_weights(self.checkpoint or hub_file(self.model_id, self.filename, remedy))
        file = self.checkpoint or self.filename
        return load_network(partial(DexiNed, pretrained=False), weights, file, "DexiNed")

    def place_model(self) -> None:
        place(self.model, self.device, self.running_dtype)

    def run(self, images: list[Image.Image]) -> list[np.ndarray]:
        weight = next(self.model.parameters())
        pixels = np.stack([np.asarray(image.resize(self.input_size, Image.Resampling.BILINEAR)) for image in images])
        pixels = torch.from_numpy(pixels).to(weight.device).permute(0, 3, 1, 2).flip(1).float()  # RGB to BGR
        pixels = pixels - torch.tensor(self.mean, device=weight.device)[:, None, None]
        with autocast(self.device, self.running_dtype):
            edges = self.model(pixels.to(weight.dtype)).float().sigmoid()[:, 0]  # (batch, 480, 480)
        if not edges.isfinite().all():
            raise FloatingPointError(f"edges are not numbers in {weight.dtype}; use to(dtype='float32')")
        low, high = edges.amin((1, 2), keepdim=True), edges.amax((1, 2), keepdim=True)
        edges = 255 - (255 * (edges - low) / (high - low + 1e-12)).byte()
        return [_enlarge(edge_map, image.size) for edge_map, image in zip(edges.cpu().numpy(), images)]


def _continue_edges(strong: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The edges (height, width) that are connected to a strong pixel through any of the 8 neighbours."""
    from scipy.ndimage import binary_propagation

    return binary_propagation(strong, structure=np.ones((3, 3), bool), mask=edges)


def _enlarge(edges: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A uint8 (height, width) map, resized bilinearly to `size`, (width, height)."""
    edge_map = Image.fromarray(edges)
    return np.array(edge_map if edge_map.size == size else edge_map.resize(size, Image.Resampling.BILINEAR))
