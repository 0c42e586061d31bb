"""The parts of a PrismerLM's processor, from ids, folders or objects."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .encoder_settings import find_checkpoint, read_encoder_settings
from .experts_processor import as_suite


def read_suite(experts: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The live experts, if there are any, and the descriptions of all."""
    if experts is None:
        return None, []
    is_list = isinstance(experts, list | tuple)
    if is_list and all(isinstance(own, Mapping) or hasattr(own, "tensor_names") for own in experts):
        return None, [dict(own) if isinstance(own, Mapping) else own.to_dict() for own in experts]
    suite = as_suite(experts)
    return suite, list(suite.descriptions)


def read_prismer_suite(vision: Any, config: Any) -> Any:
    """The live experts of the Prismer whose encoder is that of a `PrismerLMConfig`, `config`, if it has them."""
    (source,) = as_list(vision) or [entry["id"] for entry in (config.backbones or {}).get("vision", [])] or [None]
    if isinstance(source, PreTrainedModel):
        source = source.name_or_path
    if not isinstance(source, str) or not source:
        return None
    try:
        from modeling_prismer.processing.experts import ExpertSuite

        return ExpertSuite.from_pretrained(find_checkpoint(source))
    except (ImportError, OSError):  # only live experts need the package; or the Prismer was saved without experts
        return None


def with_class_names(descriptions: list[dict[str, Any]], suite: Any) -> list[dict[str, Any]]:
    """The descriptions with the names of classes that live experts know."""
    names = getattr(suite, "class_names", {})
    described = []
    for own in descriptions:
        known = names.get(own["name"], ())
        is_new = not own.get("class_names") and known and len(known) == own.get("num_classes")
        described.append({**own, "class_names": list(known)} if is_new else dict(own))
    return described


def load_text_processor(language: Any, is_vlm: bool) -> tuple[Any, Any]:
    """The tokenizer of a language model, and the processor if it is a vision-language model."""
    if isinstance(language, PreTrainedModel):
        language = language.name_or_path
    if isinstance(language, str) and language:
        language = (AutoProcessor if is_vlm else AutoTokenizer).from_pretrained(language)
    if isinstance(language, ProcessorMixin):
        return language.tokenizer, language
    if not isinstance(language, PreTrainedTokenizerBase):
        raise ValueError(
            f"language is {language!r}; an id, a folder, a tokenizer or the processor of a vision-language model is "
            "needed"
        )
    return language, None


def read_encoders(vision: Any, config: Any) -> list[dict[str, Any]]:
    """The settings of each vision encoder of a `PrismerLMConfig`, `config`."""
    saved = [entry["id"] for entry in (config.backbones or {}).get("vision", [])]
    sources = as_list(vision) or saved or [None] * len(config.vision_config)
    configs = list(config.vision_config) or [None] * len(sources)
    if len(sources) != len(configs):
        raise ValueError(f"{len(sources)} vision encoders are given; the config has {len(configs)}")
    return [read_encoder_settings(source, own) for source, own in zip(sources, configs)]


def new_config(language: Any, vision: Any, experts: list[dict[str, Any]], experts_as: str, **kwargs: Any) -> Any:
    """The configuration that the model's `from_backbones` makes of the same arguments."""
    # Only this needs the installed package; a saved processor works alone (trust_remote_code).
    try:
        from modeling_prismer import PrismerLMConfig
    except ImportError as error:
        raise ImportError(f"from_backbones without a config needs the package modeling-prismer ({error})") from error
    encoders = [_config_of(source, "vision") for source in as_list(vision)]
    if None in encoders:
        raise ValueError(
            "config is missing: vision has encoders whose configurations are not known, so the number of placeholders "
            "is not known either. Pass config=model.config"
        )
    if experts_as == "words":
        kwargs["experts_config"] = None  # the network reads no maps
    elif experts:
        kwargs["experts_config"] = {**(kwargs.get("experts_config") or {}), "experts": experts}
    return PrismerLMConfig(
        vision_config=encoders, text_config=_config_of(language, "text"), experts_as=experts_as, **kwargs
    )


def as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _config_of(source: Any, part: str) -> Any:
    """The configuration of a backbone; `None` of a tokenizer, a processor or settings."""
    if isinstance(source, str):
        source = AutoConfig.from_pretrained(find_checkpoint(source), trust_remote_code=False)
    elif isinstance(source, PreTrainedModel):
        source = source.config
    if not isinstance(source, PreTrainedConfig):
        return None
    return getattr(source, "vision_config", source) if part == "vision" else source
