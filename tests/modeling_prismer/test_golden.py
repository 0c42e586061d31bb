"""The network gives what the reference network was recorded to give, in float32 on the CPU."""

import pytest
import torch

from modeling_prismer.conversion.original_names import original_names

from .tiny import without


RECORDINGS = [
    ("tiny_prismer", "ids"),
    ("tiny_prismer", "painted"),
    ("tiny_prismerz", "no experts"),
    ("tiny_patch14", "ids"),
    ("tiny_patch14", "painted"),
]
EXPERTS_RECORDED = [
    *(("tiny_prismer", name) for name in ("depth", "normal", "segmentation", "edge", "detection", "ocr")),
    *(("tiny_patch14", name) for name in ("depth", "segmentation", "ocr")),
]
BEAMS = {
    "greedy_max20": {"max_length": 20},
    "caption_beam3_max20_min8": {"num_beams": 3, "max_length": 20, "min_length": 8},
    "vqa_beam3_lenpen-1_max+10_min+2": {"num_beams": 3, "max_length": 13, "min_length": 5, "length_penalty": -1.0},
}


@pytest.fixture(params=RECORDINGS, ids=[f"{name}-{kind}" for name, kind in RECORDINGS])
def recording(request, load_recording):
    """(what the reference gave, our inputs)"""
    name, kind = request.param
    golden = load_recording(name)
    return golden, golden.images(painted=kind == "painted")


def assert_same(actual, expected, what=""):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5, msg=lambda message: f"{what}: {message}")


@torch.no_grad()
def test_every_stem_and_the_resampler(recording):
    golden, images = recording
    model = golden.model()
    vision, seen = model.model.vision_model, {}

    def remember(name):
        return lambda module, args, output: seen.update({name: output})

    vision.embeddings.patch_embedding.register_forward_hook(remember("stem_rgb"))
    for name, stem in vision.expert_stems.items():  # its last convolution comes before the instance embedding
        stem.projection.register_forward_hook(remember(f"stem_{golden.original(name)}"))
    if vision.resampler is not None:
        vision.resampler.register_forward_hook(remember("resampler"))
    model.get_image_features(**images)

    recorded = {name for name in golden.expected if name.startswith("stem_") or name == "resampler"}
    assert set(seen) == recorded
    for name in recorded:
        assert_same(seen[name], golden.expected[name], name)


@torch.no_grad()
def test_encoder(recording):
    golden, images = recording
    features = golden.model().get_image_features(**images)
    assert_same(features.last_hidden_state, golden.expected["encoder_last_hidden_state"])
    assert features.pooler_output is features.last_hidden_state


@pytest.mark.parametrize("painted", [False, True], ids=["ids", "painted"])
@pytest.mark.parametrize("name, expert", EXPERTS_RECORDED)
@torch.no_grad()
def test_encoder_without_an_expert(load_recording, name, expert, painted):
    golden = load_recording(name)
    model, images = golden.model(), golden.images(painted)
    expected = golden.expected[f"encoder_without_{golden.original(expert)}"]

    mask = torch.tensor([[other != expert for other in golden.config.expert_names]]).repeat(3, 1)
    padded = {
        key: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0)
        if key.startswith(f"{expert}_")
        else tensor
        for key, tensor in images.items()
    }
    assert_same(model.get_image_features(**padded, expert_mask=mask).last_hidden_state, expected, "masked out")
    assert_same(
        model.get_image_features(**without(images, expert), expert_mask=mask).last_hidden_state, expected, "mask alone"
    )
    model.config.strict_experts = False
    assert_same(model.get_image_features(**without(images, expert)).last_hidden_state, expected, "left out")


@torch.no_grad()
def test_logits_and_losses(recording):
    golden, images = recording
    outputs = golden.model()(**golden.text, **images)
    shown = golden.text["attention_mask"].bool()
    assert_same(outputs.logits[shown], golden.expected["logits"][shown])
    expected = golden.expected["loss_per_sample"]
    torch.testing.assert_close(outputs.loss_per_sample, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.loss, expected.mean(), atol=1e-4, rtol=0)


def test_loss_and_gradients_of_a_training_step(recording):
    golden, images = recording
    model = golden.model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    loss = model(**golden.text, **images).loss
    torch.testing.assert_close(loss[None], golden.expected["train_loss"], atol=1e-4, rtol=0)
    loss.backward()

    sources = original_names(golden.config)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients.setdefault(sources[name].name, []).append(parameter.grad.flatten())
    norms = {name: torch.cat(parts).norm().item() for name, parts in gradients.items()}
    assert norms == pytest.approx(golden.recorded["train_grad_norm"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("search", BEAMS)
def test_generated_ids(recording, search, use_cache):
    golden, images = recording
    generated = golden.model().generate(
        input_ids=golden.inputs["prompt_ids"], do_sample=False, use_cache=use_cache, **BEAMS[search], **images
    )
    pad = golden.config.pad_token_id
    assert [[token for token in row if token != pad] for row in generated.tolist()] == [
        [token for token in row if token != pad] for row in golden.recorded[search]
    ]


def rank(golden, images, rows=slice(None), length=None, **kwargs):
    inputs = {
        "input_ids": golden.inputs["rank_question_ids"][rows, :length],
        "attention_mask": golden.inputs["rank_question_mask"][rows, :length],
        **{key: tensor[rows] for key, tensor in images.items()},
        **kwargs,
    }
    return golden.model().rank_candidates(
        golden.inputs["rank_answer_ids"], golden.inputs["rank_answer_mask"], golden.recorded["rank_k"], **inputs
    )


def by_candidate(ranking, row):
    return dict(zip(ranking.indices[row].tolist(), ranking.scores[row].tolist()))


@pytest.mark.parametrize("row", [0, 2])  # the reference's result for row 1, which is padded, depends on the others
def test_ranking(recording, row):
    golden, images = recording
    ranking = rank(golden, images)
    expected = {int(index): score for index, score in golden.recorded["rank_log_prob_by_answer"][row].items()}
    assert by_candidate(ranking, row) == pytest.approx(expected, abs=1e-4)
    assert ranking.indices[row, 0] == golden.recorded["rank_best_answer_index"][row]
    assert ranking.scores[row].tolist() == sorted(ranking.scores[row].tolist(), reverse=True)


@pytest.mark.parametrize("row", [0, 2])
@torch.no_grad()
def test_probability_of_each_candidates_first_token(recording, row):
    golden, images = recording
    logits = golden.model()(
        input_ids=golden.inputs["rank_question_ids"],
        attention_mask=golden.inputs["rank_question_mask"],
        logits_to_keep=1,
        **images,
    ).logits
    probabilities = logits[row, -1].softmax(dim=-1)[golden.inputs["rank_answer_ids"][:, 0]]
    assert_same(probabilities, golden.expected["rank_first_token_prob"][row])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_ranking(recording, side):
    golden, images = recording
    ids, mask = golden.inputs["rank_question_ids"], golden.inputs["rank_question_mask"]
    length = int(mask[1].sum())
    assert length < ids.shape[1] and not mask[1, length:].any()  # recorded with padding on the right
    alone = rank(golden, images, rows=slice(1, 2), length=length)
    if side == "left":
        padding = ids.shape[1] - length
        ids, mask = ids.clone(), mask.clone()
        ids[1], mask[1] = ids[1].roll(padding), mask[1].roll(padding)
    together = rank(golden, images, input_ids=ids, attention_mask=mask)
    assert by_candidate(together, 1) == pytest.approx(by_candidate(alone, 0), abs=2e-5)


@pytest.mark.parametrize(
    "frozen, vision, language",
    [
        ("none", False, False),
        ("freeze_lang", False, True),
        ("freeze_vision", True, False),
        ("freeze_lang_vision", True, True),
    ],
)
@pytest.mark.parametrize("name", ["tiny_prismer", "tiny_prismerz", "tiny_patch14"])
def test_each_frozen_set_trains_its_weights(load_recording, name, frozen, vision, language):
    golden = load_recording(name)
    model, sources = golden.model(), original_names(golden.config)
    model.freeze_backbones(vision=vision, language=language)
    trainable = {sources[name].name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(golden.recorded["trainable_parameters"][frozen])
