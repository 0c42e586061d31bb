"""Experts in front of vision-language models, whose own image path stays as it is."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_prismer import PrismerLMForConditionalGeneration

from .tiny_lm import (
    EXPERTS,
    FUSIONS,
    NUM_LATENTS,
    TOLERANCE,
    VLMS,
    image_inputs,
    pick,
    scatter_weights,
    tiny_vlm,
    vlm_inputs,
)


GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [96, 97, 98, 99]}
BEAMS = {**GREEDY, "num_beams": 2}
EXPERTS_CONFIG = {"hidden_size": 32, "num_latents": NUM_LATENTS, "resampler_layers": 1, "image_size": 32}
vlms = pytest.mark.parametrize("name", VLMS)
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def in_front_of(base, fusion, is_trained=True, **kwargs):
    """A PrismerLM on a copy of `base`."""
    torch.manual_seed(0)
    model = PrismerLMForConditionalGeneration.from_backbones(
        copy.deepcopy(base),
        experts=EXPERTS,
        fusion=fusion,
        experts_config=EXPERTS_CONFIG,
        cross_attention_every=1,
        image_token_id=500,
        **kwargs,
    )
    if is_trained:
        for name, module in model.model.named_children():
            if name != "language_model":
                scatter_weights(module)
        with torch.no_grad():
            for parameter in model.model.parameters(recurse=False):
                parameter.normal_()
    return model.eval()


def inputs_of(name, model, rows=2, images=1):
    """Inputs of the vision-language model with placeholders for experts, and the experts' maps."""
    has_placeholders = model.config.fusion == "prefix" or images > 1
    own = vlm_inputs(name, rows, model.config if has_placeholders else None, images)
    return own, image_inputs(model.config, rows * images)


def rows_of(inputs, rows, total):
    """The inputs of some rows; Qwen's patches of all images lie behind each other."""
    return {
        name: tensor.unflatten(0, (total, -1))[rows].flatten(0, 1) if name == "pixel_values" else tensor[rows]
        for name, tensor in inputs.items()
    }


@vlms
@fusions
def test_without_experts_it_is_the_model_itself(name, fusion):
    base = tiny_vlm(name)
    model, inputs = in_front_of(base, fusion), vlm_inputs(name, 2)
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    for search in (GREEDY, BEAMS):
        assert torch.equal(model.generate(**inputs, **search), base.generate(**inputs, **search))


@vlms
def test_untrained_cross_attention_changes_nothing(name):
    base = tiny_vlm(name)
    model, inputs = in_front_of(base, "cross_attention", is_trained=False), vlm_inputs(name, 2)
    experts = image_inputs(model.config, 2)
    assert torch.equal(model(**inputs, **experts).logits, base(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **experts, **BEAMS), base.generate(**inputs, **BEAMS))


@vlms
@fusions
def test_experts_and_images_change_the_logits(name, fusion):
    model = in_front_of(tiny_vlm(name), fusion)
    inputs, experts = inputs_of(name, model)
    logits = model(**inputs, **experts).logits
    assert (model(**inputs, **{key: tensor.flip(0) for key, tensor in experts.items()}).logits - logits).norm() > 1e-2
    inputs["pixel_values"] = inputs["pixel_values"] * 2
    assert (model(**inputs, **experts).logits - logits).norm() > 1e-2


@vlms
@fusions
def test_generation_sees_the_experts_at_each_step(name, fusion):
    model = in_front_of(tiny_vlm(name), fusion)
    inputs, experts = inputs_of(name, model)
    for search in (GREEDY, BEAMS):
        generated = model.generate(**inputs, **experts, **search)
        assert torch.equal(generated, model.generate(**inputs, **experts, **search, use_cache=False))
        assert torch.equal(generated[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        for row in range(2):
            alone = rows_of(inputs, [row], 2)
            assert torch.equal(model.generate(**alone, **pick(experts, [row]), **search), generated[[row]])


@vlms
@fusions
def test_the_stems_learn_through_the_frozen_model(name, fusion):
    model = in_front_of(tiny_vlm(name), fusion).train()
    inputs, experts = inputs_of(name, model)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-3] = -100
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**inputs, **experts).loss.backward()
        gradients.append(model.model.experts.expert_stems["depth"].projection.weight.grad.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients)
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


@fusions
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_prompts_with_several_images(name, fusion):
    model = in_front_of(tiny_vlm(name), fusion)
    inputs, experts = inputs_of(name, model, images=2)
    for search in (GREEDY, BEAMS):
        generated = model.generate(**inputs, **experts, **search)
        assert torch.equal(generated, model.generate(**inputs, **experts, **search, use_cache=False))
        alone = rows_of(inputs, [1], 2)
        if name == "qwen2_5_vl":
            alone["image_grid_thw"] = inputs["image_grid_thw"][2:]
        assert torch.equal(model.generate(**alone, **pick(experts, [2, 3]), **search), generated[1:])


@fusions
def test_ranking_after_images_and_experts(fusion):
    model = in_front_of(tiny_vlm("llava"), fusion)
    inputs, experts = inputs_of("llava", model)
    candidates, mask = torch.tensor([[5, 6, 2], [7, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    ranking = model.rank_candidates(candidates, mask, 2, **inputs, **experts)
    length = inputs["input_ids"].shape[1]
    for row in range(2):
        for score, index in zip(ranking.scores[row], ranking.indices[row]):
            candidate = candidates[index][mask[index].bool()]
            ids = torch.cat([inputs["input_ids"][row], candidate])[None]
            images = {"pixel_values": inputs["pixel_values"][[row]], **pick(experts, [row])}
            log_probs = model(input_ids=ids, **images).logits[0, length - 1 : -1].log_softmax(dim=-1)
            torch.testing.assert_close(score, log_probs.gather(1, candidate[:, None]).mean(), atol=1e-4, rtol=1e-4)


def test_candidates_see_the_last_of_several_images():
    model = in_front_of(tiny_vlm("llava"), "cross_attention")
    inputs, experts = inputs_of("llava", model, rows=1, images=2)
    candidates, mask = torch.tensor([[5, 6, 2], [7, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    ranking = model.rank_candidates(candidates, mask, 2, **inputs, **experts)
    length = inputs["input_ids"].shape[1]
    for score, index in zip(ranking.scores[0], ranking.indices[0]):
        candidate = candidates[index][mask[index].bool()]
        ids = torch.cat([inputs["input_ids"][0], candidate])[None]
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], **experts).logits
        log_probs = logits[0, length - 1 : -1].log_softmax(dim=-1)
        torch.testing.assert_close(score, log_probs.gather(1, candidate[:, None]).mean(), atol=1e-4, rtol=1e-4)


@fusions
def test_a_step_after_the_prompt_continues_it(fusion):
    model = in_front_of(tiny_vlm("llava"), fusion)
    inputs, experts = inputs_of("llava", model, rows=1)
    prompt = model(**inputs, **experts, use_cache=True)
    token = torch.tensor([[7]])
    step = model(input_ids=token, encoder_outputs=prompt.image_outputs, past_key_values=prompt.past_key_values)
    ids = torch.cat([inputs["input_ids"], token], dim=1)
    whole = model(input_ids=ids, pixel_values=inputs["pixel_values"], **experts)
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained_only", [False, True])
def test_settings_of_generation_are_saved(trained_only, tmp_path):
    base = tiny_vlm("llava")
    base.save_pretrained(tmp_path / "base")
    model = in_front_of(type(base).from_pretrained(tmp_path / "base"), "prefix")
    model.generation_config.update(max_new_tokens=3, eos_token_id=None)
    model.save_pretrained(tmp_path / "own", trained_only=trained_only)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(
        tmp_path / "own", **({"language": str(tmp_path / "base")} if trained_only else {})
    )
    inputs, experts = inputs_of("llava", loaded)
    for images in (experts, {}):
        given = inputs if images else vlm_inputs("llava", 2)
        generated = loaded.generate(**given, **images, suppress_tokens=[96, 97, 98, 99])
        assert generated.shape[1] == given["input_ids"].shape[1] + 3


@fusions
def test_the_question_conditions_the_resampler(fusion):
    model = in_front_of(tiny_vlm("llava"), fusion, question_queries=True)
    inputs, experts = inputs_of("llava", model)
    generated = model.generate(**inputs, **experts, **BEAMS)
    assert torch.equal(generated, model.generate(**inputs, **experts, **BEAMS, use_cache=False))


@fusions
def test_a_failed_call_leaves_nothing_behind(fusion):
    base = tiny_vlm("llava")
    model = in_front_of(base, fusion)
    inputs, experts = inputs_of("llava", model)
    with pytest.raises(ValueError):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]}, **experts)
    plain = vlm_inputs("llava", 2)
    assert torch.equal(model(**plain).logits, base(**plain).logits)


@fusions
def test_a_copy_has_experts_of_its_own(fusion):
    model = in_front_of(tiny_vlm("llava"), fusion)
    inputs, experts = inputs_of("llava", model)
    expected = model(**inputs, **experts).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.experts_projection.norm.weight.zero_()
    assert not torch.equal(other(**inputs, **experts).logits, expected)
    assert torch.equal(model(**inputs, **experts).logits, expected)


@vlms
def test_a_saved_model_loads_with_all_its_weights(name, tmp_path):
    model = in_front_of(tiny_vlm(name), "prefix")
    model.save_pretrained(tmp_path)
    loaded, info = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs, experts = inputs_of(name, model)
    torch.testing.assert_close(loaded(**inputs, **experts).logits, model(**inputs, **experts).logits, **TOLERANCE)


@fusions
def test_trained_weights_alone_go_to_another_copy(fusion, tmp_path):
    base = tiny_vlm("qwen2_5_vl")
    model = in_front_of(base, fusion)
    inputs, experts = inputs_of("qwen2_5_vl", model)
    expected = model(**inputs, **experts).logits
    model.save_pretrained(tmp_path, trained_only=True)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=base)
    torch.testing.assert_close(loaded(**inputs, **experts).logits, expected, **TOLERANCE)
    with pytest.raises(ValueError, match="is not the one that these weights were trained on"):
        PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=tiny_vlm("qwen2_5_vl", seed=1))


def test_a_vision_language_model_keeps_its_own_encoder_alone():
    with pytest.raises(StrictDataclassError, match="vision_config must be empty"):
        PrismerLMForConditionalGeneration.from_backbones(tiny_vlm("llava"), tiny_vlm("paligemma").model.vision_tower)
