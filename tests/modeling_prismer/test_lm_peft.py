"""Adapters of a PrismerLM's language model, together with its own trained modules."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_prismer import PrismerLMForConditionalGeneration

from .tiny_lm import (
    FUSIONS,
    image_inputs,
    pick,
    prompts,
    scatter_weights,
    tiny_language_model,
    tiny_model,
    tiny_vlm,
    training_inputs,
    vlm_inputs,
)


peft = pytest.importorskip("peft")

fusions = pytest.mark.parametrize("fusion", FUSIONS)
OWN_MODULES = ("experts", "experts_projection", "vision_projection", "image_embedding")
METHODS = {
    "lora": lambda **kwargs: peft.LoraConfig(r=4, **kwargs),
    "dora": lambda **kwargs: peft.LoraConfig(r=4, use_dora=True, **kwargs),
}


def own_modules(model) -> list[str]:
    """The modules that always train, as peft takes them."""
    names = [name for name in OWN_MODULES if getattr(model.model, name, None) is not None]
    return [*names, *(f"cross_blocks.{index}" for index in model.model.cross_blocks)]


def adapted(model, method="lora", **kwargs):
    """With an adapter of the language model, as after training; `model` is the base."""
    kwargs.setdefault("target_modules", r".*language_model\..*\.(q_proj|v_proj|down_proj)")
    model = peft.get_peft_model(model, METHODS[method](**kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.mark.parametrize(
    "language, names", [("llama", {"q_proj", "v_proj"}), ("phi3", {"qkv_proj"}), ("gpt2", {"c_attn"})]
)
@fusions
def test_default_adapter_targets_the_language_model(language, names, fusion):
    model = peft.get_peft_model(
        tiny_model(language=language, fusion=fusion), peft.LoraConfig(fan_in_fan_out=language == "gpt2")
    )
    found = [name.partition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert {name.rpartition(".")[2] for name in found} == names
    assert all(".language_model." in name for name in found) and len(found) == 2 * len(names)


def test_default_adapter_leaves_the_vlm_encoder_out():
    model = PrismerLMForConditionalGeneration.from_backbones(tiny_vlm("llava"))
    model = peft.get_peft_model(model, peft.LoraConfig())
    found = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(found) == 4 and not any("vision" in name for name in found)


@pytest.mark.parametrize("config", ["AdaLoraConfig", "LNTuningConfig", "VeraConfig", "OFTConfig", "LoHaConfig"])
def test_other_methods_have_defaults_too(config):
    options = (
        {"total_step": 10} if config == "AdaLoraConfig" else {"oft_block_size": 4} if config == "OFTConfig" else {}
    )
    model = peft.get_peft_model(tiny_model(), getattr(peft, config)(**options))
    model(**training_inputs(model.config)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".language_model." in name or "vera" in name for name in trained)


@fusions
@pytest.mark.parametrize("method", METHODS)
def test_adapter_and_own_modules_are_trained_saved_and_loaded(fusion, method, tmp_path):
    base = tiny_model(fusion=fusion)
    inputs = training_inputs(base.config)
    inputs["input_ids"] = prompts(base.config, 2, length=7, placeholders=True)
    inputs["labels"] = inputs["input_ids"].where(inputs["input_ids"] < 100, -100)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model = adapted(base, method, modules_to_save=own_modules(base)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(**inputs).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if ".language_model." in name and "lora_" not in name]
    assert not [name for name in trained if ".vision_encoders." in name]

    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(fusion=fusion), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    images = image_inputs(base.config, 2)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    questions = prompts(base.config, 4)
    generated = loaded.generate(input_ids=questions, **images, **settings)
    assert torch.equal(generated, loaded.generate(input_ids=questions, **images, **settings, use_cache=False))
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(**inputs).logits, tiny_model(fusion=fusion)(**inputs).logits)


@fusions
def test_a_merged_adapter_gives_the_same_logits(fusion):
    model = adapted(tiny_model(fusion=fusion))
    inputs = training_inputs(model.config)
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    assert type(merged) is PrismerLMForConditionalGeneration
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_with_an_adapter_loads_by_its_task(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base = PrismerLMForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = adapted(base, task_type="CAUSAL_LM")
    inputs = training_inputs(base.config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@fusions
def test_an_adapter_inside_is_saved_with_the_trained_weights(fusion, tmp_path):
    language = tiny_language_model()
    experts = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "experts_config": {"hidden_size": 32}}
    model = PrismerLMForConditionalGeneration.from_backbones(
        language, fusion=fusion, cross_attention_every=1, **experts
    )
    peft.inject_adapter_in_model(METHODS["lora"](target_modules=["q_proj", "v_proj"]), model.language_model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(tmp_path, trained_only=True)
    inputs = {"input_ids": prompts(model.config, 2), **image_inputs(model.config, 2)}
    loaded = PrismerLMForConditionalGeneration.from_pretrained(tmp_path, language=tiny_language_model())
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_around_the_model_is_not_saved_with_the_trained_weights(tmp_path):
    model = peft.get_peft_model(tiny_model(), METHODS["lora"](target_modules=["q_proj"])).get_base_model()
    with pytest.raises(ValueError, match="save that of get_peft_model by its own save_pretrained"):
        model.save_pretrained(tmp_path, trained_only=True)


@fusions
def test_trainer_trains_an_adapter_with_checkpointing(fusion, tmp_path):
    model = adapted(tiny_model(fusion=fusion).freeze_backbones())
    inputs = training_inputs(model.config, 4)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=3e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
    )

    def collate(samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    trainer = Trainer(model, arguments, train_dataset=[pick(inputs, row) for row in range(4)], data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_adapter_of_a_vlm_learns_with_experts(tmp_path):
    model = PrismerLMForConditionalGeneration.from_backbones(
        tiny_vlm("qwen2_5_vl"),
        experts=[{"name": "depth", "kind": "dense", "channels": 1}],
        experts_config={"hidden_size": 32, "num_latents": 3, "image_size": 32},
        image_token_id=500,
    )
    scatter_weights(model.model.experts_projection)
    inputs = vlm_inputs("qwen2_5_vl", 2, model.config) | image_inputs(model.config, 2)
    inputs["labels"] = inputs["input_ids"].where(inputs["input_ids"] < 90, -100)
    model = adapted(model, target_modules=None, modules_to_save=["experts", "experts_projection"]).train()
    model(**inputs).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval().save_pretrained(tmp_path)
