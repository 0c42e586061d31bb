"""`from_backbones`: a new model on a CLIP vision tower and a RoBERTa, whose weights are taken over exactly."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    ViTConfig,
    ViTModel,
)

from modeling_prismer import PrismerForConditionalGeneration
from modeling_prismer.modeling_prismer import PrismerAdaptor

from .tiny import EXPERTS, TOLERANCE, image_inputs, prompts, scatter_weights, training_inputs


VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}


@pytest.fixture
def clip():
    return scatter_weights(CLIPVisionModel(CLIPVisionConfig(**VISION))).eval()


@pytest.fixture
def roberta():
    return scatter_weights(RobertaForMaskedLM(RobertaConfig(**TEXT))).eval()


@pytest.fixture
def model(clip, roberta):
    return PrismerForConditionalGeneration.from_backbones(clip, roberta, EXPERTS).eval()


def test_half_precision_backbones_give_a_float32_model(clip, roberta, tmp_path):
    for name, backbone in (("clip", clip), ("roberta", roberta)):
        backbone.half().save_pretrained(tmp_path / name)
    for vision, text in ((clip, roberta), (tmp_path / "clip", tmp_path / "roberta")):
        model = PrismerForConditionalGeneration.from_backbones(vision, text, EXPERTS)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@torch.no_grad()
def test_vision_layers_equal_their_source(clip, model):
    states = torch.randn(2, 9, 32)
    tower = getattr(clip, "vision_model", clip)
    for ours, theirs in zip(model.model.vision_model.layers, tower.encoder.layers, strict=True):
        expected = theirs(states, None)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(ours(states), expected, **TOLERANCE)
    torch.testing.assert_close(model.model.vision_model.pre_layernorm(states), tower.pre_layrnorm(states), **TOLERANCE)
    torch.testing.assert_close(
        model.model.vision_model.post_layernorm(states), tower.post_layernorm(states), **TOLERANCE
    )


@torch.no_grad()
def test_patches_and_positions_equal_clip(clip, model):
    pixels = torch.randn(2, 3, 32, 32)
    tower = getattr(clip, "vision_model", clip)
    torch.testing.assert_close(
        model.model.vision_model.embeddings(pixels), tower.embeddings(pixels)[:, 1:], **TOLERANCE
    )


@torch.no_grad()
def test_encoder_without_experts_equals_clip(clip, roberta):
    model = PrismerForConditionalGeneration.from_backbones(clip, roberta).eval()
    pixels = torch.randn(2, 3, 32, 32)
    tower = getattr(clip, "vision_model", clip)
    states = tower.pre_layrnorm(tower.embeddings(pixels)[:, 1:])
    for layer in tower.encoder.layers:
        states = layer(states, None)
        states = states[0] if isinstance(states, tuple) else states
    torch.testing.assert_close(model.get_image_features(pixels)[0], tower.post_layernorm(states), **TOLERANCE)


@torch.no_grad()
def test_text_layers_equal_their_source(roberta, model):
    states = torch.randn(2, 6, 24)
    layers = model.model.text_model.layers
    assert len(layers) == len(roberta.roberta.encoder.layer) + 1  # and the output layer
    for ours, theirs in zip(layers, roberta.roberta.encoder.layer):
        attention = theirs.attention(states, None)
        attention = attention[0] if isinstance(attention, tuple) else attention
        ours.self_attn.is_causal = False  # RoBERTa sees all; only the weights are compared
        torch.testing.assert_close(
            ours.self_attn_layer_norm(ours.self_attn(states)[0] + states), attention, **TOLERANCE
        )
        expected = theirs.output(theirs.intermediate(states), states)
        torch.testing.assert_close(ours.mlp_layer_norm(ours.mlp(states) + states), expected, **TOLERANCE)


@torch.no_grad()
def test_embeddings_and_head_equal_roberta(roberta, model):
    ids = prompts()
    embeddings = model.model.text_model.embeddings
    ours = embeddings(embeddings.word_embeddings(ids), torch.arange(5)[None])
    torch.testing.assert_close(ours, roberta.roberta.embeddings(ids), **TOLERANCE)
    states = torch.randn(2, 5, 24)
    torch.testing.assert_close(model.lm_head(states), roberta.lm_head(states), **TOLERANCE)
    assert model.lm_head.decoder.weight is embeddings.word_embeddings.weight


@torch.no_grad()
def test_new_layer_norms_copy_the_norm_before(model):
    for layer in model.model.text_model.layers[:-1]:
        for norm in (layer.cross_attn_layer_norm, layer.adaptor.layer_norm):
            assert torch.equal(norm.weight, layer.self_attn_layer_norm.weight)
            assert torch.equal(norm.bias, layer.self_attn_layer_norm.bias)
            assert norm.weight is not layer.self_attn_layer_norm.weight


def test_the_config_is_that_of_the_backbones(clip, roberta):
    model = PrismerForConditionalGeneration.from_backbones(
        clip, roberta, EXPERTS, num_latents=5, resampler_layers=1, label_smoothing=0.0
    )
    vision, text = model.config.vision_config, model.config.text_config
    assert {name: getattr(vision, name) for name in VISION} == VISION
    assert {name: getattr(text, name) for name in TEXT} == TEXT | {"num_hidden_layers": 3}
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (1, 0, 2)
    assert (model.config.num_latents, model.config.resampler_layers, model.config.label_smoothing) == (5, 1, 0.0)
    assert model.config.experts == EXPERTS


def test_the_rest_starts_fresh(model):
    for module in model.modules():
        if isinstance(module, PrismerAdaptor):
            assert not module.up_proj.weight.any() and module.down_proj.weight.any()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_it_trains_and_speaks(model):
    model.freeze_backbones().train()
    model(**training_inputs()).loss.backward()
    assert model.model.text_model.layers[0].cross_attn.q_proj.weight.grad.any()
    assert model.eval().generate(input_ids=prompts(), **image_inputs(), max_new_tokens=3).shape[0] == 3


def test_the_backbones_stay_as_they_are(clip, roberta):
    before = {name: tensor.clone() for name, tensor in (*clip.state_dict().items(), *roberta.state_dict().items())}
    model = PrismerForConditionalGeneration.from_backbones(clip, roberta)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for source in (clip, roberta):
        assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("image_size", [48, 24, 37])
def test_another_resolution(clip, roberta, image_size):
    model = PrismerForConditionalGeneration.from_backbones(clip, roberta, image_size=image_size)
    assert model.config.vision_config.image_size == image_size
    grid = image_size // 8
    tower = getattr(clip, "vision_model", clip)
    table = tower.embeddings.position_embedding.weight.detach()[1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(grid, grid), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(model.model.vision_model.embeddings.position_embedding.detach(), expected)
    assert model.get_image_features(torch.randn(1, 3, image_size, image_size))[0].shape == (1, grid**2, 32)


# ---- what a backbone may be


def taken_over(model):
    """The tensors of the model that come from a backbone, its head left out."""
    fresh = (".adaptor.", ".cross_attn", "text_model.layers.2.")
    states = model.model.state_dict()
    return {name: tensor for name, tensor in states.items() if not any(part in name for part in fresh)}


def test_a_whole_clip_and_a_roberta_without_a_head(clip, roberta, tmp_path):
    expected = PrismerForConditionalGeneration.from_backbones(clip, roberta)
    whole = CLIPModel(CLIPConfig(vision_config=VISION, text_config=SMALL))
    getattr(whole.vision_model, "vision_model", whole.vision_model).load_state_dict(
        {name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}
    )
    causal = RobertaForCausalLM(RobertaConfig(**TEXT, is_decoder=True))
    causal.load_state_dict(roberta.state_dict())
    for text in (roberta.roberta, causal):
        found = PrismerForConditionalGeneration.from_backbones(whole, text)
        states = taken_over(found)
        assert states.keys() == taken_over(expected).keys()
        assert all(torch.equal(tensor, states[name]) for name, tensor in taken_over(expected).items())
    assert torch.equal(found.lm_head.dense.weight, roberta.lm_head.dense.weight)
    assert torch.equal(found.lm_head.decoder.bias, roberta.lm_head.bias)

    whole.save_pretrained(tmp_path / "clip")
    roberta.save_pretrained(tmp_path / "roberta")
    from_folders = PrismerForConditionalGeneration.from_backbones(str(tmp_path / "clip"), tmp_path / "roberta")
    states = taken_over(from_folders)
    assert all(torch.equal(tensor, states[name]) for name, tensor in taken_over(expected).items())


def test_backbones_in_half_precision_are_taken_over_exactly(clip, roberta):
    model = PrismerForConditionalGeneration.from_backbones(clip.half(), roberta.half())
    assert model.dtype == torch.float32
    weight = getattr(clip, "vision_model", clip).encoder.layers[0].mlp.fc1.weight
    assert torch.equal(model.model.vision_model.layers[0].mlp.fc1.weight, weight.float())


def vit():
    return ViTModel(ViTConfig(**SMALL, image_size=32))


def bert():
    return BertModel(BertConfig(**SMALL, vocab_size=60))


def test_other_backbones_are_refused(clip, roberta):
    with pytest.raises(ValueError, match="vision is a ViTModel; a CLIP vision tower is needed"):
        PrismerForConditionalGeneration.from_backbones(vit(), roberta)
    with pytest.raises(ValueError, match="vision is a Roberta.*; a CLIP vision tower is needed"):
        PrismerForConditionalGeneration.from_backbones(roberta, roberta)
    with pytest.raises(ValueError, match="text is a BertModel; a RoBERTa is needed"):
        PrismerForConditionalGeneration.from_backbones(clip, bert())


def test_folders_of_other_backbones_are_refused(clip, roberta, tmp_path):
    vit().save_pretrained(tmp_path / "vit")
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="a CLIP vision tower is needed"):
        PrismerForConditionalGeneration.from_backbones(str(tmp_path / "vit"), roberta)
    with pytest.raises(ValueError, match="a RoBERTa is needed"):
        PrismerForConditionalGeneration.from_backbones(clip, str(tmp_path / "bert"))
