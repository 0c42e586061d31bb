"""
PrismerLM: frozen vision encoders and experts in front of any language model of transformers.

The file reads from the smallest module to the model: the experts, the projection, the gated cross-attention block, and
the model. The experts' stems and the resampler are in expert_stems.py, the features of images and the text that they
belong to in image_features.py, and building from backbones in lm_backbones.py.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .adapter_targets import register_adapter_targets
from .cache import CACHE_NAME, accept_past_key_values
from .configuration_prismer_lm import PrismerExpertsConfig, PrismerLMConfig
from .expert_editing import ExpertEditingMixin
from .expert_spec import ExpertSpec
from .expert_stems import (
    ExpertsMixin,
    gather_expert_inputs,
    init_expert_weights,
    look_up,
    pop_expert_inputs,
)
from .image_features import (
    PrismerLMImageFeatures,
    VisibleImages,
    assign_images,
    is_trained,
    num_channels,
    patch_features,
    pixel_names,
    resize_grid,
    see_images,
)
from .layers import PrismerAttention, PrismerLayerNorm, PrismerMLP
from .lm_backbones import build_from_backbones, load_trained, save_trained
from .ranking import RankingMixin


# ---- modules ----


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


class PrismerLMExperts(ExpertsMixin, nn.Module):
    """The experts' stems, position embeddings of their own, and the resampler. `forward` runs the stems."""

    def __init__(self, config: PrismerExpertsConfig, question_size: int | None = None):
        super().__init__()
        self.config = config
        self.init_experts(config)
        self.position_embedding = nn.Parameter(torch.empty(config.grid_size**2, config.hidden_size))
        if question_size is not None:
            self.question = PrismerLMQuestion(config, question_size)

    def expert_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        return resize_grid(self.position_embedding[None], grid)[0]

    def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.embed_experts(*args)


class PrismerLMProjection(nn.Module):
    """Two layers into the language model's width. The output starts at the scale of its word embeddings."""

    def __init__(self, config: PrismerLMConfig, input_size: int):
        super().__init__()
        inner_size = config.projector_hidden_size or config.hidden_size
        self.fc1 = nn.Linear(input_size, inner_size)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(inner_size, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.feature_scale = config.feature_scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc2(self.activation(self.fc1(features.to(self.norm.weight.dtype)))))


class PrismerLMGatedBlock(nn.Module):
    """
    Flamingo's block before a decoder layer: cross-attention to the images' features and an MLP, each behind a tanh
    gate that starts at zero.
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

    def forward(self, hidden_states: torch.Tensor, images: "VisibleImages") -> torch.Tensor:
        residual = hidden_states
        hidden_states = residual.to(self.attn_gate)  # the language model may run in another precision
        attn_output, _ = self.cross_attn(
            self.layer_norm(hidden_states),
            attention_mask=None if images.mask is None else images.mask.to(hidden_states),
            keys_values=images.keys_values(self.cross_attn, hidden_states),
        )
        hidden_states = hidden_states + self.attn_gate.tanh() * attn_output
        hidden_states = hidden_states + self.mlp_gate.tanh() * self.mlp(self.mlp_layer_norm(hidden_states))
        hidden_states = hidden_states.to(residual)
        return hidden_states if images.sees_image is None else torch.where(images.sees_image, hidden_states, residual)


class CrossAttend:
    """Forward pre-hook of a decoder layer: takes `visible_images` out of its arguments and runs the layer's block."""

    def __init__(self, blocks: nn.ModuleDict, index: int):
        self.blocks = blocks  # not the layer's own: peft and FSDP put wrappers in its place
        self.index = str(index)

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        images = kwargs.pop("visible_images", None)
        if images is not None and self.index in self.blocks:
            block = self.blocks[self.index]
            if args:
                args = (block(args[0], images), *args[1:])
            else:
                kwargs["hidden_states"] = block(kwargs["hidden_states"], images)
        return args, kwargs


# ---- outputs ----


@dataclass
class PrismerLMModelOutput(BaseModelOutputWithPast):
    """
    Output of [`PrismerLMModel`]: that of the language model without its head, and `image_outputs`
    ([`PrismerLMImageFeatures`], *optional*), which can be given to another call as `encoder_outputs`.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from modeling_prismer import PrismerLMConfig, PrismerLMModel

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    >>> experts = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32}
    >>> config = PrismerLMConfig(experts_config=experts, text_config=LlamaConfig(**sizes), fusion="cross_attention")
    >>> model = PrismerLMModel(config).eval()
    >>> outputs = model(torch.tensor([[5, 6, 7]]), depth_values=torch.rand(1, 1, 64, 64))
    >>> outputs.last_hidden_state.shape, outputs.image_outputs.pooler_output.shape
    (torch.Size([1, 3, 32]), torch.Size([1, 64, 32]))
    ```
    """

    image_outputs: PrismerLMImageFeatures | None = None


@dataclass
class PrismerLMCausalLMOutput(CausalLMOutputWithPast):
    """
    Output of [`PrismerLMForConditionalGeneration`]: that of the language model, and `image_outputs`
    ([`PrismerLMImageFeatures`], *optional*), which can be given to another call as `encoder_outputs`.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    >>> experts = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32}
    >>> config = PrismerLMConfig(experts_config=experts, text_config=LlamaConfig(**sizes), fusion="cross_attention")
    >>> model = PrismerLMForConditionalGeneration(config).eval()
    >>> outputs = model(torch.tensor([[5, 6, 7]]), depth_values=torch.rand(1, 1, 64, 64))
    >>> outputs.logits.shape, outputs.image_outputs.pooler_output.shape
    (torch.Size([1, 3, 32000]), torch.Size([1, 64, 32]))
    ```
    """

    image_outputs: PrismerLMImageFeatures | None = None


def pad_types(mm_token_type_ids: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens that `mm_token_type_ids` lacks at the end are text."""
    return F.pad(mm_token_type_ids, (0, max(0, length - mm_token_type_ids.shape[1])))


# ---- the model ----

_IMAGE_KWARGS = ("encoder_outputs", "mm_token_type_ids")
_RUNNING: ContextVar[Any] = ContextVar("running", default=None)  # images and placeholders of a running VLM


def _place_features(module: nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
    """Forward hook of a vision-language model's word embeddings: puts the experts' features into the prompt."""
    if (running := _RUNNING.get()) is not None and embeddings.ndim == 3:
        model, images, mask = running
        rows, length, _ = embeddings.shape
        if rows % mask.shape[0] == 0 and length >= mask.shape[1]:  # a prompt; without a cache, also what follows it
            mask = pad_types(mask.to(embeddings.device), length).repeat_interleave(rows // mask.shape[0], dim=0)
            embeddings, images.visible = model.fuse(embeddings, images, mask)
    return embeddings


def _pass_visible_images(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a vision-language model's decoder, which hands its arguments on to its layers."""
    if (running := _RUNNING.get()) is not None and running[1].visible is not None:
        _, images, mask = running
        if kwargs["inputs_embeds"].shape[1] < mask.shape[1]:  # a step of decoding
            images.visible = images.visible.after_prompt()
        kwargs = {**kwargs, "visible_images": images.visible}
    return args, kwargs


class PrismerLMPreTrainedModel(PreTrainedModel):
    """
    What all models of PrismerLM have in common: how weights start, and what the backbones support.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from modeling_prismer import PrismerLMConfig, PrismerLMModel, PrismerLMPreTrainedModel

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    >>> experts = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32}
    >>> config = PrismerLMConfig(experts_config=experts, text_config=LlamaConfig(**sizes), fusion="cross_attention")
    >>> model = PrismerLMModel(config).eval()
    >>> isinstance(model, PrismerLMPreTrainedModel), model.config.model_type
    (True, 'prismer_lm')
    ```
    """

    config: PrismerLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrismerExpertStem", "PrismerResamplerLayer", "PrismerLMGatedBlock"]
    _skip_keys_device_placement = [CACHE_NAME, "encoder_outputs", "visible_images"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: PrismerLMConfig):
        super().__init__(config)
        register_adapter_targets()

    @classmethod
    def is_custom_code(cls) -> bool:
        # Weights of code from outside transformers start in another way, those of its backbones too: modules without
        # weights of their own are skipped.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_expert_weights(module)
        if isinstance(module, PrismerLMExperts):
            init.normal_(module.position_embedding, std=0.02)
        elif isinstance(module, PrismerLMQuestion):
            init.zeros_(module.gate)
        elif isinstance(module, PrismerLMProjection):
            init.constant_(module.norm.weight, module.feature_scale)
        elif isinstance(module, PrismerLMGatedBlock):
            init.zeros_(module.attn_gate)
            init.zeros_(module.mlp_gate)
        elif isinstance(module, PrismerLMModel) and module.image_embedding is not None:
            init.normal_(module.image_embedding.weight, std=self.config.feature_scale)


class PrismerLMModel(PrismerLMPreTrainedModel):
    """
    The vision encoders, the experts and the language model. `forward` returns the language model's hidden states.

    Args:
        config ([`PrismerLMConfig`]): the configuration.
        language_model, vision_encoders (*optional*): loaded backbones, in place of new ones.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from modeling_prismer import PrismerLMConfig, PrismerLMModel

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    >>> experts = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32}
    >>> config = PrismerLMConfig(experts_config=experts, text_config=LlamaConfig(**sizes), fusion="cross_attention")
    >>> model = PrismerLMModel(config).eval()
    >>> outputs = model(torch.tensor([[5, 6, 7]]), depth_values=torch.rand(1, 1, 64, 64))
    >>> outputs.last_hidden_state.shape
    torch.Size([1, 3, 32])
    ```
    """

    def __init__(
        self,
        config: PrismerLMConfig,
        language_model: PreTrainedModel | None = None,
        vision_encoders: list[PreTrainedModel] | None = None,
    ):
        super().__init__(config)
        if vision_encoders is None:
            vision_encoders = [AutoModel.from_config(encoder) for encoder in config.vision_config]
        if language_model is None:
            auto_class = AutoModelForImageTextToText if config.has_vision_language_model else AutoModelForCausalLM
            language_model = auto_class.from_config(config.text_config)
        config.text_config = language_model.config
        config.vision_config = [encoder.config for encoder in vision_encoders]
        self.language_model = language_model
        self.vision_encoders = nn.ModuleList(vision_encoders)
        if vision_encoders:
            self.vision_projection = PrismerLMProjection(config, sum(map(num_channels, vision_encoders)))
        self.experts: Any = None
        if config.experts_config is not None:
            if config.experts_config._attn_implementation is None:
                config.experts_config._attn_implementation = config._attn_implementation
            question_size = config.hidden_size if config.question_queries else None
            self.experts = PrismerLMExperts(config.experts_config, question_size)
            self.experts_projection = PrismerLMProjection(config, config.experts_config.hidden_size)
        self.cross_blocks = nn.ModuleDict()
        self.image_embedding: Any = None
        if config.fusion == "cross_attention" and config.num_features:
            self.image_embedding = nn.Embedding(1, config.hidden_size)  # of a placeholder
            every = config.cross_attention_every
            for index in range(every - 1, len(self.decoder_layers), every):
                self.cross_blocks[str(index)] = PrismerLMGatedBlock(config, index)
            for index, layer in enumerate(self.decoder_layers):
                layer.register_forward_pre_hook(CrossAttend(self.cross_blocks, index), with_kwargs=True)
        if config.has_vision_language_model:  # it embeds its prompt and calls its decoder by itself
            language_model.get_input_embeddings().register_forward_hook(_place_features)
            language_model.get_decoder().register_forward_pre_hook(_pass_visible_images, with_kwargs=True)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # transformers takes "model.language_model.model" of a model with a head for an old name of another model.
        kwargs["key_mapping"] = {r"^model\.": "", **(kwargs.get("key_mapping") or {})}
        loaded = super().from_pretrained(*args, **kwargs)
        config = (loaded[0] if isinstance(loaded, tuple) else loaded).config
        if (config.backbones or {}).get("trained_only"):
            raise ValueError("the checkpoint has trained weights alone: PrismerLMForConditionalGeneration loads it")
        return loaded

    @property
    def decoder_layers(self) -> nn.ModuleList:
        decoder = self.language_model.get_decoder()
        layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
        if layers is None:
            raise ValueError(f"{type(decoder).__name__} has no list of layers called 'layers' or 'h'")
        return layers

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def train(self, mode: bool = True) -> "PrismerLMModel":
        super().train(mode)
        for encoder in self.vision_encoders:
            if not is_trained(encoder):
                encoder.eval()
        return self

    # ---- images to features ----

    def pop_image_inputs(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Takes the inputs of `get_image_features` out of `tensors`. A vision-language model keeps its own."""
        inputs = pop_expert_inputs(tensors, self.config.expert_names)
        names = ["expert_mask"]
        if not self.config.has_vision_language_model:
            names += ["patch_features", *pixel_names(max(1, len(self.vision_encoders)))]
        inputs |= {name: tensors.pop(name) for name in names if name in tensors}
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def encode_patches(
        self,
        pixel_values: list[torch.Tensor],
        expert_inputs: dict[str, dict[str, torch.Tensor]],
        expert_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        The patch features of all encoders: `(num_images, grid_size * grid_size, channels)`. A Prismer's encoder adds
        its latents.
        """
        if self.config.has_prismer_encoder:
            (encoder,), (pixels,) = self.vision_encoders, pixel_values
            mask = None if expert_mask is None else expert_mask.to(device=pixels.device, dtype=torch.bool)
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(encoder)):
                return encoder(pixels, expert_inputs, mask).last_hidden_state
        grid = (self.config.grid_size, self.config.grid_size)
        features = []
        for encoder, pixels in zip(self.vision_encoders, pixel_values):
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(encoder)):
                features.append(resize_grid(patch_features(encoder, pixels), grid).to(pixel_values[0].device))
        return torch.cat(features, dim=-1)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        expert_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PrismerLMImageFeatures:
        r"""
        Encodes images and the experts' maps. Give the result to `forward` or `generate` as `encoder_outputs` to ask
        more about the same images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                The images, normalised for the first vision encoder. Those for the next ones are called
                `pixel_values_1`, `pixel_values_2`, …
            expert_mask (`torch.BoolTensor` of shape `(num_images, number of experts)`, *optional*):
                Which experts each image has.
            patch_features (`torch.FloatTensor` of shape `(num_images, num_patches, channels)`, *optional*):
                `last_hidden_state` of an earlier call, in place of `pixel_values` and of what an encoder that is a
                Prismer's needs of the experts: frozen encoders then run once for each image of a training.
            kwargs:
                The experts' tensors; see [`PrismerModel.forward`].

        Returns:
            [`PrismerLMImageFeatures`]

        Raises:
            ValueError: if an input of an encoder or expert is missing, or has another number of images.
        """
        is_encoded = patch_features is not None
        needs_no_map = self.config.experts_as == "words" or (is_encoded and self.config.has_prismer_encoder)
        strict = self.config.strict_experts and not needs_no_map
        expert_inputs = gather_expert_inputs(kwargs, expert_mask, self.config.expert_names, strict=strict)
        names = pixel_names(len(self.vision_encoders))
        pixels = {name: pixel_values if name == "pixel_values" else kwargs.pop(name, None) for name in names}
        missing = [name for name, tensor in pixels.items() if tensor is None]
        if is_encoded:
            self.check_patch_features(patch_features, [name for name in names if name not in missing])
            pixels = {"patch_features": patch_features}
        elif missing:
            raise ValueError(f"{', '.join(missing)} missing; the model has {len(names)} vision encoders")
        images: dict[str, Any] = pixels or {
            f"{name}_{key}": tensor for name, own in expert_inputs.items() for key, tensor in own.items()
        }
        if not images:
            raise ValueError("no image given: neither pixel_values nor an expert's tensors")
        first = next(iter(images.values()))
        for name, tensor in images.items():
            if tensor.shape[0] != first.shape[0]:
                raise ValueError(f"{name} has {tensor.shape[0]} rows for {first.shape[0]} images")

        outputs = PrismerLMImageFeatures()
        features = []
        if pixels:
            patches = patch_features
            if patches is None:
                patches = self.encode_patches(list(pixels.values()), expert_inputs, expert_mask)
            outputs.last_hidden_state = patches
            features.append(self.vision_projection(patches))
        if self.experts is not None and self.config.experts:
            mask = None if expert_mask is None else expert_mask.to(device=first.device, dtype=torch.bool)
            self.experts.check_expert_inputs(expert_inputs, mask, images)
            tokens, token_mask = self.experts(expert_inputs, mask, first.shape[0], first.device)
            if self.config.question_queries:
                outputs.expert_tokens, outputs.expert_token_mask = tokens, token_mask
            else:
                features.append(self.experts_projection(self.experts.resampler(tokens, token_mask)))
        if features:
            outputs.pooler_output = torch.cat([part.to(features[0].device) for part in features], dim=1)
        return outputs

    def check_patch_features(self, patch_features: torch.Tensor, pixels: list[str]) -> None:
        if not self.vision_encoders or pixels:
            reason = f"{', '.join(pixels)} is given too" if pixels else "the model has no vision encoder"
            raise ValueError(f"patch_features is given, but {reason}")
        experts_config = self.config.experts_config
        num_latents = 0 if experts_config is None else experts_config.num_latents
        shape = (self.config.num_features - num_latents, self.vision_projection.fc1.in_features)
        if tuple(patch_features.shape[1:]) != shape:
            raise ValueError(
                f"patch_features has the shape {tuple(patch_features.shape)}; (num_images, {shape[0]}, {shape[1]}) is "
                "needed"
            )

    def condition(
        self, images: PrismerLMImageFeatures, rows: list[list[int]], questions: torch.Tensor, mask: torch.Tensor
    ) -> PrismerLMImageFeatures:
        """
        Runs the resampler once for each question, on images that have been encoded once.

        Args:
            images ([`PrismerLMImageFeatures`]): the encoded images.
            rows (`list[list[int]]`): images of each question.
            questions (`torch.FloatTensor` of shape `(len(rows), length, hidden_size)`): embeddings of the text.
            mask (`torch.BoolTensor` of shape `(len(rows), length)`): which tokens belong to the question.

        Returns:
            [`PrismerLMImageFeatures`] with one entry for each image of each row.
        """
        device = images.expert_tokens.device
        image = torch.tensor([image for row in rows for image in row], device=device)
        row = torch.tensor([index for index, row in enumerate(rows) for _ in row], device=device)
        questions, mask = questions.to(device)[row], mask.to(device)[row]
        token_mask = None if images.expert_token_mask is None else images.expert_token_mask[image]
        latents = self.experts.resampler(
            images.expert_tokens[image],
            token_mask,
            condition=lambda latents: self.experts.question(latents, questions, mask),
        )
        features = self.experts_projection(latents)
        if images.pooler_output is not None:
            patches = images.pooler_output[image]
            features = torch.cat([patches, features.to(patches)], dim=1)
        return PrismerLMImageFeatures(images.last_hidden_state, features)

    # ---- features into the language model ----

    def placeholders(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which tokens stand for images: `(rows, length)`, bool."""
        if mm_token_type_ids is not None and not self.config.has_vision_language_model:
            text: Any = inputs_embeds if input_ids is None else input_ids
            return pad_types(mm_token_type_ids, text.shape[1]) == 1
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if inputs_embeds is None or self.config.has_vision_language_model:
            raise ValueError("input_ids is missing: a prompt is needed, in which images have their place")
        if self.config.image_token_id < self.config.vocab_size:
            placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            return (inputs_embeds == self.embed(placeholder)).all(dim=-1)
        if self.config.fusion == "prefix":
            raise ValueError("inputs_embeds needs mm_token_type_ids with 1 at the placeholders of images")
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)

    def without_placeholders(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Ids that the language model can embed: a placeholder may lie beyond its vocabulary."""
        if self.config.image_token_id < self.config.vocab_size:
            return input_ids
        pad_token_id = self.config.get_text_config(decoder=True).pad_token_id
        return input_ids.masked_fill(mask, 1 if pad_token_id == 0 else 0)  # `generate` takes padding for masked

    def assign(self, images: PrismerLMImageFeatures, mask: torch.Tensor) -> list[list[int]]:
        """The images of each row of text with these placeholders `(rows, length)`. A GPU waits here, once a prompt."""
        counts, length = mask.sum(dim=1).tolist(), self.config.image_seq_length
        if self.config.fusion == "cross_attention" and not any(counts):
            counts = [1] * len(counts)  # without placeholders, all of a row's tokens see its image
        elif wrong := [count for count in counts if count % length]:
            raise ValueError(f"a prompt has {wrong[0]} placeholders of images; each image needs {length}")
        else:
            counts = [count // length for count in counts]
        return assign_images(counts, images.num_images)

    def fuse(
        self, embeddings: torch.Tensor, images: PrismerLMImageFeatures, mask: torch.Tensor
    ) -> tuple[torch.Tensor, VisibleImages | None]:
        """
        Args:
            embeddings (`torch.FloatTensor` of shape `(rows, length, hidden_size)`): of a prompt.
            images ([`PrismerLMImageFeatures`]): the encoded images.
            mask (`torch.BoolTensor` of shape `(rows, length)`): placeholders of images.

        Returns:
            The embeddings with features in place of the placeholders, and what the tokens cross-attend to.
        """
        rows = self.assign(images, mask)
        if self.config.fusion == "prefix":
            order = torch.tensor([image for row in rows for image in row], device=images.pooler_output.device)
            features = images.pooler_output[order].flatten(0, 1).to(embeddings)
            return embeddings.masked_scatter(mask[..., None], features), None
        placeholder = self.image_embedding(torch.zeros_like(mask[:1, :1], dtype=torch.long))  # (1, 1, hidden_size)
        embeddings = torch.where(mask[..., None], placeholder.to(embeddings), embeddings)
        return embeddings, see_images(images.pooler_output, rows, mask)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return look_up(self.get_input_embeddings(), input_ids, "input_ids", self.config.vocab_size)

    def ask(
        self,
        images: PrismerLMImageFeatures,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> PrismerLMImageFeatures:
        """Conditions the resampler on all text of a prompt but what is to be learned (`config.question_queries`)."""
        if images.expert_tokens is None:
            return images
        question_mask = ~mask
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError("question_queries=True needs one question in each row: rows cannot be packed")
            question_mask = question_mask & attention_mask[:, -mask.shape[1] :].bool()
        if labels is not None:
            question_mask = question_mask & (labels == -100)
        if inputs_embeds is None:
            inputs_embeds = self.embed(self.without_placeholders(input_ids, mask))
        return self.condition(images, self.assign(images, mask), inputs_embeds, question_mask)

    def follows_prompt(self, images: PrismerLMImageFeatures, mask: torch.Tensor, cache: Cache | None) -> bool:
        """Whether the text has no placeholders and continues a prompt that is in the cache."""
        if cache is None or (self.config.fusion == "cross_attention" and images.visible is None):
            return False
        return mask.shape[1] == 1 or (bool(cache.get_seq_length() > 0) and not bool(mask.any()))

    def packed_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """
        Which token attends to which, `(rows, 1, length, length)` bool, as the language model's attention takes it.
        """
        if self.config.get_text_config(decoder=True)._attn_implementation != "eager":
            return attention_mask
        dtype = self.get_input_embeddings().weight.dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)

    @contextmanager
    def running(self, images: PrismerLMImageFeatures, mask: torch.Tensor) -> Iterator[None]:
        """While it is open, a vision-language model's hooks put the features into a prompt with this `mask`."""
        token = _RUNNING.set((self, images, mask))
        try:
            yield
        finally:
            _RUNNING.reset(token)

    def run(
        self,
        language_model: nn.Module,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        encoder_outputs: PrismerLMImageFeatures | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, PrismerLMImageFeatures | None]:
        """Calls `language_model`, with or without its head. Returns its output, and the features of the images."""
        image_inputs = self.pop_image_inputs(kwargs)
        if image_inputs and encoder_outputs is not None:
            raise ValueError(f"give {', '.join(image_inputs)} or encoder_outputs, not both")
        images = self.get_image_features(**image_inputs) if image_inputs else encoder_outputs
        is_vlm = self.config.has_vision_language_model
        if is_vlm and mm_token_type_ids is not None:
            kwargs["mm_token_type_ids"] = mm_token_type_ids
        attention_mask: Any = kwargs.get("attention_mask")
        if getattr(attention_mask, "ndim", None) == 4 and attention_mask.dtype == torch.bool:
            kwargs["attention_mask"] = self.packed_mask(attention_mask)
        if images is None:
            return language_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs), None

        mask = self.placeholders(input_ids, inputs_embeds, mm_token_type_ids)
        if inputs_embeds is None and not is_vlm:
            inputs_embeds = self.embed(self.without_placeholders(input_ids, mask))
        follows = self.follows_prompt(images, mask, kwargs.get(CACHE_NAME))
        if follows and images.visible is not None:
            images.visible = images.visible.after_prompt()
        elif not follows:
            asked = (kwargs.get("attention_mask"), kwargs.get("labels"))
            images = self.ask(images, input_ids, inputs_embeds, mask, *asked)
        if is_vlm:
            with self.running(images, mask):
                return language_model(input_ids=self.without_placeholders(input_ids, mask), **kwargs), images
        if not follows:
            inputs_embeds, images.visible = self.fuse(inputs_embeds, images, mask)
        if images.visible is not None:
            kwargs["visible_images"] = images.visible
        return language_model(inputs_embeds=inputs_embeds, **kwargs), images

    @accept_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        expert_mask: torch.BoolTensor | None = None,
        encoder_outputs: PrismerLMImageFeatures | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PrismerLMModelOutput:
        r"""
        Args:
            input_ids … use_cache, pixel_values, expert_mask, encoder_outputs:
                See [`PrismerLMForConditionalGeneration.forward`].
        """
        outputs, images = self.run(
            self.language_model.base_model,
            input_ids,
            inputs_embeds,
            encoder_outputs,
            mm_token_type_ids,
            pixel_values=pixel_values,
            expert_mask=expert_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return PrismerLMModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=images,
        )


class PrismerLMForConditionalGeneration(RankingMixin, ExpertEditingMixin, PrismerLMPreTrainedModel, GenerationMixin):
    """
    A language model that sees images through frozen vision encoders and experts.

    Example:

    ```python
    >>> from transformers import LlamaConfig, SiglipVisionConfig
    >>> from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    >>> config = PrismerLMConfig(
    ...     vision_config=[SiglipVisionConfig(**sizes, image_size=32, patch_size=16)],
    ...     experts_config={"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32},
    ...     text_config=LlamaConfig(**sizes, vocab_size=100),
    ... )
    >>> model = PrismerLMForConditionalGeneration(config)
    >>> model.config.image_seq_length  # 2 x 2 patches and 64 latents
    68
    ```
    """

    if TYPE_CHECKING:  # transformers types it for a class of its own alone

        def _generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any: ...

    def __init__(
        self,
        config: PrismerLMConfig,
        language_model: PreTrainedModel | None = None,
        vision_encoders: list[PreTrainedModel] | None = None,
    ):
        super().__init__(config)
        self.model = PrismerLMModel(config, language_model, vision_encoders)
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model.language_model

    @property
    def expert_network(self) -> PrismerLMExperts:
        if self.model.experts is None:
            raise ValueError("the configuration has no experts_config: this model has no stems to add an expert to")
        return self.model.experts

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, expert_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> PrismerLMImageFeatures:
        return self.model.get_image_features(pixel_values, expert_mask, **kwargs)

    get_image_features.__doc__ = PrismerLMModel.get_image_features.__doc__

    # ---- ranking ----

    def logits_and_outputs(
        self, select: Callable[[torch.Tensor], torch.Tensor], **inputs: Any
    ) -> tuple[torch.Tensor, PrismerLMCausalLMOutput]:
        positions = (inputs["attention_mask"].long().cumsum(dim=-1) - 1).clamp(min=0)
        positions = positions[:, -inputs["input_ids"].shape[1] :]
        if not self.config.has_vision_language_model:
            inputs["position_ids"] = positions
        elif inputs.get(CACHE_NAME) is not None:  # it counts the positions of a prompt by itself
            deltas = getattr(self.language_model.base_model, "rope_deltas", None)
            if deltas is not None:  # positions of time, height and width
                deltas = deltas.repeat_interleave(positions.shape[0] // deltas.shape[0], dim=0).to(positions)
                inputs["position_ids"] = (positions + deltas).expand(3, -1, -1)
        outputs = self(**inputs, use_cache=True, return_dict=True)
        return select(outputs.logits), outputs

    def after_prompt(self, outputs: PrismerLMCausalLMOutput, repeats: int) -> dict[str, Any]:
        cache = copy.deepcopy(getattr(outputs, CACHE_NAME))
        cache.batch_repeat_interleave(repeats)
        images, visible = outputs.image_outputs, getattr(outputs.image_outputs, "visible", None)
        if images is None or visible is None:
            return {CACHE_NAME: cache}
        images = replace(images)
        images.visible = visible.repeat(repeats)
        return {CACHE_NAME: cache, "encoder_outputs": images}

    # ---- from backbones, and files ----

    @classmethod
    def from_backbones(
        cls,
        language: str | PreTrainedModel,
        vision: str | PreTrainedModel | list[str | PreTrainedModel] | None = None,
        experts: list[dict[str, Any] | ExpertSpec] | None = None,
        fusion: str = "prefix",
        experts_config: dict[str, Any] | None = None,
        language_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "PrismerLMForConditionalGeneration":
        """
        A new model on frozen backbones. Their weights and names stay as they are; the stems, resampler, projections
        and cross-attention blocks start fresh.

        Args:
            language (`str` or `PreTrainedModel`):
                A causal language model, or a vision-language model such as Qwen2.5-VL: a Hub id, a folder, or a loaded
                model, which may be quantised.
            vision (`str`, `PreTrainedModel` or a list of them, *optional*):
                Vision encoders (CLIP, SigLIP, DINOv2, DINOv3, `timm_wrapper`), which are fused. None with a
                vision-language model.
            experts (`list[dict]`, *optional*): the experts' descriptions, such as `suite.descriptions`.
            fusion (`str`, *optional*, defaults to `"prefix"`): `"prefix"` or `"cross_attention"`.
            experts_config (`dict`, *optional*): further fields of [`PrismerExpertsConfig`], such as `num_latents`.
            language_kwargs (`dict`, *optional*):
                Arguments of `from_pretrained` for the language model, such as `dtype` or `quantization_config`.
            kwargs: further fields of [`PrismerLMConfig`].

        Raises:
            ValueError: if a backbone is of another kind, or the configuration is not valid.

        Example:

        ```python
        >>> from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
        >>> from modeling_prismer import PrismerLMForConditionalGeneration

        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        >>> language = LlamaForCausalLM(LlamaConfig(**sizes))  # or "HuggingFaceTB/SmolLM2-135M-Instruct"
        >>> vision = SiglipVisionModel(SiglipVisionConfig(**sizes))  # or "google/siglip2-base-patch16-224"
        >>> experts = [{"name": "depth", "kind": "dense", "channels": 1}]
        >>> model = PrismerLMForConditionalGeneration.from_backbones(language, vision, experts)
        >>> any(weight.requires_grad for weight in model.language_model.parameters())
        False
        ```
        """
        return build_from_backbones(
            cls, language, vision, experts, experts_config, language_kwargs, fusion=fusion, **kwargs
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        language: str | PreTrainedModel | None = None,
        vision: str | PreTrainedModel | list[str | PreTrainedModel] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in every model of transformers, and:

        Args:
            language, vision (*optional*):
                The frozen backbones of a checkpoint that has trained weights alone, as ids, folders or loaded models.
                By default they are loaded by the ids that the checkpoint names. The arguments in `kwargs`, such as
                `dtype`, `device_map` or `quantization_config`, are then those of the language model.

        Raises:
            ValueError: if a backbone is not the one that the weights were trained on.
        """
        hub_fields = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in hub_fields if name in kwargs}
        config = kwargs.get("config")
        if config is None and pretrained_model_name_or_path is not None:
            config = PrismerLMConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        if config is None or not (config.backbones or {}).get("trained_only"):
            if language is not None or vision is not None:
                raise ValueError("language and vision are for checkpoints with trained weights alone; this has all")
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        language_kwargs = {name: value for name, value in kwargs.items() if name not in (*hub_fields, "config")}
        return load_trained(
            cls, pretrained_model_name_or_path, config, language, vision, hub_kwargs, **language_kwargs
        )

    def save_pretrained(self, save_directory: Any, *args: Any, trained_only: bool = False, **kwargs: Any) -> None:
        """
        As in every model of transformers, and:

        Args:
            trained_only (`bool`, *optional*, defaults to `False`):
                Save the trained weights alone, with ids and fingerprints of the frozen backbones, which
                `from_pretrained` loads and checks.
        """
        if self._auto_class is not None:  # the code is saved too, so that `AutoModel` finds the model without its head
            auto_map = {"AutoModel": f"{__name__.rpartition('.')[2]}.{PrismerLMModel.__name__}"}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map}
        if trained_only:
            save_trained(self, save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, *args, **kwargs)

    def freeze_backbones(self, vision: bool = True, language: bool = True) -> "PrismerLMForConditionalGeneration":
        """Freezes the vision encoders and the language model, or unfreezes them (`False`). All else always trains."""
        is_quantized = getattr(self.language_model, "hf_quantizer", None) is not None  # then it is never trained
        self.language_model.requires_grad_(not language and not is_quantized)
        self.model.vision_encoders.requires_grad_(not vision)
        return self.train(self.training)

    @accept_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_1: torch.FloatTensor | None = None,
        depth_values: torch.FloatTensor | None = None,
        normal_values: torch.FloatTensor | None = None,
        segmentation_ids: torch.Tensor | None = None,
        edge_values: torch.FloatTensor | None = None,
        detection_ids: torch.Tensor | None = None,
        detection_classes: torch.Tensor | None = None,
        detection_rows: torch.LongTensor | None = None,
        ocr_ids: torch.Tensor | None = None,
        ocr_features: torch.FloatTensor | None = None,
        expert_mask: torch.BoolTensor | None = None,
        encoder_outputs: PrismerLMImageFeatures | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PrismerLMCausalLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(rows, length)`, *optional*):
                The text. In prefix fusion each image has `config.image_seq_length` placeholders
                `config.image_token_id`, in cross-attention one, or none if each row is about one image. Rows that
                follow each other may share an image, which is encoded once.
            attention_mask (`torch.Tensor` of shape `(rows, length)` or `(rows, 1, length, length)`, *optional*):
                0 for padding, on either side; or which token attends to which, for packed rows.
            position_ids, cache, inputs_embeds, use_cache, logits_to_keep:
                As in the language model.
            pixel_values, pixel_values_1, expert_mask, the experts' tensors, and patch_features:
                See [`PrismerLMForConditionalGeneration.get_image_features`]. A vision-language model gets its own
                `pixel_values`. Without any of them, the text runs alone.
            encoder_outputs ([`PrismerLMImageFeatures`], *optional*):
                Images that have been encoded before, in place of the image inputs.
            mm_token_type_ids (`torch.LongTensor` of shape `(rows, length)`, *optional*):
                1 at the placeholders; by default they are found by their id.
            labels (`torch.LongTensor` of shape `(rows, length)`, *optional*):
                The tokens to learn, aligned with `input_ids`; -100 where nothing is learned.

        Returns:
            [`PrismerLMCausalLMOutput`]; the loss is that of the language model, the mean over tokens.
        """
        experts = {
            "depth_values": depth_values,
            "normal_values": normal_values,
            "segmentation_ids": segmentation_ids,
            "edge_values": edge_values,
            "detection_ids": detection_ids,
            "detection_classes": detection_classes,
            "detection_rows": detection_rows,
            "ocr_ids": ocr_ids,
            "ocr_features": ocr_features,
        }
        if labels is not None:
            kwargs["labels"] = labels
        outputs, images = self.model.run(
            self.language_model,
            input_ids,
            inputs_embeds,
            encoder_outputs,
            mm_token_type_ids,
            pixel_values=pixel_values,
            pixel_values_1=pixel_values_1,
            **{name: tensor for name, tensor in experts.items() if tensor is not None},
            expert_mask=expert_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        return PrismerLMCausalLMOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=images,
        )

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in every model of transformers. Images are encoded once for the whole generation, and shared by all beams
        and by all rows of text about them.

        Args:
            inputs (`torch.LongTensor` of shape `(rows, length)`, *optional*): the prompts, also as `input_ids`.
            args, kwargs:
                The inputs of `forward`, and those of `generate`.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        image_inputs = self.model.pop_image_inputs(kwargs)
        images = kwargs.pop("encoder_outputs", None)
        if image_inputs:
            if images is not None:
                raise ValueError(f"give {', '.join(image_inputs)} or encoder_outputs, not both")
            images = self.get_image_features(**image_inputs)
        is_vlm = self.config.has_vision_language_model  # its own `generate` prepares its own inputs
        if images is None:
            generate = self.language_model.generate if is_vlm else super().generate
            return generate(input_ids, *args, **kwargs)

        inputs_embeds = kwargs.get("inputs_embeds")
        mask = self.model.placeholders(input_ids, inputs_embeds, kwargs.get("mm_token_type_ids"))
        images = self.model.ask(replace(images), input_ids, inputs_embeds, mask, kwargs.get("attention_mask"))
        if kwargs.get(CACHE_NAME) is not None and self.config.fusion == "cross_attention":  # it has the prompt already
            images.visible = see_images(images.pooler_output, self.model.assign(images, mask), mask)
        prompts = input_ids
        if input_ids is not None:
            input_ids = self.model.without_placeholders(input_ids, mask)
        if is_vlm:
            with self.model.running(images, mask):
                generated = self.language_model.generate(input_ids, *args, **kwargs)
        else:
            images.inputs = image_inputs
            kwargs |= {"encoder_outputs": images, "mm_token_type_ids": mask.long()}
            generated = super().generate(input_ids, *args, **kwargs)
        if prompts is not None:  # as they were given, with placeholders
            sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
            repeats = sequences.shape[0] // prompts.shape[0]
            sequences[:, : prompts.shape[1]] = prompts.repeat_interleave(repeats, dim=0).to(sequences)
        return generated

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads its signature
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Assisted decoding adds drafts to `input_ids` alone.
        if kwargs.get("mm_token_type_ids") is not None:
            kwargs["mm_token_type_ids"] = pad_types(kwargs["mm_token_type_ids"], input_ids.shape[1])
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _get_candidate_generator(self, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # An assistant has other encoders, so it encodes the images itself, once. An assistant for text gets none.
        text_kwargs = {key: value for key, value in model_kwargs.items() if key not in _IMAGE_KWARGS}
        generator = super()._get_candidate_generator(generation_config, model_kwargs=text_kwargs, **kwargs)
        images, assistant = model_kwargs.get("encoder_outputs"), kwargs.get("assistant_model")
        if images is not None and assistant is not None and assistant.config.model_type == self.config.model_type:
            if not images.inputs:
                raise ValueError("assisted decoding needs the image inputs, not encoder_outputs")
            inputs = {name: tensor.to(assistant.device) for name, tensor in images.inputs.items()}
            generator.assistant_kwargs |= {
                "encoder_outputs": assistant.get_image_features(**inputs),
                "mm_token_type_ids": model_kwargs["mm_token_type_ids"].to(assistant.device),
            }
        return generator


__all__ = ["PrismerLMForConditionalGeneration", "PrismerLMModel", "PrismerLMPreTrainedModel"]
