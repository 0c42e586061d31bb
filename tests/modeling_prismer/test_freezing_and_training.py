"""Frozen backbones, and training through Trainer."""

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from modeling_prismer import PrismerForConditionalGeneration

from .tiny import TOLERANCE, image_inputs, pick, tiny_model, training_inputs


def is_vision_backbone(name):
    return name.startswith("model.vision_model.layers.") and ".adaptor." not in name


def is_language_backbone(name):
    new = (".adaptor.", ".cross_attn.", ".cross_attn_layer_norm.", ".layers.2.")  # the last is the output layer
    return name.startswith("model.text_model.layers.") and not any(part in name for part in new)


class Samples(torch.utils.data.Dataset):
    """One dict a sample, as the processor and the default collator have it."""

    def __init__(self, number=4, **kwargs):
        self.inputs = training_inputs(number, **kwargs)
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return pick(self.inputs, index)


def arguments(folder, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return TrainingArguments(**(defaults | kwargs))


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("language", [False, True])
def test_freezing_covers_the_backbones_only(model, vision, language):
    assert model.freeze_backbones(vision=vision, language=language) is model
    for name, parameter in model.named_parameters():
        frozen = (vision and is_vision_backbone(name)) or (language and is_language_backbone(name))
        assert parameter.requires_grad == (not frozen), name


def test_freezing_covers_both_by_default_and_is_undone(model):
    model.freeze_backbones()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(is_vision_backbone(name) or is_language_backbone(name) for name in frozen)
    model.freeze_backbones(vision=True, language=False)
    assert {name for name in frozen if is_vision_backbone(name)} == {
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    }
    model.freeze_backbones(vision=False, language=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_stems_keep_their_statistics(model):
    stems = model.model.vision_model.expert_stems
    stems["depth"].requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in stems.named_buffers()}
    model.train()(**training_inputs())
    changed = {
        name.partition(".")[0] for name, buffer in stems.named_buffers() if not torch.equal(buffer, before[name])
    }
    assert {name.partition(".")[0] for name in changed} == set(stems) - {"depth"}


@pytest.mark.filterwarnings("ignore:.*will be removed in v6")
@pytest.mark.parametrize(
    "vision, language, gradient_checkpointing", [(True, True, True), (True, False, False), (False, False, False)]
)
def test_trainer_changes_only_unfrozen_weights(tmp_path, vision, language, gradient_checkpointing):
    model = tiny_model().freeze_backbones(vision=vision, language=language)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = arguments(tmp_path, gradient_checkpointing=gradient_checkpointing)
    Trainer(model=model, args=args, train_dataset=Samples()).train()
    for name, parameter in model.named_parameters():
        frozen = (vision and is_vision_backbone(name)) or (language and is_language_backbone(name))
        assert torch.equal(parameter, before[name]) == frozen, name
        assert torch.isfinite(parameter).all(), name
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert model.model.vision_model.expert_stems["depth"].norms[0].num_batches_tracked > 0


def test_a_model_learns_its_samples(tmp_path):
    torch.manual_seed(0)
    samples = Samples()
    model = PrismerForConditionalGeneration(tiny_model().config).freeze_backbones()
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=4)
    Trainer(model=model, args=args, train_dataset=samples).train()
    model.config.label_smoothing = 0.0
    with torch.no_grad():
        assert (model.eval()(**samples.inputs).loss_per_sample < 1.0).all()
    prompt = samples.inputs["input_ids"][:, :2]
    said = model.generate(input_ids=prompt, **image_inputs(4), do_sample=False, max_new_tokens=5)
    assert torch.equal(said, samples.inputs["input_ids"])


def test_only_labels_are_labels():
    assert find_labels(PrismerForConditionalGeneration) == ["labels"]


def test_trainer_keeps_the_tensors_of_the_six_experts(model, tmp_path):
    trainer = Trainer(model=model, args=arguments(tmp_path))
    trainer._set_signature_columns_if_needed()
    needed = {*training_inputs(), "detection_rows", "expert_mask", "sample_weight"}
    assert needed <= set(trainer._signature_columns)


def test_accumulated_gradients_equal_one_batch(tmp_path):
    samples = Samples(experts=[])
    samples.inputs["labels"][0, :5] = -100  # unlike numbers of tokens
    samples.inputs["sample_weight"] = torch.tensor([1.0, 0.5, 0.0, 0.3])
    trained = []
    for size, steps in ((4, 1), (1, 4)):
        model = tiny_model(experts=[])
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0,
            learning_rate=0.1,
        )
        Trainer(model=model, args=args, train_dataset=samples).train()
        trained.append(dict(model.named_parameters()))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter, trained[1][name], msg=name, **TOLERANCE)


def test_trainer_evaluates_and_predicts(model, tmp_path):
    samples = Samples()
    with torch.no_grad():
        expected = model(**samples.inputs)
    trainer = Trainer(model=model, args=arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=samples)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    prediction = trainer.predict(samples)
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), expected.logits, **TOLERANCE)
    assert torch.equal(torch.from_numpy(prediction.label_ids), samples.inputs["labels"])


def test_seq2seq_trainer_generates(model, tmp_path):
    samples = Samples()
    samples.inputs.pop("labels")
    samples.inputs["input_ids"] = samples.inputs["input_ids"][:, :3]
    samples.inputs["attention_mask"] = samples.inputs["attention_mask"][:, :3]
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_max_length=9,
        per_device_eval_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    predicted = Seq2SeqTrainer(model=model, args=args).predict(samples, num_beams=2, do_sample=False).predictions
    expected = model.generate(**samples.inputs, max_length=9, num_beams=2, do_sample=False)
    assert torch.equal(torch.from_numpy(predicted)[:, : expected.shape[1]], expected)


def test_training_goes_on_where_it_stopped(tmp_path):
    def train(steps, folder, resume=None):
        model = tiny_model(experts=[])
        args = arguments(
            tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        Trainer(model=model, args=args, train_dataset=Samples(8, experts=[])).train(resume_from_checkpoint=resume)
        return model

    straight = train(4, "straight")
    train(2, "parts")
    resumed = train(4, "parts", resume=str(tmp_path / "parts" / "checkpoint-2"))
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path / "straight" / "checkpoint-4")
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
        assert torch.equal(parameter, loaded.get_parameter(name)), name
