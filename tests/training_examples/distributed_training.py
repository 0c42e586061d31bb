"""The functions that test_distributed.py runs in one and in two processes: the recipes' trainer on small models."""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from modeling_prismer import DataCollatorForPrismer, PrismerForConditionalGeneration, PrismerProcessor
from tests.modeling_prismer.tiny import tiny_model, training_inputs


NUM_SAMPLES = 8
CANDIDATES = ["red", "green", "blue", "white", "a square", "red square", "yes", "no"]


def samples() -> list[dict[str, torch.Tensor]]:
    """Samples with texts of different lengths and weights. Of every four samples, the last two have no depth."""
    inputs = training_inputs(NUM_SAMPLES)
    generator = torch.Generator().manual_seed(2)
    for row, length in enumerate(torch.randint(4, 8, (NUM_SAMPLES,), generator=generator)):
        inputs["attention_mask"][row, length:] = 0
        inputs["labels"][row, length:] = -100
    inputs["sample_weight"] = torch.rand(NUM_SAMPLES, generator=generator) + 0.2
    # fixed, since each process would draw its own rows
    inputs["detection_rows"] = torch.randint(128, inputs["detection_ids"].shape, generator=generator)
    inputs["expert_mask"] = torch.rand(NUM_SAMPLES, 6, generator=generator) < 0.8
    inputs["expert_mask"][:, 0] = torch.arange(NUM_SAMPLES) % 4 < 2
    return [{name: tensor[row] for name, tensor in inputs.items()} for row in range(NUM_SAMPLES)]


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def without_batch_statistics(model: PrismerForConditionalGeneration) -> PrismerForConditionalGeneration:
    """Keeps BatchNorm in evaluation mode, so that the loss of a sample does not depend on the rest of its batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.register_forward_pre_hook(lambda *_: [norm.eval() for norm in norms] and None)
    return model


def model_without_batch_statistics() -> PrismerForConditionalGeneration:
    return without_batch_statistics(tiny_model(label_smoothing=0.1))


class Notes(TrainerCallback):
    """Records the gradients of the last optimizer step, and the loss of every step."""

    def __init__(self):
        self.gradients, self.losses = {}, []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def arguments(folder: Path, **kwargs) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "report_to": [],
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**{**defaults, **kwargs})


def train(folder: Path, model=None, **kwargs):
    """Trains on the samples, and returns the trainer and the notes."""
    from training import PrismerTrainer

    notes = Notes()
    model = model_without_batch_statistics() if model is None else model
    trainer = PrismerTrainer(model, arguments(folder, **kwargs), train_dataset=samples(), callbacks=[notes])
    trainer.train()
    return trainer, notes


def gradients(folder: Path, batch_size: int, accumulated: int = 1, **kwargs) -> dict[str, torch.Tensor]:
    """The gradients of one optimizer step over all samples."""
    return train(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        **kwargs,
    )[1].gradients


def training_run(folder: Path, batch_size: int, **kwargs):
    """Two epochs of two steps of four samples. With SGD, since Adam amplifies rounding errors of small gradients."""
    options = {"per_device_train_batch_size": batch_size, "num_train_epochs": 2, "learning_rate": 1e-3, "optim": "sgd"}
    options |= kwargs
    return train(folder, **options)


def questions(image_folder: Path) -> datasets.Dataset:
    """11 questions. With batches of two in two processes, the last batch must be padded."""
    names = sorted(path.name for path in image_folder.glob("*.png"))[:11]
    rows = {"image": [str(image_folder / name) for name in names], "image_id": names, "suffix": ["red"] * 11}
    rows["text"] = ["what color is it" if number % 3 else "is it red" for number in range(11)]
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))


def answering_trainer(folder: Path, checkpoint: Path, candidates: list[str] | None, train_dataset=None, **kwargs):
    from training import PrismerTrainer

    processor = PrismerProcessor.from_pretrained(checkpoint)
    processor.task = "vqa"
    return PrismerTrainer(
        without_batch_statistics(PrismerForConditionalGeneration.from_pretrained(checkpoint)),
        arguments(folder, per_device_eval_batch_size=2, **kwargs),
        train_dataset=train_dataset,
        processing_class=processor,
        data_collator=DataCollatorForPrismer(processor),
        eval_collator=DataCollatorForPrismer(processor, with_suffix=False),
        candidates=candidates,
        num_ranked=4,
        # a frequent letter is a second end token, so that some answers end earlier
        generation={"max_new_tokens": 5, "eos_token_id": [2, processor.tokenizer.convert_tokens_to_ids("u")]},
    )


def predict(folder: Path, checkpoint: Path, image_folder: Path, candidates: list[str] | None) -> list[str]:
    return answering_trainer(folder, checkpoint, candidates).predict_texts(questions(image_folder))


def seen_of_stream(folder: Path, shards: list[int], passes: int) -> tuple[list[list[int]], int]:
    """The rows of each batch that this process read, and the number of steps. `shards` has the rows of each file."""
    from training import PrismerTrainer

    def read(files):
        for file in files:
            yield from ({"number": 100 * file + row} for row in range(shards[file]))

    batches = []

    def collate(rows):
        batch = stacked([samples()[row["number"] % NUM_SAMPLES] for row in rows])
        length = 5 + rows[0]["number"] % 3  # batches of different lengths
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name] = batch[name][:, :length]
        batches.append([row["number"] for row in rows])
        return batch

    class Seen(TrainerCallback):
        def __init__(self):
            self.passes = 0

        def on_epoch_end(self, args, state, control, **kwargs):
            self.passes += 1
            control.should_training_stop = self.passes == passes

    rows = datasets.IterableDataset.from_generator(read, gen_kwargs={"files": list(range(len(shards)))})
    trainer = PrismerTrainer(
        model_without_batch_statistics(),
        arguments(folder, per_device_train_batch_size=2, max_steps=20),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Seen()],
    )
    trainer.train()
    return batches, trainer.state.global_step


def answer_questions(folder: Path, checkpoint: Path, image_folder: Path):
    """Runs the VQA recipe by its command line: labelling, training, evaluation."""
    import run_vqa

    questions = image_folder / "questions.jsonl"
    command = f"run_vqa.py --model {checkpoint} --train_data {questions} --eval_data {questions} --do_train --do_eval"
    command += f" --output_dir {folder / 'answers'} --image_size 32 --num_train_epochs 1 --total_batch_size 8"
    command += " --per_device_train_batch_size 2 --per_device_eval_batch_size 3 --use_cpu --disable_tqdm true"
    sys.argv = command.split()
    run_vqa.main()


def in_two_processes(folder: Path, checkpoint: Path, image_folder: Path):
    """Writes the results of each process to `<name>_<process>.safetensors` and `facts_<process>.json`."""
    rank = PartialState(cpu=True).process_index
    facts = {"processes": PartialState().num_processes}

    def keep(name, tensors):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}_{rank}.safetensors")

    keep("even", gradients(folder, 4))
    keep("accumulated", gradients(folder, 2, accumulated=2))
    keep("uneven", gradients(folder, 5, accelerator_config={"even_batches": False}))

    for name, options in {"plain": {}, "checkpointing": {"activation_checkpointing": True}}.items():
        trainer, notes = training_run(folder, 2, **options)
        wrapper = trainer.model_wrapped
        facts[name] = {
            "wrapper": type(wrapper).__name__,
            "find_unused_parameters": wrapper.find_unused_parameters,
            "checkpointing": trainer.model.is_activation_checkpointing,
            "losses": notes.losses,
        }
        keep(name, dict(trainer.model.named_parameters()))
    trainer, notes = training_run(folder, 2, model=tiny_model())
    facts["batch_statistics"] = notes.losses
    keep("buffers", dict(trainer.model.named_buffers()))

    facts["generated"] = predict(folder, checkpoint, image_folder, None)
    facts["ranked"] = predict(folder, checkpoint, image_folder, CANDIDATES)
    facts["stream"] = seen_of_stream(folder, [11], passes=1)
    facts["files"] = seen_of_stream(folder, [7, 3], passes=2)
    answer_questions(folder, checkpoint, image_folder)
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts))


def on_two_gpus(folder: Path):
    del os.environ["ACCELERATE_USE_CPU"]
    trainer, _ = training_run(folder, 2, model=tiny_model(), use_cpu=False)
    norms = [module for module in trainer.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    statistics = {name: tensor.cpu() for name, tensor in trainer.model.named_buffers() if ".running_" in name}
    save_file(statistics, folder / f"statistics_{trainer.args.process_index}.safetensors")
