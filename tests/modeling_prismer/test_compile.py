"""`torch.compile` makes one graph of the encoder and one of a decode step, and they say what the network says."""

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from transformers import StaticCache

from .tiny import EXPERTS, image_inputs, needs_traced_checks, prompts, tiny_config, tiny_model


TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
DENSE, LABEL = EXPERTS[0], EXPERTS[2]
LENGTH = 5


def small_model(experts):
    config = tiny_config(experts=experts)
    config.vision_config.num_hidden_layers = config.vision_config.resampler_layers = 1
    config.text_config.num_hidden_layers = 2
    return tiny_model(config)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(autouse=True)
def nothing_compiled_before_or_after(monkeypatch, cache_folder):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache_folder)
    torch.compiler.reset()
    # scalar code is compiled in a fraction of the time of vector code
    settings = {"compile_threads": 1, "cpp.simdlen": 1, "cpp.vec_isa_ok": True}
    with torch._inductor.config.patch(settings), torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def full_backend():
    """torch's own default, where there is the C++ compiler that it needs on a CPU."""
    try:
        get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler:
        return "aot_eager"
    return "inductor"


def compiled(function, backend="aot_eager"):
    """The function as one graph: a break of the graph is an error."""
    return torch.compile(function, fullgraph=True, backend=backend)


@needs_traced_checks
def test_encoder_is_one_graph_for_any_expert_mask(full_backend):
    model = small_model([DENSE, LABEL])
    encode = compiled(model.get_image_features, full_backend)
    mask = torch.tensor([[False, True], [False, False], [False, True]])  # of the dense expert there is nothing
    inputs = {**image_inputs(experts=[LABEL]), "expert_mask": mask}
    expected = model.get_image_features(**inputs).last_hidden_state
    torch.testing.assert_close(encode(**inputs).last_hidden_state, expected, **TOLERANCE)

    with torch.compiler.set_stance("fail_on_recompile"):  # another mask of the same experts runs the same graph
        inputs = {**inputs, "expert_mask": mask.roll(1, dims=0)}
        expected = model.get_image_features(**inputs).last_hidden_state
        torch.testing.assert_close(encode(**inputs).last_hidden_state, expected, **TOLERANCE)


@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["none", "six"])
def test_the_encoder_is_one_graph_with_and_without_experts(experts):
    model, inputs = small_model(experts), image_inputs(experts=experts)
    encode = compiled(model.get_image_features)
    expected = model.get_image_features(**inputs).last_hidden_state
    torch.testing.assert_close(encode(**inputs).last_hidden_state, expected, **TOLERANCE)


def test_a_frozen_encoder_is_one_graph():
    model, inputs = small_model([DENSE]).requires_grad_(False).train(), image_inputs(experts=[DENSE])
    encode = compiled(model.get_image_features)
    expected = model.get_image_features(**inputs).last_hidden_state
    torch.testing.assert_close(encode(**inputs).last_hidden_state, expected, **TOLERANCE)


@needs_traced_checks
def test_compiled_encoder_refuses_mask_of_missing_expert():
    model = small_model([DENSE])
    images = image_inputs(experts=[])
    encode = compiled(model.get_image_features)
    encode(**images, expert_mask=torch.zeros(3, 1, dtype=torch.bool))
    with pytest.raises(RuntimeError):
        encode(**images, expert_mask=torch.ones(3, 1, dtype=torch.bool))


def test_static_cache_step_is_one_graph(full_backend):
    model = small_model([DENSE])
    step = compiled(model.forward, full_backend)
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    text = prompts(length=LENGTH + 3)
    for seed in (0, 1):
        images = image_inputs(experts=[DENSE], seed=seed)
        expected = model(input_ids=text, **images).logits
        cache.reset()
        model(input_ids=text[:, :LENGTH], cache=cache, **images)
        for place in range(LENGTH, text.shape[1]):
            first = (seed, place) == (0, LENGTH)
            with torch.compiler.set_stance("default" if first else "fail_on_recompile"):
                logits = step(
                    input_ids=text[:, place : place + 1],
                    position_ids=torch.full((3, 1), place),
                    cache=cache,
                ).logits
            torch.testing.assert_close(logits[:, 0], expected[:, place], **TOLERANCE)


def test_static_cache_prefill_is_one_graph():
    model, images = small_model([DENSE]), image_inputs(experts=[DENSE])
    forward = compiled(model.forward)
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    expected = model(input_ids=prompts(), **images).logits
    logits = forward(input_ids=prompts(), cache=cache, **images).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)
