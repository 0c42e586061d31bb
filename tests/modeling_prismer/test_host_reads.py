"""
A GPU waits whenever Python reads a value of a tensor. Training and decoding steps do not read any, but for the checks
of a training step's inputs, which come before its first expert stem and layer.
"""

import sys

import pytest
import torch

from modeling_prismer.cache import CACHE_NAME
from modeling_prismer.expert_stems import PrismerExpertStem

from .tiny import image_inputs, prompts, tiny_model, training_inputs


READS = ("__bool__", "__index__", "__int__", "__float__", "item", "tolist", "nonzero")


def on_meta(inputs):
    """Tensors without values: reading one is an error."""
    return {key: tensor.to("meta") for key, tensor in inputs.items()}


@pytest.fixture
def host_reads(monkeypatch):
    """The functions of this package, or of transformers, that read a tensor; "layer" when the first layer runs."""
    reads = []

    def note(function):
        def read(tensor, *args, **kwargs):
            frame = sys._getframe(1)
            while not frame.f_globals["__name__"].startswith(("modeling_prismer.", "transformers.masking")):
                if (frame := frame.f_back) is None:  # torch or a test reads for itself
                    return function(tensor, *args, **kwargs)
            reads.append(frame.f_code.co_name)
            return function(tensor, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, note(getattr(torch.Tensor, name)))
    return reads


def run(model, reads, **inputs):
    """Runs a training step. Returns the reads before the first layer, and those after it."""
    handles = [
        module.register_forward_pre_hook(lambda *_: reads.append("layer"))
        for module in model.modules()
        if isinstance(module, PrismerExpertStem | torch.nn.Linear)
    ]
    model(**inputs).loss.backward()
    for handle in handles:
        handle.remove()
    first = reads.index("layer")
    return reads[:first], [name for name in reads[first:] if name != "layer"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_reads_nothing_without_checks(monkeypatch, attention):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    model = tiny_model().train().to("meta")
    model.set_attn_implementation(attention)
    inputs = on_meta(training_inputs())
    del inputs["attention_mask"]
    model(**inputs, sample_weight=torch.ones(3, device="meta")).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [3, 6], ids=["one text per image", "two texts per image"])
def test_decoding_reads_nothing(attention, rows):
    model = tiny_model().to("meta")
    model.set_attn_implementation(attention)
    with torch.no_grad():
        cache = model(input_ids=prompts(rows).to("meta"), **on_meta(image_inputs()), use_cache=True)[CACHE_NAME]
        for length in (6, 7):
            inputs = {"position_ids": torch.arange(length, device="meta")[None], "use_cache": True}
            inputs = model.prepare_inputs_for_generation(
                torch.zeros(rows, length, dtype=torch.long, device="meta"),
                next_sequence_length=1,
                **{CACHE_NAME: cache},
                **inputs,
            )
            outputs = model(**inputs)
            assert outputs.logits.shape[:2] == (rows, 1)
            cache = outputs[CACHE_NAME]


def test_training_checks_its_inputs_before_the_first_layer(model, host_reads):
    inputs = training_inputs()
    del inputs["attention_mask"]
    before, after = run(model.train(), host_reads, **inputs)
    assert sorted(before) == ["_require_finite", "check_labels"] and after == []


def test_training_reads_the_expert_mask_once(model, host_reads):
    mask = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    inputs = training_inputs()
    del inputs["attention_mask"]
    before, after = run(model.train(), host_reads, **inputs, expert_mask=mask)
    assert sorted(before) == ["_require_finite", "check_labels", "embed_experts"]
    assert set(after) == {"_ignore_bidirectional_mask_sdpa"}  # transformers looks whether a mask is needed


def test_only_transformers_reads_the_attention_mask(model, host_reads):
    before, after = run(model.train(), host_reads, **training_inputs())
    assert sorted(before) == ["_require_finite", "check_labels"]
    assert set(after) == {"_ignore_causal_mask_sdpa"}
