"""Muon and AdamW as one optimizer: who changes what, schedules, and going on from a checkpoint."""

import pytest
import torch

import muon
from tests.modeling_prismer.tiny import tiny_config, tiny_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model(tiny_config()).freeze_backbones(vision=True, language=True)


def train(model, optimizer, steps, scheduler=None):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def test_linear_layers_get_muon_and_all_else_that_is_trained_adamw(model):
    with_muon, with_adamw = muon.muon_for(model, lr=1e-3, weight_decay=0.05).parts
    matrices = {id(parameter) for group in with_muon.param_groups for parameter in group["params"]}
    others = {id(parameter) for group in with_adamw.param_groups for parameter in group["params"]}
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not matrices & others and matrices | others == names.keys()
    found = {names[each] for each in matrices}
    assert {"model.text_model.layers.0.adaptor.down_proj.weight"} <= found
    assert not any("embed" in name or "lm_head.decoder" in name or "convs" in name for name in found)


def test_what_squares_learns_at_a_tenth_of_the_speed(model):
    rates = {}
    for part in muon.muon_for(model, lr=1e-3, weight_decay=0.0).parts:
        rates |= {id(parameter): group["lr"] for group in part.param_groups for parameter in group["params"]}
    rate = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rate["model.vision_model.resampler.layers.0.mlp.fc1.weight"] == pytest.approx(3e-4)
    assert rate["model.text_model.layers.0.adaptor.down_proj.weight"] == pytest.approx(3e-4)
    assert rate["model.vision_model.resampler.latents"] == pytest.approx(1e-4)
    assert rate["model.text_model.layers.0.cross_attn.q_proj.weight"] == pytest.approx(3e-3)
    assert rate["model.text_model.embeddings.word_embeddings.weight"] == pytest.approx(1e-3)


def test_a_schedule_reaches_both(model):
    optimizer = muon.muon_for(model, lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, 2, scheduler)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_goes_on_from_its_state_as_if_never_stopped(model, tmp_path):
    optimizer = muon.muon_for(model, lr=1e-3, weight_decay=0.05)
    train(model, optimizer, 2)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    train(model, optimizer, 2)
    again = tiny_model(tiny_config()).freeze_backbones(vision=True, language=True)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed = muon.muon_for(again, lr=0.5, weight_decay=0.0)
    resumed.load_state_dict(state)
    train(again, resumed, 2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=0, atol=0)


def test_a_closure_is_called_once_with_gradients(model):
    optimizer = muon.muon_for(model, lr=1e-3, weight_decay=0.0)
    called = []

    def closure():
        called.append(torch.is_grad_enabled())
        return torch.tensor(2.5)

    with torch.no_grad():
        assert optimizer.step(closure) == 2.5
    assert called == [True] and optimizer.step() is None
