"""
The Prismer network (arXiv 2303.02506): from an image and the maps of frozen experts to text.

The file reads from the smallest module to the model: adaptor, vision encoder, text decoder, and both together with
the loss. Attention and MLP are in layers.py, the experts' stems and the resampler in expert_stems.py, the imitation of
experts in imitation.py, generation in generation.py, ranking in ranking.py, and building from CLIP and RoBERTa in
backbones.py.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import torch_compilable_check
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapter_targets import register_adapter_targets
from .backbones import build_from_backbones
from .cache import CACHE_NAME, accept_past_key_values
from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig
from .expert_editing import ExpertEditingMixin
from .expert_stems import gather_expert_inputs, init_expert_weights, look_up, pop_expert_inputs
from .generation import PrismerGenerationMixin
from .half_precision import HalfPrecisionMixin
from .imitation import (
    ImitatingExpertsMixin,
    ImitationMixin,
    ImitationOutput,
    init_imitation_weights,
    uncaptured_outputs,
)
from .layers import PrismerAttention, PrismerLayerNorm, PrismerMLP, init_layer_weights
from .loss import sample_losses
from .ranking import RankingMixin


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
    Output of [`PrismerModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of the text decoder.
        cache (`Cache`, *optional*):
            The keys and values of the text, and of the image that it attends to.
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
    Output of [`PrismerForConditionalGeneration`].

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
        if pixel_values is None:  # weights that are offloaded come back for a call of `forward`, not of `positions`
            return self.positions(grid or (self.grid_size, self.grid_size))
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding  # (batch, patches, width)


class PrismerPreTrainedModel(PreTrainedModel):
    """
    Base class of all Prismer models: initial weights, loading, and the resolution of images.

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
        "PrismerImitation",
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
        # Drops the flag for code saved with a model: it skips modules without weights of their own, such as adaptors.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_expert_weights(module)
        init_imitation_weights(module)
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
        Changes the resolution of the images. The position embeddings are resized by bicubic interpolation.

        Args:
            image_size (`int`): side of the image in pixels.

        Raises:
            ValueError: if the size is not a whole number of at least one patch, or if the embeddings are offloaded.
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
        embeddings.grid_size = grid_size
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
                Side of the image in pixels. If the checkpoint has another one, its position embeddings are resized;
                so they are if a `config` with another one is passed.
        """
        config = kwargs.get("config")
        if config is not None and pretrained_model_name_or_path is not None:
            # The weights load in the size that is saved beside them, which a given `config` may have changed.
            hub_fields = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            hub_kwargs = {field: kwargs[field] for field in hub_fields if field in kwargs}
            if not isinstance(config, PreTrainedConfig):
                config = cls.config_class.from_pretrained(config, **hub_kwargs)
            saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
            saved_size = getattr(getattr(saved, "vision_config", saved), "image_size", None)
            wanted_size = getattr(getattr(config, "vision_config", config), "image_size", None)
            if saved_size != wanted_size:
                image_size = image_size or wanted_size
                kwargs["config"] = copy.deepcopy(config)
                getattr(kwargs["config"], "vision_config", kwargs["config"]).image_size = saved_size
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if image_size is not None:
            model.resize_position_embeddings(image_size)
        return loaded


class PrismerVisionModel(ImitatingExpertsMixin, PrismerPreTrainedModel):
    """
    The vision encoder: a CLIP vision transformer with adaptors. It reads the patches of the image, and the latents to
    which the resampler condenses the experts' maps.

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
    base_model_prefix = "model.vision_model"  # so that it loads from the folder of a whole Prismer
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
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

    def expert_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        return self.embeddings(grid=grid)  # experts share the positions of the image

    def imitate(self, patches: torch.Tensor, *args: Any, **kwargs: Any) -> ImitationOutput:
        layers = tuple(layer.__call__ for layer in self.layers)  # accelerate would move modules among the arguments
        with uncaptured_outputs():
            return self.imitation(self.pre_layernorm(patches), layers, *args, **kwargs)

    def check_inputs(
        self,
        pixel_values: torch.Tensor,
        expert_inputs: dict[str, dict[str, torch.Tensor]],
        expert_mask: torch.Tensor | None,
    ) -> None:
        """
        Arguments as in `forward`.

        Raises:
            ValueError: naming the tensor, what is wrong with it and what is accepted.
        """
        size = self.config.image_size
        needed = (self.config.num_channels, size, size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != needed:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; this model needs (batch, "
                f"{', '.join(map(str, needed))}): prepare the image at {size} pixels, or change the model with "
                "`resize_position_embeddings(image_size)`"
            )
        self.check_expert_inputs(expert_inputs, expert_mask, {"pixel_values": pixel_values})

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
        self.check_inputs(pixel_values, expert_inputs, expert_mask)
        hidden_states = self.embeddings(pixel_values)
        if self.resampler is not None:
            batch_size, device = hidden_states.shape[0], hidden_states.device
            latents = self.encode_experts(expert_inputs, expert_mask, batch_size, device, hidden_states, **kwargs)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(hidden_states, attention_mask=attention_mask, cache=cache, **kwargs)
        hidden_states = self.self_attn_layer_norm(self.dropout(attn_output) + hidden_states)

        if self.cross_attn is not None and self.adaptor is not None:
            keys_values = self.cross_attn.image_keys_values(encoder_hidden_states, cache)
            if keys_values is not None or encoder_hidden_states is not None:
                attn_output, _ = self.cross_attn(
                    hidden_states, keys_values=keys_values, states=encoder_hidden_states, **kwargs
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
    _input_embed_layer = "word_embeddings"
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

    def make_position_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_length: int,
    ) -> torch.Tensor:
        """Positions from 0 that do not count padding, which is at -1: `(batch_size, sequence_length)`."""
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= length + past_length:
            mask = attention_mask.long()
            position_ids = mask.cumsum(-1) * mask - 1
            return position_ids[:, past_length : past_length + length]
        if input_ids is not None and past_length == 0:
            mask = input_ids.ne(self.config.pad_token_id).long()
            return mask.cumsum(-1) * mask - 1
        return torch.arange(past_length, past_length + length, device=inputs_embeds.device)[None]

    def check_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        past_length: int | torch.Tensor,
    ) -> None:
        """
        Arguments as in `forward`; `past_length` is the cache's, a tensor for a static cache.

        Raises:
            ValueError: if the text is missing, too long, or does not fit the images.
        """
        text = inputs_embeds if input_ids is None else input_ids
        if text is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        rows, length = text.shape[:2]
        if encoder_hidden_states is not None and rows % encoder_hidden_states.shape[0]:
            raise ValueError(
                f"{rows} rows of text for {encoder_hidden_states.shape[0]} images: the rows must be a multiple of the "
                "images, those of one image following each other"
            )
        longest = self.embeddings.max_length
        if isinstance(past_length, int) and past_length + length > longest:
            raise ValueError(
                f"{past_length + length} tokens; this model takes at most {longest} "
                f"(max_position_embeddings={self.config.max_position_embeddings})"
            )

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
                Output of the vision encoder, by default the image that `cache` holds. Without either, cross-attention
                is skipped.
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache:
                See [`PrismerModel.forward`].
        """
        past_length = cache.get_seq_length() if cache is not None else 0
        self.check_inputs(input_ids, inputs_embeds, encoder_hidden_states, past_length)
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embeddings.word_embeddings, input_ids, "input_ids", self.config.vocab_size)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.make_position_ids(input_ids, inputs_embeds, attention_mask, past_length)

        hidden_states = self.embeddings(inputs_embeds, position_ids)
        attention_mask = create_causal_mask(self.config, hidden_states, attention_mask, cache)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=attention_mask,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(hidden_states, cache if use_cache else None)


class PrismerModel(HalfPrecisionMixin, PrismerPreTrainedModel):
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

    def __init__(self, config: PrismerConfig):
        super().__init__(config)
        self.vision_model = PrismerVisionModel._from_config(config.vision_config)
        self.text_model = PrismerTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def check_inputs(
        self, pixel_values: torch.Tensor | None, expert_inputs: dict[str, Any], encoder_outputs: Any
    ) -> None:
        """
        Arguments as in `forward`. `get_image_features` checks the images themselves.

        Raises:
            ValueError: if images are given twice or without pixels, or if they were encoded by another model.
        """
        if pixel_values is None:
            if given := [name for name, tensor in expert_inputs.items() if tensor is not None]:
                raise ValueError(f"{', '.join(given)} given without pixel_values")
        elif encoder_outputs is not None:
            raise ValueError("give pixel_values or encoder_outputs, not both")
        if encoder_outputs is not None:
            states = encoder_outputs if isinstance(encoder_outputs, torch.Tensor) else encoder_outputs[0]
            width = self.config.vision_config.hidden_size
            if states.shape[-1] != width:
                raise ValueError(
                    f"encoder_outputs has the shape {tuple(states.shape)}; (images, tokens, {width}) is needed"
                )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        expert_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes images and the experts' maps.

        Args:
            pixel_values, expert_mask and the experts' tensors (in `kwargs`):
                See [`PrismerModel.forward`].

        Returns:
            `last_hidden_state`, and the same tensor as `pooler_output`, of shape `(batch_size, num_patches +
            num_latents, width)`. Give the output to `forward` or `generate` as `encoder_outputs`.

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
        expert_inputs = gather_expert_inputs(kwargs, expert_mask, names, strict, self.config.imitated_experts)
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
                Positions from 0, by default without counting padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Word embeddings in place of `input_ids`.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, image_size, image_size)`, *optional*):
                The normalised images. Without them, and without `encoder_outputs`, the text runs alone.
            depth_values, normal_values, edge_values (`torch.FloatTensor` of shape `(num_images, channels, h, w)`):
                Maps in [-1, 1] of the dense experts. Give any other dense expert of the config as `<name>_values`, and
                so a painted map of a label expert.
            segmentation_ids (`torch.Tensor` of shape `(num_images, h, w)`, `uint8` or `int16`):
                Class of each pixel, 255 for background. Give any other label expert as `<name>_ids`.
            detection_ids, detection_classes (shapes `(num_images, h, w)` and `(num_images, max_instances)`):
                Instance of each pixel, 255 for background, and the class of each instance.
            detection_rows (`torch.LongTensor` of shape `(num_images, h, w)`, *optional*):
                Row of the instance embedding for each pixel. By default, instance `i` has row `i mod 127` and the
                background row 127 in evaluation; in training each value of the map draws a row at random.
            ocr_ids, ocr_features (shapes `(num_images, h, w)` and `(num_images, max_words, 64)`):
                Word of each pixel, 255 for background, and the feature of each word.
            expert_mask (`torch.BoolTensor` of shape `(num_images, number of experts)`, *optional*):
                Which experts each sample has, in the order of the config, by default the given ones. An expert that is
                masked out leaves no trace. With `config.imitation`, its imitation takes its place.
            cache (`Cache`, *optional*):
                The text so far, with the image that it attends to.
            encoder_outputs (`ModelOutput`, *optional*):
                Encoded images from `get_image_features`, in place of the image inputs.
        """
        if self.training and torch.is_grad_enabled():
            self.warn_of_half_precision()
        expert_inputs = pop_expert_inputs(kwargs, self.config.expert_names)
        self.check_inputs(pixel_values, expert_inputs, encoder_outputs)
        if pixel_values is not None:
            encoder_outputs = self.get_image_features(pixel_values, expert_mask, **expert_inputs, **kwargs)
        encoder_hidden_states = encoder_outputs
        if encoder_outputs is not None and not isinstance(encoder_outputs, torch.Tensor):
            encoder_hidden_states = encoder_outputs[0]

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
            **outputs,
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


class PrismerForConditionalGeneration(
    RankingMixin, ExpertEditingMixin, ImitationMixin, PrismerGenerationMixin, PrismerPreTrainedModel
):
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
    accepts_loss_kwargs = False  # the loss is a mean over samples: Trainer scales it under gradient accumulation

    def __init__(self, config: PrismerConfig):
        super().__init__(config)
        self.model = PrismerModel(config)
        self.lm_head = PrismerLMHead(config.text_config)
        self.post_init()

    @property
    def expert_network(self) -> PrismerVisionModel:
        return self.model.vision_model

    def embed_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.vision_model.embeddings(pixel_values)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if self._auto_class is not None:  # the code is saved too, so that `AutoModel` finds the model without its head
            auto_map = {"AutoModel": f"{__name__.rpartition('.')[2]}.{PrismerModel.__name__}"}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map}
        super().save_pretrained(save_directory, *args, **kwargs)

    save_pretrained.__doc__ = PreTrainedModel.save_pretrained.__doc__

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

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
        text = input_ids if inputs_embeds is None else inputs_embeds
        given = labels if shift_labels is None else shift_labels
        if given is not None and text is not None:
            self.check_labels(given, shift_labels is not None, text, sample_weight, logits_to_keep)
            use_cache = False
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
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        texts |= {"inputs_embeds": inputs_embeds, "cache": cache, "use_cache": use_cache}
        images = {"pixel_values": pixel_values, "expert_mask": expert_mask, "encoder_outputs": encoder_outputs}
        outputs = dict(self.model(**texts, **images, **experts, **kwargs, return_dict=True))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.pop("last_hidden_state")[:, kept])
        loss = loss_per_sample = None
        if shift_labels is not None:
            loss_per_sample = sample_losses(logits, shift_labels, self.config.label_smoothing)
        elif labels is not None:
            loss_per_sample = sample_losses(logits[:, :-1], labels[:, 1:], self.config.label_smoothing)
        if loss_per_sample is not None:
            weights = 1.0 if sample_weight is None else sample_weight.to(logits.device)
            loss = (loss_per_sample * weights).mean()
        return PrismerCausalLMOutput(loss=loss, logits=logits, loss_per_sample=loss_per_sample, **outputs)

    def check_labels(
        self,
        labels: torch.Tensor,
        is_shifted: bool,
        text: torch.Tensor,
        sample_weight: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
    ) -> None:
        """
        Arguments as in `forward`; `text` is `input_ids` or `inputs_embeds`.

        Raises:
            ValueError: if labels or weights do not fit the text, or if there is nothing to learn.
        """
        rows, length = text.shape[:2]
        kept = len(range(length)[-logits_to_keep:]) if isinstance(logits_to_keep, int) else len(logits_to_keep)
        if labels.shape != (rows, kept):
            raise ValueError(
                f"labels of the shape {tuple(labels.shape)} for logits of {(rows, kept)}; they must be aligned with "
                'input_ids (with peft\'s prompt learning: it needs `task_type="CAUSAL_LM"`)'
            )
        if sample_weight is not None and sample_weight.shape != (rows,):
            raise ValueError(
                f"sample_weight has the shape {tuple(sample_weight.shape)}; ({rows},) is needed, one weight for each "
                "row of input_ids"
            )
        if not is_shifted:
            torch_compilable_check(
                (labels[:, 1:] != -100).any(),
                "labels are -100 everywhere: there is nothing to learn. They are aligned with input_ids, -100 on "
                "prompt and padding alone",
            )

    @staticmethod
    def _backbone_parameters(model: PrismerModel, vision: bool) -> Iterator[nn.Parameter]:
        """The parameters of CLIP's or RoBERTa's layers, without the modules that Prismer adds to a layer."""
        layers = model.vision_model.layers if vision else model.text_model.layers[:-1]
        for name, parameter in layers.named_parameters():
            if not any(part in name for part in (".adaptor.", ".cross_attn.", ".cross_attn_layer_norm.")):
                yield parameter

    def freeze_backbones(self, vision: bool = True, language: bool = True) -> "PrismerForConditionalGeneration":
        """
        Freezes the layers of CLIP (`vision`) and of RoBERTa (`language`), or unfreezes them (`False`). Everything else
        always trains: the experts' stems, resampler, positions, adaptors, cross-attention, embeddings, output layer
        and head. The paper freezes both in pre-training, and the vision backbone in fine-tuning.

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
        Builds a new model on a CLIP vision tower and a RoBERTa. It has the backbones' weights, without CLIP's class
        token and the poolers. Stems, resampler, adaptors, cross-attention and output layer are new. The new LayerNorms
        in a RoBERTa layer are copies of the LayerNorm before them, so that the frozen weights after them get inputs of
        the scale that they were trained on.

        Args:
            vision (`str`, `CLIPVisionModel` or `CLIPModel`):
                A Hub id, a folder, or a loaded model.
            text (`str`, `RobertaModel`, `RobertaForMaskedLM` or `RobertaForCausalLM`):
                A Hub id, a folder, or a loaded model. Its language modelling head is used, if it has one.
            experts (`list[dict]`, *optional*):
                The experts' descriptions; see [`PrismerConfig`].
            image_size (`int`, *optional*):
                Side of the image in pixels, by default the vision tower's. The positions are resized to it.
            kwargs:
                Further fields of [`PrismerConfig`].

        Raises:
            ValueError: if `vision` is not a CLIP vision tower, or `text` not a RoBERTa.

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
