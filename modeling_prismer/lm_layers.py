"""The trained parts of a PrismerLM: experts, projections into the language model, and gated cross-attention."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_prismer_lm import PrismerExpertsConfig, PrismerLMConfig
from .image_features import VisibleImages, resize_grid
from .imitation import ImitatingExpertsMixin, ImitationOutput
from .layers import PrismerAttention, PrismerLayerNorm, PrismerMLP


class PrismerLMQuestion(nn.Module):
    """Lets a question change the resampler's latents, through a gate that starts at zero."""

    def __init__(self, config: PrismerExpertsConfig, question_size: int):
        super().__init__()
        self.layer_norm = PrismerLayerNorm(question_size, eps=config.layer_norm_eps)
        self.attn = PrismerAttention(config, config.resampler_attention_heads, 0.0, question_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, latents: torch.Tensor, questions: torch.Tensor, question_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latents (`torch.FloatTensor` of shape `(rows, num_latents, width)`)
            questions (`torch.FloatTensor` of shape `(rows, length, question_size)`): embeddings of the tokens.
            question_mask (`torch.BoolTensor` of shape `(rows, length)`): which tokens belong to the question.

        Returns:
            `torch.FloatTensor` of shape `(rows, num_latents, width)`.
        """
        mask = torch.zeros_like(question_mask, dtype=latents.dtype).masked_fill(
            ~question_mask, torch.finfo(latents.dtype).min
        )
        states = self.layer_norm(questions.to(latents.dtype))
        attn_output, _ = self.attn(latents, attention_mask=mask[:, None, None], states=states)
        return latents + self.gate.tanh() * attn_output


class PrismerLMExperts(ImitatingExpertsMixin, nn.Module):
    """
    The experts' stems, position embeddings of their own, and the resampler. `forward` runs the stems.

    Imitated experts are predicted from the features of the frozen encoders, `patch_channels` wide: encoders are
    arbitrary, run without gradients, and their features may come from a file, so that no adaptor can be inside them.
    """

    def __init__(
        self, config: PrismerExpertsConfig, question_size: int | None = None, patch_channels: int | None = None
    ):
        super().__init__()
        self.config = config
        self.imitation_sizes = (patch_channels, question_size)
        self.init_experts(config)
        self.position_embedding = nn.Parameter(torch.empty(config.grid_size**2, config.hidden_size))
        if question_size is not None:
            self.question = PrismerLMQuestion(config, question_size)

    def expert_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        return resize_grid(self.position_embedding[None], grid)[0]

    def imitate(self, patches: torch.Tensor, *args: Any, **kwargs: Any) -> ImitationOutput:
        if self.imitation.grid_size is None:
            patches = resize_grid(patches, (self.config.grid_size,) * 2)
        return self.imitation(patches, None, *args, **kwargs)

    def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.embed_experts(*args)


class PrismerLMProjection(nn.Module):
    """
    Two layers into the language model's width. The output starts at the scale of its word embeddings in prefix fusion,
    and at 1 for the gated blocks.
    """

    def __init__(self, config: PrismerLMConfig, input_size: int):
        super().__init__()
        inner_size = config.projector_hidden_size or config.hidden_size
        self.fc1 = nn.Linear(input_size, inner_size)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(inner_size, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.feature_scale = config.feature_scale if config.fusion == "prefix" else 1.0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc2(self.activation(self.fc1(features.to(self.norm.weight.dtype)))))


class PrismerLMGatedBlock(nn.Module):
    """
    Flamingo's block before a decoder layer: cross-attention to the images' features and an MLP, each behind a tanh
    gate that starts at zero. What they add is relative to the root mean square of each token's hidden states, which
    grows from layer to layer: a frozen language model would not notice anything smaller.
    """

    def __init__(self, config: PrismerLMConfig, index: int):
        super().__init__()
        text_config = config.get_text_config(decoder=True)
        size = text_config.hidden_size
        self.index = index
        self.layer_norm = PrismerLayerNorm(size)
        self.cross_attn = PrismerAttention(text_config, text_config.num_attention_heads, layer_idx=index)
        self.mlp_layer_norm = PrismerLayerNorm(size)
        self.mlp = PrismerMLP(size, config.cross_attention_intermediate_size or 4 * size, "gelu")
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, images: VisibleImages) -> torch.Tensor:
        residual = hidden_states
        hidden_states = residual.to(self.attn_gate)  # the language model may run in another precision
        attn_output, _ = self.cross_attn(
            self.layer_norm(hidden_states),
            attention_mask=None if images.mask is None else images.mask.to(hidden_states),
            keys_values=images.keys_values(self.cross_attn, hidden_states),
        )
        scale = hidden_states.pow(2).mean(dim=-1, keepdim=True).sqrt()
        hidden_states = hidden_states + scale * self.attn_gate.tanh() * attn_output
        hidden_states = hidden_states + scale * self.mlp_gate.tanh() * self.mlp(self.mlp_layer_norm(hidden_states))
        hidden_states = hidden_states.to(residual)
        if images.sees_image is None:
            return hidden_states
        return torch.where(images.sees_image.to(residual.device), hidden_states, residual)


class PrismerLMCrossBlocks(nn.ModuleDict):
    """The gated blocks by the numbers of their layers. `reached` tells that images have come to a layer."""

    reached = False


class CrossAttend:
    """Forward pre-hook of a decoder layer: takes `visible_images` out of its arguments and runs the layer's block."""

    def __init__(self, blocks: PrismerLMCrossBlocks, index: int):
        self.blocks = blocks  # not the layer's own: peft and FSDP put wrappers in its place
        self.index = str(index)

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        images = kwargs.pop("visible_images", None)
        if images is None:
            return args, kwargs
        if not self.blocks.reached:
            self.blocks.reached = True
        if self.index in self.blocks:
            block = self.blocks[self.index]
            if args:
                args = (block(args[0], images), *args[1:])
            else:
                kwargs["hidden_states"] = block(kwargs["hidden_states"], images)
        return args, kwargs
