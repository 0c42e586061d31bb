"""`rank_candidates`: the scores by their definition, chunks, batches, memory, errors."""

import pytest
import torch

from modeling_prismer.loss import sample_losses

from .largest_tensor import LargestTensor
from .tiny import TOLERANCE, VOCAB_SIZE, image_inputs, pick, prompts, tiny_config, tiny_model


PAD, EOS = 1, 2


def candidates(number: int, longest: int = 4, seed: int = 3):
    """Answers of one to `longest` words and `</s>`, padded on the right; many begin with the same word."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB_SIZE, (number, longest + 1), generator=generator)
    ids[:, 0] = ids[:, 0] // 6 + 4
    lengths = torch.randint(1, longest + 1, (number,), generator=generator)
    places = torch.arange(longest + 1)
    ids = torch.where(places == lengths[:, None], EOS, ids)
    mask = (places <= lengths[:, None]).long()
    return torch.where(mask.bool(), ids, PAD), mask


def by_candidate(ranking):
    return [dict(zip(indices, scores)) for indices, scores in zip(ranking.indices.tolist(), ranking.scores.tolist())]


def assert_same_ranking(actual, expected):
    for one, other in zip(by_candidate(actual), by_candidate(expected), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


@torch.no_grad()
def score(model, candidate_ids, candidate_mask, input_ids, images):
    """The definition: each candidate after the prompt, the loss over its tokens alone, the mean negated."""
    scores = []
    for ids, mask in zip(candidate_ids, candidate_mask.bool()):
        text = torch.cat([input_ids, ids[mask].expand(len(input_ids), -1)], dim=1)
        labels = text.clone()
        labels[:, : input_ids.shape[1]] = -100
        scores.append(-model(input_ids=text, labels=labels, **images).loss_per_sample / mask.sum())
    return torch.stack(scores, dim=1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_are_mean_log_probabilities(label_smoothing, attention):
    model = tiny_model(tiny_config(label_smoothing=label_smoothing))
    model.set_attn_implementation(attention)
    ids, mask = candidates(9)
    images = image_inputs()
    expected = score(model, ids, mask, prompts(), images)
    ranking = model.rank_candidates(ids, mask, 9, input_ids=prompts(), **images)
    torch.testing.assert_close(ranking.scores, expected.gather(1, ranking.indices), **TOLERANCE)
    torch.testing.assert_close(ranking.scores, expected.sort(dim=1, descending=True).values, **TOLERANCE)


def test_the_k_most_probable_first_tokens_are_scored():
    model = tiny_model()
    ids, mask = candidates(30)
    ids[:, 0] = torch.arange(10, 40)  # unlike first words
    images = image_inputs()
    with torch.no_grad():
        first = model(input_ids=prompts(), **images).logits[:, -1, ids[:, 0]]
    expected = first.topk(5, dim=1).indices.sort(dim=1).values
    ranking = model.rank_candidates(ids, mask, 5, input_ids=prompts(), **images)
    assert torch.equal(ranking.indices.sort(dim=1).values, expected)
    assert (ranking.scores.diff(dim=1) <= 0).all()


def test_equal_first_tokens_keep_their_order(model):
    ids, mask = candidates(40)
    ids[:, 0] = 9
    ranking = model.rank_candidates(ids, mask, 7, input_ids=prompts(), **image_inputs())
    assert ranking.indices.sort(dim=1).values.tolist() == [list(range(7))] * 3


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 16, 1000])
def test_chunks_change_nothing(model, chunk_size):
    ids, mask = candidates(25)
    inputs = {"input_ids": prompts(), **image_inputs()}
    expected = model.rank_candidates(ids, mask, 20, **inputs)
    assert_same_ranking(model.rank_candidates(ids, mask, 20, chunk_size=chunk_size, **inputs), expected)


def test_more_than_there_are_is_all(model):
    ids, mask = candidates(6)
    ranking = model.rank_candidates(ids, mask, 50, input_ids=prompts(), **image_inputs())
    assert ranking.indices.sort(dim=1).values.tolist() == [list(range(6))] * 3


def test_one_candidate_of_one_token(model):
    ids, mask = torch.tensor([[EOS]]), torch.tensor([[1]])
    ranking = model.rank_candidates(ids, mask, 1, input_ids=prompts(), **image_inputs())
    expected = score(model, ids, mask, prompts(), image_inputs())
    torch.testing.assert_close(ranking.scores, expected, **TOLERANCE)


def test_padding_of_the_candidates_changes_nothing(model):
    ids, mask = candidates(12)
    inputs = {"input_ids": prompts(), **image_inputs()}
    expected = model.rank_candidates(ids, mask, 12, **inputs)
    padding = torch.full((12, 5), 17)
    wider = model.rank_candidates(torch.cat([ids, padding], 1), torch.cat([mask, padding * 0], 1).bool(), 12, **inputs)
    assert_same_ranking(wider, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_given", [True, False], ids=["mask given", "mask inferred"])
def test_a_result_does_not_depend_on_the_batch(model, side, mask_given, attention):
    model.set_attn_implementation(attention)
    ids, mask = candidates(40)
    images, questions, lengths = image_inputs(4), prompts(4, length=6), [6, 3, 5, 1]
    padded = torch.full_like(questions, PAD)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(6 - length, None)
        padded[row, place] = questions[row, :length]
    attention_mask = (padded != PAD).long() if mask_given else None
    together = model.rank_candidates(ids, mask, 8, input_ids=padded, attention_mask=attention_mask, **images)
    for row, length in enumerate(lengths):
        alone = model.rank_candidates(ids, mask, 8, input_ids=questions[row : row + 1, :length], **pick(images, [row]))
        assert by_candidate(together)[row] == pytest.approx(by_candidate(alone)[0], abs=2e-5)


def test_several_questions_about_one_image(model):
    ids, mask = candidates(20)
    images, questions = image_inputs(2), prompts(6)
    together = model.rank_candidates(ids, mask, 10, input_ids=questions, **images)
    repeated = {key: tensor.repeat_interleave(3, dim=0) for key, tensor in images.items()}
    assert_same_ranking(together, model.rank_candidates(ids, mask, 10, input_ids=questions, **repeated))


def test_images_encoded_before_can_be_used_again(model):
    ids, mask = candidates(20)
    expected = model.rank_candidates(ids, mask, 10, input_ids=prompts(), **image_inputs())
    with torch.no_grad():
        encoded = model.get_image_features(**image_inputs())
    again = model.rank_candidates(ids, mask, 10, input_ids=prompts(), encoder_outputs=encoded)
    assert_same_ranking(again, expected)


def test_missing_experts(model):
    ids, mask = candidates(20)
    expert_mask = torch.tensor([[True] * 6, [False] * 6, [True, False] * 3])
    images = image_inputs()
    together = model.rank_candidates(ids, mask, 10, input_ids=prompts(), expert_mask=expert_mask, **images)
    alone = model.rank_candidates(
        ids, mask, 10, input_ids=prompts()[1:2], expert_mask=expert_mask[1:2], **pick(images, [1])
    )
    assert by_candidate(together)[1] == pytest.approx(by_candidate(alone)[0], abs=2e-5)


def test_the_prompt_and_the_image_are_run_once(model):
    ids, mask = candidates(40)
    lengths, images = [], []
    model.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.model.vision_model.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    projected = []
    model.model.text_model.layers[0].cross_attn.k_proj.register_forward_pre_hook(
        lambda module, args: projected.append(len(args[0]))
    )
    model.rank_candidates(ids, mask, 30, input_ids=prompts(), chunk_size=12, **image_inputs())
    assert images == projected == [3]
    assert lengths[0] == (3, 5)
    assert [rows for rows, _ in lengths[1:]] == [12] * 7 + [6]
    assert all(length <= 4 for _, length in lengths[1:])  # the candidates without their last token, not the prompt


def test_memory_depends_on_the_chunk_only():
    model = tiny_model(experts=[])
    images = image_inputs(1, experts=[])
    largest = {}
    for number in (300, 3000):
        ids, mask = candidates(number)
        with LargestTensor() as seen:
            ranking = model.rank_candidates(ids, mask, number, input_ids=prompts(1), chunk_size=100, **images)
        largest[number] = seen.largest
        assert ranking.indices.sort(dim=1).values.tolist() == [list(range(number))]
    assert largest[300] == largest[3000]
    some = slice(1000, 1007)
    expected = score(model, ids[some], mask[some], prompts(1), images)
    found = dict(zip(ranking.indices[0].tolist(), ranking.scores[0]))
    torch.testing.assert_close(torch.stack([found[i] for i in range(1000, 1007)])[None], expected, **TOLERANCE)


def test_it_takes_no_gradients(model):
    ids, mask = candidates(5)
    assert not model.rank_candidates(ids, mask, 5, input_ids=prompts(), **image_inputs()).scores.requires_grad


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 0}, "k=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"candidate_mask": torch.ones(6, 4)}, r"candidate_ids \(6, 5\) and candidate_mask \(6, 4\)"),
        ({"candidate_mask": torch.zeros(6, 5)}, "no candidate empty"),
        ({"candidate_mask": torch.tensor([[0, 1, 1, 1, 1]] * 6)}, "padded on the right"),
        ({"candidate_mask": torch.tensor([[1, 0, 1, 1, 1]] * 6)}, "padded on the right"),
        ({"candidate_ids": torch.ones(6), "candidate_mask": torch.ones(6)}, "num_candidates, length"),
        ({"candidate_ids": torch.ones(0, 3), "candidate_mask": torch.ones(0, 3)}, "at least one"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5, [1] * 5])}, "all padding"),
    ],
)
def test_bad_inputs_are_refused(model, changes, message):
    ids, mask = candidates(6)
    call = {"candidate_ids": ids, "candidate_mask": mask, "k": 3, "input_ids": prompts(), **image_inputs()}
    with pytest.raises(ValueError, match=message):
        model.rank_candidates(**(call | changes))


def test_the_loss_of_a_sample_is_the_sum_over_its_tokens():
    logits = torch.randn(2, 3, 7)
    labels = torch.tensor([[1, -100, 4], [-100, -100, -100]])
    log_probs = logits.log_softmax(dim=-1)
    expected = -(log_probs[0, 0, 1] + log_probs[0, 2, 4]) * 0.9 - 0.1 * log_probs[0, [0, 2]].mean(dim=-1).sum()
    torch.testing.assert_close(sample_losses(logits, labels, 0.1), torch.stack([expected, torch.tensor(0.0)]))
