"""`from_pretrained(quantization_config=...)` with torchao and bitsandbytes: what gets small, and what is then said."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_prismer import PrismerForConditionalGeneration

from .tiny import EXPERTS, image_inputs, prompts, tiny_config, training_inputs


def torchao_config(name):
    return lambda: TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())


def bitsandbytes_config(**kwargs):
    def make():
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**kwargs)

    return make


CONFIGS = {
    "torchao-int8": torchao_config("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": torchao_config("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes-8bit": bitsandbytes_config(load_in_8bit=True),
    "bitsandbytes-4bit": bitsandbytes_config(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
# Spread weights are hard to quantise: here the network is as initialised, and this much may change.
COARSE = {"torchao-int8": 0.03, "torchao-int8-dynamic": 0.06, "bitsandbytes-8bit": 0.05, "bitsandbytes-4bit": 0.3}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]

pytestmark = [
    pytest.mark.skipif(
        not (importlib.util.find_spec("torchao") or importlib.util.find_spec("bitsandbytes")),
        reason="needs torchao or bitsandbytes",
    ),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of widths that 4-bit blocks divide."""
    config = tiny_config(experts=EXPERTS)
    config.vision_config.hidden_size = config.text_config.hidden_size = config.text_config.encoder_hidden_size = 64
    config.vision_config.intermediate_size = config.text_config.intermediate_size = 128
    config.text_config.num_attention_heads = 4
    config.vision_config.num_hidden_layers = config.vision_config.resampler_layers = 1
    torch.manual_seed(0)
    model = PrismerForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def load(folder, name, device="cpu"):
    return PrismerForConditionalGeneration.from_pretrained(
        folder, quantization_config=CONFIGS[name](), device_map=device
    )


def is_quantized(module):
    return not (type(module.weight) is nn.Parameter and module.weight.is_floating_point())


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_layers_but_the_tied_one_are_quantised(folder, name):
    model = load(folder, name)
    modules = {name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    assert {name for name, module in modules.items() if is_quantized(module)} == linear - {"lm_head.decoder"}
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert len(linear) > 30


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_model_is_close(folder, name, device):
    inputs = {"input_ids": prompts(), **image_inputs()}
    with torch.no_grad():
        expected = PrismerForConditionalGeneration.from_pretrained(folder)(**inputs).logits
    model = load(folder, name, device)
    inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
    with torch.no_grad():
        logits = model(**inputs).logits.float().cpu()
    assert (logits - expected).norm() < COARSE[name] * expected.norm()
    generated = model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=4)
    assert generated.shape[0] == 3 and 5 < generated.shape[1] <= 9
    candidates = torch.tensor([[9, 2, 1], [9, 8, 2]])
    assert model.rank_candidates(candidates, candidates != 1, 2, **inputs).scores.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_saved_quantised(folder, name, tmp_path):
    model = load(folder, name)
    model.save_pretrained(tmp_path)  # before it runs: bitsandbytes on a CPU may repack 4-bit weights in the first call
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu")
    inputs = {"input_ids": prompts(), **image_inputs()}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, load(folder, name)(**inputs).logits)
    assert loaded.is_quantized


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "torchao-int8-dynamic"])
def test_an_adapter_is_trained_in_a_quantised_model(folder, name):
    peft = pytest.importorskip("peft")
    model = load(folder, name)
    kwargs = {"use_reentrant": False}  # else adapters in encoder and resampler would get no gradient
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).train()
    model(**training_inputs()).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in trained.values())
