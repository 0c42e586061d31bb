"""A new PrismerLM from frozen backbones, and files with its trained weights alone."""

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_prismer_lm import PrismerLMConfig
from .expert_spec import ExpertSpec
from .image_features import patch_features
from .pretrained import find_checkpoint


if TYPE_CHECKING:
    from typing import Self


ModelType = TypeVar("ModelType", bound=PreTrainedModel)
Backbone: TypeAlias = str | PreTrainedModel

IMAGE_TOKEN = "<image>"
EXPERTS_TOKEN = "<experts>"  # in front of a vision-language model, whose image tokens are its own

# Fields of a backbone's configuration that its fingerprint has. Not all: new versions of transformers add fields.
_FINGERPRINT_FIELDS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("image_size", "patch_size"),
)
_FROZEN = ("model.language_model.", "model.vision_encoders.")
# Arguments of `from_pretrained` that say how files are found, in the checkpoint and in its backbones
_ACCESS = ("cache_dir", "force_download", "local_files_only", "token")
_HUB_FIELDS = (*_ACCESS, "revision", "subfolder")


def assemble(
    cls: type[ModelType], config: PrismerLMConfig, language_model: PreTrainedModel, encoders: list[PreTrainedModel]
) -> ModelType:
    """A model around loaded backbones, which are frozen and keep their weights."""
    for backbone in (language_model, *encoders):
        for module in backbone.modules():
            module._is_hf_initialized = True  # or the new model would draw its weights again
    model = cls(config, language_model, encoders)
    model.generation_config = language_model.generation_config
    return model.freeze_backbones()


def load_language_model(language: Backbone, **kwargs: Any) -> PreTrainedModel:
    if isinstance(language, PreTrainedModel):
        if not language.can_generate():
            raise ValueError(f"language is a {type(language).__name__}; a model that can generate text is needed")
        return language
    hub_kwargs = {name: kwargs[name] for name in _HUB_FIELDS if name in kwargs}
    config = AutoConfig.from_pretrained(language, trust_remote_code=False, **hub_kwargs)
    is_vlm = getattr(config, "vision_config", None) is not None
    auto_class = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    return auto_class.from_pretrained(language, **kwargs | {"trust_remote_code": False})


def load_encoders(vision: Backbone | list[Backbone] | None, **kwargs: Any) -> list[PreTrainedModel]:
    """
    The vision encoders. Of a CLIP or SigLIP with two towers, or of a Prismer, the encoder of images. A Prismer may be
    the name of a shipped one.
    """
    sources = [] if vision is None else vision if isinstance(vision, list | tuple) else [vision]
    encoders = []
    for source in sources:
        whole: Any = source
        if not isinstance(source, PreTrainedModel):
            whole = AutoModel.from_pretrained(find_checkpoint(source), trust_remote_code=False, **kwargs)
        encoder = getattr(getattr(whole, "model", whole), "vision_model", getattr(whole, "vision_model", whole))
        if encoder.main_input_name != "pixel_values":
            raise ValueError(f"vision has a {type(encoder).__name__}; a vision encoder is needed")
        encoder.name_or_path = source if isinstance(source, str) else whole.name_or_path  # of the whole checkpoint
        encoders.append(encoder)
    return encoders


def find_placeholder_id(language_model: PreTrainedModel, token: str) -> int | None:
    """The id that the processor gives the placeholder: the token's own, or that of a token which is added."""
    if not language_model.name_or_path:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(language_model.name_or_path)
    except (OSError, ValueError):
        return None
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(token)


@torch.no_grad()
def find_grid_size(encoder: PreTrainedModel) -> int:
    """Side of the grid of patch features, from a run on an empty image."""
    size = input_size(encoder)
    pixels = torch.zeros(1, 3, size, size, device=encoder.device)
    return math.isqrt(patch_features(encoder, pixels).shape[1])


def input_size(encoder: PreTrainedModel) -> int:
    """Side in pixels of the images that an encoder takes."""
    if encoder.config.model_type == "timm_wrapper":
        size = getattr(getattr(encoder.timm_model, "patch_embed", None), "img_size", None)
        return (size or encoder.timm_model.pretrained_cfg["input_size"])[-1]
    if encoder.config.model_type == "siglip2_vision_model":
        return math.isqrt(encoder.config.num_patches) * encoder.config.patch_size
    return encoder.config.image_size


@torch.no_grad()
def embedding_scale(language_model: PreTrainedModel) -> float:
    """Root mean square of the word embeddings, as the decoder gets them."""
    embeddings = language_model.get_input_embeddings()
    ids = torch.arange(0, embeddings.weight.shape[0], max(1, embeddings.weight.shape[0] // 1000))
    return float(embeddings(ids.to(embeddings.weight.device)).float().pow(2).mean().sqrt())


# ---- trained weights alone ----


@torch.no_grad()
def fingerprint(backbone: PreTrainedModel) -> dict[str, Any]:
    """
    Fields of the configuration and a few weights: they tell backbones apart. Vectors are never quantised; matrices may
    be, and are then not compared.
    """
    own = {
        name: parameter
        for name, parameter in backbone.named_parameters()
        if "bias" not in name and "lora_" not in name and has_plain_weights(parameter)
    }
    found: dict[str, Any] = {"config": architecture_of(backbone)}
    for part, ndim in (("weights", 1), ("matrices", 2)):
        names = sorted(name for name, parameter in own.items() if parameter.ndim == ndim)
        chosen = names[:: max(1, len(names) // 8)][:8]
        found[part] = {name: first_values(own[name]) for name in chosen}
    return found


def architecture_of(backbone: PreTrainedModel) -> dict[str, Any]:
    """The fields of the configuration that a fingerprint has."""
    config = backbone.config.get_text_config() if hasattr(backbone.config, "text_config") else backbone.config
    return {name: getattr(config, name, None) for name in _FINGERPRINT_FIELDS}


def has_plain_weights(parameter: torch.Tensor) -> bool:
    """Whether a parameter has its own weights, and is not quantised."""
    return parameter.is_floating_point() and type(parameter.data) is torch.Tensor


def first_values(parameter: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in parameter.detach().flatten()[:4].float().tolist()]


def check_fingerprint(backbone: PreTrainedModel, expected: dict[str, Any], role: str) -> None:
    """
    Raises:
        ValueError: if `backbone` is not the one that the trained weights belong to, naming what differs.
    """
    start = f"the {role} {backbone.name_or_path or type(backbone).__name__} is not {expected['id'] or 'the one'} that"
    for name, own in architecture_of(backbone).items():
        value = expected["config"].get(name)
        if own != value:
            raise ValueError(f"{start} these weights were trained on: {name}={own}, not {value}")
    parameters = dict(backbone.named_parameters())
    for part, tolerance in (("weights", 2e-3), ("matrices", 2e-4)):
        for name, values in expected.get(part, {}).items():  # older checkpoints have no matrices
            parameter = parameters.get(name)
            if part == "matrices" and (parameter is None or not has_plain_weights(parameter)):
                continue  # quantised
            own = first_values(parameter) if parameter is not None else []
            close = len(own) == len(values) and np.allclose(own, values, rtol=0.02, atol=tolerance)
            if not close:
                raise ValueError(f"{start} these weights were trained on: {name} differs")


def save_trained(model: PreTrainedModel, folder: str | Path, **kwargs: Any) -> None:
    """See `trained_only` of [`PrismerLMForConditionalGeneration.save_pretrained`]."""
    core, known = model.model, model.config.backbones or {}
    backbones = [core.language_model, *core.vision_encoders]
    entries = [known.get("language"), *(known.get("vision") or [None] * len(core.vision_encoders))]
    language, *vision = (
        entry or {"id": backbone.name_or_path, **fingerprint(backbone)} for entry, backbone in zip(entries, backbones)
    )
    resized, size = architecture_of(core.language_model)["vocab_size"], language["config"]["vocab_size"]
    if resized != size:
        raise ValueError(
            f"the vocabulary of the language model was resized from {size} to {resized} tokens, which trained weights "
            "alone do not restore; save the whole model (trained_only=False)"
        )
    language = {**language, "adapter": describe_adapter(core.language_model)}
    if language["adapter"] is None and any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "trained_only saves an adapter of peft that inject_adapter_in_model has put into model.language_model; "
            "save that of get_peft_model by its own save_pretrained"
        )
    model.config.backbones = {"language": language, "vision": vision, "trained_only": True}
    try:
        one_file = {"max_shard_size": 2**60}
        PreTrainedModel.save_pretrained(model, folder, state_dict=trained_state(model), **kwargs | one_file)
    finally:
        model.config.backbones.pop("trained_only")


def load_trained(
    cls: type[ModelType],
    folder: str,
    config: PrismerLMConfig,
    language: Backbone | None,
    vision: Backbone | list[Backbone] | None,
    hub_kwargs: dict[str, Any],
    **language_kwargs: Any,
) -> ModelType:
    """
    Loads what `save_trained` has written: the backbones by their ids, or those that are given, then the settings of
    generation and the trained weights.

    Raises:
        ValueError: if a backbone is not the one of the checkpoint, or if weights are missing or unknown.
    """
    access = {name: hub_kwargs[name] for name in _ACCESS if name in hub_kwargs}
    backbones: dict[str, Any] = config.backbones or {}
    language = given_or_named(language, backbones["language"]["id"], "language")
    language_model = load_language_model(language, **access, **language_kwargs)
    check_fingerprint(language_model, backbones["language"], "language model")
    if adapter := backbones["language"].get("adapter"):
        from peft import get_peft_config, inject_adapter_in_model

        inject_adapter_in_model(get_peft_config(adapter), language_model)
    if vision is None:
        vision = [given_or_named(None, entry["id"], "vision") for entry in backbones["vision"]]
    encoders = load_encoders(vision, **access)
    if len(encoders) != len(backbones["vision"]):
        raise ValueError(f"{len(encoders)} vision encoders given; the checkpoint needs {len(backbones['vision'])}")
    for encoder, expected in zip(encoders, backbones["vision"]):
        check_fingerprint(encoder, expected, "vision encoder")
    backbones.pop("trained_only")
    model = assemble(cls, config, language_model, encoders)
    if cached_file(folder, GENERATION_CONFIG_NAME, **hub_kwargs, _raise_exceptions_for_missing_entries=False):
        model.generation_config = GenerationConfig.from_pretrained(folder, **hub_kwargs)
    path = cached_file(folder, SAFE_WEIGHTS_NAME, **hub_kwargs, _raise_exceptions_for_missing_entries=False)
    weights = {} if path is None else load_file(path)  # with experts as words alone, there are none
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith(_FROZEN)]
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not fit its configuration: {len(missing)} weights are missing {missing[:3]} and "
            f"{len(unexpected)} are unknown {unexpected[:3]}"
        )
    for name, parameter in model.named_parameters():
        if name.startswith(_FROZEN) and name in weights:  # an adapter's, or a backbone's that was trained
            parameter.requires_grad_(True)
    return model.to(language_model.device).eval()


def given_or_named(backbone: Backbone | None, name: str, argument: str) -> Backbone:
    if not backbone and not name:
        raise ValueError(f"{argument} is missing: the checkpoint names no id or folder of its backbone")
    return backbone or name


def describe_adapter(language_model: PreTrainedModel) -> dict[str, Any] | None:
    """
    The settings of an adapter in the language model, as far as they are not peft's defaults.

    Raises:
        ValueError: if there are several adapters.
    """
    adapters = list(getattr(language_model, "peft_config", {}).values())
    if not adapters:
        return None
    if len(adapters) > 1:
        raise ValueError(f"the language model has {len(adapters)} adapters; one can be saved with the trained weights")
    (adapter,) = adapters
    defaults = type(adapter)().to_dict()
    settings = {name: value for name, value in adapter.to_dict().items() if value != defaults[name]}
    settings.pop("base_model_name_or_path", None)
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return {**settings, "peft_type": adapter.peft_type.value}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights and buffers but those of frozen backbones."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name in trained or not name.startswith(_FROZEN)
    }


class BackbonesMixin:
    """Gives a PrismerLM `from_backbones`, and files with its trained weights alone."""

    if TYPE_CHECKING:
        config: PrismerLMConfig
        model: Any
        language_model: PreTrainedModel
        training: bool
        train: Any
        _auto_class: str | None

    @classmethod
    def from_backbones(
        cls,
        language: Backbone,
        vision: Backbone | list[Backbone] | None = None,
        experts: list[dict[str, Any] | ExpertSpec] | None = None,
        fusion: str = "prefix",
        experts_config: dict[str, Any] | None = None,
        language_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "Self":
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
        language_model = load_language_model(language, **(language_kwargs or {}))
        encoders = load_encoders(vision)
        is_vlm = getattr(language_model.config, "vision_config", None) is not None
        if kwargs.get("experts_as") == "words":
            experts_config = None  # the network reads no maps
        elif experts:
            specs = [ExpertSpec.from_dict(expert).to_dict() for expert in experts]
            experts_config = {**(experts_config or {}), "experts": specs}
        if kwargs.get("image_token_id") is None:
            kwargs["image_token_id"] = find_placeholder_id(language_model, EXPERTS_TOKEN if is_vlm else IMAGE_TOKEN)
        if encoders and kwargs.get("grid_size") is None and encoders[0].config.model_type != "prismer_vision_model":
            kwargs["grid_size"] = find_grid_size(encoders[0])
        kwargs.setdefault("feature_scale", embedding_scale(language_model))
        config = PrismerLMConfig(  # of copies: a new configuration resets the attention implementation of its parts
            vision_config=[copy.deepcopy(encoder.config) for encoder in encoders],
            text_config=copy.deepcopy(language_model.config),
            experts_config=experts_config,
            fusion=fusion,
            **kwargs,
        )
        config.backbones = {
            "language": {"id": language_model.name_or_path, **fingerprint(language_model)},
            "vision": [{"id": encoder.name_or_path, **fingerprint(encoder)} for encoder in encoders],
        }
        return assemble(cls, config, language_model, encoders)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        language: Backbone | None = None,
        vision: Backbone | list[Backbone] | None = None,
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
        hub_kwargs = {name: kwargs[name] for name in _HUB_FIELDS if name in kwargs}
        config = kwargs.get("config")
        if config is None and pretrained_model_name_or_path is not None:
            config = PrismerLMConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        if config is None or not (config.backbones or {}).get("trained_only"):
            if language is not None or vision is not None:
                raise ValueError("language and vision are for checkpoints with trained weights alone; this has all")
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        config = copy.deepcopy(config)  # which stays as it was given
        fields = set(PrismerLMConfig.__annotations__) - {"vision_config", "text_config", "experts_config", "backbones"}
        for name in fields.intersection(kwargs):
            setattr(config, name, kwargs.pop(name))
        config.validate()
        with_info = kwargs.pop("output_loading_info", False)
        others = {name: value for name, value in kwargs.items() if name not in (*_HUB_FIELDS, "config")}
        model = load_trained(cls, pretrained_model_name_or_path, config, language, vision, hub_kwargs, **others)
        if with_info:  # load_trained refuses weights that do not fit
            return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, trained_only: bool = False, **kwargs: Any) -> None:
        """
        As in every model of transformers, and:

        Args:
            trained_only (`bool`, *optional*, defaults to `False`):
                Save the trained weights alone, with ids and fingerprints of the frozen backbones, which
                `from_pretrained` loads and checks.
        """
        if self._auto_class is not None:  # the code is saved too, so that `AutoModel` finds the model without its head
            base = type(self.model)
            auto_map = {"AutoModel": f"{base.__module__.rpartition('.')[2]}.{base.__name__}"}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map}
        # transformers would give some vision-language models the names of their old checkpoints, under which it does
        # not find them again inside another model
        kwargs.setdefault("save_original_format", False)
        if trained_only:
            save_trained(self, save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def freeze_backbones(self, vision: bool = True, language: bool = True) -> "Self":
        """Freezes the vision encoders and the language model, or unfreezes them (`False`). All else always trains."""
        is_quantized = getattr(self.language_model, "hf_quantizer", None) is not None  # then it is never trained
        self.language_model.requires_grad_(not language and not is_quantized)
        self.model.vision_encoders.requires_grad_(not vision)
        return self.train(self.training)
