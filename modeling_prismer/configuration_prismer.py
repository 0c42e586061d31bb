"""Configuration of Prismer: a vision encoder with experts, and a causal text decoder."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .expert_spec import PUBLISHED_EXPERTS, ExpertsConfigMixin, read_specs
from .imitation_spec import ImitationConfigMixin


_ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 25,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_VARIANTS = {
    "base": (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
        {"hidden_size": 768, "num_hidden_layers": 13, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "large": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
        _ROBERTA_LARGE,
    ),
    "huge": (
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "patch_size": 14},
        _ROBERTA_LARGE,
    ),
}
VARIANTS = tuple(f"{family}_{size}" for family in ("prismer", "prismerz") for size in _VARIANTS)

_COUNT = ("a positive integer", lambda value: value >= 1)
_SHARE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
# The accepted values of each field, in any of the three configurations.
_ACCEPTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "encoder_hidden_size"), _COUNT),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_channels"), _COUNT),
    **dict.fromkeys(("image_size", "patch_size"), _COUNT),
    **dict.fromkeys(("num_latents", "resampler_layers", "resampler_attention_heads"), _COUNT),
    **dict.fromkeys(("vocab_size", "type_vocab_size", "max_position_embeddings"), _COUNT),
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), _SHARE),
    "label_smoothing": _SHARE,
    "layer_norm_eps": ("a positive number", lambda value: 0 < value < math.inf),
    "num_instance_embeddings": ("at least 2", lambda value: value >= 2),
    "initializer_range": ("0 or a positive number", lambda value: 0 <= value < math.inf),
}


def validate_fields(config: PreTrainedConfig) -> None:
    """
    Checks each field of a configuration of Prismer.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    from transformers.activations import ACT2FN

    for field, (accepted, is_accepted) in _ACCEPTED.items():
        value = getattr(config, field, None)
        if value is not None and not is_accepted(value):
            raise ValueError(f"{field}={value}; accepted is {accepted}")
    activation = getattr(config, "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        raise ValueError(f"hidden_act={activation!r}; accepted are {', '.join(sorted(ACT2FN))}")


def _require_multiple(config: PreTrainedConfig, heads: str) -> None:
    if config.hidden_size % getattr(config, heads):
        raise ValueError(f"hidden_size={config.hidden_size} is not a multiple of {heads}={getattr(config, heads)}")


@strict
class PrismerVisionConfig(ImitationConfigMixin, ExpertsConfigMixin, PreTrainedConfig):
    r"""
    Configuration of the vision encoder of Prismer: a CLIP vision transformer (field names of `CLIPVisionConfig`) with
    adaptors, the experts' stems and the resampler. The defaults are those of `prismer_base`, without experts.

    Args:
        experts (`list[dict]`, *optional*, defaults to `[]`):
            One description for each expert; see [`PrismerConfig`].
        num_latents (`int`, *optional*, defaults to 64):
            Number of latents to which the resampler reduces the tokens of all experts.
        resampler_layers (`int`, *optional*, defaults to 4):
            Number of blocks of the resampler.
        resampler_attention_heads (`int`, *optional*, defaults to 8):
            Number of attention heads of the resampler.
        num_instance_embeddings (`int`, *optional*, defaults to 128):
            Number of rows in the embedding table of a detector's instances.
        imitation (`dict`, *optional*):
            The experts to imitate where they are missing; a dict with the fields of [`ImitationSpec`]. Without it, the
            network is the paper's.

    Example:

    ```python
    >>> from modeling_prismer import PrismerVisionConfig

    >>> config = PrismerVisionConfig(hidden_size=1024, num_attention_heads=16, patch_size=14)
    >>> config.intermediate_size  # four times `hidden_size` unless given
    4096
    ```
    """

    model_type = "prismer_vision_model"
    base_config_key = "vision_config"

    if TYPE_CHECKING:  # their types after __init__
        intermediate_size: int
        experts: list[dict[str, Any]]
    else:
        intermediate_size: int | None = None
        experts: list[dict] | None = None

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    num_latents: int = 64
    resampler_layers: int = 4
    resampler_attention_heads: int = 8
    num_instance_embeddings: int = 128
    imitation: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.experts = [dict(expert) for expert in self.experts or []]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation."""
        validate_fields(self)
        specs = read_specs(self.experts)
        if self.imitation_spec is not None:
            self.imitation_spec.check(specs, self.num_hidden_layers)
        _require_multiple(self, "num_attention_heads")
        if self.experts:
            _require_multiple(self, "resampler_attention_heads")
            if self.hidden_size < 8:
                raise ValueError(f"hidden_size={self.hidden_size}; the experts' stems need at least 8")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} is smaller than patch_size={self.patch_size}")


@strict
class PrismerTextConfig(PreTrainedConfig):
    r"""
    Configuration of the text decoder of Prismer: a causal RoBERTa (field names of `RobertaConfig`) with
    cross-attention and adaptors. The defaults are those of `prismer_base`.

    Args:
        num_hidden_layers (`int`, *optional*, defaults to 13):
            Number of all layers. The last one, the output layer, has no cross-attention and no adaptor.
        encoder_hidden_size (`int`, *optional*):
            Width of the states for cross-attention; [`PrismerConfig`] sets it to the vision encoder's width.

    Example:

    ```python
    >>> from modeling_prismer import PrismerTextConfig

    >>> config = PrismerTextConfig()
    >>> config.num_hidden_layers, config.hidden_size, config.encoder_hidden_size
    (13, 768, 768)
    ```
    """

    model_type = "prismer_text_model"
    base_config_key = "text_config"

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 13
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    if TYPE_CHECKING:
        pad_token_id: int
    else:
        pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    encoder_hidden_size: int = 768
    is_decoder: bool = True
    use_cache: bool = True

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation."""
        validate_fields(self)
        _require_multiple(self, "num_attention_heads")
        if self.num_hidden_layers < 2:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers}; at least 2 (the last is the output layer)")
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id}; an id of the vocabulary is needed, 0 to {self.vocab_size - 1}"
            )
        if self.max_position_embeddings < self.pad_token_id + 2:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings}; with pad_token_id={self.pad_token_id} at "
                f"least {self.pad_token_id + 2} are needed: positions start after that of padding"
            )


class _NoProblemType:
    """
    The empty `problem_type` of a [`PrismerConfig`]. If `label_smoothing_factor` is set, `Trainer` compares the problem
    type with `"multi_label_classification"` and then replaces the model's loss by one that neither shifts logits
    against labels nor averages over samples. A model can only refuse that in this comparison.
    """

    def __eq__(self, other: object) -> bool:
        if other == "multi_label_classification":
            raise ValueError(
                "TrainingArguments(label_smoothing_factor=…) would replace Prismer's loss by another one, which does "
                "not shift logits against labels. Leave it at 0 and set config.label_smoothing instead"
            )
        return isinstance(other, _NoProblemType)


@strict
class PrismerConfig(ImitationConfigMixin, ExpertsConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`PrismerModel`] or [`PrismerForConditionalGeneration`]. The architecture is that of
    [Prismer](https://huggingface.co/papers/2303.02506).

    Args:
        vision_config (`dict` or [`PrismerVisionConfig`], *optional*):
            The vision encoder.
        text_config (`dict` or [`PrismerTextConfig`], *optional*):
            The text decoder.
        experts (`list[dict]`, *optional*):
            One description for each expert, in the order of `expert_mask`: a dict with the fields of [`ExpertSpec`].
            A network without experts is the paper's PrismerZ. `experts` and the next three fields are stored in
            `vision_config`. `expert_specs` returns `experts` as a list of [`ExpertSpec`].
        num_latents (`int`, *optional*, defaults to 64):
            Number of latents of the resampler.
        resampler_layers (`int`, *optional*, defaults to 4):
            Number of blocks of the resampler.
        imitation (`dict`, *optional*):
            The experts to imitate where they are missing, with the fields of [`ImitationSpec`].
        label_smoothing (`float`, *optional*, defaults to 0.1):
            Label smoothing of the training loss and of the scores of `rank_candidates`.
        strict_experts (`bool`, *optional*, defaults to `True`):
            Whether it is an error if an expert is neither given nor masked out by `expert_mask`. This detects lost
            tensors, which would otherwise only make results worse.

    Example:

    ```python
    >>> from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration

    >>> config = PrismerConfig.from_variant("prismer_base", image_size=480)
    >>> config.experts[0]
    {'name': 'depth', 'kind': 'dense', 'channels': 1}
    ```
    """

    model_type = "prismer"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=PrismerVisionConfig),
        "text_config": SubConfigSpec(config_class=PrismerTextConfig),
    }
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",  # before transformers 5.24
        "loss_per_sample",
        "hidden_states",
        "attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
    ]

    if TYPE_CHECKING:  # the arguments of __init__, and the types after it
        vision_config: PrismerVisionConfig
        text_config: PrismerTextConfig

        def __init__(
            self,
            vision_config: dict[str, Any] | PrismerVisionConfig | None = None,
            text_config: dict[str, Any] | PrismerTextConfig | None = None,
            experts: list[dict[str, Any]] | None = None,
            **kwargs: Any,
        ) -> None: ...
    else:
        vision_config: dict | PrismerVisionConfig | None = None
        text_config: dict | PrismerTextConfig | None = None

    problem_type = _NoProblemType()
    label_smoothing: float | int = 0.1
    strict_experts: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        vision_fields = ("experts", "num_latents", "resampler_layers", "resampler_attention_heads", "imitation")
        given = {field: kwargs.pop(field) for field in vision_fields if field in kwargs}
        given = {field: value for field, value in given.items() if value is not None}
        vocab_size = kwargs.pop("vocab_size", None)
        super().__post_init__(**kwargs)
        if given:
            self.vision_config = PrismerVisionConfig(**{**self.vision_config.to_dict(), **given})
        if vocab_size is not None:
            self.vocab_size = vocab_size
        if self.problem_type is None:
            del self.problem_type  # the class attribute applies
        self.text_config.encoder_hidden_size = self.vision_config.hidden_size
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, token) is None:
                setattr(self, token, getattr(self.text_config, token))

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation."""
        validate_fields(self)
        vocab_size = self.text_config.vocab_size
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id}; an id of the vocabulary is needed, 0 to {vocab_size - 1}"
            )

    @property
    def experts(self) -> list[dict]:
        return self.vision_config.experts

    @experts.setter
    def experts(self, experts: list[dict]) -> None:
        read_specs(experts)
        self.vision_config.experts = experts

    @property
    def imitation(self) -> dict | None:
        return self.vision_config.imitation

    @imitation.setter
    def imitation(self, imitation: dict | None) -> None:
        self.vision_config.imitation = imitation

    @property
    def num_latents(self) -> int:
        return self.vision_config.num_latents

    @num_latents.setter
    def num_latents(self, num_latents: int) -> None:
        self.vision_config.num_latents = num_latents

    @property
    def resampler_layers(self) -> int:
        return self.vision_config.resampler_layers

    @resampler_layers.setter
    def resampler_layers(self, resampler_layers: int) -> None:
        self.vision_config.resampler_layers = resampler_layers

    @property
    def vocab_size(self) -> int:
        """The size in `text_config`. peft saves the embeddings if it differs from that of the base model."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, vocab_size: int) -> None:
        self.text_config.vocab_size = vocab_size

    @classmethod
    def from_variant(cls, variant: str, image_size: int = 224, **kwargs: Any) -> "PrismerConfig":
        """
        Returns the configuration of a network by its name.

        Args:
            variant (`str`):
                `prismer_base`, `prismer_large`, `prismer_huge`, or without experts `prismerz_base`, `prismerz_large`,
                `prismerz_huge`. Checkpoints of base and large are published.
            image_size (`int`, *optional*, defaults to 224):
                Side of the image in pixels. The paper uses 224 for pre-training, 480 for captioning and questions, and
                384 for classification.
            kwargs:
                Any further field of [`PrismerConfig`], for example `experts`.

        Raises:
            ValueError: if there is no such variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
        family, size = variant.split("_")
        vision, text = _VARIANTS[size]
        if family == "prismer":
            kwargs.setdefault("experts", [spec.to_dict() for spec in PUBLISHED_EXPERTS])
        return cls(vision_config={**vision, "image_size": image_size}, text_config=dict(text), **kwargs)


__all__ = ["PrismerConfig", "PrismerTextConfig", "PrismerVisionConfig"]
