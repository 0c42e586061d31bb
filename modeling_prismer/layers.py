"""The layers that the vision encoder, the resampler and the text decoder share: LayerNorm, attention and MLP."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache import image_layer
from .configuration_prismer import PrismerTextConfig, PrismerVisionConfig


class PrismerLayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 and cast back, whatever the type of the weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float32 == self.weight.dtype:
            return super().forward(hidden_states)
        normed = F.layer_norm(
            hidden_states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(hidden_states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = F.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


class PrismerAttention(nn.Module):
    """
    Multi-head attention of `hidden_states` over themselves or over other states of width `key_value_size`.

    The other states are given as `states`, or as projected `keys_values`. They may have one row for each image and so
    fewer rows than the queries. Queries that follow each other (beams, candidates or questions) then share a row.
    """

    def __init__(
        self,
        config: PrismerVisionConfig | PrismerTextConfig,
        num_heads: int,
        dropout: float = 0.0,
        key_value_size: int | None = None,
        is_causal: bool = False,
        layer_idx: int = 0,
    ):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.is_causal = is_causal
        self.layer_idx = layer_idx
        key_value_size = key_value_size or config.hidden_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(key_value_size, config.hidden_size)
        self.v_proj = nn.Linear(key_value_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, length, head_dim)

    def project_keys_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split_heads(self.k_proj(states)), self.split_heads(self.v_proj(states))

    def image_keys_values(
        self, encoder_hidden_states: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of an image, which the cache keeps so that each image is projected once."""
        if cache is None:
            return None
        layer = image_layer(cache, self.layer_idx)
        if encoder_hidden_states is not None and layer.encoder_hidden_states is not encoder_hidden_states:
            key, value = self.project_keys_values(encoder_hidden_states)
            layer.cross_keys_values = key.contiguous(), value.contiguous()  # every step reads them
            layer.encoder_hidden_states = encoder_hidden_states
        return layer.cross_keys_values

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, length, _ = hidden_states.shape
        query = self.split_heads(self.q_proj(hidden_states))
        if keys_values is None:
            keys_values = self.project_keys_values(hidden_states if states is None else states)
        key, value = keys_values
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        images = key.shape[0]
        if images != rows:  # queries of one image side by side: (images, heads, rows_per_image * length, head_dim)
            query = query.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = self.out_proj(attn_output.reshape(rows, length, -1))
        if attn_weights is not None and images != rows:
            attn_weights = attn_weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return attn_output, attn_weights


class PrismerQuickGELU(nn.Module):
    """CLIP's `x · sigmoid(1.702 x)`, written with SiLU so that training keeps one tensor instead of two."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.silu(1.702 * hidden_states) / 1.702


class PrismerMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = PrismerQuickGELU() if hidden_act == "quick_gelu" else ACT2FN[hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


@torch.no_grad()
def init_layer_weights(attention: PrismerAttention, mlp: PrismerMLP, depth: int, is_resampler: bool = False) -> None:
    """Initialises one of `depth` layers as CLIP does."""
    width = attention.config.hidden_size
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc2):
        init.normal_(projection.weight, std=(width * 2 * depth) ** -0.5)
    if is_resampler:
        # Attention scores with a standard deviation of 2 let each latent start on different tokens. With small scores
        # all latents would attend to the mean of all tokens, which hardly differs between images.
        for projection in (attention.q_proj, attention.k_proj):
            init.normal_(projection.weight, std=(2 / width) ** 0.5)
    init.normal_(attention.out_proj.weight, std=width**-0.5)
    init.normal_(mlp.fc1.weight, std=(2 * width) ** -0.5)
