"""The losses of a distillation: tokens, maps, decorrelation, and which samples learn from which expert."""

import copy

import pytest
import torch
from torch.nn import functional as F

from modeling_prismer.expert_spec import ExpertSpec
from modeling_prismer.imitation_loss import (
    decorrelation,
    fit_teachers,
    freeze_teachers,
    imitation_loss,
    map_losses,
    map_target,
    teacher_tokens,
    token_losses,
)

from .test_imitation import IMITATED, IMITATION
from .tiny import TOLERANCE, image_inputs, tiny_model


@pytest.fixture(scope="module")
def imitating():
    model = tiny_model(imitation=IMITATION)
    freeze_teachers(model.model.vision_model)
    return model


def stem_inputs(names=IMITATED, **kwargs):
    """The tensors of the teachers, by expert and suffix."""
    inputs: dict = {name: {} for name in names}
    for key, tensor in image_inputs(**kwargs).items():
        name, _, suffix = key.rpartition("_")
        if name in inputs:
            inputs[name][suffix] = tensor
    return inputs


def loss_of(model, teachers, present=None, rows=slice(None)):
    network, pixels = model.model.vision_model, image_inputs()["pixel_values"][rows]
    imitated = network.imitate(network.embeddings(pixels))
    return imitation_loss(network, model.config.expert_specs, imitated, teachers, present)


# ---- tokens


def test_token_loss_is_the_formula_of_prism():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 2, 5, 8, generator=generator)
    expected = [
        0.9 * (1 - F.cosine_similarity(p, t, dim=-1).mean()) + 0.1 * F.smooth_l1_loss(p, t)
        for p, t in zip(predicted, target)
    ]
    torch.testing.assert_close(token_losses(predicted, target), torch.stack(expected))
    assert token_losses(target, target).abs().max() < 1e-6


@torch.no_grad()
def test_heads_predict_in_the_units_of_their_experts(imitating):
    model = copy.deepcopy(imitating)
    network, teachers = model.model.vision_model, stem_inputs()
    mask = torch.tensor([True, False, True])
    fit_teachers(network, [(teachers, {name: row for name in IMITATED}) for row in (mask, ~mask)])
    for name, tokens in teacher_tokens(network, teachers).items():
        head = network.imitation.heads[name]
        torch.testing.assert_close(head.token_mean, tokens.mean(dim=(0, 1)), **TOLERANCE)
        units = head.normalize(tokens)
        torch.testing.assert_close(units.mean(dim=(0, 1)), torch.zeros(32), atol=1e-5, rtol=0)
        torch.testing.assert_close(units.pow(2).mean(), torch.ones(()))
        states = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
        expected = head.fc2(head.activation(head.fc1(head.layer_norm(states))))
        torch.testing.assert_close(head.normalize(head(states)[0]), expected, atol=1e-4, rtol=1e-4)
        expected = head.level_proj[0](head.layer_norm(states))
        torch.testing.assert_close(head.normalize(head.level_tokens(0, states)), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no sample has the expert 'depth'"):
        fit_teachers(network, [(teachers, {name: mask & ~mask for name in IMITATED})])


@torch.no_grad()
def test_teachers_are_the_stems_in_evaluation(imitating):
    network, teachers = imitating.model.vision_model, stem_inputs()
    expected = {name: network.expert_stems[name](**own).flatten(2).transpose(1, 2) for name, own in teachers.items()}
    network.train()  # rows of instances would be random
    try:
        for _ in range(2):
            for name, tokens in teacher_tokens(network, teachers, side=4).items():
                torch.testing.assert_close(tokens, expected[name])
        assert teacher_tokens(network, teachers, side=2)["depth"].shape == (3, 4, 32)
    finally:
        network.eval()


def test_trained_stem_is_no_teacher(imitating):
    network = copy.deepcopy(imitating.model.vision_model)
    network.expert_stems["depth"].requires_grad_(True)
    network.train()
    with pytest.raises(ValueError, match="stem of the teacher 'depth' is trained"):
        teacher_tokens(network, stem_inputs(), side=4)
    freeze_teachers(network)
    network.train()
    assert teacher_tokens(network, stem_inputs(), side=4).keys() == set(IMITATED)


# ---- maps


def test_classes_of_pixels_with_the_background_last():
    spec = ExpertSpec("segmentation", "label", channels=8, num_classes=10)
    ids = torch.tensor([[[0, 9], [10, 255]]], dtype=torch.uint8)
    assert map_target(spec, {"ids": ids}, side=2).tolist() == [[[0, 9], [10, 10]]]
    large = ids.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    assert map_target(spec, {"ids": large}, side=2).tolist() == [[[0, 9], [10, 10]]]


def test_classes_of_instances():
    spec = ExpertSpec("detection", "label", channels=8, num_classes=12, instances=True)
    ids = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8)
    classes = torch.tensor([[7, 40]])  # the second is none of the 12; a third one has no class
    assert map_target(spec, {"ids": ids, "classes": classes}, side=2).tolist() == [[[7, 12], [12, 12]]]


def test_words_are_text_or_background():
    spec = ExpertSpec("ocr", "label", channels=8)
    ids = torch.tensor([[[0, 3], [255, 255]]], dtype=torch.uint8)
    assert map_target(spec, {"ids": ids, "features": torch.zeros(1, 4, 8)}, side=2).tolist() == [[[0, 0], [1, 1]]]


def test_values_are_reduced():
    spec = ExpertSpec("depth", "dense", channels=1)
    values = torch.tensor([[[[-1.0, 1.0], [0.0, 0.5]]]])
    large = values.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    target = map_target(spec, {"values": large}, side=4)
    torch.testing.assert_close(target[0, 0, ::3, ::3], values[0, 0], atol=0.1, rtol=0)
    assert map_target(ExpertSpec("ocr", "label", channels=8), {"values": torch.zeros(1, 8, 4, 4)}, 2) is None


def test_map_losses_are_of_samples():
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([F.cross_entropy(scores[i : i + 1], classes[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(map_losses(scores, classes), expected)
    assert map_losses(scores, scores).tolist() == [0, 0]


# ---- decorrelation and the sum


def test_decorrelation_is_of_distant_tokens():
    same = torch.ones(1, 16, 8)
    assert decorrelation(torch.eye(16)[None]) < 1e-6 < decorrelation(same) < 1
    near, far = torch.eye(16).repeat(2, 1, 1)
    near[1] = near[0]  # a neighbour and a distant token with the same features
    far[15] = far[0]
    assert 0 < decorrelation(near[None]) < decorrelation(far[None])


def test_only_present_samples_count(imitating):
    teachers = stem_inputs()
    present = {name: torch.tensor([True, False, False]) for name in IMITATED}
    present["segmentation"] = torch.tensor([False, True, False])
    loss = loss_of(imitating, teachers, present)
    changed = copy.deepcopy(teachers)
    changed["depth"]["values"][1:] = -changed["depth"]["values"][1:]
    changed["segmentation"]["ids"][[0, 2]] = 1
    same = loss_of(imitating, changed, present)
    torch.testing.assert_close([same.tokens, same.maps], [loss.tokens, loss.maps])
    changed["depth"]["values"][0] = -changed["depth"]["values"][0]
    assert not torch.isclose(loss_of(imitating, changed, present).tokens, loss.tokens)


def test_loss_is_a_mean_over_samples_with_the_expert(imitating):
    teachers = stem_inputs()
    first = {name: {key: tensor[:1] for key, tensor in own.items()} for name, own in teachers.items()}
    alone = loss_of(imitating, first, rows=slice(1))
    loss = loss_of(imitating, teachers, {name: torch.tensor([True, False, False]) for name in IMITATED})
    torch.testing.assert_close([loss.tokens, loss.maps], [alone.tokens, alone.maps])


def test_head_without_a_sample_has_a_gradient(imitating):
    """DDP waits for a gradient of each weight."""
    model = copy.deepcopy(imitating)
    present = {name: torch.tensor([name == "depth"] * 3) for name in IMITATED}
    loss_of(model, stem_inputs(), present).total().backward()
    heads = model.model.vision_model.imitation.heads
    assert all(weight.grad is not None for weight in heads.parameters())
    assert not any(weight.grad.any() for weight in heads["ocr"].parameters())


def test_total_weighs_the_parts(imitating):
    loss = loss_of(imitating, stem_inputs())
    assert all(part > 0 for part in (loss.tokens, loss.maps, loss.decorrelation, loss.balance))
    total = loss.tokens + 2 * loss.maps + 3 * loss.decorrelation + 4 * loss.balance
    torch.testing.assert_close(loss.total(maps=2, decorrelation=3, balance=4), total)


def test_only_the_student_learns(imitating):
    model = copy.deepcopy(imitating).train()
    model.requires_grad_(False)
    model.model.vision_model.imitation.requires_grad_(True)
    loss = loss_of(model, stem_inputs())
    loss.total().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned and all(".imitation." in name for name in learned)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model, stem_inputs()).total().backward()
        optimizer.step()
    assert loss_of(model, stem_inputs()).tokens < 0.7 * loss.tokens.item()
