"""
Compares Prismer's adaptors with other ways to adapt a trained Prismer to new data, under one budget of trained
weights: LoRA, DoRA, (IA)³, prefix tuning, BitFit, and full fine-tuning, which has no budget.

    export PYTHONPATH=training_examples
    python -m studies.rivals --data easy-vqa --output_dir runs/rivals/easy-vqa
    python -m studies.rivals --data shifted --data_dir runs/scenes-data --output_dir runs/rivals/shifted
    python -m studies.rivals --data easy-vqa --output_dir runs/rivals/easy-vqa --report docs/study/rivals-easy-vqa.md

All start from `--start` with its trained adaptors, and train for the same number of steps on the same questions.
`--data shifted` are the scenes that look different from those of the shipped checkpoint. The budget is the number of
weights in the adaptors: ranks and widths are chosen to meet it. (IA)³ and BitFit have fewer weights by their nature.
Each method is trained with each learning rate of `--learning_rates` and the first seed, the best one on the validation
images is trained with the other seeds, and these models answer the test questions. `--data shifted` also measures what
they forget: the change of the answers about the original scenes. You can stop and restart the program, and several
processes can work on one folder.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from peft import PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, TrainingArguments, set_seed

from comparison.measuring import peak_memory
from comparison.report import markdown, write_interval
from comparison.scores import difference, interval
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing.labels import label_images, label_source
from run_easy_vqa import load_easy_vqa
from scenes.run_scenes import choose_attention
from scenes.scenes import Scenes
from training import PrismerTrainer, RecipeArguments, make_trainer, write_text

from .adaptation import backbone_layers, count_adaptors, ia3, lora
from .answers import Counts, right_answers, rows_of
from .trials import (
    AT_AN_END,
    StepTimes,
    Training,
    Trials,
    add_arguments,
    check_arguments,
    run,
    score_of,
    write_costs,
    write_rate,
    write_validation,
)


SETTINGS = ("start", "data", "train_images", "eval_images", "steps", "batch_size", "texts_per_image")
VIRTUAL_TOKENS = 10
SPLITS = ("train", "validation", "test")
OLD, OLD_BEFORE = "old", "old, before"  # answers about scenes like those of the start's training


# ---- the methods: each gets a model and a budget, and returns the model that is trained ----


def train_adaptors(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    return only(model, lambda name: ".adaptor." in name)


def train_biases(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    return only(model, lambda name: name.endswith("bias"))


def train_all(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    return only(model, lambda name: True)


def add_lora(model: PrismerForConditionalGeneration, budget: int, use_dora: bool = False) -> nn.Module:
    return get_peft_model(model, lora(backbone_layers(model), budget, use_dora))


def add_dora(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    return add_lora(model, budget, use_dora=True)


def add_ia3(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    return get_peft_model(model, ia3(backbone_layers(model)))


def add_prefix(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    """A prefix in every layer of the decoder, made by an MLP whose width meets the budget."""
    text = model.config.text_config
    outputs = 2 * text.num_hidden_layers * text.hidden_size
    width = max(1, round((budget - VIRTUAL_TOKENS * text.hidden_size) / (text.hidden_size + outputs)))
    return get_peft_model(
        model,
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=VIRTUAL_TOKENS,
            num_layers=text.num_hidden_layers,
            token_dim=text.hidden_size,
            num_attention_heads=text.num_attention_heads,
            prefix_projection=True,
            encoder_hidden_size=width,
        ),
    )


def only(model: nn.Module, is_trained: Callable[[str], bool]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))
    return model


METHODS: dict[str, Callable[[PrismerForConditionalGeneration, int], nn.Module]] = {
    "adaptors": train_adaptors,
    "LoRA": add_lora,
    "DoRA": add_dora,
    "(IA)³": add_ia3,
    "prefix tuning": add_prefix,
    "BitFit": train_biases,
    "full": train_all,
}


# ---- data: a row is an image with its questions and answers ----


def load_data(args: argparse.Namespace) -> dict[str, Dataset]:
    """The images of each split."""
    number = {"train": args.train_images, "validation": args.eval_images, "test": args.eval_images}
    if args.data == "easy-vqa":
        train = load_easy_vqa("train", args.train_images + args.eval_images)
        return {
            "validation": train.select(range(args.eval_images)),
            "train": train.select(range(args.eval_images, len(train))),
            "test": load_easy_vqa("test", args.eval_images),
        }

    def prepare(config: str, **numbers: int) -> dict[str, Dataset]:
        builder = Scenes(cache_dir=args.data_dir, config_name=config, **numbers)
        builder.download_and_prepare()
        return builder.as_dataset()

    splits = {**prepare(args.data, **number)}
    if args.data == "shifted":
        splits[OLD] = prepare("scenes", train=0, validation=0, test=args.eval_images)["test"]
    return {name: rows_of(scenes) for name, scenes in splits.items()}


def label_data(args: argparse.Namespace, processor: PrismerProcessor, rows: dict[str, Dataset]) -> Path | str:
    """The label store of all images. The experts run once."""
    store = args.output_dir / "labels"
    if processor.image_processor.experts:
        with FileLock(args.output_dir / "labels.lock"):
            for own in rows.values():
                images = own.select_columns(["image_id", "image"])
                label_images(images, processor.experts, store, image_column="image", key_column="image_id")
    return store if processor.image_processor.experts else "live"


# ---- one training ----


def make(training: Training, args: argparse.Namespace, rows: Dataset, store: Path | str) -> PrismerTrainer:
    path = find_checkpoint(args.start)
    processor = PrismerProcessor.from_pretrained(path)
    processor.task = "vqa"
    set_seed(training.seed)
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    choose_attention(model)
    settings = {
        "output_dir": str(args.output_dir),
        "augment": False,
        "freeze": "none",
        "max_steps": args.steps,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": training.seed,
        "logging_steps": 10,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    recipe_args, training_args = HfArgumentParser((RecipeArguments, TrainingArguments)).parse_dict(settings)
    labels_for = label_source(store, processor.image_processor.experts)
    trainer = make_trainer(
        model,
        processor,
        recipe_args,
        training_args,
        rows,
        labels_for=labels_for,
        texts_per_image=args.texts_per_image,
    )
    trainer.model = trainer.model_wrapped = METHODS[training.condition](model, count_adaptors(model))
    return trainer


def answer(trainer: PrismerTrainer, rows: Dataset) -> list[Counts]:
    """The number of right answers about each image, and of all."""
    trainer.eval_collator.with_suffix = True
    hits = right_answers(trainer.model, trainer.eval_collator, rows)
    return [{"answers": (sum(own), len(own))} for own in hits]


def train(training: Training, args: argparse.Namespace) -> dict[str, Any]:
    """
    Trains a model, and answers the questions of validation and test.

    Returns:
        `dict` with `trained` (the number of trained weights), `seconds_per_step`, `megabytes` (growth of memory at its
        peak), and for each split the number of right answers about each image, and of all, `counts`. For shifted
        scenes, `counts` also has those about the original scenes, before and after the training.
    """
    rows = load_data(args)
    store = label_data(args, PrismerProcessor.from_pretrained(find_checkpoint(args.start)), rows)
    trainer = make(training, args, rows["train"], store)
    times = StepTimes()
    trainer.add_callback(times)
    counts = {OLD_BEFORE: answer(trainer, rows[OLD])} if OLD in rows else {}
    memory = peak_memory()
    trainer.train()
    return {
        "trained": sum(own.numel() for own in trainer.model.parameters() if own.requires_grad),
        "seconds_per_step": float(np.median(times.seconds)),
        "megabytes": peak_memory() - memory,
        "counts": {**counts, **{name: answer(trainer, own) for name, own in rows.items() if name != "train"}},
    }


# ---- the report ----


def report(trials: Trials, path: Path) -> None:
    """Writes a table with the methods that have results of all rates and seeds, and lists what is missing."""
    rows, missing, first = [], [], None
    for method in trials.conditions:
        found = trials.results(method)
        if found is None:
            missing.append(method)
            continue
        score = score_of(found)
        first = first or score
        change = "–" if first is score else write_interval(difference(score, first), signed=True)
        forgotten = []
        if OLD in found[0]["counts"]:
            old = difference(score_of(found, OLD), score_of(found, OLD_BEFORE))
            forgotten = [write_interval(old, signed=True)]
        seeds = [score_of([result]).value for result in found]
        spread = f" (seeds {', '.join(f'{value:.1f}' for value in seeds)})" if len(seeds) > 1 else ""
        rows.append(
            [
                method,
                f"{found[0]['trained']:,}",
                write_rate(trials, found),
                write_validation(trials, method),
                write_interval(interval(score)) + spread,
                change,
                *forgotten,
                *write_costs(found),
            ]
        )
    head = ["method", "trained weights", "best rate", "validation by rate, %", "test, % [95 %]", "Δ to the first"]
    if rows and len(rows[0]) > len(head) + 2:
        head.append("Δ on the original scenes")
    table = markdown([*head, "s a step", "MB"], rows) if rows else "No method has all of its results yet."
    left = [f"Missing: {', '.join(missing)}."] if missing else []
    if any(row[2].endswith("*") for row in rows):
        left.append(AT_AN_END)
    write_text(path, "\n\n".join([table, *left]) + "\n")
    print(path.read_text())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, learning_rates=(1e-4, 5e-4, 2e-3, 1e-2))
    parser.add_argument("--start", default="prismer-scenes", help="the trained Prismer that all start from")
    parser.add_argument("--data", choices=("easy-vqa", "scenes", "shifted"), required=True, help="the new data")
    parser.add_argument("--data_dir", help="cache folder of Scenes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--train_images", type=int, default=400)
    parser.add_argument("--eval_images", type=int, default=200, help="images of validation, and as many of the test")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16, help="images in a step")
    parser.add_argument("--texts_per_image", type=int, default=8)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def trials_of(args: argparse.Namespace) -> Trials:
    settings = {name: getattr(args, name) for name in SETTINGS}
    return Trials(args.output_dir, settings, args.methods, args.learning_rates, args.seeds)


def main() -> None:
    args = parse_arguments()
    run(args, trials_of(args), train, report, __spec__.name)


if __name__ == "__main__":
    main()
