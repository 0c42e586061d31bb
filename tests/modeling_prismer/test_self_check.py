"""`prismer check` holds on a working installation, and names what does not hold on a broken one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling_prismer import modeling_prismer, self_check
from modeling_prismer.cli import app
from modeling_prismer.expert_stems import PrismerExpertStem
from modeling_prismer.self_check import RECORDING, SelfCheck

from .record_self_check import recording


DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def without_compile(monkeypatch):
    """torch.compile takes most of the time; test_compile.py tests it."""

    def not_available(self):
        raise self_check.NotAvailable("left out in this test")

    monkeypatch.setattr(SelfCheck, "compiled", not_available)


@pytest.fixture
def leave_out(monkeypatch, without_compile):
    """Makes slow checks that a test is not about pass at once, also where another check runs them."""
    return lambda *names: [monkeypatch.setattr(SelfCheck, name, lambda *args: 0.0) for name in names]


def outcomes(dtype=torch.float32):
    return {result.name: result.holds for result in SelfCheck("cpu", dtype).run()}


def failures(dtype=torch.float32):
    return {name for name, holds in outcomes(dtype).items() if holds is False}


def test_the_package_holds_the_golden_recording(load_recording):
    golden = load_recording("tiny_prismer")
    tensors, values = recording(golden)
    shipped = load_file(RECORDING / "recording.safetensors")
    assert shipped.keys() == tensors.keys()
    assert all(torch.equal(shipped[name], tensor) for name, tensor in tensors.items())
    assert json.loads((RECORDING / "recording.json").read_text()) == values
    weights, expected = load_file(RECORDING / "model.safetensors"), golden.loaded.state_dict()
    assert all(torch.equal(tensor.float(), expected[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_every_check_holds_on_a_cpu(without_compile, dtype):
    found = outcomes(dtype)
    gpu_only = {"attention: flex_attention", "attention: flash_attention_2", "torch.compile"}
    assert {name for name, holds in found.items() if holds is None} == gpu_only
    assert {name for name, holds in found.items() if holds} == found.keys() - gpu_only


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_painting_is_found(leave_out, monkeypatch, dtype):
    leave_out("gradients", "training_step", "ranking", "attention")
    paint = PrismerExpertStem.paint
    monkeypatch.setattr(PrismerExpertStem, "paint", lambda *args: paint(*args).flip(-1))
    failed = failures(dtype)
    assert {"stems and painting", "encoder"} <= failed
    assert "generation" in failed or dtype != torch.float32  # in half precision it is compared with itself


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_adaptor_is_found(leave_out, monkeypatch, dtype):
    leave_out("training_step", "generation", "ranking")
    monkeypatch.setattr(modeling_prismer.PrismerAdaptor, "forward", lambda self, hidden_states: hidden_states)
    failed = failures(dtype)
    assert "stems and painting" not in failed
    assert {"encoder", "logits and loss", "gradients", "attention: sdpa"} <= failed


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_cache_is_found(leave_out, monkeypatch, dtype):
    leave_out("gradients", "training_step", "ranking", "attention")

    def shifted_positions(self, input_ids, inputs_embeds, attention_mask, past_length):
        length = inputs_embeds.shape[1]
        return torch.arange(length)[None] + (past_length + 3 if past_length else 0)

    monkeypatch.setattr(modeling_prismer.PrismerTextModel, "make_position_ids", shifted_positions)
    generate = modeling_prismer.PrismerForConditionalGeneration.prepare_inputs_for_generation

    def without_positions(self, *args, **kwargs):
        return {**generate(self, *args, **kwargs), "position_ids": None}

    monkeypatch.setattr(
        modeling_prismer.PrismerForConditionalGeneration, "prepare_inputs_for_generation", without_positions
    )
    assert "generation" in failures(dtype)


def test_an_expert_that_leaves_traces_is_found(leave_out, monkeypatch):
    leave_out("gradients", "training_step", "generation")
    embed = modeling_prismer.PrismerVisionModel.embed_experts

    def ignore_the_mask(self, inputs, expert_mask, *args):
        inputs = {name: {key: t.nan_to_num() for key, t in given.items()} for name, given in inputs.items()}
        return embed(self, inputs, None, *args)

    monkeypatch.setattr(modeling_prismer.PrismerVisionModel, "embed_experts", ignore_the_mask)
    assert failures() == {"encoder without an expert", "attention: eager", "attention: sdpa"}


def test_the_command_prints_versions_and_a_table(leave_out):
    leave_out("gradients", "training_step", "generation", "ranking", "attention")
    result = CliRunner().invoke(app, ["check", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert f"torch: {torch.__version__.split('+')[0]}" in result.output
    assert "stems and painting" in result.output and "not available" in result.output


def test_the_command_fails_if_a_check_fails(leave_out, monkeypatch):
    leave_out("gradients", "training_step", "generation", "attention")

    def broken(self):
        raise RuntimeError("CUDA error: an illegal memory access\nmore [bold]lines[/bold]")

    monkeypatch.setattr(SelfCheck, "ranking", broken)
    result = CliRunner().invoke(app, ["check", "--device", "cpu"])
    assert result.exit_code == 1
    assert "1 of the checks failed: ranking" in result.output
    assert "illegal" in result.output


@pytest.mark.parametrize("option, value", [("--device", "tpu9"), ("--dtype", "int8"), ("--dtype", "half-precision")])
def test_wrong_options_are_named(option, value):
    result = CliRunner().invoke(app, ["check", option, value])
    assert result.exit_code == 1
    assert value in result.output and "Traceback" not in result.output
