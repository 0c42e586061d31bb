"""The configuration: its descriptions of experts, the published variants, saving."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig
from modeling_prismer.configuration_prismer import PUBLISHED_EXPERTS, VARIANTS

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
    assert config.experts == ([] if variant.startswith("prismerz") else PUBLISHED_EXPERTS)
    assert variant in VARIANTS


def test_a_variant_takes_other_experts_and_does_not_share_the_published_list():
    config = PrismerConfig.from_variant("prismer_base", experts=[dense()])
    assert config.expert_names == ["depth"]
    PrismerConfig.from_variant("prismer_base").experts[0]["channels"] = 7
    assert PUBLISHED_EXPERTS[0]["channels"] == 1


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no variant 'prismer_small'; there are prismer_base"):
        PrismerConfig.from_variant("prismer_small")


@pytest.mark.parametrize(
    "experts, message",
    [
        ([dense(), dense()], "expert 'depth' is described twice"),
        ([dense(name="my depth")], "identifier"),
        ([dense(name=None)], "identifier"),
        ([dense(kind="video")], "accepted are 'dense' and 'label'"),
        ([dense(channels=0)], "positive integer"),
        ([dense(channels="three")], "positive integer"),
        ([label(num_classes=0)], "num_classes=0; a positive integer or None"),
        ([label(colour="red")], r"unknown fields \['colour'\]"),
        ([dense(num_classes=3)], "belong to the kind 'label'"),
        ([dense(instances=True)], "belong to the kind 'label'"),
        ([dense(name="pixel")], "cannot be named 'pixel'"),
        ([label(name="input")], "cannot be named 'input'"),
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
        ({"num_instance_embeddings": 1}, {}, "at least 2"),
        ({}, {"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({}, {"num_hidden_layers": 1}, "at least 2"),
        (
            {"hidden_size": 24, "num_attention_heads": 3, "experts": [dense()], "resampler_attention_heads": 7},
            {},
            "resampler_attention_heads=7",
        ),
    ],
)
def test_a_network_that_cannot_be_is_refused(vision, text, message):
    with pytest.raises(StrictDataclassError, match=message):
        PrismerConfig(vision_config=vision, text_config=text)


def test_experts_and_the_resampler_are_fields_of_the_config_and_of_its_vision_part():
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


def test_special_tokens_are_those_of_the_text():
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
def test_a_part_can_be_read_from_the_whole(tmp_path, part):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    loaded = part.from_pretrained(tmp_path)
    assert loaded.hidden_size == getattr(config, part.base_config_key).hidden_size
