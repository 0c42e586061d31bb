"""`optimize_for_cpu` changes no result, only how it is computed; training undoes it."""

import copy

import pytest
import torch
from torch import nn

from modeling_prismer import PrismerForConditionalGeneration, cpu_inference, optimize_for_cpu
from modeling_prismer.configuration_prismer import PrismerVisionConfig
from modeling_prismer.layers import PrismerAttention, PrismerMLP

from .tiny import TOLERANCE, image_inputs, prompts, tiny_model, training_inputs


@pytest.fixture
def onednn(monkeypatch):
    """The calls of oneDNN's linear layer."""
    calls, function = [], cpu_inference._onednn_linear
    if function is None:
        pytest.skip("this torch was built without oneDNN or MKL: its own linear layers are used")
    monkeypatch.setattr(cpu_inference, "_onednn_linear", lambda *args: calls.append(args) or function(*args))
    return calls


def optimized(module):
    return optimize_for_cpu(nn.Sequential(copy.deepcopy(module)))[0]


@torch.no_grad()
def test_results_of_a_model_stay_equal(load_recording):
    golden = load_recording("tiny_prismer")
    model, fast = golden.model(), optimize_for_cpu(golden.model())
    for run in (
        lambda model: model.get_image_features(**golden.images()).last_hidden_state,
        lambda model: model(**golden.text, **golden.images()).logits,
    ):
        torch.testing.assert_close(run(fast), run(model), **TOLERANCE)
    search = {"num_beams": 3, "max_length": 20, "do_sample": False}
    prompt = golden.inputs["prompt_ids"]
    expected = model.generate(input_ids=prompt, **golden.images(), **search)
    assert torch.equal(fast.generate(input_ids=prompt, **golden.images(), **search), expected)


def test_linear_layers_attention_and_mlp_are_exchanged(onednn):
    model = optimize_for_cpu(tiny_model())
    kinds = {type(module) for module in model.modules()}
    assert {cpu_inference.CpuLinear, cpu_inference.CpuMLP, cpu_inference.CpuAttention} <= kinds
    assert not {nn.Linear, PrismerMLP, PrismerAttention} & kinds
    with torch.no_grad():
        model(input_ids=prompts(), **image_inputs())
    assert len(onednn) > 20


def test_training_undoes_it(onednn):
    model = tiny_model()
    kinds = [type(module) for module in model.modules()]
    optimize_for_cpu(model).train()
    assert [type(module) for module in model.modules()] == kinds
    assert all(module.training for module in model.modules())
    model(**training_inputs()).loss.backward()
    assert not onednn and model.lm_head.dense.weight.grad.any()


def test_gradients_flow_in_evaluation_too(onednn):
    model = optimize_for_cpu(tiny_model())
    model(**training_inputs()).loss.backward()
    assert not onednn and model.lm_head.dense.weight.grad.any()


def test_saved_model_is_the_same(tmp_path):
    model = tiny_model()
    optimize_for_cpu(copy.deepcopy(model)).save_pretrained(tmp_path)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(dtype):
    model = tiny_model().to(dtype)
    with pytest.raises(ValueError, match=r"is torch\.b?float16 on cpu; optimize_for_cpu needs float32 on a CPU"):
        optimize_for_cpu(model)
    assert not any(isinstance(module, cpu_inference._UndoneByTraining) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(
    "states",
    [
        torch.randn(16),
        torch.randn(3, 16),
        torch.randn(2, 1, 3, 16),
        torch.randn(0, 4, 16),
        torch.randn(3, 2, 16).transpose(0, 1),
        torch.randn(2, 3, 32)[..., ::2],
        torch.randn(1, 1, 16).expand(4, 3, 16),
    ],
    ids=lambda states: "×".join(map(str, states.shape)),
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_take_any_shape(onednn, states, bias):
    layer = nn.Linear(16, 20, bias=bias).eval()
    torch.testing.assert_close(optimized(layer)(states), layer(states), **TOLERANCE)
    assert len(onednn) == 1


@torch.no_grad()
def test_autocast_is_honoured(onednn):
    layer = optimized(nn.Linear(16, 20))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 16)).dtype == torch.bfloat16
    assert not onednn


@torch.no_grad()
def test_hooks_on_linear_layers_are_called():
    layer = optimized(nn.Linear(16, 20))
    layer.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not layer(torch.randn(3, 16)).any()


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "relu2", "gelu"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 300), (7,)])
def test_mlps_stay_equal(shape, activation):
    mlp, states = PrismerMLP(24, 48, activation).eval(), torch.randn(*shape, 24)
    torch.testing.assert_close(optimized(mlp)(states), mlp(states), **TOLERANCE)


@pytest.fixture
def few_queries():
    """An attention of 2 rows of 3 queries to each of 2 images, in heads of 8 elements."""
    config = PrismerVisionConfig(hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    attention = PrismerAttention(config, num_heads=4, dropout=0.5, key_value_size=40).eval()
    return attention, torch.randn(4, 3, 32), torch.randn(2, 50, 40)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["no mask", "bool", "added"])
def test_few_queries_attend_without_keys_as_with_them(few_queries, monkeypatch, mask):
    attention, hidden_states, states = few_queries
    masks = {"no mask": None, "bool": torch.rand(2, 1, 6, 50) < 0.5, "added": torch.randn(2, 1, 6, 50)}
    calls = []
    without_keys = cpu_inference.CpuAttention.attend_without_keys
    monkeypatch.setattr(
        cpu_inference.CpuAttention,
        "attend_without_keys",
        lambda *args: calls.append(1) or without_keys(*args),
    )
    found = optimized(attention)(hidden_states, masks[mask], states=states)[0]
    assert calls
    torch.testing.assert_close(found, attention(hidden_states, masks[mask], states=states)[0], **TOLERANCE)


@torch.no_grad()
def test_few_queries_pass_by_no_adapter(few_queries):
    attention, hidden_states, states = few_queries
    attention.k_proj = nn.Sequential(attention.k_proj, nn.Linear(32, 32))  # such as LoRA puts around one
    found = optimized(attention)(hidden_states, states=states)[0]
    torch.testing.assert_close(found, attention(hidden_states, states=states)[0], **TOLERANCE)


@torch.no_grad()
def test_expert_masks_and_several_rows_per_image_stay_equal():
    model, inputs = tiny_model(), image_inputs(2)
    mask = torch.rand(2, len(model.config.experts)) < 0.5
    run = {"input_ids": prompts(6), "expert_mask": mask, **inputs}
    expected = model(**run).logits
    torch.testing.assert_close(optimize_for_cpu(model)(**run).logits, expected, **TOLERANCE)
