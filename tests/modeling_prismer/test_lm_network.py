"""PrismerLM's network: encoders, experts, both fusions, questions that condition the resampler, and its errors."""

import logging
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    FalconConfig,
    Gemma3nTextConfig,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
)

from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration, PrismerVisionConfig
from modeling_prismer.image_features import VisibleImages, patch_features

from .tiny_lm import (
    ENCODERS,
    EXPERTS,
    FUSIONS,
    IMAGE_SIZE,
    LANGUAGE_MODELS,
    NUM_LATENTS,
    NUM_PATCHES,
    PATCH_SIZE,
    TOLERANCE,
    image_inputs,
    pad_left,
    pick,
    prompts,
    repeat,
    shared_model,
    tiny_config,
    tiny_language_model,
    tiny_model,
    training_inputs,
)


families = pytest.mark.parametrize("language", LANGUAGE_MODELS)
fusions = pytest.mark.parametrize("fusion", FUSIONS)
SEGMENTATION = "segmentation_ids"


def without(inputs, *names):
    return {name: tensor for name, tensor in inputs.items() if name not in names}


# ---- the language model ----


@families
@fusions
def test_images_change_the_logits(language, fusion):
    model = shared_model(language, fusion)
    input_ids, images = prompts(model.config, 2), image_inputs(model.config, 2)
    logits = model(input_ids=input_ids, **images).logits
    for name in images:
        other = model(input_ids=input_ids, **images | {name: images[name].flip(0)}).logits
        assert (logits - other).abs().max() > 1e-4, name


@families
def test_untrained_cross_attention_is_the_language_model_itself(language):
    bare = tiny_language_model(language)
    model = PrismerLMForConditionalGeneration.from_backbones(
        bare, experts=EXPERTS, fusion="cross_attention", cross_attention_every=1, experts_config={"hidden_size": 32}
    ).eval()
    input_ids, images = prompts(model.config, 2), image_inputs(model.config, 2)
    assert torch.equal(model(input_ids=input_ids, **images).logits, bare(input_ids=input_ids).logits)
    padded = pad_left(input_ids, 2)
    assert torch.equal(model(**padded, **images).logits, bare(**padded).logits)


def test_names_of_the_language_model_stay():
    bare = tiny_language_model()
    names = {f"model.language_model.{name}" for name in bare.state_dict()}
    assert names <= set(shared_model().state_dict())


def test_the_base_model_returns_hidden_states():
    model = shared_model()
    inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
    states = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(states), model(**inputs).logits)


def test_a_placeholder_has_an_embedding_of_its_own():
    model = tiny_model(fusion="cross_attention")
    input_ids, images = prompts(model.config, 2, placeholders=True), image_inputs(model.config, 2)
    expected = model(input_ids=input_ids, **images).logits
    with torch.no_grad():
        model.model.image_embedding.weight.add_(1.0)
    assert (model(input_ids=input_ids, **images).logits - expected).abs().max() > 1e-3


# ---- vision encoders ----


TIMM = {
    "vit": ("vit_tiny_patch16_224", {"img_size": IMAGE_SIZE, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    "convnet": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
}


def timm_config(name) -> PreTrainedConfig:
    architecture, arguments = TIMM[name]
    return TimmWrapperConfig.from_dict(
        {"architecture": architecture, "model_args": arguments, "num_classes": 0, "do_pooling": False}
    )


@fusions
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_patch_of_every_encoder_is_a_feature(fusion, encoder):
    model = shared_model(fusion=fusion, vision=(encoder,))
    images = image_inputs(model.config, 2)
    features = model.get_image_features(**images)
    assert features.last_hidden_state.shape == (2, NUM_PATCHES, 32)
    assert features.pooler_output.shape == (2, NUM_PATCHES + NUM_LATENTS, 32)
    moved = images["pixel_values"].clone()
    moved[..., :PATCH_SIZE, :PATCH_SIZE] += 1  # the first patch
    change = (model.get_image_features(**images | {"pixel_values": moved}).last_hidden_state - features[0]).abs()
    assert change.amax(dim=(0, 2)).argmax() == 0
    labels = prompts(model.config, 2)
    assert model(input_ids=labels, labels=labels.clamp(max=99), **images).loss.isfinite()


@pytest.mark.parametrize("name", TIMM)
def test_timm_encoders(name):
    config = tiny_config(vision=())
    config = PrismerLMConfig(
        vision_config=[timm_config(name)],
        text_config=config.text_config,
        experts_config=config.experts_config,
        grid_size=2,
    )
    model = tiny_model(config)
    images = image_inputs(config, 2)
    channels = model.model.vision_encoders[0].timm_model.num_features
    features = model.get_image_features(**images).last_hidden_state
    assert features.shape == (2, 4, channels)
    side = 2 if name == "vit" else 1  # of a convolutional network with stride 32
    own = model.model.vision_encoders[0].timm_model.forward_features(images["pixel_values"])
    own = own[:, 1:] if name == "vit" else own.flatten(2).transpose(1, 2)
    assert own.shape[1] == side**2
    torch.testing.assert_close(features, own.expand(-1, 4, -1), **TOLERANCE)
    input_ids = prompts(config, 2)
    assert model.generate(input_ids, **images, max_new_tokens=2).shape[0] == 2


def test_features_of_encoders_are_joined_on_one_grid():
    fine = SiglipVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=IMAGE_SIZE,
        patch_size=8,
        vision_use_head=False,
    )
    config = tiny_config(vision=("clip", "dinov2"))
    config = PrismerLMConfig(
        vision_config=[*config.vision_config, fine],
        text_config=config.text_config,
        experts_config=config.experts_config,
    )
    model = tiny_model(config)
    images = image_inputs(config, 2)
    features = model.get_image_features(**images).last_hidden_state
    clip, dino, siglip = (
        patch_features(encoder, images[name])
        for encoder, name in zip(model.model.vision_encoders, ("pixel_values", "pixel_values_1", "pixel_values_2"))
    )
    assert siglip.shape[1] == 16 and features.shape == (2, NUM_PATCHES, 32 + 32 + 16)
    assert torch.equal(features[..., :64], torch.cat([clip, dino], dim=-1))
    pooled = siglip.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)  # bilinear from 4 x 4 to 2 x 2
    torch.testing.assert_close(features[..., 64:], pooled, **TOLERANCE)


@fusions
@pytest.mark.parametrize("has", ["experts", "encoder"])
def test_experts_or_encoders_alone(fusion, has):
    config = tiny_config(fusion=fusion, vision=()) if has == "experts" else tiny_config(fusion=fusion, experts=[])
    model = tiny_model(config)
    images = image_inputs(config, 2)
    number = NUM_LATENTS if has == "experts" else NUM_PATCHES
    assert model.get_image_features(**images).pooler_output.shape == (2, number, 32)
    assert model.generate(prompts(config, 2), **images, max_new_tokens=2).shape[0] == 2


def test_a_frozen_encoder_stays_in_evaluation_mode():
    model = shared_model().freeze_backbones()
    try:
        model.train()
        assert not any(encoder.training for encoder in model.model.vision_encoders)
        assert model.model.experts.training
        model.freeze_backbones(vision=False)
        assert all(encoder.training for encoder in model.model.vision_encoders)
    finally:
        model.requires_grad_(True).eval()


# ---- experts ----


@pytest.mark.parametrize("queries", [False, True])
@fusions
def test_a_missing_expert_leaves_no_trace(fusion, queries):
    model = shared_model(fusion=fusion, question_queries=queries)
    input_ids, images = prompts(model.config, 3), image_inputs(model.config, 3)
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    images["depth_values"][1:] = math.nan
    logits = model(input_ids=input_ids, **images, expert_mask=mask).logits
    assert logits.isfinite().all()
    for row, absent in enumerate(([], ["depth_values"], ["depth_values", SEGMENTATION])):
        alone = without(pick(images, [row]), *absent)
        expected = model(input_ids=input_ids[row : row + 1], **alone, expert_mask=mask[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], expected, **TOLERANCE)


def test_a_missing_expert_does_not_enter_the_statistics():
    batches = []
    for number in (2, 3):
        model = tiny_model().train()
        images = image_inputs(model.config, 3)
        mask = torch.tensor([[True, True], [True, True], [False, True]])
        if number == 3:
            images["depth_values"][2] = 1e6
        else:
            images["depth_values"] = images["depth_values"][[0, 1, 0]]
        model(input_ids=prompts(model.config, 3), **images, expert_mask=mask)
        batches.append(model.model.experts.expert_stems["depth"].norms[0].running_mean)
    assert torch.equal(*batches)


def test_without_strict_experts_what_is_not_given_is_missing():
    model = tiny_model(strict_experts=False)
    input_ids, images = prompts(model.config, 2), image_inputs(model.config, 2)
    mask = torch.tensor([[False, True]]).expand(2, -1)
    expected = model(input_ids=input_ids, **images, expert_mask=mask).logits
    given = model(input_ids=input_ids, **without(images, "depth_values")).logits
    torch.testing.assert_close(given, expected, **TOLERANCE)


def test_dense_features_in_place_of_ids():
    model = shared_model()
    stem = model.model.experts.expert_stems["segmentation"]
    input_ids, images = prompts(model.config, 2), image_inputs(model.config, 2)
    dense = stem.class_features[:-1][images[SEGMENTATION].long()].permute(0, 3, 1, 2)
    given = without(images, SEGMENTATION) | {"segmentation_values": dense}
    expected = model(input_ids=input_ids, **images).logits
    torch.testing.assert_close(model(input_ids=input_ids, **given).logits, expected, **TOLERANCE)


@fusions
def test_an_expert_is_added_and_its_stem_trained_alone(fusion):
    model = tiny_model(fusion=fusion)
    inputs = training_inputs(model.config)
    old = model(**inputs).logits
    stem = model.add_expert("edge", "dense", channels=1)
    assert model.config.experts_config.expert_names == ["depth", "segmentation", "edge"]
    mask = torch.tensor([[True, True, False]]).expand(2, -1)
    torch.testing.assert_close(model(**inputs, expert_mask=mask).logits, old, **TOLERANCE)

    model.requires_grad_(False)
    stem.requires_grad_(True)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if "expert_stems.edge" not in name}
    optimizer = torch.optim.Adam(stem.parameters(), lr=1e-2)
    inputs["edge_values"] = torch.rand(2, 1, IMAGE_SIZE, IMAGE_SIZE)
    losses = []
    for _ in range(4):
        losses.append(model(**inputs).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_the_first_expert_is_added_later():
    config = tiny_config()
    config = PrismerLMConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        experts_config={"hidden_size": 32, "num_latents": NUM_LATENTS, "image_size": IMAGE_SIZE},
    )
    model = tiny_model(config)
    assert model(input_ids=prompts(config, 2), **image_inputs(config, 2)).logits.isfinite().all()
    model.add_expert("depth", "dense", channels=1)
    assert config.image_seq_length == NUM_PATCHES + NUM_LATENTS
    assert model(input_ids=prompts(config, 2), **image_inputs(config, 2)).logits.isfinite().all()


def test_an_expert_cannot_be_added_to_a_model_without_stems():
    with pytest.raises(ValueError, match="no experts_config"):
        tiny_model(experts=[]).add_expert("depth", "dense", channels=1)


def test_class_features_are_set():
    model = tiny_model()
    inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
    old = model(**inputs).logits
    model.set_class_features("segmentation", torch.randn(3, 8), class_names=["sky", "tree", "road"])
    assert model.config.class_names == {"segmentation": ["sky", "tree", "road"]}
    assert not torch.equal(model(**inputs).logits, old)


# ---- gated blocks ----


def test_what_a_block_adds_grows_with_the_hidden_states():
    model = tiny_model(fusion="cross_attention")
    block = next(iter(model.model.cross_blocks.values()))
    with torch.no_grad():
        block.attn_gate.fill_(0.5)
        block.mlp_gate.fill_(-0.5)
    images = VisibleImages(torch.randn(2, 5, model.config.hidden_size))
    hidden_states = torch.randn(2, 3, model.config.hidden_size)
    expected = block(hidden_states, images)
    assert not torch.allclose(expected, hidden_states, atol=1e-2)
    torch.testing.assert_close(block(1000 * hidden_states, images) / 1000, expected, rtol=1e-3, atol=1e-4)


# ---- the question conditions the resampler ----


def question_model(gate: float, fusion: str = "prefix"):
    model = tiny_model(fusion=fusion, question_queries=True)
    with torch.no_grad():
        model.model.experts.question.gate.fill_(gate)
    return model


@fusions
def test_a_closed_gate_gives_the_plain_resampler(fusion):
    conditioned, plain = question_model(0.0, fusion), tiny_model(fusion=fusion)
    plain.load_state_dict(conditioned.state_dict(), strict=False)
    inputs = {"input_ids": prompts(plain.config, 4), **image_inputs(plain.config, 2)}
    torch.testing.assert_close(conditioned(**inputs).logits, plain(**inputs).logits, **TOLERANCE)


def test_the_gate_starts_closed():
    model = PrismerLMForConditionalGeneration(tiny_config(question_queries=True))
    assert model.model.experts.question.gate.item() == 0.0


@fusions
def test_an_open_gate_lets_the_question_in(fusion):
    model, config = question_model(1.0, fusion), tiny_config(fusion=fusion)
    images = image_inputs(config, 1)
    questions = prompts(config, 2)
    latents = [
        model(input_ids=question[None], **images).image_outputs.pooler_output[0, -NUM_LATENTS:]
        for question in questions
    ]
    assert (latents[0] - latents[1]).abs().max() > 1e-3
    together = model(input_ids=questions, **images)  # one encoding, conditioned by each question
    torch.testing.assert_close(
        together.image_outputs.pooler_output[:, -NUM_LATENTS:], torch.stack(latents), **TOLERANCE
    )


def test_answers_do_not_leak_into_the_question():
    model = question_model(1.0)
    inputs = training_inputs(model.config)
    answered = model(**inputs).image_outputs.pooler_output
    inputs["input_ids"] = torch.where(inputs["labels"] == -100, inputs["input_ids"], 7)
    inputs["labels"] = torch.where(inputs["labels"] == -100, -100, 7)
    assert torch.equal(model(**inputs).image_outputs.pooler_output, answered)


@fusions
def test_generation_conditions_once_and_ignores_padding(fusion):
    model = question_model(1.0, fusion)
    images, questions = image_inputs(model.config, 2), prompts(model.config, 4)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    calls = []
    model.model.experts.resampler.register_forward_hook(lambda *args: calls.append(1))
    cached = model.generate(questions, **images, **settings)
    assert len(calls) == 1
    assert torch.equal(cached, model.generate(questions, **images, **settings, use_cache=False))
    padded = model.generate(**pad_left(questions, 3), **images, **settings)
    assert torch.equal(padded[:, 3:], cached)
    images = repeat(images, 2)
    alone = [model.generate(questions[row : row + 1], **pick(images, [row]), **settings) for row in range(4)]
    assert torch.equal(torch.cat(alone), cached)


def test_packed_questions_cannot_condition_the_resampler():
    model = question_model(1.0)
    input_ids = prompts(model.config, 1)
    mask = torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="rows cannot be packed"):
        model(input_ids=input_ids, attention_mask=mask, **image_inputs(model.config, 1))


# ---- ranking ----


CANDIDATES = torch.tensor([[5, 6, 2], [7, 2, 0], [5, 9, 2], [8, 9, 2]])
CANDIDATE_MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])


@torch.no_grad()
def brute_force(model, prompt, candidate, **images):
    """The mean log-probability of a candidate after a prompt."""
    ids = torch.cat([prompt, candidate])[None]
    log_probs = model(input_ids=ids, **images).logits[0].log_softmax(dim=-1)
    start = len(prompt) - 1
    return log_probs[start : start + len(candidate)].gather(1, candidate[:, None]).mean()


@fusions
@families
def test_ranking_scores_are_those_of_whole_rows(language, fusion):
    model = shared_model(language, fusion)
    images, questions = image_inputs(model.config, 2), prompts(model.config, 4)
    given = {"attention_mask": torch.ones_like(questions), **images}
    ranking = model.rank_candidates(CANDIDATES, CANDIDATE_MASK, 4, input_ids=questions, **given, chunk_size=4)
    for row in range(4):
        for score, index in zip(ranking.scores[row], ranking.indices[row]):
            candidate = CANDIDATES[index][CANDIDATE_MASK[index].bool()]
            expected = brute_force(model, questions[row], candidate, **pick(images, [row // 2]))
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)
    padded = model.rank_candidates(CANDIDATES, CANDIDATE_MASK, 4, **pad_left(questions, 3), **images)
    torch.testing.assert_close(padded.scores, ranking.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(padded.indices, ranking.indices)


@fusions
def test_ranking_with_several_images_and_question_queries(fusion):
    for model in (shared_model(fusion=fusion), question_model(1.0, fusion)):
        questions, images = prompts(model.config, 2, images=2), image_inputs(model.config, 4)
        ranking = model.rank_candidates(
            CANDIDATES, CANDIDATE_MASK, 2, questions, attention_mask=torch.ones_like(questions), **images
        )
        assert ranking.scores.shape == (2, 2)
        if model.config.question_queries:
            continue  # a whole row would let the answer into the question
        for row in range(2):
            index = ranking.indices[row, 0]
            candidate = CANDIDATES[index][CANDIDATE_MASK[index].bool()]
            expected = brute_force(model, questions[row], candidate, **pick(images, [2 * row, 2 * row + 1]))
            torch.testing.assert_close(ranking.scores[row, 0], expected, atol=1e-4, rtol=1e-4)


@fusions
def test_ranking_without_a_mask_takes_padding_from_the_ids(fusion):
    model = shared_model(fusion=fusion)
    questions, images = prompts(model.config, 2), image_inputs(model.config, 2)
    mask = torch.ones_like(questions)
    expected = model.rank_candidates(CANDIDATES, CANDIDATE_MASK, 2, questions, attention_mask=mask, **images)
    padded = torch.cat([torch.zeros_like(questions[:, :2]), questions], dim=1)
    found = model.rank_candidates(CANDIDATES, CANDIDATE_MASK, 2, padded, **images)
    torch.testing.assert_close(found.scores, expected.scores, **TOLERANCE)


# ---- language models that do not fit ----


def test_layers_that_images_do_not_reach_are_an_error():
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    falcon = FalconConfig(**sizes)
    model = tiny_model(language=falcon, fusion="cross_attention")
    with pytest.raises(ValueError, match="FalconForCausalLM does not hand arguments on to its layers"):
        model(input_ids=prompts(model.config, 1), **image_inputs(model.config, 1))
    model = tiny_model(language=falcon)
    logits = [
        model(input_ids=prompts(model.config, 1), **image_inputs(model.config, 1, seed)).logits for seed in (0, 1)
    ]
    assert (logits[0][:, -1] - logits[1][:, -1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "language, fusion, message",
    [
        ("llama", "cross_attention", "cross_attention_every is 3, but the language model has 2 layers"),
        (
            OPTConfig(vocab_size=100, hidden_size=32, word_embed_proj_dim=16, num_attention_heads=2),
            "prefix",
            "OPTForCausalLM has word embeddings of width 16 and layers of width 32",
        ),
        (
            Gemma3nTextConfig(
                **{"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": [32, 32]},
                **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_kv_shared_layers": 0},
                **{"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
                **{"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]},
            ),
            "prefix",
            "Gemma3nForCausalLM reads the ids of its text in every layer",
        ),
    ],
    ids=["layers", "widths", "ids"],
)
def test_language_models_that_cannot_take_features_are_named(language, fusion, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(language=language, fusion=fusion, cross_attention_every=3)


# ---- errors ----


@fusions
def test_placeholders_without_images_are_named(fusion):
    model = tiny_model(fusion=fusion)
    prompt = prompts(model.config, 2, placeholders=True)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"placeholders of images, but neither images nor encoder_outputs"):
            call(input_ids=prompt)
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


def test_placeholders_of_the_vocabulary_without_images_are_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_model(image_token_id=50)
    model(input_ids=torch.tensor([[3, 4, 50]]))  # a word
    assert "placeholders" not in caplog.text
    model(input_ids=prompts(model.config, 2))
    assert "14 placeholders of images, but neither images nor encoder_outputs are given" in caplog.text


def test_prompts_that_do_not_fit_the_images_are_named():
    model = shared_model()
    length = model.config.image_seq_length
    input_ids, images = prompts(model.config, 2), image_inputs(model.config, 3)
    with pytest.raises(ValueError, match="2 images; 3 images are given|do not fit"):
        model(input_ids=input_ids, **images)
    with pytest.raises(ValueError, match=f"placeholders of images; each image needs {length}"):
        model(input_ids=input_ids[:, 1:], **pick(images, [0, 1]))
    with pytest.raises(ValueError, match="placeholders for 4 images; 1 images are given"):
        model(input_ids=prompts(model.config, 1, images=4), **pick(images, [0]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel_values": None}, "pixel_values missing; the model has 1 vision encoders"),
        ({"depth_values": None}, "experts depth are neither given nor masked out"),
        ({"depth_values": torch.rand(2, 3, 32, 32)}, r"depth_values has the shape \(2, 3, 32, 32\)"),
        ({"depth_values": torch.rand(1, 1, 32, 32)}, "depth_values has 1 rows for 2 images"),
        ({"expert_mask": torch.ones(3, 2, dtype=torch.bool)}, "expert_mask has 3 rows for 2 images"),
        ({"input_ids": torch.full((2, 12), 100)}, "each image needs 7"),
        ({"encoder_outputs": "images"}, "or encoder_outputs, not both"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_inputs_are_named(change, message):
    model = shared_model()
    inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)} | change
    with pytest.raises(ValueError, match=message):
        model(**{name: value for name, value in inputs.items() if value is not None})


def test_a_token_beyond_the_vocabulary_is_named():
    model = shared_model()
    input_ids = prompts(model.config, 1)
    input_ids[0, -1] = 200
    with pytest.raises(ValueError, match="input_ids has values from 1 to 200; 0 to 99 is accepted"):
        model(input_ids=input_ids, **image_inputs(model.config, 1))


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fusion": "late"}, "fusion='late'; accepted are 'prefix', 'cross_attention'"),
        ({"experts_as": "images"}, "experts_as='images'; accepted are 'tokens', 'words', 'both'"),
        ({"cross_attention_every": 0}, "cross_attention_every=0; at least 1 is needed"),
        ({"feature_scale": 0.0}, "feature_scale=0.0; a positive number is needed"),
        ({"image_token_id": -1}, "image_token_id=-1"),
        ({"question_queries": True}, "question_queries=True needs experts_config"),
        ({"vision_config": [{"hidden_size": 32}]}, "a configuration of transformers is needed"),
        ({"vision_config": [timm_config("vit")]}, "grid_size is missing"),
        ({"text_config": LlavaConfig(), "vision_config": [SiglipVisionConfig()]}, "vision_config must be empty"),
        (
            {"vision_config": [PrismerVisionConfig(), SiglipVisionConfig()]},
            "neither experts_config nor another encoder",
        ),
        ({"experts_config": {"experts": EXPERTS, "hidden_size": 30}}, "hidden_size=30; at least 8 and a multiple"),
        ({"experts_config": {"image_size": 8}}, "image_size=8 is smaller than patch_size=16"),
        ({"experts_config": {"experts": [*EXPERTS, EXPERTS[0]]}}, "depth"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        PrismerLMConfig(**{"text_config": LLAMA} | fields)


def test_configuration_survives_its_file(tmp_path):
    config = tiny_config(vision=("clip", "dinov3"), fusion="cross_attention", question_queries=True, feature_scale=0.5)
    config.save_pretrained(tmp_path)
    loaded = PrismerLMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert [type(encoder) for encoder in loaded.vision_config] == [type(encoder) for encoder in config.vision_config]
    assert loaded.vocab_size == 100 and isinstance(loaded.text_config, LlamaConfig)


def test_attention_implementation_reaches_all_parts():
    model = tiny_model(fusion="cross_attention", vision=("clip", "siglip"))
    inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs} == {"eager"}
    torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)
