"""Backbones of a PrismerLM: a trained Prismer's encoder, and adapters of the language model."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerLMForConditionalGeneration,
    PrismerLMProcessor,
    PrismerProcessor,
    pretrained_path,
    sample_image,
)
from tests.modeling_prismer.tiny_lm import shared_model, tiny_language_model, tiny_model, training_inputs


SCENES = "prismer-scenes"


@pytest.fixture(scope="module")
def on_scenes():
    """A tiny language model behind the encoder of the shipped checkpoint."""
    model = PrismerLMForConditionalGeneration.from_backbones(
        tiny_language_model(), SCENES, image_token_id=1000, feature_scale=1.0
    )
    model.model.vision_encoders.float()
    return model.eval()


@pytest.fixture(scope="module")
def processor(on_scenes):
    tokenizer = AutoTokenizer.from_pretrained(pretrained_path(SCENES))
    return PrismerLMProcessor.from_backbones(tokenizer, config=on_scenes.config)


def test_prismer_encoder_sees_what_prismer_sees(on_scenes, processor):
    prismer = PrismerForConditionalGeneration.from_pretrained(pretrained_path(SCENES), dtype=torch.float32)
    own_processor = PrismerProcessor.from_pretrained(pretrained_path(SCENES), experts=None)
    labels = processor.run_experts(sample_image(), experts=["depth", "edge"])
    settings = {"experts": ["depth", "edge"], "return_tensors": "pt"}
    features = [
        network.get_image_features(**own.process_images(sample_image(), labels, **settings))
        for network, own in ((on_scenes, processor), (prismer, own_processor))
    ]
    torch.testing.assert_close(features[0].last_hidden_state, features[1].last_hidden_state)
    assert list(processor.experts) == on_scenes.config.expert_names
    assert processor.image_seq_length == on_scenes.config.image_seq_length == 128


def test_prismer_encoder_needs_no_maps_with_words(processor):
    model = PrismerLMForConditionalGeneration.from_backbones(
        tiny_language_model(), SCENES, image_token_id=1000, experts_as="words"
    )
    words = PrismerLMProcessor.from_backbones(processor.tokenizer, config=model.config)
    inputs = words(sample_image(), "What is it?", experts=["ocr"], max_length=256)
    assert "ocr_ids" not in inputs and "Text:" in words.decode(inputs["input_ids"][0])
    features = model.get_image_features(**model.model.pop_image_inputs(dict(inputs)))
    assert features.pooler_output.shape[1] == model.config.num_features


def test_shipped_prismer_is_saved_by_its_name(on_scenes, tmp_path):
    on_scenes.save_pretrained(tmp_path, trained_only=True)
    (entry,) = json.loads((tmp_path / "config.json").read_text())["backbones"]["vision"]
    assert entry["id"] == SCENES
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=on_scenes.language_model)
    assert type(loaded.model.vision_encoders[0]) is type(on_scenes.model.vision_encoders[0])


def test_encoder_with_two_towers_keeps_its_id(clip_folder):
    model = PrismerLMForConditionalGeneration.from_backbones(tiny_language_model(), str(clip_folder))
    assert model.config.backbones["vision"][0]["id"] == str(clip_folder)


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.freeze_backbones()
    settings = {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "init_lora_weights": False}
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, **settings), model.language_model)
    return model.eval()


def test_adapter_is_saved_with_the_trained_weights(adapted, tmp_path):
    adapted.save_pretrained(tmp_path, trained_only=True)
    base = tiny_model()
    vision = list(base.model.vision_encoders)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=base.language_model, vision=vision)
    inputs = training_inputs(adapted.config)
    torch.testing.assert_close(loaded(**inputs).logits, adapted(**inputs).logits)
    assert not torch.allclose(shared_model()(**inputs).logits, adapted(**inputs).logits)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained)


def test_settings_of_the_adapter_have_no_path(adapted, tmp_path):
    adapted.save_pretrained(tmp_path, trained_only=True)
    adapter = json.loads((tmp_path / "config.json").read_text())["backbones"]["language"]["adapter"]
    assert adapter["peft_type"] == "LORA" and adapter["r"] == 2 and adapter["use_dora"]
    assert "base_model_name_or_path" not in adapter


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_second_adapter_is_refused(adapted, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted.language_model, "second")
    with pytest.raises(ValueError, match="2 adapters"):
        adapted.save_pretrained(tmp_path, trained_only=True)
