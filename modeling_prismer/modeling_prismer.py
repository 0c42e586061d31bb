"""
The Prismer network (arXiv 2303.02506): an image, and the maps that frozen experts made of it, to text.

The file reads from the smallest module to the model: adaptor, vision encoder, text decoder, and the two put together
with loss and generation. Attention and MLP are in layers.py, the experts' stems and the resampler in expert_stems.py,
ranking in ranking.py, and building from CLIP and RoBERTa in backbones.py.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import torch_compilable_check
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapter_targets import register_adapter_targets
from .backbones import build_from_backbones
from .cache import CACHE_NAME, accept_past_key_values
from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig
from .expert_editing import ExpertEditingMixin
from .expert_stems import (
    ExpertsMixin,
    gather_expert_inputs,
    init_expert_weights,
    look_up,
    pop_expert_inputs,
)
from .layers import PrismerAttention, PrismerLayerNorm, PrismerMLP, init_layer_weights
from .loss import sample_losses
from .ranking import RankingMixin


logger = logging.get_logger(__name__)

ModelType = TypeVar("ModelType", bound="PrismerPreTrainedModel")


class ImageOutputs:
    """Gives an output class `image_outputs`, where models of transformers have the output of their image encoder."""

    encoder_last_hidden_state: torch.FloatTensor | None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None

    @property
    def image_outputs(self) -> BaseModelOutputWithPooling | None:
        if self.encoder_last_hidden_state is None:
            return None
        return BaseModelOutputWithPooling(
            last_hidden_state=self.encoder_last_hidden_state,
            pooler_output=self.encoder_last_hidden_state,
            hidden_states=self.encoder_hidden_states,
            attentions=self.encoder_attentions,
        )


@dataclass
class PrismerModelOutput(BaseModelOutputWithPastAndCrossAttentions, ImageOutputs):
    """
    What [`PrismerModel`] returns.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of the text decoder.
        cache (`Cache`, *optional*):
            The decoder's self-attention keys and values; the image's cross-attention keys and values hang on it.
        hidden_states, attentions, cross_attentions (`tuple[torch.FloatTensor]`, *optional*):
            Of the text decoder.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(num_images, num_patches + num_latents, width)`):
            Output of the vision encoder; pass it as `encoder_outputs` to ask more about the same images.
        encoder_hidden_states, encoder_attentions (`tuple[torch.FloatTensor]`, *optional*):
            Of the vision encoder. The property `image_outputs` has the encoder's outputs as one object.

    Example:

    ```python
    >>> outputs = model.model(**processor(images=image, text="What color is the shape?"))
    >>> outputs.last_hidden_state.shape, outputs.image_outputs.pooler_output.shape
    (torch.Size([1, 7, 128]), torch.Size([1, 80, 128]))
    ```
    """

    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class PrismerCausalLMOutput(CausalLMOutputWithCrossAttentions, ImageOutputs):
    """
    What [`PrismerForConditionalGeneration`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned with `labels`):
            Mean over the batch of each sample's loss, times its weight.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the next token before softmax.
        loss_per_sample (`torch.FloatTensor` of shape `(batch_size,)`, *optional*, returned with `labels`):
            Sum of a sample's token losses, before weighting.
        cache, hidden_states, attentions, cross_attentions, encoder_last_hidden_state,
        encoder_hidden_states, encoder_attentions:
            See [`PrismerModelOutput`].

    Example:

    ```python
    >>> outputs = model(**processor(images=image, text="What color is the shape?", suffix="teal"))
    >>> outputs.loss.shape, outputs.loss_per_sample.shape
    (torch.Size([]), torch.Size([1]))
    ```
    """

    loss_per_sample: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None


class PrismerAdaptor(nn.Module):
    """
    The small trained bottleneck inside a frozen layer: `up(relu(down(x))²)` with a residual connection. The vision
    encoder normalises its input, the text decoder its output (`norm_first=False`).
    """

    def __init__(self, hidden_size: int, layer_norm_eps: float, norm_first: bool):
        super().__init__()
        self.norm_first = norm_first
        self.down_proj = nn.Linear(hidden_size, hidden_size)
        self.activation = ACT2FN["relu2"]
        self.up_proj = nn.Linear(hidden_size, hidden_size)
        self.layer_norm = PrismerLayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.layer_norm(hidden_states) if self.norm_first else hidden_states
        hidden_states = hidden_states + self.up_proj(self.activation(self.down_proj(inner)))
        return hidden_states if self.norm_first else self.layer_norm(hidden_states)


class PrismerVisionLayer(GradientCheckpointingLayer):
    """A layer of CLIP's vision transformer with an adaptor between attention and MLP."""

    def __init__(self, config: PrismerVisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = PrismerLayerNorm(width, eps=eps)
        self.self_attn = PrismerAttention(config, config.num_attention_heads, config.attention_dropout)
        self.adaptor = PrismerAdaptor(width, eps, norm_first=True)
        self.layer_norm2 = PrismerLayerNorm(width, eps=eps)
        self.mlp = PrismerMLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), **kwargs)[0]
        hidden_states = self.adaptor(hidden_states)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class PrismerVisionEmbeddings(nn.Module):
    """The image's patches, and the positions that they share with the experts' tokens."""

    def __init__(self, config: PrismerVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.num_channels = config.num_channels
        self.grid_size = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        self.position_embedding = nn.Parameter(torch.empty(self.grid_size**2, config.hidden_size))

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position embeddings on another grid, by bicubic interpolation: `(grid[0] * grid[1], width)`."""
        if grid == (self.grid_size, self.grid_size):
            return self.position_embedding
        table = self.position_embedding.unflatten(0, (self.grid_size, self.grid_size)).permute(2, 0, 1)
        table = F.interpolate(table[None].float(), size=grid, mode="bicubic", align_corners=False)[0]
        return table.flatten(1).transpose(0, 1).to(self.position_embedding.dtype)

    def forward(self, pixel_values: torch.Tensor | None = None, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """The tokens of an image, or the positions on a grid: `(batch, patches, width)` or `(positions, width)`."""
        if pixel_values is None:  # not by `positions`, whose weights may be elsewhere until `forward` is called
            return self.positions(grid or (self.grid_size, self.grid_size))
        expected = (self.num_channels, self.image_size, self.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; this model needs (batch, "
                f"{', '.join(map(str, expected))}): prepare the image at {self.image_size} pixels, or change the "
                "model with `resize_position_embeddings(image_size)`"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding  # (batch, patches, width)


class PrismerPreTrainedModel(PreTrainedModel):
    """
    What all models of Prismer have in common: how weights start and load, and the resolution.

    Example:

    ```python
    >>> from modeling_prismer import PrismerForConditionalGeneration

    >>> model = PrismerForConditionalGeneration.from_pretrained(path, image_size=96)
    >>> model.config.vision_config.image_size
    96
    ```
    """

    config: PrismerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "PrismerVisionEmbeddings",
        "PrismerExpertStem",
        "PrismerResamplerLayer",
        "PrismerVisionLayer",
        "PrismerTextEmbeddings",
        "PrismerTextLayer",
    ]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        register_adapter_targets()

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        # Without the flag for code from outside transformers, which skips every module that has no weight of its own,
        # such as an adaptor. It protects from code that overwrites loaded weights; what is used here never does.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_expert_weights(module)
        if isinstance(module, PrismerVisionEmbeddings):
            init.normal_(module.patch_embedding.weight, std=0.02)
            init.normal_(module.position_embedding, std=0.02)
        elif isinstance(module, PrismerVisionLayer):
            init_layer_weights(module.self_attn, module.mlp, module.self_attn.config.num_hidden_layers)
        elif isinstance(module, PrismerAdaptor):
            init.zeros_(module.up_proj.weight)  # an adaptor starts as the identity

    @torch.no_grad()
    def resize_position_embeddings(self, image_size: int) -> "PrismerPreTrainedModel":
        """
        Changes the resolution that the model takes, resizing the position embeddings by bicubic interpolation.

        Args:
            image_size (`int`): side of the image in pixels.
        """
        vision_model = next((module for module in self.modules() if isinstance(module, PrismerVisionModel)), None)
        if vision_model is None:
            raise ValueError(f"a {type(self).__name__} takes no images")
        embeddings, config = vision_model.embeddings, vision_model.config
        if not isinstance(image_size, int):
            raise ValueError(f"image_size={image_size!r}; a whole number of pixels is needed")
        if image_size < config.patch_size:
            raise ValueError(f"image_size={image_size} is smaller than patch_size={config.patch_size}")
        if embeddings.position_embedding.is_meta:
            raise ValueError("the position embeddings are offloaded; resize them before, and save the resized model")
        grid_size = image_size // config.patch_size
        resized = embeddings.positions((grid_size, grid_size)).clone().contiguous()
        embeddings.position_embedding = nn.Parameter(
            resized, requires_grad=embeddings.position_embedding.requires_grad
        )
        embeddings.grid_size, embeddings.image_size = grid_size, image_size
        config.image_size = image_size
        return self

    @classmethod
    def from_pretrained(
        cls: type[ModelType],
        pretrained_model_name_or_path: Any,
        *args: Any,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> ModelType:
        """
        As in every model of transformers, and:

        Args:
            image_size (`int`, *optional*):
                Side of the image in pixels: where the checkpoint has another one (or the `config` that is passed asks
                for another one), its position embeddings are resized.
        """
        config = kwargs.get("config")
        if config is not None and pretrained_model_name_or_path is not None:
            hub_fields = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            hub_kwargs = {field: kwargs[field] for field in hub_fields if field in kwargs}
            if not isinstance(config, PreTrainedConfig):
                config = cls.config_class.from_pretrained(config, **hub_kwargs)
            saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
            saved_size = getattr(getattr(saved, "vision_config", saved), "image_size", None)
            wanted_size = getattr(getattr(config, "vision_config", config), "image_size", None)
            if saved_size != wanted_size:  # the weights are loaded as they are, then resized
                image_size = image_size or wanted_size
                kwargs["config"] = copy.deepcopy(config)
                getattr(kwargs["config"], "vision_config", kwargs["config"]).image_size = saved_size
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if image_size is not None:
            model.resize_position_embeddings(image_size)
        return loaded


class PrismerVisionModel(ExpertsMixin, PrismerPreTrainedModel):
    """
    The vision encoder: a CLIP vision transformer with adaptors over the image's patches and the latents to which the
    resampler condenses what the experts saw.

    Example:

    ```python
    >>> from modeling_prismer import PrismerVisionModel

    >>> model = PrismerVisionModel.from_pretrained(path)
    >>> inputs = processor.process_images(image)
    >>> outputs = model(inputs["pixel_values"], {"edge": {"values": inputs["edge_values"]}})
    >>> outputs.last_hidden_state.shape  # 64 patches and 16 latents
    torch.Size([1, 80, 128])
    ```
    """

    config: PrismerVisionConfig
    base_model_prefix = "model.vision_model"  # where a whole Prismer has it, of whose folder it can be loaded
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {
        "hidden_states": PrismerVisionLayer,
        "attentions": OutputRecorder(PrismerAttention, index=1, layer_name="self_attn"),
    }

    def __init__(self, config: PrismerVisionConfig):
        super().__init__(config)
        self.embeddings = PrismerVisionEmbeddings(config)
        self.init_experts(config)
        self.pre_layernorm = PrismerLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(PrismerVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = PrismerLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def expert_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        return self.embeddings(grid=grid)  # experts share the positions of the image

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        expert_inputs: dict[str, dict[str, torch.Tensor]] | None = None,
        expert_mask: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, image_size, image_size)`):
                The normalised image.
            expert_inputs (`dict[str, dict[str, torch.Tensor]]`, *optional*):
                For each expert that is given, its tensors by suffix (`{"depth": {"values": …}}`).
            expert_mask (`torch.BoolTensor` of shape `(batch_size, number of experts)`, *optional*):
                Which experts each sample has.

        Returns:
            `last_hidden_state` of shape `(batch_size, num_patches + num_latents, hidden_size)`.
        """
        expert_inputs = expert_inputs or {}
        self.check_expert_inputs(expert_inputs, expert_mask, {"pixel_values": pixel_values})
        hidden_states = self.embeddings(pixel_values)
        if self.resampler is not None:
            batch_size, device = hidden_states.shape[0], hidden_states.device
            latents = self.encode_experts(expert_inputs, expert_mask, batch_size, device, **kwargs)
            hidden_states = torch.cat([hidden_states, latents], dim=1)
        hidden_states = self.pre_layernorm(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.post_layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states)


class PrismerTextEmbeddings(nn.Module):
    """Words, positions and RoBERTa's single token type."""

    def __init__(self, config: PrismerTextConfig):
        super().__init__()
        self.position_offset = config.pad_token_id + 1  # RoBERTa's positions start after that of padding
        self.max_length = config.max_position_embeddings - self.position_offset
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layer_norm = PrismerLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`position_ids` count from 0, and are -1 for padding."""
        embeddings = inputs_embeds + self.token_type_embeddings(position_ids.new_zeros(1))
        embeddings = embeddings + self.position_embeddings(position_ids + self.position_offset)
        return self.dropout(self.layer_norm(embeddings))


class PrismerTextLayer(GradientCheckpointingLayer):
    """
    A RoBERTa layer, normalised after each residual connection, with cross-attention and an adaptor between its
    attention and its MLP. The output layer has neither.
    """

    def __init__(self, config: PrismerTextConfig, layer_idx: int, is_output_layer: bool):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        dropout = config.attention_probs_dropout_prob
        self.self_attn = PrismerAttention(
            config, config.num_attention_heads, dropout, is_causal=True, layer_idx=layer_idx
        )
        self.self_attn_layer_norm = PrismerLayerNorm(size, eps=eps)
        self.cross_attn = self.adaptor = None
        if not is_output_layer:
            self.cross_attn = PrismerAttention(
                config, config.num_attention_heads, dropout, config.encoder_hidden_size, layer_idx=layer_idx
            )
            self.cross_attn_layer_norm = PrismerLayerNorm(size, eps=eps)
            self.adaptor = PrismerAdaptor(size, eps, norm_first=False)
        self.mlp = PrismerMLP(size, config.intermediate_size, config.hidden_act)
        self.mlp_layer_norm = PrismerLayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @accept_past_key_values
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        cross_keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(hidden_states, attention_mask=attention_mask, cache=cache, **kwargs)
        hidden_states = self.self_attn_layer_norm(self.dropout(attn_output) + hidden_states)

        if self.cross_attn is not None and self.adaptor is not None:
            if cross_keys_values is None and encoder_hidden_states is not None and cache is not None:
                # Every step reads them: each head's side by side in memory.
                key, value = self.cross_attn.project_keys_values(encoder_hidden_states)
                cross_keys_values = key.contiguous(), value.contiguous()
                cache.cross_keys_values[self.cross_attn.layer_idx] = cross_keys_values
            if cross_keys_values is not None or encoder_hidden_states is not None:
                attn_output, _ = self.cross_attn(
                    hidden_states, keys_values=cross_keys_values, states=encoder_hidden_states, **kwargs
                )
                hidden_states = self.cross_attn_layer_norm(self.dropout(attn_output) + hidden_states)
            hidden_states = self.adaptor(hidden_states)

        return self.mlp_layer_norm(self.dropout(self.mlp(hidden_states)) + hidden_states)


class PrismerTextModel(PrismerPreTrainedModel):
    """
    The text decoder: a causal RoBERTa that cross-attends to the vision encoder's output.

    Example:

    ```python
    >>> from modeling_prismer import PrismerTextModel

    >>> model = PrismerTextModel.from_pretrained(path)
    >>> tokens = processor.tokenizer("What color is the shape?", return_tensors="pt")
    >>> model(**tokens).last_hidden_state.shape
    torch.Size([1, 8, 128])
    ```
    """

    config: PrismerTextConfig
    base_model_prefix = "model.text_model"
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": PrismerTextLayer,
        "attentions": OutputRecorder(PrismerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(PrismerAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: PrismerTextConfig):
        super().__init__(config)
        self.embeddings = PrismerTextEmbeddings(config)
        last = config.num_hidden_layers - 1
        self.layers = nn.ModuleList(
            PrismerTextLayer(config, layer_idx=i, is_output_layer=i == last) for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def make_position_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_length: int,
    ) -> torch.Tensor:
        """Positions from 0, padding left out of the count (and itself at -1): `(batch_size, sequence_length)`."""
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= length + past_length:
            mask = attention_mask.long()
            position_ids = mask.cumsum(-1) * mask - 1
            return position_ids[:, past_length : past_length + length]
        if input_ids is not None and past_length == 0:
            mask = input_ids.ne(self.config.pad_token_id).long()
            return mask.cumsum(-1) * mask - 1
        return torch.arange(past_length, past_length + length, device=inputs_embeds.device)[None]

    def cross_keys_values(
        self, encoder_hidden_states: torch.Tensor | None, cache: Cache | None, past_length: int
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """
        The cross-attention's keys and values of each layer, projected once for each image: they hang on the cache, one
        row an image, and are replaced when other encoder states come.
        """
        if cache is None:
            return {}
        known = getattr(cache, "cross_keys_values", {})
        if encoder_hidden_states is None:
            if torch.compiler.is_compiling():  # a static cache's length is a tensor, which must not be looked at here
                return known
            return {} if past_length == 0 else known  # a cache that was cleared keeps no image
        if getattr(cache, "encoded", None) is encoder_hidden_states:
            return known
        cache.encoded = encoder_hidden_states
        cache.cross_keys_values = {}  # each layer adds its own: its weights may be elsewhere until it runs
        return cache.cross_keys_values

    @accept_past_key_values
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            encoder_hidden_states (`torch.FloatTensor` of shape `(num_images, num_tokens, encoder_hidden_size)`):
                Left out, cross-attention takes what hangs on `cache`, or is skipped.
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache:
                See [`PrismerModel.forward`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embeddings.word_embeddings, input_ids, "input_ids", self.config.vocab_size)
        rows, length = inputs_embeds.shape[:2]
        if encoder_hidden_states is not None and rows % encoder_hidden_states.shape[0]:
            raise ValueError(
                f"{rows} rows of text for {encoder_hidden_states.shape[0]} images: the rows must be a multiple of the "
                "images, those of one image following each other"
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past_length = cache.get_seq_length() if cache is not None else 0
        if isinstance(past_length, int) and past_length + length > self.embeddings.max_length:
            raise ValueError(
                f"{past_length + length} tokens; this model takes at most {self.embeddings.max_length} "
                f"(max_position_embeddings={self.config.max_position_embeddings})"
            )
        if position_ids is None:
            position_ids = self.make_position_ids(input_ids, inputs_embeds, attention_mask, past_length)

        hidden_states = self.embeddings(inputs_embeds, position_ids)
        attention_mask = create_causal_mask(self.config, hidden_states, attention_mask, cache)
        cross_keys_values = self.cross_keys_values(encoder_hidden_states, cache, past_length)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=attention_mask,
                **{CACHE_NAME: cache},
                cross_keys_values=cross_keys_values.get(index),
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(hidden_states, cache if use_cache else None)


class PrismerModel(PrismerPreTrainedModel):
    """
    The vision encoder and the text decoder, without a head.

    Example:

    ```python
    >>> from modeling_prismer import PrismerModel

    >>> model = PrismerModel.from_pretrained(path)
    >>> outputs = model(**processor(images=image, text="What color is the shape?"))
    >>> outputs.last_hidden_state.shape, outputs.encoder_last_hidden_state.shape
    (torch.Size([1, 7, 128]), torch.Size([1, 80, 128]))
    ```
    """

    _has_warned_of_half_precision = False

    def __init__(self, config: PrismerConfig):
        super().__init__(config)
        self.vision_model = PrismerVisionModel._from_config(config.vision_config)
        self.text_model = PrismerTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return super().get_encoder(modality=modality or "image")

    def _warn_of_half_precision(self) -> None:
        """Warns once if weights are trained in half precision, as they are when a float16 checkpoint is loaded."""
        if self._has_warned_of_half_precision:
            return
        trained = {parameter.dtype for parameter in self.parameters() if parameter.requires_grad}
        if trained.isdisjoint((torch.float16, torch.bfloat16)):
            return
        self._has_warned_of_half_precision = True
        if torch.float16 in trained:
            problem = "float16 weights are trained: AdamW divides by values that are 0 in float16, which gives NaN"
        else:
            problem = "bfloat16 weights are trained: they have 3 significant digits and lose small updates"
        logger.warning(
            f"{problem}. Load the model with from_pretrained(…, dtype=torch.float32). To save time and memory, train "
            "it under autocast, TrainingArguments(bf16=True). (Not meant for FSDP and DeepSpeed, if they keep a "
            "float32 copy of the weights.)"
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        expert_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes images and what the experts saw.

        Args:
            pixel_values, expert_mask and the experts' tensors (in `kwargs`):
                See [`PrismerModel.forward`].

        Returns:
            `last_hidden_state`, and the same as `pooler_output`: what the text decoder cross-attends to, of shape
            `(batch_size, num_patches + num_latents, width)`. Give it to `forward` or `generate` as `encoder_outputs`.

        Example:

        ```python
        >>> encoded = model.get_image_features(**processor.process_images(image))
        >>> encoded.last_hidden_state.shape  # 64 patches and 16 latents
        torch.Size([1, 80, 128])
        >>> questions = processor(images=image, text=["What shape is in the image?", "What color is it?"])
        >>> texts = {name: questions[name] for name in ("input_ids", "attention_mask")}
        >>> generated = model.generate(**texts, encoder_outputs=encoded)
        ```
        """
        names, strict = self.config.expert_names, self.config.strict_experts
        expert_inputs = gather_expert_inputs(kwargs, expert_mask, names, strict)
        if expert_mask is not None:
            expert_mask = expert_mask.to(device=pixel_values.device, dtype=torch.bool)
        outputs = self.vision_model(pixel_values, expert_inputs, expert_mask, **kwargs)
        outputs.pooler_output = outputs.last_hidden_state
        return outputs

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
        encoder_outputs: ModelOutput | tuple[torch.FloatTensor] | torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PrismerModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The text. Its rows may be a multiple of the images: rows that follow each other then belong to one
                image, which is encoded once.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding, on either side.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions from 0; left out, they count what is not padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Word embeddings in place of `input_ids`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`, *optional*):
                The normalised images. Without them, and without `encoder_outputs`, the text runs alone.
            depth_values, normal_values, edge_values (`torch.FloatTensor` of shape `(num_images, channels, h, w)`):
                Maps in [-1, 1] of the dense experts. Any other dense expert of the config comes the same way, as
                `<name>_values`; so does the painted map of a label expert.
            segmentation_ids (`torch.Tensor` of shape `(num_images, h, w)`, `uint8` or `int16`):
                Class of each pixel, 255 for background. Another expert of that kind comes as `<name>_ids`.
            detection_ids, detection_classes (shapes `(num_images, h, w)` and `(num_images, max_instances)`):
                Instance of each pixel, 255 for background, and the class of each instance.
            detection_rows (`torch.LongTensor` of shape `(num_images, h, w)`, *optional*):
                Row of the instance embedding for each pixel. Left out: in evaluation instance `i` takes row `i mod
                127` and the background row 127; in training each value of the map draws a row at random.
            ocr_ids, ocr_features (shapes `(num_images, h, w)` and `(num_images, max_words, 64)`):
                Word of each pixel, 255 for background, and the feature of each word.
            expert_mask (`torch.BoolTensor` of shape `(num_images, number of experts)`, *optional*):
                Which experts each sample has, in the order of the config; left out, those whose tensors are given. An
                expert that is masked out leaves no trace.
            encoder_outputs (`ModelOutput`, *optional*):
                Images that have been encoded before (`get_image_features`), in place of the image inputs.
        """
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_half_precision()
        expert_inputs = pop_expert_inputs(kwargs, self.config.expert_names)
        if encoder_outputs is None and pixel_values is not None:
            encoder_outputs = self.get_image_features(pixel_values, expert_mask, **expert_inputs, **kwargs)
        elif encoder_outputs is not None and pixel_values is not None:
            raise ValueError("give pixel_values or encoder_outputs, not both")
        elif given := [name for name, tensor in expert_inputs.items() if tensor is not None]:
            raise ValueError(f"{', '.join(given)} given without pixel_values")
        if isinstance(encoder_outputs, torch.Tensor):
            encoder_outputs = (encoder_outputs,)
        encoder_hidden_states = encoder_outputs[0] if encoder_outputs is not None else None
        width = self.config.vision_config.hidden_size
        if encoder_hidden_states is not None and encoder_hidden_states.shape[-1] != width:
            raise ValueError(
                f"encoder_outputs has the shape {tuple(encoder_hidden_states.shape)}; (images, tokens, {width}) is "
                "needed"
            )

        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            use_cache=use_cache,
            **kwargs,
        )
        return PrismerModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_hidden_states,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


class PrismerLMHead(nn.Module):
    """RoBERTa's head: dense, GELU, LayerNorm, and a projection tied to the word embeddings."""

    def __init__(self, config: PrismerTextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN["gelu"]
        self.layer_norm = PrismerLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.layer_norm(self.activation(self.dense(hidden_states)))
        return self.decoder(hidden_states)


class PrismerForConditionalGeneration(RankingMixin, ExpertEditingMixin, PrismerPreTrainedModel, GenerationMixin):
    """
    Prismer with its language modelling head: captions, answers, and ranking of given answers.

    Example:

    ```python
    >>> from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path

    >>> path = pretrained_path("prismer-easy-vqa")
    >>> processor = PrismerProcessor.from_pretrained(path)
    >>> model = PrismerForConditionalGeneration.from_pretrained(path)
    >>> inputs = processor(images=image, text="What color is the shape?")
    >>> generated = model.generate(**inputs, max_new_tokens=5)  # the prompt, and what it says
    >>> processor.post_process_generation(generated, inputs["input_ids"].shape[1])
    ['teal']
    ```
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "model.text_model.embeddings.word_embeddings.weight"}
    if TYPE_CHECKING:  # transformers types it for a class of its own alone

        def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any: ...

    accepts_loss_kwargs = False  # the loss is a mean over samples: Trainer scales it under gradient accumulation

    def __init__(self, config: PrismerConfig):
        super().__init__(config)
        self.model = PrismerModel(config)
        self.lm_head = PrismerLMHead(config.text_config)
        self.post_init()

    @property
    def expert_network(self) -> PrismerVisionModel:
        return self.model.vision_model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if self._auto_class is not None:  # the code is saved too: `AutoModel` is to find the model without its head
            auto_map = {"AutoModel": f"{__name__.rpartition('.')[2]}.{PrismerModel.__name__}"}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map}
        super().save_pretrained(save_directory, *args, **kwargs)

    save_pretrained.__doc__ = PreTrainedModel.save_pretrained.__doc__

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return super().get_encoder(modality=modality or "image")

    def get_image_features(
        self, pixel_values: torch.Tensor, expert_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, expert_mask, **kwargs)

    get_image_features.__doc__ = PrismerModel.get_image_features.__doc__

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
        encoder_outputs: ModelOutput | tuple[torch.FloatTensor] | torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        sample_weight: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PrismerCausalLMOutput:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The tokens to learn, aligned with `input_ids`; -100 where nothing is learned (prompt, padding).
            sample_weight (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
                Weight of each sample's loss, such as the share of the annotators who gave a VQA answer.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute the logits of this many last positions only (0: all), or of the positions in the tensor.
            input_ids … encoder_outputs, use_cache:
                See [`PrismerModel.forward`].

        Example:

        ```python
        >>> inputs = processor(images=image, text="What color is the shape?", suffix="teal")
        >>> outputs = model(**inputs)
        >>> outputs.logits.shape == (1, inputs["input_ids"].shape[1], model.config.text_config.vocab_size)
        True
        >>> outputs.loss.shape
        torch.Size([])
        ```
        """
        shift_labels = kwargs.pop("shift_labels", None)
        kwargs.pop("num_items_in_batch", None)
        if labels is not None or shift_labels is not None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            depth_values=depth_values,
            normal_values=normal_values,
            segmentation_ids=segmentation_ids,
            edge_values=edge_values,
            detection_ids=detection_ids,
            detection_classes=detection_classes,
            detection_rows=detection_rows,
            ocr_ids=ocr_ids,
            ocr_features=ocr_features,
            expert_mask=expert_mask,
            encoder_outputs=encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])

        loss = loss_per_sample = None
        given = labels if shift_labels is None else shift_labels
        if given is not None:
            if given.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels of the shape {tuple(given.shape)} for logits of {tuple(logits.shape[:2])}; they must be "
                    'aligned with input_ids (with peft\'s prompt learning: it needs `task_type="CAUSAL_LM"`)'
                )
            if shift_labels is None:
                torch_compilable_check(
                    (given[:, 1:] != -100).any(),
                    "labels are -100 everywhere: there is nothing to learn. They are aligned with input_ids, -100 on "
                    "prompt and padding alone",
                )
                loss_per_sample = sample_losses(logits[:, :-1], given[:, 1:], self.config.label_smoothing)
            else:
                loss_per_sample = sample_losses(logits, given, self.config.label_smoothing)
            if sample_weight is not None and sample_weight.shape != loss_per_sample.shape:
                raise ValueError(
                    f"sample_weight has the shape {tuple(sample_weight.shape)}; ({len(loss_per_sample)},) is needed, "
                    "one weight for each row of input_ids"
                )
            weighted = loss_per_sample if sample_weight is None else loss_per_sample * sample_weight.to(logits.device)
            loss = weighted.mean()
        return PrismerCausalLMOutput(
            loss=loss,
            logits=logits,
            loss_per_sample=loss_per_sample,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` looks for its arguments
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # peft's prompt learning puts a method of its own before this one while it generates. Before 0.22 it looks for
        # the cache by the name of transformers before 5.24; not finding it, it would prepend its tokens at every step.
        called_by_peft = getattr(self.prepare_inputs_for_generation, "__self__", self) is not self
        if called_by_peft and "cache" in inputs and Version(version("peft")) < Version("0.22"):
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        others = dict(model_kwargs)
        pop_expert_inputs(others, self.config.expert_names)
        super()._validate_model_kwargs(others)

    def _prepare_model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> tuple:
        """Takes what is to be learned out of the prompt where `labels` say it, as Seq2SeqTrainer hands them over."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        labels = model_kwargs.pop("labels", None)
        if labels is not None and name == "input_ids":
            attention_mask = model_kwargs.get("attention_mask")
            given = inputs.ne(self.config.pad_token_id) if attention_mask is None else attention_mask.bool()
            given = given & (labels == -100)
            order = given.long().argsort(dim=-1, stable=True)  # the prompts move to the right
            inputs = inputs.masked_fill(~given, self.config.pad_token_id).gather(1, order)
            model_kwargs["attention_mask"] = given.gather(1, order).long()
        return inputs, name, model_kwargs

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], model_input_name: Any, generation_config: Any
    ) -> dict[str, Any]:
        """Encodes the images once for the whole generation; the output, not being a tensor, is shared by all beams."""
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.ndim == 2 and bool((attention_mask[:, -1] == 0).any()):
            raise ValueError(
                "generate needs prompts padded on the left (padding_side='left'): this attention_mask ends in padding"
            )
        expert_inputs = pop_expert_inputs(model_kwargs, self.config.expert_names)
        pixel_values = model_kwargs.pop("pixel_values", None)
        expert_mask = model_kwargs.pop("expert_mask", None)
        if pixel_values is None:
            if given := [key for key, tensor in expert_inputs.items() if tensor is not None]:
                raise ValueError(f"{', '.join(given)} given without pixel_values")
        elif model_kwargs.get("encoder_outputs") is not None:
            raise ValueError("give pixel_values or encoder_outputs, not both")
        else:
            images = {"pixel_values": pixel_values, "expert_mask": expert_mask, **expert_inputs}
            model_kwargs["encoder_outputs"] = self.get_image_features(return_dict=True, **images)
            model_kwargs["encoder_outputs"].images = images  # an assistant will look at them too
        encoder_outputs = model_kwargs.get("encoder_outputs")
        if isinstance(encoder_outputs, torch.Tensor):  # a tensor would be repeated for every beam
            model_kwargs["encoder_outputs"] = (encoder_outputs,)
        return model_kwargs

    def _get_candidate_generator(self, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """In assisted decoding the assistant encodes the images by itself, once; one for text alone sees none."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit needs a model that was trained for it, which Prismer is not")
        text_kwargs = {key: value for key, value in model_kwargs.items() if key != "encoder_outputs"}
        generator = super()._get_candidate_generator(generation_config, model_kwargs=text_kwargs, **kwargs)
        assistant_model: Any = kwargs.get("assistant_model")
        encoder_outputs = model_kwargs.get("encoder_outputs")
        if encoder_outputs is not None and hasattr(assistant_model, "get_image_features"):
            images = getattr(encoder_outputs, "images", None)
            if images is None:
                raise ValueError(
                    "assisted decoding needs pixel_values and the experts' tensors, not encoder_outputs: the "
                    "assistant encodes the images by itself"
                )
            images = {key: tensor.to(assistant_model.device) for key, tensor in images.items() if tensor is not None}
            generator.assistant_kwargs["encoder_outputs"] = assistant_model.get_image_features(**images)
        return generator

    @staticmethod
    def _backbone_parameters(model: PrismerModel, vision: bool) -> Iterator[nn.Parameter]:
        """The parameters that come from CLIP's or RoBERTa's layers: all of a layer but what Prismer put into it."""
        layers = model.vision_model.layers if vision else model.text_model.layers[:-1]
        for name, parameter in layers.named_parameters():
            if not any(part in name for part in (".adaptor.", ".cross_attn.", ".cross_attn_layer_norm.")):
                yield parameter

    def freeze_backbones(self, vision: bool = True, language: bool = True) -> "PrismerForConditionalGeneration":
        """
        Freezes the layers that come from CLIP (`vision`) and from RoBERTa (`language`), or unfreezes them (`False`).
        Everything else always trains: the experts' stems, resampler, positions, adaptors, cross-attention, embeddings,
        output layer and head. The paper freezes both in pre-training and the vision backbone in fine-tuning.

        Example:

        ```python
        >>> model = model.freeze_backbones(vision=True, language=False)
        >>> sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
        793088
        ```
        """
        for parameter in self._backbone_parameters(self.model, vision=True):
            parameter.requires_grad_(not vision)
        for parameter in self._backbone_parameters(self.model, vision=False):
            parameter.requires_grad_(not language)
        return self

    @classmethod
    def from_backbones(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        experts: list[dict] | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> "PrismerForConditionalGeneration":
        """
        A new model on a CLIP vision tower and a RoBERTa. The backbones' weights are taken over exactly (CLIP's class
        token and the poolers are dropped); stems, resampler, adaptors, cross-attention and output layer start fresh.
        The LayerNorms that Prismer puts into a RoBERTa layer start as copies of the one before, so that the frozen
        weights after them meet what they are used to.

        Args:
            vision (`str`, `CLIPVisionModel` or `CLIPModel`):
                A Hub id, a folder, or a loaded model.
            text (`str`, `RobertaModel`, `RobertaForMaskedLM` or `RobertaForCausalLM`):
                A Hub id, a folder, or a loaded model. The language modelling head is taken over where there is one.
            experts (`list[dict]`, *optional*):
                The experts' descriptions; see [`PrismerConfig`].
            image_size (`int`, *optional*):
                Side of the image in pixels, by default the vision tower's; the positions are resized to it.
            kwargs:
                Further fields of [`PrismerConfig`].

        Raises:
            ValueError: if `vision` is no CLIP vision tower, or `text` no RoBERTa.

        Example:

        ```python
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaForMaskedLM

        >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        >>> vision = CLIPVisionModel(CLIPVisionConfig(**sizes))  # or "openai/clip-vit-base-patch16"
        >>> text = RobertaForMaskedLM(RobertaConfig(**sizes))  # or "FacebookAI/roberta-base"
        >>> experts = [{"name": "depth", "kind": "dense", "channels": 1}]
        >>> model = PrismerForConditionalGeneration.from_backbones(vision, text, experts=experts, image_size=96)
        >>> model.config.text_config.num_hidden_layers  # RoBERTa's, and the output layer
        3
        ```
        """
        return build_from_backbones(cls, vision, text, experts, image_size, **kwargs)


__all__ = [
    "PrismerForConditionalGeneration",
    "PrismerModel",
    "PrismerPreTrainedModel",
    "PrismerTextModel",
    "PrismerVisionModel",
]
