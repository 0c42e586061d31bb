"""Quantised language models under float32 experts, and PrismerLMs spread over devices and the disk."""

import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, SiglipVisionModel, TorchAoConfig

from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMModel, modeling_prismer_lm
from modeling_prismer.image_features import VisibleImages

from .tiny_lm import (
    ENCODERS,
    EXPERTS,
    FUSIONS,
    TOLERANCE,
    VOCAB_SIZE,
    image_inputs,
    prompts,
    scatter_weights,
    tiny_model,
    training_inputs,
)


fusions = pytest.mark.parametrize("fusion", FUSIONS)


def torchao_config():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes_config(**kwargs):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**kwargs)


# and how far logits may be from those of the whole language model, relative to their norm
QUANTIZATIONS = {
    "nf4": (lambda: bitsandbytes_config(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.3),
    "int8": (lambda: bitsandbytes_config(load_in_8bit=True), 0.1),
    "torchao": (torchao_config, 0.1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of widths that 4-bit blocks divide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=VOCAB_SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    folder = tmp_path_factory.mktemp("language")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build(folder, fusion, name=None):
    """On the language model in `folder`, trained."""
    torch.manual_seed(0)
    vision = SiglipVisionModel(ENCODERS["siglip"]())
    options = {} if name is None else {"quantization_config": QUANTIZATIONS[name][0]()}
    model = PrismerLMForConditionalGeneration.from_backbones(
        str(folder),
        vision,
        EXPERTS,
        fusion,
        experts_config={"hidden_size": 32, "num_latents": 3, "resampler_layers": 1, "image_size": 32},
        language_kwargs={"dtype": torch.float32, **options},
        cross_attention_every=1,
        image_token_id=VOCAB_SIZE,
    )
    for part, module in model.model.named_children():
        if part not in ("language_model", "vision_encoders"):
            scatter_weights(module)
    return model.eval()


@pytest.mark.skipif(
    not (importlib.util.find_spec("torchao") or importlib.util.find_spec("bitsandbytes")),
    reason="needs torchao or bitsandbytes",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTIZATIONS)
class TestQuantized:
    @fusions
    def test_about_the_same_logits(self, folder, fusion, name):
        model, whole = build(folder, fusion, name), build(folder, fusion)
        inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
        with torch.no_grad():
            logits, expected = model(**inputs).logits.float(), whole(**inputs).logits
        assert (logits - expected).norm() < QUANTIZATIONS[name][1] * expected.norm()
        own = {p.dtype for n, p in model.named_parameters() if ".language_model." not in n}
        assert own == {torch.float32}
        weight = model.language_model.model.layers[0].mlp.up_proj.weight
        assert type(weight) is not torch.nn.Parameter  # it is quantised

    @fusions
    def test_generation_and_ranking(self, folder, fusion, name):
        model = build(folder, fusion, name)
        images, questions = image_inputs(model.config, 2), prompts(model.config, 4)
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 2}
        assert model.generate(questions, **images, **settings).shape == (4, questions.shape[1] + 4)
        candidates = torch.tensor([[5, 6], [7, 8]])
        ones = torch.ones_like(candidates)
        ranking = model.rank_candidates(candidates, ones, 2, questions, torch.ones_like(questions), **images)
        assert ranking.scores.isfinite().all()

    @fusions
    def test_own_modules_learn(self, folder, fusion, name):
        model = build(folder, fusion, name).train()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trained and not any(".language_model." in n or ".vision_encoders." in n for n in trained)
        model.freeze_backbones(language=False)
        assert not any(p.requires_grad for p in model.language_model.parameters())  # quantised weights cannot learn
        model(**training_inputs(model.config)).loss.backward()
        for n, parameter in trained.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), n

    @fusions
    def test_trained_weights_alone(self, folder, fusion, name, tmp_path):
        model = build(folder, fusion, name)
        model.save_pretrained(tmp_path, trained_only=True)
        vision = model.model.vision_encoders[0]
        inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
        options = {"quantization_config": QUANTIZATIONS[name][0](), "dtype": torch.float32}
        again = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, vision=vision, **options)
        whole = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, vision=vision)  # not quantised
        with torch.no_grad():
            expected = model(**inputs).logits
            torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
            logits = whole(**inputs).logits
        assert (logits - expected).norm() < QUANTIZATIONS[name][1] * expected.norm()


# ---- devices ----


@fusions
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_maps(fusion, device_map, tmp_path):
    model = tiny_model(fusion=fusion)
    model.save_pretrained(tmp_path)
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    if loaded.device.type == "cpu":
        inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@fusions
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("offloaded", ["everything", "language model", "own modules"])
def test_weights_on_the_disk(fusion, queries, offloaded, tmp_path):
    model = tiny_model(fusion=fusion, question_queries=queries)
    model.save_pretrained(tmp_path / "saved")
    places = [f"model.{name}" for name, _ in model.model.named_children()]
    is_language = {place: place == "model.language_model" for place in places}
    chosen = {
        "everything": places,
        "language model": [place for place in places if is_language[place]],
        "own modules": [place for place in places if not is_language[place]],
    }[offloaded]
    loaded = PrismerLMForConditionalGeneration.from_pretrained(
        tmp_path / "saved",
        device_map={place: "disk" if place in chosen else "cpu" for place in places},
        offload_folder=tmp_path / "offload",
    )
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    images = image_inputs(model.config, 2)
    input_ids = prompts(model.config, 2, placeholders=True)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    with torch.no_grad():
        logits = loaded(input_ids=input_ids, **images).logits
        torch.testing.assert_close(logits, model(input_ids=input_ids, **images).logits, **TOLERANCE)
        assert torch.equal(
            loaded.generate(input_ids, **images, **settings), model.generate(input_ids, **images, **settings)
        )


def fake(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """The same without data, as if it were on a GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor).cuda().requires_grad_(tensor.requires_grad)
    return module


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@fusions
def test_inputs_meet_weights_on_their_device_in_their_type(fusion, queries, dtype, monkeypatch):
    """On a fake GPU, where a tensor of another device or type is an error."""
    # a fake tensor has no values to count placeholders by
    monkeypatch.setattr(PrismerLMModel, "assign", lambda *args: [[0], [1]])
    monkeypatch.setattr(modeling_prismer_lm, "see_images", lambda features, rows, mask: VisibleImages(features))
    model = tiny_model(fusion=fusion, question_queries=queries).freeze_backbones()
    model.language_model.to(dtype)
    inputs = training_inputs(model.config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = fake(model, mode)(**{name: mode.from_tensor(tensor).cuda() for name, tensor in inputs.items()})
    assert outputs.loss.device.type == "cuda" and outputs.logits.dtype == dtype
