"""Saving and loading: bit-equal results, tied weights, other resolutions and types, Auto classes, devices."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from modeling_prismer import (
    PrismerConfig,
    PrismerForConditionalGeneration,
    PrismerModel,
    PrismerTextModel,
    PrismerVisionModel,
)

from .tiny import TOLERANCE, image_inputs, prompts, tiny_config, tiny_model, training_inputs


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def generate(model):
    return model.generate(input_ids=prompts(), **image_inputs(), do_sample=False, num_beams=3, max_new_tokens=6)


@pytest.mark.parametrize("experts", [None, []], ids=["six experts", "no experts"])
def test_a_saved_model_comes_back_bit_equal(tmp_path, experts):
    model = tiny_model(experts=experts)
    model.save_pretrained(tmp_path)
    loaded, report = PrismerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training
    states = model.state_dict()
    assert states.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, states[name]), name
    inputs = training_inputs(experts=experts)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_loaded_model_is_the_same(model, folder):
    assert torch.equal(generate(PrismerForConditionalGeneration.from_pretrained(folder)), generate(model))


def test_saved_files(folder):
    assert {file.name for file in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "prismer"
    assert config["architectures"] == ["PrismerForConditionalGeneration"]


def test_tied_embeddings_are_saved_once_and_tied_again(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    words = "model.text_model.embeddings.word_embeddings.weight"
    assert words in saved and "lm_head.decoder.weight" not in saved
    assert "lm_head.decoder.bias" in saved
    assert "model.vision_model.expert_stems.segmentation.class_features" in saved
    loaded = PrismerForConditionalGeneration.from_pretrained(folder)
    assert loaded.lm_head.decoder.weight is loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings() is loaded.lm_head.decoder


def test_large_models_are_saved_in_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(generate(PrismerForConditionalGeneration.from_pretrained(tmp_path)), generate(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_types(model, tmp_path, dtype):
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    auto = PrismerForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    full = PrismerForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.dtype == auto.dtype == dtype and full.dtype == torch.float32
    assert {p.dtype for p in auto.parameters()} == {dtype}
    expected = copy.deepcopy(model).to(dtype).float().state_dict()
    for same in (full, auto.float()):
        for name, tensor in same.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_the_base_model_can_be_loaded_alone(model, folder):
    base, report = PrismerModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    inputs = {"input_ids": prompts(), **image_inputs()}
    expected = model(**inputs)
    torch.testing.assert_close(model.lm_head(base(**inputs).last_hidden_state), expected.logits, **TOLERANCE)


def test_the_base_model_gets_a_head(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    loaded, report = PrismerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) <= {
        f"lm_head.{name}"
        for name in ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "decoder.bias")
    }
    assert torch.equal(loaded.lm_head.decoder.weight, model.lm_head.decoder.weight)
    assert torch.equal(loaded.lm_head.layer_norm.weight, torch.ones(24))
    assert loaded.lm_head.dense.weight.isfinite().all() and not loaded.lm_head.decoder.bias.any()


def test_missing_weights_are_initialised(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = PrismerConfig.from_pretrained(tmp_path)
    heat = {"name": "heat", "kind": "dense", "channels": 2}
    config.experts = [*config.experts, heat]
    loaded, report = PrismerForConditionalGeneration.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all("expert_stems.heat." in key for key in report["missing_keys"]) and report["missing_keys"]
    fresh = loaded.model.vision_model.expert_stems["heat"]
    assert fresh.convs[3].weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.1)
    states = loaded.state_dict()
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())


# ---- Auto classes


def test_auto_classes(model, folder):
    assert type(AutoConfig.from_pretrained(folder)) is PrismerConfig
    assert type(AutoModel.from_pretrained(folder)) is PrismerModel
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded) is PrismerForConditionalGeneration
    assert torch.equal(generate(loaded), generate(model))
    assert type(AutoModelForImageTextToText.from_config(tiny_config())) is PrismerForConditionalGeneration
    assert type(AutoModel.from_config(tiny_config().vision_config)) is PrismerVisionModel
    assert type(AutoModel.from_config(tiny_config().text_config)) is PrismerTextModel


@pytest.mark.parametrize("part", ["vision_model", "text_model"])
def test_a_part_can_be_saved_by_itself(model, tmp_path, part):
    source = getattr(model.model, part)
    source.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(source)
    states = source.state_dict()
    assert all(torch.equal(tensor, states[name]) for name, tensor in loaded.state_dict().items())


# ---- resolution


def resized_table(model, grid):
    table = model.model.vision_model.embeddings.position_embedding.detach().view(1, 4, 4, 32).permute(0, 3, 1, 2)
    return F.interpolate(table, size=(grid, grid), mode="bicubic").flatten(2)[0].T


@pytest.mark.parametrize("how", ["argument", "config", "both"])
@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto class"])
def test_loading_at_another_resolution_resizes_the_positions(model, folder, how, auto):
    kwargs = {"image_size": 48} if how != "config" else {}
    if how != "argument":
        kwargs["config"] = PrismerConfig.from_pretrained(folder)
        kwargs["config"].vision_config.image_size = 48
    loading_class = AutoModelForImageTextToText if auto else PrismerForConditionalGeneration
    loaded = loading_class.from_pretrained(folder, **kwargs)
    assert loaded.config.vision_config.image_size == 48
    torch.testing.assert_close(
        loaded.model.vision_model.embeddings.position_embedding.detach(), resized_table(model, 6)
    )
    images = image_inputs() | {"pixel_values": torch.randn(3, 3, 48, 48)}
    resized = copy.deepcopy(model).resize_position_embeddings(48)
    assert torch.equal(loaded.get_image_features(**images)[0], resized.get_image_features(**images)[0])
    if "config" in kwargs:
        assert kwargs["config"].vision_config.image_size == 48  # the caller's config is as it was


def test_the_base_model_can_be_loaded_at_another_resolution(model, folder):
    for loading_class in (PrismerModel, AutoModel):
        loaded = loading_class.from_pretrained(folder, image_size=48)
        table = loaded.vision_model.embeddings.position_embedding.detach()
        torch.testing.assert_close(table, resized_table(model, 6))


def test_a_resized_model_is_saved_resized(model, tmp_path):
    model.resize_position_embeddings(48).save_pretrained(tmp_path)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vision_config.image_size == 48
    images = image_inputs() | {"pixel_values": torch.randn(3, 3, 48, 48)}
    assert torch.equal(loaded.get_image_features(**images)[0], model.get_image_features(**images)[0])


def test_loading_from_a_state_dict(model):
    loaded = PrismerForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(generate(loaded), generate(model))


def test_a_config_as_a_path_or_a_dict(model, folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("config")
    config = PrismerConfig.from_pretrained(folder)
    config.label_smoothing = 0.3
    config.vision_config.image_size = 48
    config.save_pretrained(other)
    loaded = PrismerForConditionalGeneration.from_pretrained(folder, config=str(other))
    assert loaded.config.label_smoothing == 0.3
    assert loaded.config.vision_config.image_size == 48
    torch.testing.assert_close(
        loaded.model.vision_model.embeddings.position_embedding.detach(), resized_table(model, 6)
    )


def test_a_checkpoint_in_a_subfolder(model, tmp_path):
    model.save_pretrained(tmp_path / "inner")
    config = PrismerConfig.from_pretrained(tmp_path, subfolder="inner")
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path, subfolder="inner", config=config)
    assert torch.equal(generate(loaded), generate(model))


# ---- devices


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_device_maps(model, folder, device_map):
    loaded = PrismerForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    if loaded.device.type == "cpu":
        assert torch.equal(generate(loaded), generate(model))


PLACES = [
    "model.vision_model.embeddings",
    "model.vision_model.expert_stems",
    "model.vision_model.resampler",
    "model.vision_model.pre_layernorm",
    "model.vision_model.layers.0",
    "model.vision_model.layers.1",
    "model.vision_model.post_layernorm",
    "model.text_model.embeddings",
    "model.text_model.layers.0",
    "model.text_model.layers.1",
    "model.text_model.layers.2",
    "lm_head",
]


@pytest.mark.parametrize("offloaded", ["everything", "embeddings", "stems"])
def test_weights_on_the_disk(model, folder, tmp_path_factory, offloaded):
    parts = {
        "everything": PLACES,
        "stems": ["model.vision_model.expert_stems", "model.vision_model.resampler"],
        "embeddings": [place for place in PLACES if "embeddings" in place or place == "lm_head"],
    }[offloaded]
    device_map = {place: "disk" if place in parts else "cpu" for place in PLACES}
    loaded = PrismerForConditionalGeneration.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path_factory.mktemp("offload")
    )
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    inputs = {"input_ids": prompts(), **image_inputs()}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **TOLERANCE)
        assert torch.equal(generate(loaded), generate(model))
        candidates = torch.tensor([[9, 2, 1], [9, 8, 2], [11, 2, 1]])
        ranked = [each.rank_candidates(candidates, candidates != 1, 3, **inputs).scores for each in (loaded, model)]
        torch.testing.assert_close(*ranked, **TOLERANCE)
    if offloaded != "stems":
        with pytest.raises(ValueError, match="the position embeddings are offloaded"):
            loaded.resize_position_embeddings(48)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", ["vision on the CPU", "text on the CPU", "every other part on the CPU"])
def test_weights_on_two_devices(model, folder, where):
    on_cpu = {
        "vision on the CPU": [place for place in PLACES if "vision_model" in place],
        "text on the CPU": [place for place in PLACES if "vision_model" not in place],
        "every other part on the CPU": PLACES[1:-1:2],
    }[where]
    device_map = {place: "cpu" if place in on_cpu else 0 for place in PLACES}
    loaded = PrismerForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    inputs = {"input_ids": prompts(), **image_inputs()}
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = loaded(**{key: tensor.cuda() for key, tensor in inputs.items()}).logits
        assert (logits.cpu() - expected).std() < 0.01 * expected.std()
        generate(loaded)


def test_how_the_model_may_be_split(model):
    classes = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules - {"PrismerImitation"} <= classes


@pytest.mark.parametrize("part_class, name", [(PrismerVisionModel, "vision_model"), (PrismerTextModel, "text_model")])
def test_parts_load_from_a_whole_model_or_their_own_folder(model, folder, tmp_path, part_class, name):
    part, report = part_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    part.save_pretrained(tmp_path / name)
    expected = getattr(model.model, name).state_dict()
    for each in (part, part_class.from_pretrained(tmp_path / name)):
        state = each.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
