"""PrismerLM on loaded backbones, its copies and its files: everything, or the trained weights alone."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipVisionModel,
)

from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration, PrismerLMModel

from .tiny_lm import (
    ENCODERS,
    EXPERTS,
    FUSIONS,
    LANGUAGE_MODELS,
    image_inputs,
    prompts,
    scatter_weights,
    tiny_language_model,
    tiny_model,
)


fusions = pytest.mark.parametrize("fusion", FUSIONS)
EXPERTS_CONFIG = {"hidden_size": 32, "num_latents": 3, "resampler_layers": 1, "image_size": 32}
FROZEN = ("model.language_model.", "model.vision_encoders.")


def logits_of(model) -> torch.Tensor:
    inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of a language model, with a tokenizer, and of a vision encoder."""
    folder = tmp_path_factory.mktemp("backbones")
    tiny_language_model().save_pretrained(folder / "language")
    words = {f"w{number}": number for number in range(90)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    tokenizer.save_pretrained(folder / "language")
    torch.manual_seed(0)
    scatter_weights(SiglipVisionModel(ENCODERS["siglip"]())).save_pretrained(folder / "vision")
    return folder


def build(folder, fusion="prefix", **kwargs) -> PrismerLMForConditionalGeneration:
    """On the backbones in `folder`, trained."""
    model = PrismerLMForConditionalGeneration.from_backbones(
        str(folder / "language"),
        str(folder / "vision"),
        EXPERTS,
        fusion,
        experts_config=EXPERTS_CONFIG,
        cross_attention_every=1,
        **kwargs,
    )
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(FROZEN)}
    scatter_weights(model)
    model.load_state_dict(frozen, strict=False)
    return model.eval()


# ---- on loaded backbones ----


@fusions
def test_backbones_keep_their_weights_and_are_frozen(folder, fusion):
    model = build(folder, fusion)
    state = model.state_dict()
    language = AutoModelForCausalLM.from_pretrained(folder / "language")
    vision = SiglipVisionModel.from_pretrained(folder / "vision")
    for prefix, backbone in ((FROZEN[0], language), (f"{FROZEN[1]}0.", vision)):
        assert all(torch.equal(state[prefix + name], tensor) for name, tensor in backbone.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(FROZEN), name


def test_what_the_backbones_determine(folder):
    model = build(folder)
    assert model.config.image_token_id == 90  # the first token that the tokenizer does not have
    assert model.config.grid_size == 2 and model.config.image_seq_length == 4 + 3
    scale = model.get_input_embeddings().weight.pow(2).mean().sqrt()
    assert model.config.feature_scale == pytest.approx(scale.item(), rel=1e-3)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_features_start_at_the_scale_of_their_readers(folder, fusion):
    model = PrismerLMForConditionalGeneration.from_backbones(
        str(folder / "language"),
        str(folder / "vision"),
        EXPERTS,
        experts_config=EXPERTS_CONFIG,
        fusion=fusion,
        cross_attention_every=1,
    )
    features = model.get_image_features(**image_inputs(model.config, 2)).pooler_output
    scale = model.config.feature_scale if fusion == "prefix" else 1.0  # word embeddings, or a gated block
    assert features.pow(2).mean().sqrt().item() == pytest.approx(scale, rel=0.05)
    for block in model.model.cross_blocks.values():  # queries and keys of about 1: attention is not uniform
        keys = block.cross_attn.k_proj(features)
        assert keys.pow(2).mean().sqrt().item() == pytest.approx(1.0, rel=0.25)


def test_the_encoder_of_a_model_with_two_towers_is_taken():
    clip = CLIPModel(CLIPConfig(vision_config=ENCODERS["clip"]().to_dict(), text_config={"num_hidden_layers": 1}))
    model = PrismerLMForConditionalGeneration.from_backbones(tiny_language_model(), clip)
    assert model.model.vision_encoders[0].config.model_type == "clip_vision_model"


def test_experts_as_words_alone_have_no_stems():
    model = PrismerLMForConditionalGeneration.from_backbones(
        tiny_language_model(), experts=EXPERTS, experts_as="words"
    )
    assert model.model.experts is None and model.config.experts == []


@pytest.mark.parametrize(
    "backbones, message",
    [
        ({"language": LlamaModel(LANGUAGE_MODELS["llama"]())}, "language is a LlamaModel; a model that can generate"),
        ({"language": tiny_language_model(), "vision": tiny_language_model()}, "vision has a LlamaForCausalLM"),
    ],
    ids=["language", "vision"],
)
def test_backbones_of_another_kind_are_named(backbones, message):
    with pytest.raises(ValueError, match=message):
        PrismerLMForConditionalGeneration.from_backbones(**backbones)


# ---- copies ----


@fusions
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_shares_nothing(fusion, way):
    model = tiny_model(fusion=fusion)
    expected = logits_of(model)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(other), expected)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("gate") or "projection" in name:
                parameter.zero_()
    assert not torch.equal(logits_of(other), expected)
    assert torch.equal(logits_of(model), expected)


# ---- everything ----


@fusions
def test_saved_and_loaded_by_every_class(fusion, tmp_path):
    model = tiny_model(fusion=fusion, vision=("clip", "dinov3"), question_queries=True)
    expected = logits_of(model)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for auto_class in (PrismerLMForConditionalGeneration, AutoModelForImageTextToText, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is PrismerLMForConditionalGeneration
        assert torch.equal(logits_of(loaded), expected)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PrismerLMConfig


def test_the_base_model_loads_from_both_and_saves_for_both(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(base) is PrismerLMModel
    base.save_pretrained(tmp_path / "base")
    model.model.save_pretrained(tmp_path / "first")
    for name in ("base", "first"):
        again = AutoModel.from_pretrained(tmp_path / name).state_dict()
        whole = PrismerLMForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for key, tensor in model.model.state_dict().items():
            assert torch.equal(again[key], tensor) and torch.equal(whole[f"model.{key}"], tensor)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, "auto"])
def test_all_parts_get_the_wanted_type(saved, wanted, tmp_path):
    tiny_model().to(saved).save_pretrained(tmp_path)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, dtype=wanted)
    floats = {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()}
    assert floats == {saved if wanted == "auto" else wanted}
    assert logits_of(loaded).isfinite().all()


def test_new_experts_and_class_features_are_saved(tmp_path):
    model = tiny_model()
    model.add_expert("edge", "dense", channels=1)
    model.set_class_features("segmentation", torch.randn(3, 8), class_names=["sky", "tree", "road"])
    model.save_pretrained(tmp_path)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.expert_names == ["depth", "segmentation", "edge"]
    assert loaded.config.class_names == {"segmentation": ["sky", "tree", "road"]}
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_backbones_are_not_for_a_whole_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="language and vision are for checkpoints with trained weights alone"):
        PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=tiny_language_model())


# ---- trained weights alone ----


@fusions
def test_trained_weights_find_their_backbones(folder, fusion, tmp_path):
    model = build(folder, fusion, question_queries=True)
    expected = logits_of(model)
    model.save_pretrained(tmp_path, trained_only=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {name for name in model.state_dict() if not name.startswith(FROZEN)}
    assert "trained_only" not in model.config.backbones  # of the model that lives on

    given = {
        "by the names in the checkpoint": {},
        "by folders": {"language": str(folder / "language"), "vision": [str(folder / "vision")]},
        "loaded": {
            "language": AutoModelForCausalLM.from_pretrained(folder / "language"),
            "vision": SiglipVisionModel.from_pretrained(folder / "vision"),
        },
    }
    for name, backbones in given.items():
        loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, **backbones)
        assert torch.equal(logits_of(loaded), expected), name
        assert not loaded.training
        trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    loaded.save_pretrained(tmp_path / "whole")  # a checkpoint of its own
    assert torch.equal(logits_of(PrismerLMForConditionalGeneration.from_pretrained(tmp_path / "whole")), expected)


def test_trained_weights_load_by_auto_class_and_in_half(folder, tmp_path):
    build(folder).save_pretrained(tmp_path, trained_only=True)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.language_model.dtype == torch.bfloat16
    assert logits_of(loaded).isfinite().all()
    with pytest.raises(ValueError, match="PrismerLMForConditionalGeneration loads it"):
        AutoModel.from_pretrained(tmp_path)


def test_weights_of_a_trained_language_model_are_saved_too(folder, tmp_path):
    model = build(folder)
    model.language_model.lm_head.requires_grad_(True)
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(0.5)
    model.save_pretrained(tmp_path, trained_only=True)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_trained_weights_are_one_file(folder, tmp_path):
    model = build(folder)
    model.save_pretrained(tmp_path, trained_only=True, max_shard_size="5KB")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits_of(PrismerLMForConditionalGeneration.from_pretrained(tmp_path)), logits_of(model))


def test_a_resized_vocabulary_is_not_saved_with_trained_weights(folder, tmp_path):
    model = build(folder)
    model.resize_token_embeddings(110)
    with pytest.raises(ValueError, match="was resized from 100 to 110 tokens"):
        model.save_pretrained(tmp_path, trained_only=True)


def test_a_backbone_without_a_name_must_be_given(folder, tmp_path):
    model = PrismerLMForConditionalGeneration.from_backbones(tiny_language_model(), str(folder / "vision"))
    model.save_pretrained(tmp_path, trained_only=True)
    with pytest.raises(ValueError, match="language is missing: the checkpoint names no id or folder"):
        PrismerLMForConditionalGeneration.from_pretrained(tmp_path)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=tiny_language_model())
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_arguments_of_trained_weights_reach_their_part(folder, tmp_path, monkeypatch):
    model = build(folder)
    model.save_pretrained(tmp_path, trained_only=True)
    seen = []

    def watch(original):
        def load(*args, **kwargs):
            seen.append({name: kwargs.get(name) for name in ("token", "local_files_only", "subfolder")})
            return original(*args, **kwargs)

        return load

    for auto_class in (AutoModelForCausalLM, AutoModel):
        monkeypatch.setattr(auto_class, "from_pretrained", watch(auto_class.from_pretrained))
    config = PrismerLMConfig.from_pretrained(tmp_path)
    access = {"token": "secret", "local_files_only": True}
    for _ in range(2):  # the given configuration stays as it is
        loaded, info = PrismerLMForConditionalGeneration.from_pretrained(
            tmp_path, config=config, strict_experts=False, output_loading_info=True, **access
        )
        assert torch.equal(logits_of(loaded), logits_of(model))
    assert seen == [{**access, "subfolder": None}] * 4
    assert not loaded.config.strict_experts and config.strict_experts
    assert not info["missing_keys"]


def test_a_backbone_lies_in_a_subfolder(folder):
    arguments = {"subfolder": "language"}
    model = PrismerLMForConditionalGeneration.from_backbones(str(folder), language_kwargs=arguments)
    assert model.config.text_config.model_type == "llama"


def test_backbones_with_other_matrices_are_refused(folder, tmp_path):
    build(folder).save_pretrained(tmp_path, trained_only=True)
    language = AutoModelForCausalLM.from_pretrained(folder / "language")
    for parameter in language.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="the language model .* differs"):
        PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=language)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["backbones"]["language"]["matrices"]  # as older versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(config))
    PrismerLMForConditionalGeneration.from_pretrained(tmp_path)


def wrong_backbones(folder):
    other = SiglipVisionModel(ENCODERS["siglip"]())
    return {
        "other weights": ({"language": tiny_language_model(seed=1)}, "these weights were trained on: .*differs"),
        "other size": ({"language": tiny_language_model("gpt2")}, "model_type=gpt2, not llama"),
        "other encoder": ({"vision": scatter_weights(other, seed=3)}, "the vision encoder .* differs"),
        "one too many": ({"vision": [str(folder / "vision")] * 2}, "2 vision encoders given; the checkpoint needs 1"),
    }


@pytest.mark.parametrize("kind", ["other weights", "other size", "other encoder", "one too many"])
def test_other_backbones_are_refused(folder, kind, tmp_path):
    build(folder).save_pretrained(tmp_path, trained_only=True)
    backbones, message = wrong_backbones(folder)[kind]
    with pytest.raises(ValueError, match=message):
        PrismerLMForConditionalGeneration.from_pretrained(tmp_path, **backbones)


def test_a_model_without_trained_weights_loads_again(folder, tmp_path):
    language = str(folder / "language")
    model = PrismerLMForConditionalGeneration.from_backbones(language, experts=EXPERTS, experts_as="words")
    model.save_pretrained(tmp_path, trained_only=True)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path)
    ids = prompts(model.config, 2)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_missing_and_unknown_trained_weights_are_named(folder, tmp_path):
    build(folder).save_pretrained(tmp_path, trained_only=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["unknown"] = weights.pop("model.vision_projection.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing .*vision_projection.norm.* 1 are unknown .*unknown"):
        PrismerLMForConditionalGeneration.from_pretrained(tmp_path)


def test_a_configuration_names_the_backbones(folder, tmp_path):
    build(folder).save_pretrained(tmp_path, trained_only=True)
    backbones = json.loads((tmp_path / "config.json").read_text())["backbones"]
    assert backbones["language"]["id"] == str(folder / "language")
    assert [entry["id"] for entry in backbones["vision"]] == [str(folder / "vision")]
