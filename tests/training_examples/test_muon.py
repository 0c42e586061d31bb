"""Muon and AdamW as one optimizer: the groups of parameters, their learning rates, and their steps."""

import pytest
import torch

import muon
from tests.modeling_prismer.tiny import tiny_config, tiny_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model(tiny_config()).freeze_backbones(vision=True, language=True)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups_by_name(model, lr=1e-3):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = muon.muon_for(model, lr=lr, weight_decay=0.06).param_groups
    return {names[parameter]: group for group in groups for parameter in group["params"]}


def test_muon_is_used_for_linear_layers_only(model):
    groups = groups_by_name(model)
    assert groups.keys() == trained(model).keys()
    matrices = {name for name, group in groups.items() if group.get("use_muon")}
    assert all(groups[name].get("use_fallback") for name in groups.keys() - matrices)
    assert "model.text_model.layers.0.adaptor.down_proj.weight" in matrices
    assert not any("embed" in name or "lm_head.decoder" in name or "convs" in name for name in matrices)


def test_mlps_with_a_squared_relu_have_a_tenth_of_the_rate(model):
    rate = {name: group["lr"] for name, group in groups_by_name(model).items()}
    assert rate["model.vision_model.resampler.layers.0.mlp.fc1.weight"] == pytest.approx(3e-4)
    assert rate["model.text_model.layers.0.adaptor.down_proj.weight"] == pytest.approx(3e-4)
    assert rate["model.vision_model.layers.0.adaptor.up_proj.weight"] == pytest.approx(3e-4)
    assert rate["model.vision_model.resampler.latents"] == pytest.approx(1e-3)
    assert rate["model.vision_model.resampler.layers.0.latent_attn.q_proj.weight"] == pytest.approx(3e-3)
    assert rate["model.text_model.layers.0.cross_attn.q_proj.weight"] == pytest.approx(3e-3)
    assert rate["model.text_model.embeddings.word_embeddings.weight"] == pytest.approx(1e-3)


def test_steps_equal_those_of_muon_and_adamw_of_torch(model):
    """The shipped checkpoint was trained with the optimizers of torch, whose Muon computes in bfloat16."""
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    expected = tiny_model(tiny_config())
    expected.load_state_dict(model.state_dict())
    torch_optimizers = []
    for name, group in groups_by_name(model).items():
        settings = {"params": [expected.get_parameter(name)], "lr": group["lr"]}
        if group.get("use_muon"):
            torch_optimizers.append(torch.optim.Muon(**settings, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
        else:
            torch_optimizers.append(torch.optim.AdamW(**settings, weight_decay=0.06))
    optimizer = muon.muon_for(model, lr=1e-3, weight_decay=0.06)
    for _ in range(3):
        for name, parameter in trained(model).items():
            parameter.grad = torch.randn_like(parameter)
            expected.get_parameter(name).grad = parameter.grad.clone()
        for each in (optimizer, *torch_optimizers):
            each.step()
    matrices = {name for name, group in groups_by_name(model).items() if group.get("use_muon")}
    for name, parameter in trained(model).items():
        own, other = parameter - before[name], expected.get_parameter(name) - before[name]
        assert (own - other).norm() < (0.02 if name in matrices else 1e-4) * other.norm()


def test_muon_computes_in_float32_on_a_cpu():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.float32)
    layer.get_output_embeddings = lambda: None
    optimizer = muon.muon_for(layer, lr=1e-3, weight_decay=0.0)
    before = layer.weight.detach().double()
    layer.weight.grad = torch.randn(8, 8)
    update = layer.weight.grad.double() / layer.weight.grad.double().norm()
    for _ in range(5):  # Newton-Schulz in double precision
        gram = update @ update.T
        update = 3.4445 * update + (-4.775 * gram + 2.0315 * gram @ gram) @ update
    optimizer.step()
    torch.testing.assert_close(before - layer.weight.double(), 3e-3 * 0.2 * 8**0.5 * update, rtol=1e-3, atol=1e-6)
