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
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, TrainingArguments, set_seed

from comparison.report import markdown, write_interval
from comparison.scores import Score, difference, interval
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing.labels import label_images, label_source
from run_easy_vqa import load_easy_vqa
from scenes.scenes import Scenes
from training import PrismerTrainer, RecipeArguments, make_trainer, write_json

from .answers import right_answers, rows_of
from .experts import StepTimes, backbone_layers, peak_memory


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
    layers = backbone_layers(model)
    wanted = budget - use_dora * sum(layer.out_features for layer in layers.values())
    rank = max(1, round(wanted / sum(layer.in_features + layer.out_features for layer in layers.values())))
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), use_dora=use_dora)
    )


def add_dora(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    return add_lora(model, budget, use_dora=True)


def add_ia3(model: PrismerForConditionalGeneration, budget: int) -> nn.Module:
    names = [name for name in backbone_layers(model) if name.endswith(("k_proj", "v_proj", "fc2"))]
    return get_peft_model(
        model, IA3Config(target_modules=names, feedforward_modules=[name for name in names if name.endswith("fc2")])
    )


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


def count_adaptors(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".adaptor." in name)


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


@dataclass(frozen=True)
class Training:
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        plain = self.method.replace("(IA)³", "ia3").replace(" ", "-").lower()
        return f"{plain}-{self.learning_rate:g}-seed{self.seed}"


def make(training: Training, args: argparse.Namespace, rows: Dataset, store: Path | str) -> PrismerTrainer:
    path = find_checkpoint(args.start)
    processor = PrismerProcessor.from_pretrained(path)
    processor.task = "vqa"
    set_seed(training.seed)
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # the backward pass of sdpa is slow on CPUs for such short sequences
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
    trainer.model = trainer.model_wrapped = METHODS[training.method](model, count_adaptors(model))
    return trainer


def answer(trainer: PrismerTrainer, rows: Dataset) -> list[list[bool]]:
    trainer.eval_collator.with_suffix = True
    return right_answers(trainer.model, trainer.eval_collator, rows)


def train(training: Training, args: argparse.Namespace) -> dict[str, Any]:
    """
    Trains a model, and answers the questions of validation and test.

    Returns:
        `dict` with `training`, `settings`, `trained` (the number of trained weights), `seconds_per_step`, `megabytes`
        (growth of memory at its peak), `minutes`, and for each split the right answers of each image, `hits`. For
        shifted scenes, `hits` also has those about the original scenes, before and after the training.
    """
    start = time.perf_counter()
    rows = load_data(args)
    store = label_data(args, PrismerProcessor.from_pretrained(find_checkpoint(args.start)), rows)
    trainer = make(training, args, rows["train"], store)
    times = StepTimes()
    trainer.add_callback(times)
    hits = {OLD_BEFORE: answer(trainer, rows[OLD])} if OLD in rows else {}
    memory = peak_memory()
    trainer.train()
    return {
        "training": asdict(training),
        "settings": settings_of(args),
        "trained": sum(own.numel() for own in trainer.model.parameters() if own.requires_grad),
        "seconds_per_step": float(np.median(times.seconds)),
        "megabytes": peak_memory() - memory,
        "hits": {**hits, **{name: answer(trainer, own) for name, own in rows.items() if name != "train"}},
        "minutes": (time.perf_counter() - start) / 60,
    }


# ---- all trainings ----


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


def file_of(args: argparse.Namespace, training: Training) -> Path:
    return args.output_dir / "runs" / f"{training.name}.json"


def result_of(args: argparse.Namespace, training: Training) -> dict[str, Any] | None:
    path = file_of(args, training)
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != settings_of(args):
        raise SystemExit(f"{path} was made with {result['settings']}, not {settings_of(args)}; use another folder")
    return result


def share(result: dict[str, Any], split: str) -> float:
    return float(np.mean([hit for hits in result["hits"][split] for hit in hits]))


def best_rate(args: argparse.Namespace, method: str) -> float | None:
    """The learning rate with the most right answers in validation, `None` if one is still missing."""
    results = {rate: result_of(args, Training(method, rate, 0)) for rate in args.learning_rates}
    known = {rate: share(result, "validation") for rate, result in results.items() if result is not None}
    return max(known, key=lambda rate: known[rate]) if len(known) == len(results) else None


def wanted(args: argparse.Namespace) -> list[Training]:
    """The next trainings: all rates with the first seed, then the best rate with the others."""
    trainings = []
    for method in args.methods:
        best = best_rate(args, method)
        if best is None:
            trainings += [Training(method, rate, 0) for rate in args.learning_rates]
        else:
            trainings += [Training(method, best, seed) for seed in range(args.seeds)]
    return trainings


def in_own_process(training: Training, args: argparse.Namespace) -> None:
    """Starts this script for one training in a new process, so that its memory can be measured."""
    log = file_of(args, training).with_suffix(".log")
    with log.open("w") as output:
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--train", training.name]
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"{training.name} failed; see {log}")


def work(args: argparse.Namespace, start: Callable[[Training, argparse.Namespace], None] = in_own_process) -> None:
    """Runs all trainings that have no results yet and are not in progress in another process."""
    (args.output_dir / "runs").mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # the second round knows the best rates
        for training in wanted(args):
            try:
                with FileLock(file_of(args, training).with_suffix(".lock"), timeout=0):
                    if result_of(args, training) is None:
                        start(training, args)
            except Timeout:
                print(f"{training.name} is in progress in another process", flush=True)
                continue
            result = result_of(args, training)
            assert result is not None
            print(f"{training.name}: {100 * share(result, 'validation'):.1f} % in validation", flush=True)


# ---- the report ----


def score_of(results: Sequence[dict[str, Any]], split: str = "test") -> Score:
    """The share of right answers of all seeds. An image is drawn with the answers of all seeds."""
    sums = [[sum(hits), len(hits)] for hits in results[0]["hits"][split]]
    for result in results[1:]:
        sums = [[a + sum(hits), b + len(hits)] for (a, b), hits in zip(sums, result["hits"][split], strict=True)]
    return Score("right answers", np.array(sums, dtype=float))


def report(args: argparse.Namespace, path: Path) -> None:
    """Writes a table with the methods that have results of all rates and seeds, and lists what is missing."""
    rows, missing, first = [], [], None
    ends = min(args.learning_rates), max(args.learning_rates)
    for method in args.methods:
        best = best_rate(args, method)
        results = [result_of(args, Training(method, best, seed)) for seed in range(args.seeds)] if best else [None]
        if best is None or None in results:
            missing.append(method)
            continue
        found = [result for result in results if result is not None]
        score = score_of(found)
        first = first or score
        change = "–" if first is score else write_interval(difference(score, first), signed=True)
        forgotten = []
        if OLD in found[0]["hits"]:
            old = difference(score_of(found, OLD), score_of(found, OLD_BEFORE))
            forgotten = [write_interval(old, signed=True)]
        validation = [
            f"{rate:g}: {100 * share(result, 'validation'):.1f}"
            for rate in args.learning_rates
            if (result := result_of(args, Training(method, rate, 0))) is not None
        ]
        seeds = [100 * share(result, "test") for result in found]
        spread = f" (seeds {', '.join(f'{value:.1f}' for value in seeds)})" if len(seeds) > 1 else ""
        rows.append(
            [
                method,
                f"{found[0]['trained']:,}",
                f"{best:g}" + "*" * (best in ends),
                "; ".join(validation),
                write_interval(interval(score)) + spread,
                change,
                *forgotten,
                f"{np.median([result['seconds_per_step'] for result in found]):.2f}",
                f"{np.median([result['megabytes'] for result in found]):.0f}",
            ]
        )
    head = ["method", "trained weights", "best rate", "validation by rate, %", "test, % [95 %]", "Δ to the first"]
    if rows and len(rows[0]) > len(head) + 2:
        head.append("Δ on the original scenes")
    table = markdown([*head, "s a step", "MB"], rows) if rows else "No method has all of its results yet."
    left = [f"Missing: {', '.join(missing)}."] if missing else []
    if any(row[2].endswith("*") for row in rows):
        left.append("\\* The smallest or largest rate that was tried; one beyond it may be better.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("\n\n".join([table, *left]) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(path.read_text())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--start", default="prismer-scenes", help="the trained Prismer that all start from")
    parser.add_argument("--data", choices=("easy-vqa", "scenes", "shifted"), required=True, help="the new data")
    parser.add_argument("--data_dir", help="cache folder of Scenes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-4, 5e-4, 2e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train_images", type=int, default=400)
    parser.add_argument("--eval_images", type=int, default=200, help="images of validation, and as many of the test")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16, help="images in a step")
    parser.add_argument("--texts_per_image", type=int, default=8)
    parser.add_argument("--report", type=Path, help="only write the table here")
    parser.add_argument("--train", help="do this training only, such as lora-0.001-seed0, in this process")
    args = parser.parse_args(arguments)
    if len(args.learning_rates) < 3:
        parser.error("--learning_rates: at least three values are needed, so that each method is tuned alike")
    return args


def main() -> None:
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.report:
        report(args, args.report)
        return
    if args.train:
        every = [
            Training(method, rate, seed)
            for method in METHODS
            for rate in args.learning_rates
            for seed in range(args.seeds)
        ]
        names = {training.name: training for training in every}
        if args.train not in names:
            raise SystemExit(f"--train is {args.train}; accepted are {', '.join(sorted(names))}")
        write_json(file_of(args, names[args.train]), train(names[args.train], args))
        return
    work(args)


if __name__ == "__main__":
    main()
