"""A forward hook sees in inference what it sees in training: every call, and values that nothing changes later."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from .tiny import image_inputs, prompts, tiny_model


LONG = 256  # tokens of an image


@pytest.fixture
def encode():
    """A model with long rows of tokens, and a function that encodes two images, with or without gradients."""
    experts = [
        {"name": "depth", "kind": "dense", "channels": 1},
        {"name": "parts", "kind": "label", "channels": 8, "num_classes": 10},
    ]
    model = tiny_model(experts=experts, image_size=128)
    inputs = image_inputs(2, experts=experts) | {"pixel_values": torch.randn(2, 3, 128, 128)}

    def run(gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            output = model(input_ids=prompts(2), **inputs)
        assert output.encoder_last_hidden_state.shape[1] >= LONG

    return model, run


class Recorder:
    """The tensor that a hook got, and a copy from that moment."""

    def __init__(self):
        self.kept, self.copies = [], []

    def __call__(self, module, arguments, output):
        tensors = [tensor for tensor in (*arguments, output) if isinstance(tensor, torch.Tensor)]
        self.kept.append(tensors)
        self.copies.append([tensor.detach().clone() for tensor in tensors])

    def must_be_as(self, expected: "Recorder") -> None:
        assert len(self.copies) == len(expected.copies) > 0
        for tensors, others in zip(self.copies, expected.copies):
            torch.testing.assert_close(tensors, others, atol=1e-3, rtol=1e-3)
        for kept, copies in zip(self.kept, self.copies):
            assert all(torch.equal(tensor, copy) for tensor, copy in zip(kept, copies)), "changed in place"


@pytest.mark.parametrize(
    "name",
    [
        *(f"model.vision_model.layers.0.{part}" for part in ("self_attn.q_proj", "self_attn.v_proj", "layer_norm2")),
        *(f"model.vision_model.layers.0.mlp{part}" for part in ("", ".fc1", ".activation", ".fc2")),
        *(f"model.vision_model.layers.0.adaptor{part}" for part in ("", ".down_proj", ".activation", ".up_proj")),
        *(f"model.vision_model.expert_stems.{part}" for part in ("depth.norms.0", "depth.convs.1", "parts.norms.3")),
        *(f"model.vision_model.resampler.layers.0.{part}" for part in ("mlp.activation", "latent_attn.k_proj")),
        *(f"model.text_model.layers.0.{part}" for part in ("cross_attn.v_proj", "self_attn.q_proj", "mlp.activation")),
        *("lm_head.dense", "lm_head.activation", "lm_head.decoder"),
    ],
)
def test_hook_sees_the_same_without_gradients(encode, name):
    model, run = encode
    seen = []
    for gradients in (True, False):
        seen.append(Recorder())
        handle = model.get_submodule(name).register_forward_hook(seen[-1])
        run(gradients)
        handle.remove()
    seen[1].must_be_as(seen[0])


def test_global_hook_sees_the_same_without_gradients(encode):
    model, run = encode
    names = {module: name for name, module in model.named_modules()}
    calls = []
    for gradients in (True, False):
        recorder, order = Recorder(), []

        def note(module, arguments, output, recorder=recorder, order=order):
            order.append(names[module])
            recorder(module, arguments, output if isinstance(output, torch.Tensor) else None)

        handle = register_module_forward_hook(note)
        try:
            run(gradients)
        finally:
            handle.remove()
        calls.append((order, recorder))
    assert calls[0][0] == calls[1][0] and len(calls[0][0]) > 50
    calls[1][1].must_be_as(calls[0][1])


def test_hook_may_replace_an_output(encode):
    model, run = encode
    mlp = model.model.vision_model.layers[0].mlp
    seen = Recorder()
    handles = [mlp.fc2.register_forward_hook(lambda *_: torch.zeros(2, LONG + 6, 32)), mlp.register_forward_hook(seen)]
    run(gradients=False)
    assert len(seen.copies) == 1 and not seen.copies[0][-1].any()
    for handle in handles:
        handle.remove()
