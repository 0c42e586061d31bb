"""Training of PrismerLM: Trainer, frozen parts, checkpointing, half precision, packed rows and compilation."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_prismer.cache import CACHE_NAME

from .tiny_lm import (
    FUSIONS,
    TOLERANCE,
    image_inputs,
    pick,
    prompts,
    scatter_weights,
    shared_model,
    tiny_config,
    tiny_model,
    training_inputs,
)


fusions = pytest.mark.parametrize("fusion", FUSIONS)
FROZEN = ("model.language_model.", "model.vision_encoders.")


def frozen_model(fusion="prefix", **kwargs):
    return tiny_model(fusion=fusion, **kwargs).freeze_backbones()


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def uneven_samples(config, number=4):
    """Rows with different numbers of learned tokens."""
    inputs = training_inputs(config, number)
    for row in range(number):
        inputs["labels"][row, : -1 - row] = -100
    return [pick(inputs, row) for row in range(number)]


def stack(samples):
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


# ---- Trainer ----


def trainer_for(model, folder, samples, **kwargs):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
    }
    return Trainer(model, TrainingArguments(**arguments | kwargs), train_dataset=samples, data_collator=stack)


@fusions
def test_trainer_learns_and_leaves_the_backbones_alone(fusion, tmp_path):
    model = frozen_model(fusion)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path, uneven_samples(model.config), max_steps=8, remove_unused_columns=False)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or not name.startswith(FROZEN), name
    frozen = [parameter for name, parameter in model.named_parameters() if name.startswith(FROZEN)]
    assert all(parameter.grad is None for parameter in frozen)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(map(id, frozen))
    assert optimized == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_trainer_keeps_the_columns_of_the_published_experts(tmp_path):
    model = frozen_model()
    samples = uneven_samples(model.config)
    trainer = trainer_for(model, tmp_path, samples)
    columns = {"input_ids", "labels", "pixel_values", "pixel_values_1", "depth_values", "segmentation_ids"}
    trainer._set_signature_columns_if_needed()
    assert columns <= set(trainer._signature_columns)
    assert trainer.label_names == ["labels"]


def test_a_frozen_encoder_builds_no_graph():
    model = frozen_model()
    model.enable_input_require_grads()  # as gradient checkpointing needs it
    features = model.get_image_features(**image_inputs(model.config, 2))
    assert not features.last_hidden_state.requires_grad
    assert features.pooler_output.requires_grad


@fusions
def test_the_loss_is_the_mean_over_all_tokens_of_a_step(fusion, tmp_path):
    """With gradient accumulation, too: rows with few tokens do not count more."""
    config = tiny_config(fusion=fusion, experts=[])  # the statistics of BatchNorm are those of a batch
    samples = uneven_samples(config)
    model = frozen_model(fusion, experts=[])
    logits, labels = model(**stack(samples)).logits[:, :-1], stack(samples)["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(**stack(samples)).loss, expected)
    number = (labels != -100).sum()
    parts = [model(**stack(part), num_items_in_batch=number).loss for part in (samples[:1], samples[1:])]
    torch.testing.assert_close(sum(parts), expected)

    trained = []
    for batch_size, steps in ((4, 1), (1, 4)):
        model = frozen_model(fusion, experts=[])
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer = trainer_for(model, tmp_path, samples, **options)
        trainer.train()
        assert trainer.model_accepts_loss_kwargs
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
        trained.append(dict(model.named_parameters()))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, **TOLERANCE)


# ---- precision and memory ----


@fusions
@pytest.mark.parametrize("language", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(fusion, language, use_reentrant):
    model = frozen_model(fusion, language=language, question_queries=True)
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        model(**training_inputs(model.config)).loss.backward()
        found.append(gradients_of(model))
    expected, checkpointed = found
    missing = {name for name in expected if name not in checkpointed}
    assert not missing and not any(name.startswith(FROZEN) for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, **TOLERANCE)


@fusions
def test_training_under_autocast(fusion):
    model = frozen_model(fusion)
    inputs = training_inputs(model.config)
    expected = model.train()(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.1)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@fusions
@pytest.mark.parametrize("queries", [False, True])
def test_a_language_model_in_bfloat16_under_experts_in_float32(fusion, queries):
    model = frozen_model(fusion, question_queries=queries)
    model.language_model.to(torch.bfloat16)
    inputs = training_inputs(model.config)
    outputs = model.train()(**inputs)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.image_outputs.pooler_output.dtype == torch.float32
    outputs.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    model.eval().generate(prompts(model.config, 2), **image_inputs(model.config, 2), max_new_tokens=3, num_beams=2)
    candidates = torch.tensor([[5, 6], [7, 8]])
    ranking = model.rank_candidates(
        candidates,
        torch.ones_like(candidates),
        2,
        inputs["input_ids"],
        inputs["attention_mask"],
        **pick_images(inputs),
    )
    assert ranking.scores.isfinite().all()


def pick_images(inputs):
    return {name: tensor for name, tensor in inputs.items() if name.endswith(("_values", "_ids")) and tensor.ndim > 2}


# ---- packed rows: many questions about an image in one row ----


def pack(config, questions: torch.Tensor) -> dict[str, torch.Tensor]:
    """`questions` `(number, length)` behind the placeholders of one image, each of which sees the image and itself."""
    number, length = questions.shape
    placeholders = config.image_seq_length if config.fusion == "prefix" else 0
    image = torch.full((placeholders,), config.image_token_id)
    input_ids = torch.cat([image, questions.flatten()])[None]
    owner = torch.cat([torch.full((placeholders,), -1), torch.arange(number).repeat_interleave(length)])
    mask = (owner[:, None] == owner[None]) | (owner[None] == -1)
    positions = torch.cat([torch.arange(placeholders), (placeholders + torch.arange(length)).repeat(number)])
    return {"input_ids": input_ids, "attention_mask": mask.tril()[None, None], "position_ids": positions[None]}


@fusions
@pytest.mark.parametrize("language", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_questions_give_the_logits_of_their_rows(fusion, language, attention):
    model = tiny_model(language=language, fusion=fusion)
    model.set_attn_implementation(attention)
    images = image_inputs(model.config, 1)
    rows = prompts(model.config, 3)
    packed = pack(model.config, rows[:, -5:])
    expected = model(input_ids=rows, **images).logits[:, -5:]
    logits = model(**packed, **images).logits[0, -15:].unflatten(0, (3, 5))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    packed["labels"] = packed["input_ids"].clamp(max=99)
    model.train()(**packed, **images).loss.backward()


# ---- compilation and export ----


def test_a_compiled_model_gives_the_same_logits():
    model = shared_model()
    inputs = {"input_ids": prompts(model.config, 2)}
    with torch.no_grad():
        inputs["encoder_outputs"] = model.get_image_features(**image_inputs(model.config, 2))
        torch.compiler.reset()
        compiled = torch.compile(model.forward, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


@fusions
def test_a_decode_step_is_one_graph(fusion):
    model = copy.deepcopy(shared_model(fusion=fusion))
    input_ids, images = prompts(model.config, 2), image_inputs(model.config, 2)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([input_ids, input_ids[:, -1:]], dim=1), **images).logits[:, -1:]
        outputs = model(input_ids=input_ids, **images, use_cache=True)
        torch.compiler.reset()
        step = torch.compile(model.forward, backend="eager", fullgraph=True)
        logits = step(
            input_ids=input_ids[:, -1:],
            position_ids=torch.full((2, 1), input_ids.shape[1]),
            encoder_outputs=outputs.image_outputs,
            mm_token_type_ids=torch.zeros(2, 1, dtype=torch.long),
            cache=getattr(outputs, CACHE_NAME),
        ).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


def test_all_trained_weights_get_a_gradient():
    """Without an unused one, DDP needs no search for unused parameters."""
    for fusion in FUSIONS:
        model = scatter_weights(frozen_model(fusion, question_queries=True)).train()
        model(**training_inputs(model.config)).loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
