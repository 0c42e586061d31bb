"""
PrismerLM: frozen vision encoders and experts in front of any language model of transformers.

This file has the model, with and without its head. The trained parts are in lm_layers.py, the experts' stems and the
resampler in expert_stems.py, the features of images and the text that they belong to in image_features.py, building
from backbones and saving in lm_backbones.py, generation in lm_generation.py, and ranking in ranking.py.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .adapter_targets import register_adapter_targets
from .cache import CACHE_NAME, accept_past_key_values
from .configuration_prismer_lm import PrismerLMConfig
from .expert_editing import ExpertEditingMixin
from .expert_stems import gather_expert_inputs, init_expert_weights, look_up, pop_expert_inputs
from .image_features import (
    PrismerLMImageFeatures,
    VisibleImages,
    assign_images,
    is_trained,
    num_channels,
    pad_types,
    patch_features,
    pixel_names,
    resize_grid,
    see_images,
)
from .imitation import ImitationMixin, init_imitation_weights
from .lm_backbones import BackbonesMixin
from .lm_generation import PrismerLMGenerationMixin
from .lm_layers import (
    CrossAttend,
    PrismerLMCrossBlocks,
    PrismerLMExperts,
    PrismerLMGatedBlock,
    PrismerLMProjection,
    PrismerLMQuestion,
)
from .ranking import RankingMixin


logger = logging.get_logger(__name__)


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

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
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

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    >>> experts = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32}
    >>> config = PrismerLMConfig(experts_config=experts, text_config=LlamaConfig(**sizes), fusion="cross_attention")
    >>> model = PrismerLMForConditionalGeneration(config).eval()
    >>> outputs = model(torch.tensor([[5, 6, 7]]), depth_values=torch.rand(1, 1, 64, 64))
    >>> outputs.logits.shape, outputs.image_outputs.pooler_output.shape
    (torch.Size([1, 3, 32000]), torch.Size([1, 64, 32]))
    ```
    """

    image_outputs: PrismerLMImageFeatures | None = None


# ---- the model ----

_RUNNING: ContextVar[Any] = ContextVar("running", default=None)  # images and placeholders of a running VLM


def _place_features(module: nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
    """Forward hook of a vision-language model's word embeddings: puts the experts' features into the prompt."""
    if (running := _RUNNING.get()) is not None and running[2] is not None and embeddings.ndim == 3:
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
        if mask is not None and kwargs["inputs_embeds"].shape[1] < mask.shape[1]:  # a step of decoding
            images.visible = images.visible.after_prompt()
        kwargs = {**kwargs, "visible_images": images.visible}
    return args, kwargs


def check_language_model(config: PrismerLMConfig, language_model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: if the language model cannot take features of images in place of word embeddings.
    """
    if not config.num_features:
        return
    name, width = type(language_model).__name__, getattr(language_model.get_input_embeddings(), "embedding_dim", None)
    if width is not None and width != config.hidden_size:
        raise ValueError(
            f"{name} has word embeddings of width {width} and layers of width {config.hidden_size}; features of "
            "images need one width for both"
        )
    if not config.has_vision_language_model and hasattr(language_model.get_decoder(), "get_per_layer_inputs"):
        raise ValueError(f"{name} reads the ids of its text in every layer, so that features cannot take their place")


class PrismerLMPreTrainedModel(PreTrainedModel):
    """
    Base class of all models of PrismerLM. It initialises their weights.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from modeling_prismer import PrismerLMConfig, PrismerLMModel, PrismerLMPreTrainedModel

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
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
        init_imitation_weights(module)
        if isinstance(module, PrismerLMExperts):
            init.normal_(module.position_embedding, std=0.02)
        elif isinstance(module, PrismerLMQuestion):
            init.zeros_(module.gate)
        elif isinstance(module, PrismerLMProjection):
            init.constant_(module.norm.weight, module.feature_scale)
        elif isinstance(module, PrismerLMGatedBlock):
            for layer in (*module.cross_attn.children(), module.mlp.fc1, module.mlp.fc2):
                init.normal_(layer.weight, std=layer.in_features**-0.5)  # keeps the variance: attention then selects
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

    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
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
        check_language_model(config, language_model)
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
            channels = sum(map(num_channels, vision_encoders)) or None
            self.experts = PrismerLMExperts(config.experts_config, question_size, channels)
            self.experts_projection = PrismerLMProjection(config, config.experts_config.hidden_size)
        self.cross_blocks = PrismerLMCrossBlocks()
        self.image_embedding: Any = None
        if config.fusion == "cross_attention" and config.num_features:
            self.image_embedding = nn.Embedding(1, config.hidden_size)  # of a placeholder
            every = config.cross_attention_every
            if every > len(self.decoder_layers):
                raise ValueError(
                    f"cross_attention_every is {every}, but the language model has {len(self.decoder_layers)} layers: "
                    "no layer would see the images"
                )
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
        expert_inputs: dict[str, dict[str, torch.Tensor]] | None = None,
        expert_mask: torch.Tensor | None = None,
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
        imitated = self.config.imitated_experts
        expert_inputs = gather_expert_inputs(kwargs, expert_mask, self.config.expert_names, strict, imitated)
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
            expert_inputs, missing = self.experts.find_missing(expert_inputs, mask)
            tokens, token_mask = self.experts(expert_inputs, mask, first.shape[0], first.device)
            if self.config.question_queries:
                outputs.expert_tokens, outputs.expert_token_mask = tokens, token_mask
                outputs.missing_experts = missing
            else:
                if missing:
                    imitated = self.experts.imitate(outputs.last_hidden_state)
                    tokens, token_mask = self.experts.add_imitations(tokens, token_mask, imitated, missing)
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
        tokens = images.expert_tokens[image]
        token_mask = None if images.expert_token_mask is None else images.expert_token_mask[image]
        if images.missing_experts:  # the question changes the routes
            context = (questions * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            imitated = self.experts.imitate(images.last_hidden_state[image], context=context)
            missing = {
                name: absent if absent is None else absent[image] for name, absent in images.missing_experts.items()
            }
            tokens, token_mask = self.experts.add_imitations(tokens, token_mask, imitated, missing)
        latents = self.experts.resampler(
            tokens,
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

    def check_no_placeholders(self, input_ids: torch.Tensor | None) -> None:
        """
        Warns of placeholders of images in a prompt without images. (A GPU is not asked: it would wait.)

        Raises:
            ValueError: if the vocabulary does not have the placeholder.
        """
        if input_ids is None or not self.config.num_features or input_ids.device.type != "cpu":
            return
        is_word, length = self.config.image_token_id < self.config.vocab_size, self.config.image_seq_length
        if torch.compiler.is_compiling() or is_word and (length == 1 or input_ids.shape[1] < length):
            return
        mask = input_ids == self.config.image_token_id
        if mask.unfold(1, length, 1).all(dim=-1).any() if is_word else mask.any():
            problem = (
                f"input_ids has {int(mask.sum())} placeholders of images, but neither images nor encoder_outputs are "
                "given"
            )
            if not is_word:
                raise ValueError(problem)
            logger.warning_once(problem)

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
    def running(self, images: PrismerLMImageFeatures, mask: torch.Tensor | None) -> Iterator[None]:
        """
        While it is open, a vision-language model's hooks put the features into a prompt with this `mask`; without a
        mask, they only let the tokens see the images that were visible at the end of the prompt.
        """
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
            self.check_no_placeholders(input_ids)
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
            with self.running(images, None if follows else mask):
                outputs = language_model(input_ids=self.without_placeholders(input_ids, mask), **kwargs)
        else:
            if not follows:
                inputs_embeds, images.visible = self.fuse(inputs_embeds, images, mask)
            if images.visible is not None:
                kwargs["visible_images"] = images.visible
            outputs = language_model(inputs_embeds=inputs_embeds, **kwargs)
        if images.visible is not None and not self.cross_blocks.reached:
            raise ValueError(
                f"{type(self.language_model).__name__} does not hand arguments on to its layers, so that they see no "
                "images; use fusion='prefix'"
            )
        return outputs, images

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


class PrismerLMForConditionalGeneration(
    RankingMixin,
    ExpertEditingMixin,
    ImitationMixin,
    BackbonesMixin,
    PrismerLMGenerationMixin,
    PrismerLMPreTrainedModel,
):
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

    def embed_patches(
        self, pixel_values: torch.Tensor | None = None, patch_features: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if patch_features is not None:
            return patch_features
        pixels = {"pixel_values": pixel_values, **kwargs}
        return self.model.encode_patches([pixels[name] for name in pixel_names(len(self.model.vision_encoders))])

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
        images = images.copy()
        images.visible = visible.repeat(repeats)
        return {CACHE_NAME: cache, "encoder_outputs": images}

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


__all__ = ["PrismerLMForConditionalGeneration", "PrismerLMModel", "PrismerLMPreTrainedModel"]
