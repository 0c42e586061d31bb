"""Builds a new Prismer from a CLIP vision model and a RoBERTa, and maps the names of their weights."""

from typing import Any, TypeVar

import torch
from transformers import AutoConfig, CLIPVisionModel, PreTrainedModel, RobertaForMaskedLM, RobertaPreTrainedModel

from .configuration_prismer import PrismerConfig


ModelType = TypeVar("ModelType", bound=PreTrainedModel)

# Names in a RoBERTa of transformers -> names in this decoder. The conversion of published checkpoints uses them too.
ROBERTA_EMBEDDING_NAMES = {
    "word_embeddings": "word_embeddings",
    "position_embeddings": "position_embeddings",
    "token_type_embeddings": "token_type_embeddings",
    "LayerNorm": "layer_norm",
}
ROBERTA_LAYER_NAMES = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "mlp_layer_norm",
}
CLIP_LAYER_NAMES = (  # the same in both
    "layer_norm1",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)

# Fields that `from_backbones` copies from the configuration of a CLIP vision tower and of a RoBERTa.
_CLIP_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size"),
    *("patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range"),
)
_ROBERTA_FIELDS = (
    *("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"),
)


def build_from_backbones(
    cls: type[ModelType],
    vision: str | PreTrainedModel,
    text: str | PreTrainedModel,
    experts: list[dict] | None = None,
    image_size: int | None = None,
    **kwargs: Any,
) -> ModelType:
    """See [`PrismerForConditionalGeneration.from_backbones`]. `cls` is that class."""
    if not isinstance(vision, PreTrainedModel):
        kind = AutoConfig.from_pretrained(vision).model_type
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(f"{vision} has a model of the type {kind!r}; a CLIP vision tower is needed")
        vision = CLIPVisionModel.from_pretrained(vision)
    vision = getattr(vision, "vision_model", vision)
    if vision.config.model_type != "clip_vision_model":
        raise ValueError(f"vision is a {type(vision).__name__}; a CLIP vision tower is needed (CLIPVisionModel)")
    if not isinstance(text, PreTrainedModel):
        kind = AutoConfig.from_pretrained(text).model_type
        if kind != "roberta":
            raise ValueError(f"{text} has a model of the type {kind!r}; a RoBERTa is needed")
        text = RobertaForMaskedLM.from_pretrained(text)
    if not isinstance(text, RobertaPreTrainedModel):
        raise ValueError(f"text is a {type(text).__name__}; a RoBERTa is needed (RobertaForMaskedLM)")

    clip, roberta = vision.config, text.config
    config = PrismerConfig(
        vision_config={field: getattr(clip, field) for field in _CLIP_FIELDS},
        text_config={field: getattr(roberta, field) for field in _ROBERTA_FIELDS}
        | {"num_hidden_layers": roberta.num_hidden_layers + 1},
        experts=experts,
        **kwargs,
    )
    model = cls(config)
    names = backbone_names(config.vision_config.num_hidden_layers, roberta.num_hidden_layers)
    source = {f"vision.{name}": tensor for name, tensor in vision.state_dict().items()}
    text_body = text.roberta if hasattr(text, "roberta") else text
    source |= {f"text.{name}": tensor for name, tensor in text_body.state_dict().items()}
    if hasattr(text, "lm_head"):
        source |= {f"lm_head.{name}": tensor for name, tensor in text.lm_head.state_dict().items()}
    positions = "vision.embeddings.position_embedding.weight"
    source[positions] = source[positions][1:]  # the first one belongs to the class token

    target = model.state_dict()
    with torch.no_grad():
        for name, source_name in names.items():
            if source_name in source:
                target[name].copy_(source[source_name])
            elif not source_name.startswith("lm_head."):
                raise ValueError(f"the backbone has no weight {source_name!r}, the source of {name}")
        for layer in model.model.text_model.layers[:-1]:
            for norm in (layer.cross_attn_layer_norm, layer.adaptor.layer_norm):
                norm.load_state_dict(layer.self_attn_layer_norm.state_dict())
    if image_size is not None and image_size != config.vision_config.image_size:
        model.resize_position_embeddings(image_size)
    return model


def backbone_names(vision_layers: int, text_layers: int) -> dict[str, str]:
    """
    The weights that `from_backbones` copies: name in a [`PrismerForConditionalGeneration`] -> name in the CLIP vision
    tower (`vision.…`), the RoBERTa (`text.…`) or its language modelling head (`lm_head.…`).
    """
    vision, text = "model.vision_model.", "model.text_model."
    modules = {f"{vision}pre_layernorm": "vision.pre_layrnorm", f"{vision}post_layernorm": "vision.post_layernorm"}
    for i in range(vision_layers):
        modules |= {f"{vision}layers.{i}.{name}": f"vision.encoder.layers.{i}.{name}" for name in CLIP_LAYER_NAMES}
    for i in range(text_layers):
        for source, name in ROBERTA_LAYER_NAMES.items():
            modules[f"{text}layers.{i}.{name}"] = f"text.encoder.layer.{i}.{source}"
    modules[f"{text}embeddings.layer_norm"] = "text.embeddings.LayerNorm"
    modules |= {f"lm_head.{name}": f"lm_head.{name}" for name in ("dense", "layer_norm")}
    names = {f"{name}.{kind}": f"{source}.{kind}" for name, source in modules.items() for kind in ("weight", "bias")}
    for source, name in ROBERTA_EMBEDDING_NAMES.items():
        names[f"{text}embeddings.{name}.weight"] = f"text.embeddings.{source}.weight"
    names[f"{vision}embeddings.patch_embedding.weight"] = "vision.embeddings.patch_embedding.weight"
    names[f"{vision}embeddings.position_embedding"] = "vision.embeddings.position_embedding.weight"
    names["lm_head.decoder.bias"] = "lm_head.bias"
    return names
