"""`Trainer`, `Seq2SeqTrainer` and trl's `SFTTrainer` over rows of pictures, with `DataCollatorForPrismer`."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from modeling_prismer import DataCollatorForPrismer, PrismerForConditionalGeneration, PrismerProcessor, pretrained_path

from .tiny import image_inputs, prompts, tiny_config, tiny_model, training_inputs


def picture(color):
    image = Image.new("RGB", (64, 64), (240, 244, 250))
    ImageDraw.Draw(image).ellipse((16, 18, 46, 48), fill=color)
    return image


RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255))
# the third is wrong: what is said must not come from there
ROWS = [
    {"image": RED, "text": "What color is the shape?", "suffix": "red"},
    {"image": BLUE, "text": "Is it blue?", "suffix": "yes"},
    {"image": RED, "text": "What color is the shape?", "suffix": "gray"},
    {"image": BLUE, "text": "What shape is in the image?", "suffix": "circle"},
    {"image": RED, "text": "Is there a blue circle?", "suffix": "no"},
    {"image": BLUE, "text": "What color is the shape?", "suffix": "blue"},
]
SAID = ["red", "yes", "red", "circle", "no", "blue"]


@pytest.fixture(scope="module")
def processor():
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"))
    processor.experts = processor.experts.only("edge")
    return processor


@pytest.fixture
def model():
    return PrismerForConditionalGeneration.from_pretrained(pretrained_path("prismer-easy-vqa"), dtype=torch.float32)


def arguments(arguments_class, folder, **kwargs):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    return arguments_class(**(defaults | kwargs))


def texts(processor, ids):
    return processor.post_process_generation(np.where(ids < 0, processor.tokenizer.pad_token_id, ids))


@torch.no_grad()
def loss_of(model, processor, rows=ROWS):
    """The mean over the samples, each in a batch of its own."""
    collator = DataCollatorForPrismer(processor)
    return np.mean([model.eval()(**collator([row])).loss.item() for row in rows])


# ---- Trainer


def test_trainer_learns_from_rows(model, processor, tmp_path):
    # one answer that the checkpoint would not give, and one of an unlike length
    rows = [
        {"image": RED, "text": "Is it warm?", "suffix": "circle"},
        {"image": BLUE, "text": "Warm?", "suffix": "no"},
    ]
    args = arguments(TrainingArguments, tmp_path, max_steps=12, learning_rate=5e-4, lr_scheduler_type="constant")
    Trainer(model=model, args=args, train_dataset=rows, data_collator=DataCollatorForPrismer(processor)).train()
    inputs = DataCollatorForPrismer(processor, with_suffix=False)(rows)
    generated = model.eval().generate(**inputs)
    assert processor.post_process_generation(generated, inputs["input_ids"].shape[1]) == ["circle", "no"]


def test_trainer_gives_logits_to_compute_metrics(model, processor, tmp_path):
    def compute_metrics(prediction):
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        right = (logits.argmax(-1) == labels) | (labels == -100)
        return {"exact_match": right.all(axis=1).mean()}

    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path),
        eval_dataset=ROWS,
        data_collator=DataCollatorForPrismer(processor),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] == pytest.approx(5 / 6)
    assert metrics["eval_loss"] == pytest.approx(loss_of(model, processor), rel=1e-4)


def test_dropped_columns_are_an_error_with_a_remedy(processor, tmp_path):
    args = arguments(TrainingArguments, tmp_path, remove_unused_columns=True, max_steps=1)
    trainer = Trainer(tiny_model(), args, train_dataset=ROWS, data_collator=DataCollatorForPrismer(processor))
    with pytest.raises(ValueError, match="has no 'image'.*remove_unused_columns=False"):
        trainer.train()


@pytest.mark.parametrize("trainer_class", [Trainer, Seq2SeqTrainer])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole model", "adapter"])
def test_label_smoothing_of_the_trainer_is_refused(trainer_class, adapted, tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig()) if adapted else tiny_model()
    arguments_class = Seq2SeqTrainingArguments if trainer_class is Seq2SeqTrainer else TrainingArguments
    with pytest.raises(ValueError, match="set config.label_smoothing instead"):
        trainer_class(model, arguments(arguments_class, tmp_path, label_smoothing_factor=0.1))
    trainer_class(model, arguments(arguments_class, tmp_path, label_smoothing_factor=0.0))


def test_refusal_of_label_smoothing_leaves_the_config_alone():
    config = tiny_config()
    assert config == tiny_config() == copy.deepcopy(config)
    assert "problem_type" not in config.to_dict() and config.problem_type != "regression"


# ---- weights in half precision


def train_once(model, autocast=None):
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        model.train()(**training_inputs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_half_precision_weights_is_warned_of_once(caplog, dtype):
    model = tiny_model().to(dtype)
    train_once(model)
    train_once(model)
    assert caplog.text.count("dtype=torch.float32") == caplog.text.count("bf16=True") == 1
    assert str(dtype).removeprefix("torch.") in caplog.text


def test_other_uses_of_half_precision_are_not_warned_of(caplog):
    train_once(tiny_model(), autocast=torch.bfloat16)
    model = tiny_model().half()
    model(**training_inputs())
    with torch.no_grad():
        train_once(model)
    train_once(get_peft_model(model, LoraConfig()))  # whose weights are float32
    assert not caplog.text


def test_weights_are_examined_once_and_after_a_change_of_type(monkeypatch, caplog):
    model, walks = tiny_model().train(), []
    parameters = model.model.parameters
    monkeypatch.setattr(model.model, "parameters", lambda *args: walks.append(1) or parameters(*args))
    for _ in range(3):
        train_once(model)
    assert len(walks) == 1 and not caplog.text
    train_once(model.half())
    assert len(walks) == 2 and "float16 weights are trained" in caplog.text


# ---- Seq2SeqTrainer


class AnswerTrainer(Seq2SeqTrainer):
    """As in docs/generation.md: the predictions are what follows the prompt."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        loss, generated, labels = super().prediction_step(model, inputs, *args, **kwargs)
        return loss, generated[:, inputs["input_ids"].shape[1] :], labels


@pytest.mark.parametrize("trainer_class", [Seq2SeqTrainer, AnswerTrainer])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole model", "adapter"])
def test_seq2seq_trainer_does_not_see_the_answers(model, processor, tmp_path, trainer_class, adapted):
    seen = {}

    def compute_metrics(prediction):
        seen["said"], seen["wanted"] = texts(processor, prediction.predictions), texts(processor, prediction.label_ids)
        return {"exact_match": np.mean([a == b for a, b in zip(seen["said"], seen["wanted"])])}

    expected_loss = loss_of(model, processor)
    trainer = trainer_class(
        model=get_peft_model(model, LoraConfig()) if adapted else model,
        args=arguments(Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True, generation_num_beams=2),
        eval_dataset=ROWS,
        data_collator=DataCollatorForPrismer(processor),
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert seen["wanted"] == [row["suffix"] for row in ROWS]
    if trainer_class is AnswerTrainer:
        assert seen["said"] == SAID and metrics["eval_exact_match"] == pytest.approx(5 / 6)
    else:  # as `generate` does, it gives the prompt as well
        assert seen["said"] == [f"{row['text']} {answer}".lower() for row, answer in zip(ROWS, SAID)]
    assert metrics["eval_loss"] == pytest.approx(expected_loss, rel=1e-4)


def test_seq2seq_trainer_predicts_from_prompts_alone(model, processor, tmp_path):
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True),
        data_collator=DataCollatorForPrismer(processor, with_suffix=False),
    )
    prediction = trainer.predict(ROWS, max_new_tokens=4)
    assert [said.rsplit("? ")[-1] for said in texts(processor, prediction.predictions)] == SAID
    assert prediction.label_ids is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_given", [True, False])
def test_labels_are_no_part_of_the_prompt(side, mask_given):
    model, images, prompt = tiny_model(), image_inputs(2), prompts(2)
    lengths, answers = [5, 3], [[20, 2], [21, 22, 2]]
    rows, labels = [], []
    for row, (length, answer) in enumerate(zip(lengths, answers)):
        padding = [1] * (7 - length - len(answer))
        for made, start in ((rows, prompt[row, :length].tolist()), (labels, [-100] * length)):
            filling = padding if made is rows else [-100] * len(padding)
            made.append([*filling, *start, *answer] if side == "left" else [*start, *answer, *filling])
    inputs = {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}
    if mask_given:
        inputs["attention_mask"] = inputs["input_ids"].ne(1).long()
    settings = {"do_sample": False, "num_beams": 3, "max_new_tokens": 6}
    generated = model.generate(**inputs, **images, sample_weight=torch.ones(2), **settings)

    alone = torch.full((2, 7), 1)
    for row, length in enumerate(lengths):
        alone[row, -length:] = prompt[row, :length]
    assert torch.equal(generated, model.generate(input_ids=alone, **images, **settings))
    assert torch.equal(generated[:, :7], alone)


# ---- trl


def test_sft_trainer_with_the_models_own_loss(model, processor, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")

    class PrismerSFTTrainer(trl.SFTTrainer):
        """As in docs/generation.md: trl's own loss leaves out the layers between the decoder and its last matrix."""

        compute_loss = Trainer.compute_loss

    expected = loss_of(model, processor)
    losses, before = {}, model.lm_head.dense.weight.detach().clone()
    rows = Dataset.from_list(ROWS)
    for trainer_class in (trl.SFTTrainer, PrismerSFTTrainer):
        trainer = trainer_class(
            model=model,
            args=arguments(trl.SFTConfig, tmp_path, max_steps=2, bf16=False),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=DataCollatorForPrismer(processor),
            processing_class=processor,
        )
        losses[trainer_class] = trainer.evaluate()["eval_loss"]
    assert losses[PrismerSFTTrainer] == pytest.approx(expected, rel=1e-4)
    # if this fails, trl has learned of such heads: the class above, and what the guide says of it, can go
    assert losses[trl.SFTTrainer] > 1.2 * expected
    trainer.train()
    assert not torch.equal(model.lm_head.dense.weight, before)
