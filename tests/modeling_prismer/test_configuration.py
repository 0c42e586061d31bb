"""The configuration: its descriptions of experts, the published variants, saving."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig, pretrained_path
from modeling_prismer.configuration_prismer import VARIANTS
from modeling_prismer.expert_spec import PUBLISHED_EXPERTS

from .tiny import EXPERTS, tiny_config


def dense(**changes):
    return {"name": "depth", "kind": "dense", "channels": 1, **changes}


def label(**changes):
    return {"name": "segmentation", "kind": "label", "channels": 64, **changes}


def test_the_default_is_prismer_base_without_experts():
    config = PrismerConfig()
    assert config.experts == []
    assert config.to_diff_dict() == PrismerConfig.from_variant("prismerz_base").to_diff_dict()
    assert (config.num_latents, config.resampler_layers) == (64, 4)


@pytest.mark.parametrize(
    "variant, vision, text",
    [
        ("prismer_base", (768, 12, 12, 16), (768, 13, 12)),
        ("prismerz_base", (768, 12, 12, 16), (768, 13, 12)),
        ("prismer_large", (1024, 24, 16, 14), (1024, 25, 16)),
        ("prismerz_large", (1024, 24, 16, 14), (1024, 25, 16)),
        ("prismer_huge", (1280, 32, 20, 14), (1024, 25, 16)),
        ("prismerz_huge", (1280, 32, 20, 14), (1024, 25, 16)),
    ],
)
def test_the_six_published_variants(variant, vision, text):
    config = PrismerConfig.from_variant(variant, image_size=480)
    v, t = config.vision_config, config.text_config
    assert (v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.patch_size) == vision
    assert (t.hidden_size, t.num_hidden_layers, t.num_attention_heads) == text
    assert v.intermediate_size == 4 * v.hidden_size and t.intermediate_size == 4 * t.hidden_size
    assert v.image_size == 480
    assert t.encoder_hidden_size == v.hidden_size
    assert config.expert_specs == ([] if variant.startswith("prismerz") else list(PUBLISHED_EXPERTS))
    assert variant in VARIANTS


def test_a_variant_has_its_own_list_of_experts():
    config = PrismerConfig.from_variant("prismer_base", experts=[dense()])
    assert config.expert_names == ["depth"]
    PrismerConfig.from_variant("prismer_base").experts[0]["channels"] = 7
    assert PrismerConfig.from_variant("prismer_base").expert_specs == list(PUBLISHED_EXPERTS)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="no variant 'prismer_small'; there are prismer_base"):
        PrismerConfig.from_variant("prismer_small")


@pytest.mark.parametrize(
    "experts, message",
    [
        ([dense(), dense()], "expert 'depth' is described twice"),
        ([dense(kind="video")], "accepted are 'dense', 'label' and 'features'"),
        ([label(colour="red")], r"unknown fields \['colour'\]"),
    ],
)
def test_a_wrong_description_of_an_expert_is_refused(experts, message):
    with pytest.raises(StrictDataclassError, match=message):
        PrismerConfig(experts=experts)
    config = PrismerConfig()
    with pytest.raises(ValueError, match=message):
        config.experts = experts


@pytest.mark.parametrize(
    "vision, text, message",
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            {},
            "hidden_size=30 is not a multiple of num_attention_heads=4",
        ),
        ({"image_size": 8}, {}, "image_size=8 is smaller than patch_size=16"),
        ({"num_instance_embeddings": 1}, {}, "num_instance_embeddings=1; accepted is at least 2"),
        ({}, {"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({}, {"num_hidden_layers": 1}, "at least 2"),
        (
            {"hidden_size": 24, "num_attention_heads": 3, "experts": [dense()], "resampler_attention_heads": 7},
            {},
            "resampler_attention_heads=7",
        ),
    ],
)
def test_an_impossible_network_is_refused(vision, text, message):
    with pytest.raises(StrictDataclassError, match=message):
        PrismerConfig(vision_config=vision, text_config=text)


WITH_EXPERT = {"experts": [dense()]}
COUNTS = {
    "vision_config": (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
        *("image_size", "patch_size", "num_latents", "resampler_layers", "resampler_attention_heads"),
    ),
    "text_config": (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "type_vocab_size", "encoder_hidden_size"),
    ),
}
SHARES = {
    "vision_config": ["attention_dropout"],
    "text_config": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
}


@pytest.mark.parametrize("value", [0, -16])
@pytest.mark.parametrize("part, field", [(part, field) for part, fields in COUNTS.items() for field in fields])
def test_sizes_and_counts_must_be_positive(part, field, value):
    with pytest.raises(StrictDataclassError, match=f"{field}={value}; accepted is a positive integer"):
        PrismerConfig(**{part: {field: value}})


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("part, field", [(part, field) for part, fields in SHARES.items() for field in fields])
def test_dropout_must_be_a_probability_below_one(part, field, value):
    with pytest.raises(StrictDataclassError, match=f"{field}={value}; accepted is at least 0 and below 1"):
        PrismerConfig(**{part: {field: value}})


@pytest.mark.parametrize("value", [5, 1, -0.1, float("nan"), float("inf")])
def test_label_smoothing_must_be_below_one(value):
    with pytest.raises(StrictDataclassError, match=f"label_smoothing={value}; accepted is at least 0 and below 1"):
        PrismerConfig(label_smoothing=value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_config": {"hidden_act": "gleu"}}, "hidden_act='gleu'; accepted are gelu, .*quick_gelu, .*relu"),
        ({"text_config": {"hidden_act": "gleu"}}, "hidden_act='gleu'; accepted are gelu"),
        ({"vision_config": {"layer_norm_eps": 0.0}}, "layer_norm_eps=0.0; accepted is a positive number"),
        ({"text_config": {"layer_norm_eps": float("nan")}}, "layer_norm_eps=nan; accepted is a positive number"),
        ({"vision_config": {"initializer_range": -0.1}}, "initializer_range=-0.1; accepted is 0 or a positive"),
        ({"vision_config": {"hidden_size": 4, "num_attention_heads": 2}}, None),
        (
            {"vision_config": {"hidden_size": 4, "num_attention_heads": 2, "resampler_attention_heads": 2}}
            | WITH_EXPERT,
            "hidden_size=4; the experts' stems need at least 8",
        ),
        (
            {"text_config": {"pad_token_id": 50265}},
            "pad_token_id=50265; an id of the vocabulary is needed, 0 to 50264",
        ),
        ({"text_config": {"pad_token_id": -1}}, "pad_token_id=-1; an id of the vocabulary"),
        ({"text_config": {"pad_token_id": None}}, "pad_token_id=None; an id of the vocabulary"),
        ({"pad_token_id": 50265}, "pad_token_id=50265; an id of the vocabulary"),
        ({"text_config": {"max_position_embeddings": 2}}, "max_position_embeddings=2; with pad_token_id=1 at least 3"),
        ({"text_config": {"max_position_embeddings": 3}}, None),
        ({"vision_config": {"patch_size": 2.5}}, "'patch_size' expected int, got float"),
        ({"vision_config": {"num_latents": "64"}}, "'num_latents' expected int, got str"),
        ({"vision_config": "base"}, "'vision_config'"),
        ({"vision_config": PrismerTextConfig()}, "'vision_config'"),
        ({"text_config": PrismerVisionConfig()}, "'text_config'"),
        ({"experts": "depth"}, "'experts'"),
        ({"experts": ["depth"]}, "'experts'"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    if message is None:
        PrismerConfig(**fields)
        return
    with pytest.raises(StrictDataclassError, match=message):
        PrismerConfig(**fields)


@pytest.mark.parametrize("name", ["prismer-scenes", "prismer-easy-vqa"])
def test_configs_of_the_shipped_checkpoints_load(name):
    assert PrismerConfig.from_pretrained(pretrained_path(name)).experts


@pytest.mark.parametrize("experts", ["depth", ["depth"], [None], {"depth": 1}])
def test_experts_set_later_must_be_a_list_of_dicts(experts):
    with pytest.raises(ValueError, match="experts (is a|has the entry) "):
        PrismerConfig().experts = experts


def test_class_names_are_saved_and_may_repeat(tmp_path):
    config = PrismerConfig(experts=[dense(), label(num_classes=3, class_names=["bat", "cat", "bat"])])
    assert config.class_names == {"segmentation": ["bat", "cat", "bat"]}
    config.save_pretrained(tmp_path)
    assert PrismerConfig.from_pretrained(tmp_path).class_names == config.class_names


def test_experts_and_resampler_belong_to_both_configs():
    config = tiny_config()
    assert config.experts == config.vision_config.experts == EXPERTS
    assert config.num_latents == config.vision_config.num_latents == 6
    assert config.resampler_layers == config.vision_config.resampler_layers == 2
    assert config.expert_names == ["depth", "normal", "segmentation", "edge", "detection", "ocr"]
    assert PrismerConfig(vision_config={"experts": EXPERTS}, experts=[]).experts == []
    assert PrismerConfig(vision_config={"experts": EXPERTS}, experts=None, num_latents=None).experts == EXPERTS


def test_sub_configs_may_be_objects():
    config = PrismerConfig(vision_config=PrismerVisionConfig(hidden_size=96), text_config=PrismerTextConfig())
    assert config.vision_config.hidden_size == config.text_config.encoder_hidden_size == 96


def test_special_tokens_come_from_the_text_config():
    config = PrismerConfig(text_config={"pad_token_id": 5, "bos_token_id": 6, "eos_token_id": [7, 8]})
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (5, 6, [7, 8])


def test_a_saved_config_comes_back_the_same(tmp_path):
    config = tiny_config(label_smoothing=0.0, strict_experts=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PrismerConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.experts == EXPERTS and loaded.label_smoothing == 0.0 and not loaded.strict_experts


def test_fields_can_be_changed_while_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    loaded = PrismerConfig.from_pretrained(tmp_path, experts=EXPERTS[:1], num_latents=3, label_smoothing=0.2)
    assert loaded.expert_names == ["depth"] and loaded.num_latents == 3 and loaded.label_smoothing == 0.2
    assert loaded.vision_config.num_latents == 3


@pytest.mark.parametrize("part", [PrismerVisionConfig, PrismerTextConfig])
def test_a_sub_config_loads_from_the_whole_config(tmp_path, part):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = part.from_pretrained(tmp_path)
    assert loaded.hidden_size == getattr(config, part.base_config_key).hidden_size
