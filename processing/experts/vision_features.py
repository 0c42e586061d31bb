"""The expert for features: the last layer of any vision encoder of transformers or timm, as a grid of vectors."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .look import ExpertLook
from .pretrained import KnownModel, PretrainedExpert


MAX_PREFIX = 16  # the most tokens in front of the patches: class tokens and registers


class VisionFeatures(PretrainedExpert):
    """
    The last layer of a vision encoder, as a grid of vectors: DINOv2, DINOv3, SigLIP, CLIP, C-RADIO, ConvNeXt, and the
    models of timm, which transformers loads too (`"timm/…"`).

    The image is resized to the size of the network's input; nothing is cropped, so that the grid covers the image.
    Tokens in front of the patches, such as class tokens and registers, are left out. The vectors are stored in 8 bits:
    each group of `group_size` channels has its own smallest and largest value in the image. A network reads them
    through a stem of two convolutions.

    Label: `{"values": uint8 (h, w, channels), "low": float32 (groups,), "high": float32 (groups,)}`, where 0 to 255
    stand for `low` to `high`. Weights of the default: 22 million parameters, 88 MB, Apache-2.0.

    Args:
        model_id (`str`, *optional*, defaults to `"facebook/dinov2-small"`): Hub id or folder of an `AutoModel`.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        width (`int`, *optional*): length of a vector, the expert's `channels`. By default the configuration says it.
        group_size (`int`, *optional*, defaults to 16):
            Channels in a group. A smaller divisor of `channels` is used if it does not divide them.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import VisionFeatures

    >>> expert = VisionFeatures("facebook/dinov2-small", width=384)  # loaded when it first runs
    >>> expert.description
    {'name': 'features', 'kind': 'features', 'channels': 384}
    ```
    """

    type = "vision_features"
    name, kind = "features", "features"
    look = ExpertLook("Features", "what a vision encoder finds alike")
    model_id = "facebook/dinov2-small"
    license = "apache-2.0"
    size_in_bytes = 88_000_000
    source = "transformers.AutoModel"
    auto_model = "AutoModel"
    known_models = {
        "facebook/dinov2-small": KnownModel("apache-2.0", 88_000_000),
        "nvidia/C-RADIOv4-H": KnownModel("nvidia-open-model-license", 2_607_000_000),
    }

    def __init__(
        self,
        model_id: str | None = None,
        image_processor: dict[str, Any] | None = None,
        width: int | None = None,
        group_size: int = 16,
    ):
        if group_size < 1 or (width is not None and width < 1):
            raise ValueError(f"width is {width}, group_size {group_size}; at least 1 is needed")
        super().__init__(model_id, image_processor)
        self.width = width
        self.group_size = group_size

    @property
    def channels(self) -> int:
        return _width(self.model_config) if self.width is None else self.width

    def load_model(self) -> torch.nn.Module:
        model = super().load_model()
        see_the_whole_image(self._image_processor)
        return getattr(model, "vision_model", model)  # CLIP and SigLIP have a text model, too

    def run(self, images: list[Image.Image]) -> list[dict[str, np.ndarray]]:
        labels: list[Any] = [None] * len(images)
        for indices, inputs in self.prepared(images):
            outputs = self.forward({"pixel_values": inputs["pixel_values"]})
            grids = as_grid(outputs.last_hidden_state.float(), inputs["pixel_values"].shape[2:])
            for index, grid in zip(indices, grids):  # (h, w, channels)
                labels[index] = quantized(grid.cpu().numpy(), self.group_size)
        return labels


def see_the_whole_image(image_processor: Any) -> None:
    """Replaces the centre crop of an image processor by a resize to the same size."""
    if hasattr(image_processor, "val_transforms"):  # of timm
        from timm.data import create_transform

        config = {**image_processor.data_config, "crop_pct": 1.0, "crop_mode": "squash"}
        image_processor.val_transforms = create_transform(**config, is_training=False)
    elif getattr(image_processor, "do_center_crop", False):
        image_processor.do_center_crop = False
        image_processor.size = image_processor.crop_size


def as_grid(hidden_states: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """
    Lays the tokens of patches on their grid.

    Args:
        hidden_states (`torch.FloatTensor`):
            `(batch, prefix + patches, channels)` from a transformer or `(batch, channels, h, w)` from a convolutional
            network.
        size (`tuple[int, int]`): height and width of the network's input.

    Returns:
        `torch.FloatTensor` of shape `(batch, h, w, channels)`.

    Raises:
        ValueError: if no size of patches fits the number of tokens.
    """
    if hidden_states.ndim == 4:
        return hidden_states.permute(0, 2, 3, 1)
    number, (height, width) = hidden_states.shape[1], size
    for patch in range(1, min(height, width) + 1):
        rows, columns = height // patch, width // patch
        fits = height % patch == width % patch == 0
        if fits and 0 <= number - rows * columns <= MAX_PREFIX:
            return hidden_states[:, number - rows * columns :].unflatten(1, (rows, columns))
    raise ValueError(f"{number} tokens for an image of {width}×{height} pixels lie on no grid of square patches")


def quantized(vectors: np.ndarray, group_size: int) -> dict[str, np.ndarray]:
    """
    Stores vectors in 8 bits.

    Args:
        vectors (`np.ndarray` of shape `(h, w, channels)`): float.
        group_size (`int`):
            Channels that share their range; a smaller divisor of `channels` if it does not divide them.

    Returns:
        `dict`: `values` uint8 (h, w, channels), and `low` and `high` float32 (groups,).

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import quantized

    >>> label = quantized(np.array([[[0.0, 2.0, -1.0, 1.0]]]), group_size=2)
    >>> label["values"].tolist(), label["low"].tolist(), label["high"].tolist()
    ([[[0, 255, 0, 255]]], [0.0, -1.0], [2.0, 1.0])
    ```
    """
    height, width, channels = vectors.shape
    size = next(size for size in range(min(group_size, channels), 0, -1) if channels % size == 0)
    grouped = vectors.astype(np.float32).reshape(height * width, channels // size, size)
    low, high = grouped.min(axis=(0, 2)), grouped.max(axis=(0, 2))
    spread = np.maximum(high - low, 1e-12)[:, None]
    codes = np.round((grouped - low[:, None]) / spread * 255).clip(0, 255).astype(np.uint8)
    return {"values": codes.reshape(height, width, channels), "low": low, "high": high}


def _width(config: Any) -> int:
    """The length of the vectors in the last layer, from a model's configuration."""
    config = getattr(config, "vision_config", config)
    for name in ("hidden_size", "embed_dim", "num_features"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    if getattr(config, "hidden_sizes", None):
        return config.hidden_sizes[-1]
    raise ValueError(f"the configuration of {config.model_type} does not say how long its vectors are; give width")
