"""
The images of a PrismerLM: patch features of the vision encoders, features for the language model, and the rows of text
that see each image.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .layers import PrismerAttention


@dataclass
class PrismerLMImageFeatures(BaseModelOutputWithPooling):
    """
    Encoded images, from [`PrismerLMForConditionalGeneration.get_image_features`].

    Args:
        pooler_output (`torch.FloatTensor` of shape `(num_images, num_features, hidden_size)`):
            Projected patches and latents, in the language model's width. If the question conditions the resampler, the
            latents are missing until it is known.
        last_hidden_state (`torch.FloatTensor` of shape `(num_images, num_patches, channels)`, *optional*):
            Patch features of the vision encoders on one grid, concatenated along channels.
        expert_tokens (`torch.FloatTensor` of shape `(num_images, num_tokens, width)`, *optional*):
            Output of the experts' stems, if the question conditions the resampler.
        expert_token_mask (`torch.BoolTensor` of shape `(num_images, num_tokens)`, *optional*):
            Which of those tokens there are.

    The attribute `visible` keeps what the text cross-attends to from one step of decoding to the next, `inputs` the
    encoded tensors for an assistant of `generate`, and `missing_experts` which imitated experts each image lacks (see
    [`ImitatingExpertsMixin.find_missing`]).

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    >>> experts = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32}
    >>> config = PrismerLMConfig(experts_config=experts, text_config=LlamaConfig(**sizes), fusion="cross_attention")
    >>> model = PrismerLMForConditionalGeneration(config).eval()
    >>> images = model.get_image_features(depth_values=torch.rand(1, 1, 64, 64))
    >>> images.pooler_output.shape, images.num_images
    (torch.Size([1, 64, 32]), 1)
    ```
    """

    if TYPE_CHECKING:  # most are there wherever they are read
        pooler_output: torch.Tensor
        expert_tokens: torch.Tensor
        visible: "VisibleImages | None"
    else:
        expert_tokens: torch.FloatTensor | None = None
    expert_token_mask: torch.BoolTensor | None = None
    visible = None  # not a field: a new forward pass over a prompt replaces it
    inputs = None
    missing_experts = None

    def copy(self) -> "PrismerLMImageFeatures":
        """The same features, for another prompt."""
        copied = replace(self)
        copied.missing_experts = self.missing_experts
        return copied

    @property
    def num_images(self) -> int:
        return len(self.expert_tokens if self.pooler_output is None else self.pooler_output)


@dataclass
class VisibleImages:
    """
    The images that each row of text cross-attends to.

    Args:
        features (`torch.FloatTensor` of shape `(num_images, num_features, hidden_size)`)
        rows (`torch.LongTensor` of shape `(rows, images per row)`, *optional*):
            Images of each row; without it, rows that follow each other share an image.
        mask (`torch.FloatTensor` of shape `(rows, 1, length, images per row * num_features)`, *optional*):
            Added to the attention scores, so that a token sees its last image only.
        sees_image (`torch.BoolTensor` of shape `(rows, length, 1)`, *optional*): whether a token has seen an image.
        projected (`dict`): keys and values of each layer, projected once for each image; not kept in training.
    """

    features: torch.Tensor
    rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sees_image: torch.Tensor | None = None
    projected: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def keys_values(self, attention: PrismerAttention, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of one layer, from features of the type and on the device of `like`."""
        layer = attention.layer_idx or 0
        if layer in self.projected:
            key, value = self.projected[layer]
        else:
            key, value = attention.project_keys_values(self.features.to(like))
            if not torch.is_grad_enabled():
                self.projected[layer] = key.contiguous(), value.contiguous()
        if self.rows is not None:  # (rows, heads, images per row * num_features, head_dim)
            rows = self.rows.to(key.device)
            key, value = (states[rows].transpose(1, 2).flatten(2, 3) for states in (key, value))
        return key, value

    def after_prompt(self) -> "VisibleImages":
        """The view of the tokens after the prompt: each row sees its last image."""
        last = None if self.rows is None else self.rows[:, -1:]
        sees_image = None if self.sees_image is None else self.sees_image[:, -1:]
        return VisibleImages(self.features, last, sees_image=sees_image, projected=self.projected)

    def repeat(self, repeats: int) -> "VisibleImages":
        """The same for every row `repeats` times."""

        def repeated(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(repeats, dim=0)

        rows, mask, sees_image = map(repeated, (self.rows, self.mask, self.sees_image))
        return VisibleImages(self.features, rows, mask, sees_image, self.projected)


def see_images(features: torch.Tensor, rows: list[list[int]], mask: torch.Tensor) -> VisibleImages:
    """
    Lets each token cross-attend to its last image.

    Args:
        features (`torch.FloatTensor` of shape `(num_images, num_features, hidden_size)`)
        rows (`list[list[int]]`): images of each row of text.
        mask (`torch.BoolTensor` of shape `(rows, length)`):
            Placeholders, one for each image. Without any, every token sees the one image of its row.
    """
    if not mask.any():
        return VisibleImages(features)
    seen = mask.cumsum(dim=1)  # (rows, length): images so far
    sees_image = (seen > 0)[..., None]
    most = max(map(len, rows))
    if most == 1 and all(rows):
        return VisibleImages(features, sees_image=sees_image)
    # A row with fewer images repeats its last one, which then is the last of all.
    padded = [row + row[-1:] * (most - len(row)) if row else [0] * most for row in rows]
    number = torch.arange(1, most + 1, device=seen.device)  # (images per row,)
    visible = seen.clamp(min=1)[..., None] == number  # (rows, length, images per row)
    scores = torch.zeros(visible.shape, device=seen.device).masked_fill(~visible, torch.finfo(features.dtype).min)
    scores = scores.repeat_interleave(features.shape[1], dim=-1)[:, None]
    return VisibleImages(features, torch.tensor(padded, device=features.device), scores, sees_image)


def assign_images(counts: list[int], num_images: int) -> list[list[int]]:
    """
    The images of each row of text. Rows that follow each other share the images of a prompt, such as the questions
    about one image or its beams: all prompts have as many rows as it takes to have each image in one prompt.

    Args:
        counts (`list[int]`): images in each row.
        num_images (`int`): images in all.

    Raises:
        ValueError: if the rows do not fit the images.
    """
    shared = max(1, sum(counts) // num_images)  # rows of each prompt
    first_rows = counts[::shared]
    if sum(first_rows) != num_images:
        raise ValueError(f"the prompts have placeholders for {sum(first_rows)} images; {num_images} images are given")
    if counts != [count for count in first_rows for _ in range(shared)]:
        raise ValueError(f"rows of text with {counts} images do not fit {num_images} images that {shared} rows share")
    rows, start = [], 0
    for count in first_rows:
        rows += [list(range(start, start + count))] * shared
        start += count
    return rows


def pad_types(mm_token_type_ids: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens that `mm_token_type_ids` lacks at the end are text."""
    return F.pad(mm_token_type_ids, (0, max(0, length - mm_token_type_ids.shape[1])))


def pixel_names(number: int) -> list[str]:
    """Names of the images' tensors, one for each vision encoder: `pixel_values`, `pixel_values_1`, …"""
    return ["pixel_values", *(f"pixel_values_{index}" for index in range(1, number))][:number]


def num_channels(encoder: PreTrainedModel) -> int:
    """Channels of a vision encoder's patch features."""
    if encoder.config.model_type == "timm_wrapper":
        return encoder.timm_model.num_features
    return encoder.config.hidden_size


def is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def resize_grid(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of `(batch, side * side, channels)` to `(batch, grid[0] * grid[1], channels)`."""
    side = math.isqrt(features.shape[1])
    if (side, side) == tuple(grid):
        return features
    features = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(features.float(), size=grid, mode="bilinear", align_corners=False)
    return resized.to(features.dtype).flatten(2).transpose(1, 2)


def patch_features(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    The patch features of a vision encoder, without class and register tokens, which all encoders put in front:
    `(batch, side * side, channels)`.
    """
    config = encoder.config
    patch_size = getattr(config, "patch_size", None)
    pixel_values = pixel_values.to(encoder.dtype)
    if config.model_type == "siglip2_vision_model":  # takes patches, of images of any shape
        side = pixel_values.shape[-1] // patch_size
        patches = pixel_values.unflatten(3, (side, patch_size)).unflatten(2, (side, patch_size))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (batch, side * side, pixels * 3)
        mask = patches.new_ones(patches.shape[:2], dtype=torch.int32)
        shapes = torch.tensor([[side, side]], device=patches.device).expand(patches.shape[0], -1)
        return encoder(patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
    if config.model_type == "timm_wrapper":
        features = encoder(pixel_values, do_pooling=False).last_hidden_state
        if features.ndim == 4:  # of a convolutional network: (batch, channels, height, width)
            return features.flatten(2).transpose(1, 2)
    else:
        features = encoder(pixel_values=pixel_values).last_hidden_state
    side = pixel_values.shape[-1] // patch_size if isinstance(patch_size, int) else math.isqrt(features.shape[1])
    return features[:, -(side**2) :]
