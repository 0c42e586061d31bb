"""
Measures how much a Prismer gains from its experts: trains many small models on Scenes and compares them.

    export PYTHONPATH=training_examples
    python -m studies.experts --backbones runs/scenes/backbones --suite runs/scenes/experts \\
        --labels runs/scenes/labels --data_dir runs/scenes-data --output_dir runs/study
    python -m studies.experts --output_dir runs/study --report docs/study

The first command trains and evaluates the models that have no results yet, each in its own process, and writes a JSON
file for each into runs/study/runs. You can stop and restart it, and several processes can work on one folder at the
same time. `--only` selects studies: number_of_experts, quality, noise, missing, freezing, resampler, single,
adaptation, transfer (see design.py). The second command makes a figure of each study, and results.md with the tables,
from the results that exist. It lists the missing ones.

All models start from the backbones of scenes/train_backbones.py and use the same scenes. Their training is a shorter
version of the first stage in run_scenes.py. With `--start`, they also start with the weights of a model that
run_scenes.py trained with six experts, for the parts that they share, and need less training. One model is the
reference: it has six experts with predicted labels, frozen backbones and no expert dropout. Each other model differs
from it in one setting. The seed decides the new weights, the order of the scenes, the choice of texts, and the random
choices of a study.

Labels are of three kinds. `predicted` labels are those of the trained experts, from `--labels`. `true` labels come
from the data set. `coarse` labels are predicted ones, degraded: maps are reduced to 8x8 and enlarged again, which
removes most details smaller than a sixteenth of the image, and each word has one random wrong letter.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import HfArgumentParser, TrainingArguments, set_seed

from comparison.measuring import peak_memory
from modeling_prismer import PrismerForConditionalGeneration
from modeling_prismer.expert_spec import read_specs
from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.labels import label_images, label_source
from muon import muon_with
from scenes.run_scenes import (
    DEFAULTS,
    DESCRIPTIONS,
    GENERATION,
    ScenesArguments,
    TrueLabels,
    choose_attention,
    evaluation_splits,
    measure,
    new_model,
    training_rows,
)
from scenes.scenes import Scenes, first
from training import PrismerTrainer, has_bfloat16, make_trainer, write_json

from .adaptation import AllTokens, replace_adaptors
from .design import STUDIES, Run, conditions_of, runs_of
from .report import report
from .trials import StepTimes
from .wrong_labels import Labels, coarse, noisy


SETTINGS = ("train_rows", "epochs", "batch_size", "texts_per_image", "learning_rate", "eval_rows")


# ---- labels ----


def labels_for(rows: Dataset, run: Run, kind: str, store: Path | str) -> Labels:
    """The expert labels of a run for the images of `rows`. `store` is a label store, or `"true"` for true labels."""
    image_ids = rows["image_id"][:]
    if not run.experts:
        return {image_id: {} for image_id in image_ids}
    if kind == "true" or store == "true":
        known = TrueLabels(rows)
    else:
        known = label_source(store, [spec for spec in read_specs(DESCRIPTIONS) if spec.name in run.experts])
    labels = dict(zip(image_ids, known(image_ids)))
    return {image_id: coarse(label, image_id) for image_id, label in labels.items()} if kind == "coarse" else labels


# ---- models ----


PARTS = {"adaptors": ".adaptor.", "resampler": ".resampler."}  # Run.renewed: a part of the names of weights


def start_from(model: PrismerForConditionalGeneration, folder: Path, renewed: str | None) -> None:
    """Loads the weights of a trained model into all shared parts, except the renewed one."""
    trained = PrismerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    if renewed:
        trained = {name: weights for name, weights in trained.items() if PARTS[renewed] not in name}
    model.load_state_dict(trained, strict=False)


def trainer_of(run: Run, seed: int, args: argparse.Namespace, rows: Dataset, labels: Labels) -> PrismerTrainer:
    settings = {
        **DEFAULTS,
        "output_dir": str(args.output_dir),
        "backbones": str(args.backbones),
        "suite": "true" if run.experts else "none",  # no live experts: labels_for gives the labels
        "experts": ",".join(run.experts) or None,
        "expert_dropout": run.expert_dropout,
        "freeze": run.freeze,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": args.epochs,
        "seed": seed,
        "weight_decay": 0.05,
        "bf16": has_bfloat16(),
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,  # the labels are in memory
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    recipe_args, training_args = HfArgumentParser((ScenesArguments, TrainingArguments)).parse_dict(settings)
    set_seed(seed)
    model, processor = new_model(recipe_args)
    if args.start:
        start_from(model, args.start, run.renewed)
    choose_attention(model)
    if not run.resampler:
        model.model.vision_model.resampler = AllTokens()
    if run.adaptation != "adaptors":
        replace_adaptors(model, {"lora": "LoRA", "dora": "DoRA"}[run.adaptation])
    return make_trainer(
        model,
        processor,
        recipe_args,
        training_args,
        training_rows(rows),
        labels_for=lambda image_ids: [labels[image_id] for image_id in image_ids],
        texts_per_image=args.texts_per_image,
        generation=GENERATION,
        optimizer_cls_and_kwargs=muon_with(training_args.learning_rate, training_args.weight_decay),
    )


# ---- one run ----


def train_and_evaluate(run: Run, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """
    Trains a model and evaluates it under all conditions.

    Returns:
        `dict` with `run`, `seed`, `settings` and `minutes`; `training`, with the share of trained weights, the
        computing time of a step in seconds, the growth of memory at its peak in MB, the number of steps and the loss;
        and `evaluations`, the results of [`run_scenes.measure`] by the name of the condition.
    """
    start = time.process_time()
    splits = Scenes(cache_dir=args.data_dir, config_name="scenes").as_dataset()
    rows = first(splits["train"], args.train_rows)
    trainer = trainer_of(run, seed, args, rows, labels_for(rows, run, run.labels, args.labels))
    model = trainer.model
    times = StepTimes()
    trainer.add_callback(times)
    memory = peak_memory()
    output = trainer.train()
    weights = list(model.parameters())
    training = {
        "trained_share": sum(each.numel() for each in weights if each.requires_grad) / sum(w.numel() for w in weights),
        "seconds_per_step": float(np.median(times.seconds)),
        "memory": peak_memory() - memory,
        "steps": output.global_step,
        "loss": output.training_loss,
    }

    shifted = Scenes(cache_dir=args.data_dir, config_name="shifted").as_dataset()["test"]
    domains = {
        "scenes": (evaluation_splits(splits)["test"], args.labels),
        "shifted": (shifted, shifted_store(args)),
    }
    evaluations = {}
    for condition in conditions_of(run, seed):
        scenes, store = domains[condition.data]
        scenes = first(scenes, args.eval_rows)
        kind = condition.labels or run.labels
        if run.experts and kind != "true" and store is None:
            print(f"{condition.name}: skipped; it needs --suite to label the images")
            continue
        labels = labels_for(scenes, run, kind, store)
        if condition.noise:
            labels = noisy(labels, condition.noise, seed)
        if condition.missing:
            labels = {image_id: {**label, condition.missing: None} for image_id, label in labels.items()}
        collator = trainer.eval_collator
        collator.labels_for = lambda image_ids, labels=labels: [labels[image_id] for image_id in image_ids]
        with trainer.accelerator.autocast():
            evaluations[condition.name] = measure(model, trainer.processing_class, scenes, collator, num_beams=1)
        print(condition.name, evaluations[condition.name], flush=True)
    return {
        "run": asdict(run),
        "seed": seed,
        "settings": settings_of(args),
        "training": training,
        "evaluations": evaluations,
        "minutes": (time.process_time() - start) / 60,
    }


def shifted_store(args: argparse.Namespace) -> Path | str | None:
    """The label store of the shifted domain."""
    if args.labels == "true":
        return "true"
    return args.output_dir / "shifted-labels" if args.suite else None


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all compared runs must share."""
    return {
        **{name: getattr(args, name) for name in SETTINGS},
        "start": "a Prismer that was trained with six experts" if args.start else "the backbones",
        "label_store": "true labels" if args.labels == "true" else "experts",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


# ---- all runs ----


def file_of(output_dir: Path, run: Run, seed: int) -> Path:
    return output_dir / "runs" / f"{run.name}-seed{seed}.json"


def prepare(args: argparse.Namespace) -> None:
    """Makes the data sets if they do not exist, and labels the shifted domain."""
    with FileLock(args.output_dir / "prepare.lock"):
        for name in ("scenes", "shifted"):
            builder = Scenes(cache_dir=args.data_dir, config_name=name)
            builder.download_and_prepare()
        store = shifted_store(args)
        if store is not None and store != "true":
            rows = first(builder.as_dataset()["test"], args.eval_rows).select_columns(["image_id", "image"])
            suite = ExpertSuite.from_pretrained(args.suite)
            label_images(rows, suite, store, image_column="image", key_column="image_id")


def in_own_process(run: Run, seed: int, args: argparse.Namespace) -> None:
    """Starts this script for one run in a new process, so that its memory can be measured."""
    log = args.output_dir / "runs" / f"{run.name}-seed{seed}.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--run", f"{run.name}-seed{seed}"]
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"{run.name}-seed{seed} failed; see {log}")


def work(args: argparse.Namespace, start: Callable[[Run, int, argparse.Namespace], None] = in_own_process) -> None:
    """Starts all runs that have no results yet and are not in progress in another process."""
    wanted = [(run, seed) for seed in range(args.seeds) for run in runs_of(args.only, seed)]
    for number, (run, seed) in enumerate(wanted, 1):
        path = file_of(args.output_dir, run, seed)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if not path.exists():
                    start(run, seed, args)
        except Timeout:
            print(f"{number} of {len(wanted)}: {path.stem} is in progress in another process", flush=True)
            continue
        result = json.loads(path.read_text())
        if result["settings"] != settings_of(args):
            raise SystemExit(f"{path} was made with {result['settings']}, not {settings_of(args)}; use another folder")
        score = result["evaluations"]["test"]["answers"]["all"]
        print(f"{number} of {len(wanted)}: {path.stem}, {100 * score:.1f} % of the answers correct", flush=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--backbones", type=Path, help="output folder of scenes/train_backbones.py")
    parser.add_argument("--suite", type=Path, help="output folder of scenes/train_experts.py, for the shifted domain")
    parser.add_argument("--labels", help="label store of scenes/train_experts.py; or `true`, for a trial run")
    parser.add_argument("--data_dir", help="folder of the data set; made if missing")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="studies to run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--start", type=Path, help="a trained model that all runs start from")
    parser.add_argument("--train_rows", type=int, default=1600, help="scenes to train on")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=16, help="images per step")
    parser.add_argument("--texts_per_image", type=int, default=8, help="texts drawn for an image in each epoch")
    parser.add_argument("--learning_rate", type=float, default=DEFAULTS["learning_rate"])
    parser.add_argument("--eval_rows", type=int, default=200, help="scenes to evaluate on")
    parser.add_argument("--report", type=Path, help="only write tables and figures here")
    parser.add_argument("--run", help="do this run only, such as all-seed0, in this process")
    args = parser.parse_args(arguments)
    if not args.report and not (args.backbones and args.labels):
        parser.error("--backbones and --labels are missing; training needs them (or pass --report)")
    if args.start and not args.start.is_dir():
        parser.error(f"--start {args.start} is not a folder")
    return args


def main() -> None:
    args = parse_arguments()
    if args.report:
        report(args.output_dir, args.report, args.seeds)
        return
    if args.run:
        runs = {
            file_of(args.output_dir, run, seed): (run, seed)
            for seed in range(args.seeds)
            for run in runs_of(list(STUDIES), seed)
        }
        path = args.output_dir / "runs" / f"{args.run}.json"
        if path not in runs:
            raise SystemExit(f"--run is {args.run}; accepted are {', '.join(sorted(each.stem for each in runs))}")
        write_json(path, train_and_evaluate(*runs[path], args))
        return
    (args.output_dir / "runs").mkdir(parents=True, exist_ok=True)
    prepare(args)
    work(args)


if __name__ == "__main__":
    main()
