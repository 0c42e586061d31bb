"""Half precision on the CPU, however a model came to it: what is in which type, and what it then says."""

import pytest
import torch

from modeling_prismer import PrismerForConditionalGeneration

from .tiny import image_inputs, pick, prompts, tiny_model, training_inputs, without


DTYPES = [torch.bfloat16, torch.float16]
CANDIDATES = {
    "candidate_ids": torch.tensor([[9, 2, 1], [9, 8, 2], [11, 2, 1], [30, 31, 2]]),
    "candidate_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]]),
}
MASK = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


def by_the_saved_type(folder, dtype):
    tiny_model().to(dtype).save_pretrained(folder / str(dtype))
    return PrismerForConditionalGeneration.from_pretrained(folder / str(dtype), dtype="auto")


WAYS = {
    "from_pretrained": lambda folder, dtype: PrismerForConditionalGeneration.from_pretrained(folder, dtype=dtype),
    "by_name": lambda folder, dtype: PrismerForConditionalGeneration.from_pretrained(
        folder, dtype=str(dtype).removeprefix("torch.")
    ),
    "auto": by_the_saved_type,
    "to": lambda folder, dtype: tiny_model().to(dtype),
    "method": lambda folder, dtype: tiny_model().half() if dtype == torch.float16 else tiny_model().bfloat16(),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ways_to_half_precision_give_the_same_model(folder, dtype):
    inputs = {"input_ids": prompts(), **image_inputs()}
    models = {name: way(folder, dtype).eval() for name, way in WAYS.items()}
    expected = models["to"](**inputs).logits
    for name, model in models.items():
        assert model.dtype == dtype, name
        assert torch.equal(model(**inputs).logits, expected), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_and_statistic_has_the_type(folder, way, dtype):
    state = WAYS[way](folder, dtype).state_dict()
    other = {name for name, tensor in state.items() if tensor.dtype != dtype}
    assert {name.rpartition(".")[2] for name in other} == {"num_batches_tracked"}
    assert any(name.endswith("running_var") for name in state) and any("class_features" in name for name in state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_ranking_scores_in_full_precision(dtype):
    inputs = {**CANDIDATES, "k": 4, "input_ids": prompts(), **image_inputs()}
    expected, given = tiny_model().rank_candidates(**inputs), tiny_model().to(dtype).rank_candidates(**inputs)
    assert given.scores.dtype == torch.float32
    torch.testing.assert_close(given.scores, expected.scores, atol=0.1 if dtype == torch.bfloat16 else 0.01, rtol=0)
    assert torch.equal(given.indices, expected.indices)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_masked_expert_leaves_no_trace(dtype):
    model, images = tiny_model().to(dtype), image_inputs()
    images["edge_values"][1] = float("nan")
    encoded = model.get_image_features(**images, expert_mask=MASK).last_hidden_state
    assert encoded.dtype == dtype and encoded.isfinite().all()
    gone = [name for name, has in zip(model.config.expert_names, MASK[1]) if not has]
    alone = model.get_image_features(**without(pick(images, [1]), *gone), expert_mask=MASK[1:2]).last_hidden_state
    assert (encoded[1:2] - alone).abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_generation_takes_inputs_of_either_type(dtype):
    model, images = tiny_model().to(dtype), image_inputs()
    cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in images.items()}
    search = {"input_ids": prompts(), "expert_mask": MASK, "num_beams": 2, "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(model.generate(**images, **search), model.generate(**cast, **search))


def test_autocast_updates_statistics_in_full_precision():
    model = tiny_model().train()
    before = model.model.vision_model.expert_stems["depth"].norms[0].running_mean.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**training_inputs())
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    after = model.model.vision_model.expert_stems["depth"].norms[0].running_mean
    assert after.dtype == torch.float32 and not torch.equal(after, before)
