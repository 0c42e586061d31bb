"""Configuration of PrismerLM: frozen vision encoders and experts in front of any language model."""

import math
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_prismer import validate_fields
from .expert_spec import ExpertsConfigMixin, ExpertSpec, read_specs
from .imitation_spec import ImitationConfigMixin


FUSIONS = ("prefix", "cross_attention")
EXPERTS_AS = ("tokens", "words", "both")


@strict
class PrismerExpertsConfig(ImitationConfigMixin, ExpertsConfigMixin, PreTrainedConfig):
    r"""
    The experts' part of a PrismerLM: a stem for each expert, position embeddings of their own, and the resampler.

    Args:
        experts (`list[dict]`, *optional*, defaults to `[]`):
            One description for each expert, in the order of `expert_mask`; see [`PrismerConfig`].
        hidden_size (`int`, *optional*, defaults to 768): width of the stems' tokens and of the latents.
        image_size (`int`, *optional*, defaults to 224): side of the experts' maps in pixels.
        patch_size (`int`, *optional*, defaults to 16): pixels for each token of a map, on both axes.
        num_latents (`int`, *optional*, defaults to 64): latents that the resampler condenses all tokens to.
        resampler_layers (`int`, *optional*, defaults to 4): blocks of the resampler.
        resampler_attention_heads (`int`, *optional*, defaults to 8): attention heads of the resampler.
        num_instance_embeddings (`int`, *optional*, defaults to 128): rows of the table of instance embeddings.
        imitation (`dict`, *optional*):
            The experts to imitate from the features of the vision encoders where they are missing; a dict with the
            fields of [`ImitationSpec`].

    Example:

    ```python
    >>> from modeling_prismer import PrismerExpertsConfig

    >>> config = PrismerExpertsConfig(experts=[{"name": "depth", "kind": "dense", "channels": 1}], hidden_size=256)
    >>> config.expert_names, config.grid_size
    (['depth'], 14)
    ```
    """

    model_type = "prismer_experts"
    base_config_key = "experts_config"

    if TYPE_CHECKING:
        experts: list[dict[str, Any]]
    else:
        experts: list[dict] | None = None

    hidden_size: int = 768
    image_size: int = 224
    patch_size: int = 16
    num_latents: int = 64
    resampler_layers: int = 4
    resampler_attention_heads: int = 8
    num_instance_embeddings: int = 128
    imitation: dict | None = None
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.experts = [ExpertSpec.from_dict(expert).to_dict() for expert in self.experts or []]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation."""
        validate_fields(self)
        specs = read_specs(self.experts)
        if self.imitation_spec is not None:
            self.imitation_spec.check(specs)
        if self.hidden_size % self.resampler_attention_heads or self.hidden_size < 8:
            raise ValueError(
                f"hidden_size={self.hidden_size}; at least 8 and a multiple of "
                f"resampler_attention_heads={self.resampler_attention_heads} is needed"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} is smaller than patch_size={self.patch_size}")

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size


@strict
class PrismerLMConfig(ImitationConfigMixin, ExpertsConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`PrismerLMForConditionalGeneration`]: frozen vision encoders and experts in front of any
    language model, or of any vision-language model.

    Args:
        vision_config (`list[dict]` or `list[PreTrainedConfig]`, *optional*, defaults to `[]`):
            The vision encoders, for example of CLIP, SigLIP, DINOv2, DINOv3 or `timm_wrapper`. Their patch features
            are resized to one grid and concatenated along channels. A single [`PrismerVisionConfig`] puts a trained
            Prismer's encoder in front of the language model, its experts included. Leave it empty if `text_config` is
            that of a vision-language model.
        experts_config (`dict` or [`PrismerExpertsConfig`], *optional*):
            Stems and resampler of the experts; without it, the experts reach the model as words alone, or not at all.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to that of a Llama):
            The language model, or the whole vision-language model.
        fusion (`str`, *optional*, defaults to `"prefix"`):
            `"prefix"`: projected patches and latents replace the embeddings of placeholder tokens in the prompt.
            `"cross_attention"`: gated blocks (zero at the start) before every n-th decoder layer attend to them.
        cross_attention_every (`int`, *optional*, defaults to 4): n, for `fusion="cross_attention"`.
        cross_attention_intermediate_size (`int`, *optional*):
            Width inside the MLP of those blocks; four times that of the language model unless given.
        projector_hidden_size (`int`, *optional*):
            Width inside the two-layer projections into the language model; its hidden size unless given.
        question_queries (`bool`, *optional*, defaults to `False`):
            Whether the question conditions the resampler's latents, through a gate that starts at zero. The encoders
            and stems still run once for each image, the resampler once for each question.
        experts_as (`str`, *optional*, defaults to `"tokens"`):
            How the processor hands the experts over: `"tokens"`, `"words"` in the prompt, or `"both"`.
        image_token_id (`int`, *optional*):
            Id of the placeholder token. It may lie beyond the vocabulary, where it is by default: the language
            model's embeddings then stay as they are.
        grid_size (`int`, *optional*):
            Side of the grid of patch features; that of the first encoder unless given.
        feature_scale (`float`, *optional*, defaults to 1.0):
            Root mean square of what takes the place of word embeddings, at the start: projected features in prefix
            fusion, the placeholder in cross-attention. [`from_backbones`] sets that of the word embeddings.
        label_smoothing (`float`, *optional*, defaults to 0.0): label smoothing of the scores of `rank_candidates`.
        strict_experts (`bool`, *optional*, defaults to `True`):
            Whether an expert that is neither given nor masked out by `expert_mask` is an error.
        backbones (`dict`, *optional*):
            Ids and fingerprints of the frozen backbones, written by `save_pretrained(…, trained_only=True)`.

    Example:

    ```python
    >>> from transformers import LlamaConfig, SiglipVisionConfig
    >>> from modeling_prismer import PrismerLMConfig

    >>> experts = [{"name": "depth", "kind": "dense", "channels": 1}]
    >>> config = PrismerLMConfig(
    ...     vision_config=[SiglipVisionConfig()], text_config=LlamaConfig(), experts_config={"experts": experts}
    ... )
    >>> config.image_seq_length  # 14 x 14 patches and 64 latents
    260
    ```
    """

    model_type = "prismer_lm"
    sub_configs_defaults = {
        "experts_config": SubConfigSpec(config_class=PrismerExpertsConfig, optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values", "hidden_states", "attentions", "image_hidden_states"]

    if TYPE_CHECKING:
        vision_config: list[PreTrainedConfig]
        text_config: PreTrainedConfig
        experts_config: PrismerExpertsConfig | None
        image_token_id: int
        grid_size: int
    else:
        vision_config: list | dict | PreTrainedConfig | None = None
        text_config: dict | PreTrainedConfig | None = None
        experts_config: dict | PrismerExpertsConfig | None = None
        image_token_id: int | None = None
        grid_size: int | None = None

    fusion: str = "prefix"
    cross_attention_every: int = 4
    cross_attention_intermediate_size: int | None = None
    projector_hidden_size: int | None = None
    question_queries: bool = False
    experts_as: str = "tokens"
    feature_scale: float | int = 1.0
    label_smoothing: float | int = 0.0
    strict_experts: bool = True
    initializer_range: float = 0.02
    backbones: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        encoders: Any = self.vision_config
        if encoders is None:
            encoders = []
        elif not isinstance(encoders, list | tuple):
            encoders = [encoders]
        self.vision_config = [_as_config(encoder) for encoder in encoders]
        super().__post_init__(**kwargs)
        if self.image_token_id is None:
            self.image_token_id = self.vocab_size
        if self.grid_size is None and self.vision_config:
            self.grid_size = _grid_size(self.vision_config[0])

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation."""
        validate_fields(self)
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion={self.fusion!r}; accepted are {', '.join(map(repr, FUSIONS))}")
        if self.experts_as not in EXPERTS_AS:
            raise ValueError(f"experts_as={self.experts_as!r}; accepted are {', '.join(map(repr, EXPERTS_AS))}")
        if self.cross_attention_every < 1:
            raise ValueError(f"cross_attention_every={self.cross_attention_every}; at least 1 is needed")
        if not 0 < self.feature_scale < math.inf:
            raise ValueError(f"feature_scale={self.feature_scale}; a positive number is needed")
        if self.vision_config and self.has_vision_language_model:
            raise ValueError(
                f"text_config is that of a vision-language model ({self.text_config.model_type}), which has its own "
                "vision encoder: vision_config must be empty"
            )
        if any(encoder.model_type == "prismer_vision_model" for encoder in self.vision_config) and (
            len(self.vision_config) > 1 or self.experts_config is not None
        ):
            raise ValueError(
                "vision_config has Prismer's encoder, which has experts of its own: neither experts_config nor "
                "another encoder can be next to it"
            )
        if self.vision_config and self.grid_size is None:
            raise ValueError(
                f"grid_size is missing: the configuration of {self.vision_config[0].model_type!r} does not tell how "
                "many patches the encoder returns"
            )
        if self.question_queries and self.experts_config is None:
            raise ValueError("question_queries=True needs experts_config: the question conditions the resampler")
        if self.imitation is not None and not self.vision_config:
            raise ValueError("imitation needs vision_config: the experts are imitated from the encoders' features")
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id={self.image_token_id}; an id of 0 or more is needed")

    @property
    def _attn_implementation(self) -> Any:
        return PreTrainedConfig._attn_implementation.fget(self)

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)
        if isinstance(value, dict):
            value = value.get("vision_config", value.get(""))
        for encoder in self.__dict__.get("vision_config") or []:
            if value is not None and isinstance(encoder, PreTrainedConfig):
                encoder._attn_implementation = value

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["vision_config"] = [encoder.to_dict() for encoder in self.vision_config]
        for encoder in output["vision_config"]:
            encoder.pop("transformers_version", None)
        for backbone in (output["text_config"], *output["vision_config"]):
            backbone["_name_or_path"] = ""  # may be a folder of this machine; `backbones` has the ids
        return output

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def vocab_size(self) -> int:
        """That of the language model."""
        return self.get_text_config(decoder=True).vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.get_text_config(decoder=True).vocab_size = value

    @property
    def hidden_size(self) -> int:
        """That of the language model."""
        return self.get_text_config(decoder=True).hidden_size

    @property
    def has_vision_language_model(self) -> bool:
        """Whether `text_config` is that of a vision-language model, with an image path of its own."""
        return getattr(self.text_config, "vision_config", None) is not None

    @property
    def has_prismer_encoder(self) -> bool:
        """Whether the vision encoder is that of a Prismer, which reads the experts by itself."""
        return bool(self.vision_config) and self.vision_config[0].model_type == "prismer_vision_model"

    @property
    def experts(self) -> list[dict[str, Any]]:
        if self.has_prismer_encoder:
            return self.vision_config[0].experts
        return [] if self.experts_config is None else self.experts_config.experts

    @experts.setter
    def experts(self, experts: list[dict[str, Any]]) -> None:
        read_specs(experts)
        if self.experts_config is None:
            raise ValueError("there is no experts_config: this model has no stems for experts")
        self.experts_config.experts = experts

    @property
    def imitation(self) -> dict[str, Any] | None:
        if self.has_prismer_encoder:
            return self.vision_config[0].imitation
        return None if self.experts_config is None else self.experts_config.imitation

    @property
    def num_features(self) -> int:
        """Features of one image: patches and latents."""
        if self.has_prismer_encoder:
            encoder = self.vision_config[0]
            return self.grid_size**2 + (encoder.num_latents if encoder.experts else 0)
        num_patches = self.grid_size**2 if self.vision_config else 0
        return num_patches + (self.experts_config.num_latents if self.experts_config and self.experts else 0)

    @property
    def image_seq_length(self) -> int:
        """Placeholder tokens of one image in a prompt: one for each feature, or a single one for cross-attention."""
        return self.num_features if self.fusion == "prefix" else 1


def _as_config(encoder: Any) -> PreTrainedConfig:
    if isinstance(encoder, PreTrainedConfig):
        return encoder
    if not isinstance(encoder, dict) or encoder.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"vision_config has the entry {encoder!r}; a configuration of transformers is needed, or a dict with its "
            "model_type"
        )
    return CONFIG_MAPPING[encoder["model_type"]].from_dict(encoder)


def _grid_size(config: PreTrainedConfig) -> int | None:
    image_size, patch_size = (getattr(config, field, None) for field in ("image_size", "patch_size"))
    if isinstance(image_size, int) and isinstance(patch_size, int):
        return image_size // patch_size
    num_patches = getattr(config, "num_patches", None)  # of a SigLIP 2 for images of any shape
    return math.isqrt(num_patches) if isinstance(num_patches, int) else None


__all__ = ["PrismerExpertsConfig", "PrismerLMConfig"]
