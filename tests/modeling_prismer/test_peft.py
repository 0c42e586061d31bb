"""Low-rank adapters by peft: trained, merged, saved, loaded."""

import pytest
import torch
from transformers import Trainer

from modeling_prismer import PrismerForConditionalGeneration

from .test_freezing_and_training import Samples, arguments
from .tiny import TOLERANCE, image_inputs, prompts, tiny_model, training_inputs


peft = pytest.importorskip("peft")

GENERATION = {"do_sample": False, "num_beams": 2, "max_new_tokens": 5}


def with_lora(model, init_lora_weights=False, **kwargs):
    """By default with adapters that change what the model says, as after training."""
    targets = ["q_proj", "v_proj", "fc1"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=init_lora_weights, **kwargs)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_only_the_adapters_are_trained(tmp_path, task_type):
    model = with_lora(tiny_model(), task_type=task_type)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Trainer(model=model, args=arguments(tmp_path, label_names=["labels"]), train_dataset=Samples()).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    places = ("vision_model.layers", "resampler", "text_model.layers.0.self_attn", "text_model.layers.0.cross_attn")
    assert all(any(place in name for name in before if "lora_" in name) for place in places)


def test_adapters_can_be_merged():
    model = with_lora(tiny_model())
    inputs = training_inputs()
    expected, said = model(**inputs).logits, model.generate(input_ids=prompts(), **image_inputs(), **GENERATION)
    assert not torch.allclose(expected, tiny_model()(**inputs).logits)
    merged = model.merge_and_unload()
    assert type(merged) is PrismerForConditionalGeneration
    torch.testing.assert_close(merged(**inputs).logits, expected, **TOLERANCE)
    assert torch.equal(merged.generate(input_ids=prompts(), **image_inputs(), **GENERATION), said)


def test_adapters_are_saved_and_loaded_without_the_model(tmp_path):
    model = with_lora(tiny_model())
    expected = model(**training_inputs()).logits
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(loaded(**training_inputs()).logits, expected)
    into_the_model = tiny_model()
    into_the_model.load_adapter(str(tmp_path))
    assert torch.equal(into_the_model(**training_inputs()).logits, expected)


def test_stems_can_be_trained_whole_beside_the_adapters():
    model = with_lora(tiny_model(), init_lora_weights=True, modules_to_save=["depth", "resampler"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in ("expert_stems.depth.modules_to_save", "resampler.modules_to_save"):
        assert any(part in name for name in trained)
    model(**training_inputs()).loss.backward()
    torch.testing.assert_close(
        model(**training_inputs()).logits, tiny_model()(**training_inputs()).logits, **TOLERANCE
    )
