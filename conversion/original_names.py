"""Maps the parameter names of this package to those of the published checkpoints."""

from typing import NamedTuple

from modeling_prismer.backbones import ROBERTA_EMBEDDING_NAMES, ROBERTA_LAYER_NAMES
from modeling_prismer.configuration_prismer import PrismerConfig


class Source(NamedTuple):
    """The source of a parameter: a name, and for packed projections of an attention the number of the third."""

    name: str
    third: int | None = None


EXPERT_NAMES = {"segmentation": "seg", "detection": "obj_detection", "ocr": "ocr_detection"}  # the others are the same

# module of this package -> original module, below the prefix of a layer
ADAPTOR_NAMES = {
    "adaptor.down_proj": "adaptor.down_proj",
    "adaptor.up_proj": "adaptor.up_proj",
    "adaptor.layer_norm": "adaptor_ln",
}
VISION_LAYER_NAMES = {
    "layer_norm1": "0.ln_1",
    "self_attn.out_proj": "0.attn.out_proj",
    "layer_norm2": "0.ln_2",
    "mlp.fc1": "0.mlp.c_fc",
    "mlp.fc2": "0.mlp.c_proj",
} | {name: f"1.{original}" for name, original in ADAPTOR_NAMES.items()}
RESAMPLER_LAYER_NAMES = {
    "latents_layer_norm": "ln_1",
    "tokens_layer_norm": "ln_2",
    "latent_attn.out_proj": "attn.out_proj",
    "mlp_layer_norm": "ln_ff",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TEXT_LAYER_NAMES = (
    {name: f"0.{original}" for original, name in ROBERTA_LAYER_NAMES.items()}
    | {
        "cross_attn.q_proj": "1.self.query",
        "cross_attn.k_proj": "1.self.key",
        "cross_attn.v_proj": "1.self.value",
        "cross_attn.out_proj": "1.output.dense",
        "cross_attn_layer_norm": "1.output.LayerNorm",
    }
    | {name: f"2.{original}" for name, original in ADAPTOR_NAMES.items()}
)

# Tensors of the published files that are not parameters: a constant, and copies of tied tensors.
POSITION_IDS = "text_decoder.roberta.embeddings.position_ids"
TIED_NAMES = {
    "text_decoder.lm_head.decoder.weight": "text_decoder.roberta.embeddings.word_embeddings.weight",
    "text_decoder.lm_head.decoder.bias": "text_decoder.lm_head.bias",
}
IGNORED_NAMES = {POSITION_IDS: "a constant"} | {name: f"tied to {kept}" for name, kept in TIED_NAMES.items()}


def original_names(config: PrismerConfig) -> dict[str, Source]:
    """
    The source in a published checkpoint of every parameter and BatchNorm statistic of a
    `PrismerForConditionalGeneration` with this `config`. Tables of class features are not in a checkpoint.

    Raises:
        ValueError: if there are several experts with instances; the format has only one table of embeddings for them.
    """
    of_instances = [spec.name for spec in config.expert_specs if spec.instances]
    if len(of_instances) > 1:
        raise ValueError(
            f"the published format has one expert with instances; the config has {', '.join(of_instances)}"
        )
    vision, text = "model.vision_model", "model.text_model"
    names: dict[str, Source] = {}

    def module(name: str, original: str, kinds: tuple[str, ...] = ("weight", "bias")) -> None:
        for kind in kinds:
            names[f"{name}.{kind}"] = Source(f"{original}.{kind}")

    def packed_attention(name: str, original: str) -> None:
        for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            for kind in ("weight", "bias"):
                names[f"{name}.{projection}.{kind}"] = Source(f"{original}.in_proj_{kind}", third)

    names[f"{vision}.embeddings.position_embedding"] = Source("expert_encoder.positional_embedding")
    module(f"{vision}.embeddings.patch_embedding", "expert_encoder.conv1.rgb", ("weight",))
    for spec in config.expert_specs:
        stem = f"{vision}.expert_stems.{spec.name}"
        original = f"expert_encoder.conv1.{EXPERT_NAMES.get(spec.name, spec.name)}"
        for i in range(4):
            module(f"{stem}.convs.{i}", f"{original}.{3 * i + 1}", ("weight",))
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            module(f"{stem}.norms.{i}", f"{original}.{3 * i + 2}", ("weight", "bias", *statistics))
        module(f"{stem}.projection", f"{original}.13", ("weight",))
        if spec.instances:
            names[f"{stem}.instance_embedding"] = Source("expert_encoder.instance_embedding")
    if config.experts:
        names[f"{vision}.resampler.latents"] = Source("expert_encoder.resampler.latents")
        for i in range(config.resampler_layers):
            layer, original = f"{vision}.resampler.layers.{i}", f"expert_encoder.resampler.perceiver_blocks.{i}"
            packed_attention(f"{layer}.latent_attn", f"{original}.attn")
            for name, original_name in RESAMPLER_LAYER_NAMES.items():
                module(f"{layer}.{name}", f"{original}.{original_name}")
    module(f"{vision}.pre_layernorm", "expert_encoder.ln_pre")
    module(f"{vision}.post_layernorm", "expert_encoder.ln_post")
    for i in range(config.vision_config.num_hidden_layers):
        layer, original = f"{vision}.layers.{i}", f"expert_encoder.transformer.resblocks.{i}"
        packed_attention(f"{layer}.self_attn", f"{original}.0.attn")
        for name, original_name in VISION_LAYER_NAMES.items():
            module(f"{layer}.{name}", f"{original}.{original_name}")

    for original_name, name in ROBERTA_EMBEDDING_NAMES.items():
        kinds = ("weight", "bias") if original_name == "LayerNorm" else ("weight",)
        module(f"{text}.embeddings.{name}", f"text_decoder.roberta.embeddings.{original_name}", kinds)
    last = config.text_config.num_hidden_layers - 1
    for i in range(last):
        for name, original_name in TEXT_LAYER_NAMES.items():
            module(f"{text}.layers.{i}.{name}", f"text_decoder.roberta.encoder.layer.{i}.{original_name}")
    for original_name, name in ROBERTA_LAYER_NAMES.items():
        module(f"{text}.layers.{last}.{name}", f"text_decoder.roberta.encoder.output_layer.{original_name}")
    for name in ("dense", "layer_norm"):
        module(f"lm_head.{name}", f"text_decoder.lm_head.{name}")
    names["lm_head.decoder.bias"] = Source("text_decoder.lm_head.bias")
    return names
