"""peft: its methods, its task types, its ways to save, load and merge, and what it adapts when it is not told."""

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Trainer

from modeling_prismer import (
    PrismerConfig,
    PrismerForConditionalGeneration,
    PrismerModel,
    PrismerProcessor,
    pretrained_path,
)

from .test_freezing_and_training import Samples, arguments
from .tiny import TOLERANCE, VOCAB_SIZE, image_inputs, prompts, tiny_config, tiny_model, training_inputs


peft = pytest.importorskip("peft")

from . import peft_methods  # noqa: E402


GENERATION = {"do_sample": False, "num_beams": 2, "max_new_tokens": 5}
GUIDE = peft_methods.rows_of_the_guide()


def with_lora(model, init_lora_weights=False, **kwargs):
    """By default with adapters that change what the model says, as after training."""
    kwargs.setdefault("target_modules", ["q_proj", "v_proj", "fc1"])
    config = peft.LoraConfig(r=4, init_lora_weights=init_lora_weights, **kwargs)
    return peft.get_peft_model(model, config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder):
    """The adapter of a saved model, and what the model says with it."""
    model = with_lora(PrismerForConditionalGeneration.from_pretrained(folder), task_type="CAUSAL_LM")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model(**training_inputs()).logits.detach()


# ---- what every method can do ----


@pytest.mark.parametrize("method", sorted(method.value for method in peft_methods.PEFT_TYPE_TO_CONFIG_MAPPING))
@pytest.mark.filterwarnings("ignore")
def test_each_method_does_as_the_guide_says(method, tmp_path):
    result, errors = peft_methods.examine(method, str(tmp_path))
    written = "run `python -m tests.modeling_prismer.peft_methods`"
    assert GUIDE.get(method) == peft_methods.row(method, result), f"{written}: {errors}"


def test_guide_gives_the_reason_for_each_no():
    assert all(row.rstrip(" |").endswith(".") for row in GUIDE.values() if "| no |" in row)


def test_shadow_runs_on_the_decoder():
    model = tiny_model().requires_grad_(False)
    inputs, plain = training_inputs(), tiny_model()(**training_inputs()).logits
    model.model.text_model = peft.get_peft_model(model.model.text_model, peft.ShadowConfig(init_weights=False))
    model(**inputs).loss.backward()
    assert all("shadow" in name for name, parameter in model.named_parameters() if parameter.grad is not None)
    assert not torch.allclose(model.eval()(**inputs).logits, plain)
    assert model.generate(input_ids=prompts(), **image_inputs(), **GENERATION).shape[0] == 3


VIRTUAL_TOKENS = ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"]


def with_virtual_tokens(method, folder):
    """With weights that change what the model says, as after training."""
    model, _ = peft_methods.adapted(method, str(folder))
    for parameter in model.eval().parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("method", VIRTUAL_TOKENS)
def test_virtual_tokens_in_generation_equal_training(method, tmp_path):
    model = with_virtual_tokens(method, tmp_path)
    images = image_inputs(2, experts=peft_methods.EXPERTS_HERE)
    if method == "MULTITASK_PROMPT_TUNING":
        images["task_ids"] = torch.tensor([0, 1])
    input_ids, attention_mask = prompts(2), torch.ones(2, 5, dtype=torch.long)
    input_ids[1, :2], input_ids[1, 2], attention_mask[1, :2] = 1, 0, 0  # a shorter prompt, padded
    generated = model.generate(
        **{"input_ids": input_ids, "attention_mask": attention_mask, **images},
        **{"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4},
        **{"return_dict_in_generate": True, "output_logits": True},
    )
    attention_mask = torch.cat([attention_mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    logits = model(input_ids=generated.sequences, attention_mask=attention_mask, **images).logits
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), logits[:, -5:-1], **TOLERANCE)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_with_beams_and_several_questions(method, tmp_path):
    model = with_virtual_tokens(method, tmp_path)
    inputs = {"input_ids": prompts(6), **image_inputs(2, experts=peft_methods.EXPERTS_HERE)}
    settings = {"do_sample": False, "num_beams": 3, "max_new_tokens": 4, "return_dict_in_generate": True}
    cached, without = (
        model.generate(**inputs, **settings, output_scores=True, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, without.sequences)
    torch.testing.assert_close(cached.sequences_scores, without.sequences_scores, **TOLERANCE)


# ---- what is adapted when no modules are named ----


@pytest.mark.parametrize("part", [None, "vision_model", "text_model"])
def test_lora_needs_no_names_of_modules(part):
    model = tiny_model()
    module = model if part is None else model.model.get_submodule(part)
    adapted = peft.get_peft_model(module, peft.LoraConfig()).targeted_module_names
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}
    if part is None:
        places = (
            "vision_model.layers",
            "resampler",
            "text_model.layers.0.self_attn",
            "text_model.layers.0.cross_attn",
        )
        assert all(any(place in name for name in adapted) for place in places)


def test_new_model_adds_default_modules_to_peft(monkeypatch):
    tables = peft.utils.constants
    for model_type in ("prismer", "prismer_vision_model", "prismer_text_model"):
        monkeypatch.delitem(tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, model_type, raising=False)
    monkeypatch.setitem(tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, "prismer", ["fc1"])
    tiny_model()
    assert tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["prismer_text_model"] == ["q_proj", "v_proj"]
    assert tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["prismer"] == ["q_proj", "v_proj"]
    assert tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["prismer"] == ["fc1"]


# ---- training ----


@pytest.mark.parametrize("task_type", [None, *(task.value for task in peft.TaskType)])
def test_every_task_type_trains_generates_saves_and_loads(tmp_path, folder, task_type):
    model = with_lora(tiny_model(), task_type=task_type)
    output = model(**training_inputs())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    said = model.generate(input_ids=prompts(), **image_inputs(), **GENERATION)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(PrismerForConditionalGeneration.from_pretrained(folder), tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(**training_inputs()).logits, output.logits)
    assert torch.equal(loaded.generate(input_ids=prompts(), **image_inputs(), **GENERATION), said)


@pytest.mark.parametrize("task_type", [task.value for task in peft.TaskType if task.value != "CAUSAL_LM"])
def test_prompt_learning_names_the_task_type_it_needs(task_type):
    config = peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=3)
    with pytest.raises(ValueError, match='it needs `task_type="CAUSAL_LM"`'):
        peft.get_peft_model(tiny_model(), config)(**training_inputs())


def test_trainer_trains_only_the_adapters(tmp_path):
    model = with_lora(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(model=model, args=arguments(tmp_path), train_dataset=Samples()).train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


def test_trainer_resumes_from_a_saved_adapter(tmp_path):
    def train(folder, **kwargs):
        trainer = Trainer(
            model=with_lora(tiny_model()),
            args=arguments(folder, max_steps=4, save_strategy="steps", save_steps=2),
            train_dataset=Samples(),
        )
        trainer.train(**kwargs)
        return peft.get_peft_model_state_dict(trainer.model)

    torch.manual_seed(0)
    straight = train(tmp_path / "straight")
    torch.manual_seed(1)  # other adapters to start with
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_changes_no_gradient(when):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = tiny_model()
        if checkpointing and when == "before":
            model.activation_checkpointing_enable()
        model = with_lora(model)
        if checkpointing and when == "after":
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model.train()(**training_inputs()).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients(checkpointing=False)
    for name, gradient in gradients(checkpointing=True).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("module", ["depth", "detection", "resampler", "adaptor"])
def test_modules_can_be_trained_whole_beside_the_adapters(tmp_path, module):
    model = with_lora(tiny_model(), init_lora_weights=True, modules_to_save=[module])
    torch.testing.assert_close(
        model(**training_inputs()).logits, tiny_model()(**training_inputs()).logits, **TOLERANCE
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**training_inputs()).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    expected = model.eval()(**training_inputs()).logits
    assert torch.equal(peft.PeftModel.from_pretrained(tiny_model(), tmp_path)(**training_inputs()).logits, expected)
    torch.testing.assert_close(model.merge_and_unload()(**training_inputs()).logits, expected, **TOLERANCE)


# ---- merging ----


def test_adapters_can_be_merged():
    model = with_lora(tiny_model())
    inputs = training_inputs()
    expected, said = model(**inputs).logits, model.generate(input_ids=prompts(), **image_inputs(), **GENERATION)
    assert not torch.allclose(expected, tiny_model()(**inputs).logits)
    merged = model.merge_and_unload()
    assert type(merged) is PrismerForConditionalGeneration
    torch.testing.assert_close(merged(**inputs).logits, expected, **TOLERANCE)
    assert torch.equal(merged.generate(input_ids=prompts(), **image_inputs(), **GENERATION), said)


@pytest.mark.filterwarnings("ignore:Model with")
def test_merging_keeps_separate_embeddings_apart(tmp_path):
    model = with_lora(tiny_model(), modules_to_save=["word_embeddings"])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    expected = model(**training_inputs()).logits
    with pytest.warns(UserWarning, match="no longer tied"):
        model.merge_and_unload().save_pretrained(tmp_path)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.config.tie_word_embeddings
    torch.testing.assert_close(loaded(**training_inputs()).logits, expected, **TOLERANCE)


# ---- saving and loading ----


def test_an_adapter_is_saved_without_the_model(adapter):
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {file.name for file in adapter[0].iterdir()} == files


@pytest.mark.parametrize("auto_class", [PrismerForConditionalGeneration, AutoModelForImageTextToText])
def test_the_folder_of_an_adapter_loads_as_a_model(adapter, auto_class):
    model = auto_class.from_pretrained(adapter[0])
    assert torch.equal(model(**training_inputs()).logits, adapter[1])


def test_auto_peft_model_needs_an_import_allowlist(tmp_path, folder):
    model = with_lora(PrismerForConditionalGeneration.from_pretrained(folder))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"import_allowlist=\['modeling_prismer"):
        peft.AutoPeftModel.from_pretrained(tmp_path)
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["modeling_prismer"])
    assert torch.equal(loaded(**training_inputs()).logits, model(**training_inputs()).logits)


@pytest.mark.parametrize("method", ["LORA", "PROMPT_TUNING"])
def test_auto_peft_model_for_causal_lm(tmp_path, folder, method):
    settings = {"LORA": {"init_lora_weights": False}, "PROMPT_TUNING": {"num_virtual_tokens": 3}}[method]
    config = peft_methods.PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(PrismerForConditionalGeneration.from_pretrained(folder), config).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.get_base_model()) is PrismerForConditionalGeneration
    assert torch.equal(loaded(**training_inputs()).logits, model(**training_inputs()).logits)
    said = model.generate(input_ids=prompts(), **image_inputs(), **GENERATION)
    assert torch.equal(loaded.generate(input_ids=prompts(), **image_inputs(), **GENERATION), said)


@pytest.mark.parametrize(
    "task_type, auto_class",
    [
        ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
        ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
        ("TOKEN_CLS", "AutoPeftModelForTokenClassification"),
        ("QUESTION_ANS", "AutoPeftModelForQuestionAnswering"),
    ],
)
def test_other_auto_peft_models_are_refused(tmp_path, folder, task_type, auto_class):
    with_lora(PrismerForConditionalGeneration.from_pretrained(folder), task_type=task_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class.*PrismerConfig"):
        getattr(peft, auto_class).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use a specific class for your task type"):
        peft.AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["modeling_prismer"])
    PrismerForConditionalGeneration.from_pretrained(tmp_path)  # takes any


def test_adapter_of_the_base_model_extracts_features(tmp_path, folder):
    model = with_lora(PrismerModel.from_pretrained(folder), task_type="FEATURE_EXTRACTION")
    model.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path)
    inputs = {"input_ids": prompts(), **image_inputs()}
    assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_adapter_without_new_tokens_holds_no_embeddings(adapter):
    assert all("lora_" in name for name in load_file(adapter[0] / "adapter_model.safetensors"))


def with_new_tokens(folder):
    """The saved model with four more tokens, whose rows have been trained."""
    model = PrismerForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(VOCAB_SIZE + 4)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB_SIZE:] += 1.0
        model.get_output_embeddings().bias[VOCAB_SIZE:] += 1.0
    return model


def inputs_with_new_tokens():
    inputs = training_inputs()
    inputs["input_ids"][:, 3] = inputs["labels"][:, 3] = VOCAB_SIZE + 1
    return inputs


@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": ["word_embeddings"]}, {"trainable_token_indices": [VOCAB_SIZE, 61]}], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_new_tokens_are_saved_with_an_adapter(tmp_path, folder, settings):
    model = with_lora(with_new_tokens(folder), **settings)
    model.save_pretrained(tmp_path)
    base = PrismerForConditionalGeneration.from_pretrained(folder)
    base.resize_token_embeddings(VOCAB_SIZE + 4)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = inputs_with_new_tokens()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises((RuntimeError, IndexError), match="size"):  # as for other models: resize first
        peft.PeftModel.from_pretrained(PrismerForConditionalGeneration.from_pretrained(folder), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_new_tokens_are_in_the_merged_model(tmp_path, folder):
    model = with_lora(with_new_tokens(folder))
    inputs = inputs_with_new_tokens()
    expected = model(**inputs).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    merged = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert merged.config.vocab_size == merged.config.text_config.vocab_size == VOCAB_SIZE + 4
    torch.testing.assert_close(merged(**inputs).logits, expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_auto_peft_model_loads_new_tokens(tmp_path):
    path = pretrained_path("prismer-easy-vqa")
    processor = PrismerProcessor.from_pretrained(path, experts=None)
    processor.tokenizer.add_tokens(["[DEFECT]"])
    model = PrismerForConditionalGeneration.from_pretrained(path)
    model.resize_token_embeddings(len(processor.tokenizer))
    model = with_lora(model, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == len(processor.tokenizer)
    expected = model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, expected)
    assert torch.equal(loaded.get_output_embeddings().weight, expected)


def test_vocab_size_is_that_of_the_text_config():
    config = tiny_config()
    config.vocab_size = 70
    assert config.vocab_size == config.text_config.vocab_size == 70
    assert PrismerConfig(vocab_size=80).text_config.vocab_size == 80
    assert "vocab_size" not in config.to_dict()


# ---- adapters without a wrapper ----

# transformers 5.24 asks for a peft that is newer than the newest
TOO_OLD = Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version("0.22")


@pytest.mark.skipif(not TOO_OLD, reason="peft is new enough for this transformers")
def test_add_adapter_names_the_peft_it_needs():
    model = tiny_model()
    with pytest.raises(ValueError, match="PEFT.*0.22"):
        model.add_adapter(peft.LoraConfig(init_lora_weights=False))
    assert torch.equal(model(**training_inputs()).logits, tiny_model()(**training_inputs()).logits)


@pytest.mark.skipif(TOO_OLD, reason="add_adapter of transformers 5.24 needs peft 0.22")
def test_adapters_can_be_put_into_a_model_without_a_wrapper(tmp_path):
    model = tiny_model()
    model.set_attn_implementation("eager")  # whose products an adapter does not rearrange: equal to the last bit
    plain = model(**training_inputs()).logits
    model.add_adapter(peft.LoraConfig(init_lora_weights=False), "captions")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    expected = model(**training_inputs()).logits
    assert not torch.allclose(expected, plain)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(model(**training_inputs()).logits, plain)

    loaded = tiny_model()
    loaded.set_attn_implementation("eager")
    loaded.load_adapter(str(tmp_path), "captions")
    loaded.add_adapter(peft.LoraConfig(init_lora_weights=False), "answers")
    loaded.set_adapter("captions")
    assert torch.equal(loaded(**training_inputs()).logits, expected)
    loaded.delete_adapter(["captions", "answers"])
    assert torch.equal(loaded(**training_inputs()).logits, plain)
