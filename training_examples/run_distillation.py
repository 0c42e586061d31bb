"""
Distillation: the vision encoder learns to imitate the experts, so that the model runs none of them afterwards.

    accelerate launch training_examples/run_distillation.py --distil teachers --model CHECKPOINT \\
        --imitate depth,normal,segmentation,edge,detection --task vqa --train_data my_questions \\
        --do_train --output_dir runs/student
    accelerate launch training_examples/run_distillation.py --distil task --model runs/student --task vqa \\
        --train_data my_questions --eval_data my_questions --do_train --do_eval --output_dir runs/distilled

The first stage trains routed adaptors and heads alone: each sample imitates one of its experts, and the routers know
which (PRISM, arXiv 2606.03444). In the second stage the routers see the image, one pass imitates all experts, and the
model learns its task on the imitations, with the distillation kept on. `--distil experts` is the second stage without
the language task: all weights of the model stay as they are. Data and labels are those of the other recipes
(docs/own_data.md). The evaluation runs no imitated expert. A checkpoint of PrismerLM takes the further options of
run_lm.py.
"""

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import AutoConfig, HfArgumentParser

import run_captioning
import run_lm
import run_vqa
from distillation import Distillation, DistillationMixin, measure_imitation, prepare
from lm_training import LmTrainer
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing.data import group_by_image
from training import (
    PrismerTrainer,
    RecipeArguments,
    load_checkpoint,
    load_data,
    make_trainer,
    parse_arguments,
    run,
    write_json,
)


logger = logging.getLogger("prismer")


DEFAULTS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "freeze": "vision",
}


@dataclass
class DistillationOptions:
    distil: Literal["teachers", "experts", "task"] = field(
        default="teachers",
        metadata={
            "help": "`teachers`: one expert for each sample. `experts`: all experts. `task`: all experts, and the "
            "language task."
        },
    )
    imitate: str | None = field(
        default=None,
        metadata={"help": "The experts to imitate, such as `depth,edge`, if the model imitates none yet; or all."},
    )
    layers: str | None = field(
        default=None, metadata={"help": "Layers of the encoder with routed adaptors, such as `2,5`."}
    )
    num_adaptors: int = field(default=8, metadata={"help": "Routed adaptors at a layer; 0 for the shared one alone."})
    top_k: int = field(default=2, metadata={"help": "Routed adaptors of a token."})
    adaptor_size: int | None = field(
        default=None, metadata={"help": "Width inside an adaptor, by default a quarter of the tokens' width."}
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Weight of the distillation beside the language task."}
    )
    map_weight: float = field(default=1.0, metadata={"help": "Weight of the experts' maps in the distillation."})
    decorrelation_weight: float = field(default=0.5, metadata={"help": "Weight of the decorrelation of tokens."})
    balance_weight: float = field(default=0.01, metadata={"help": "Weight of the balance of routed adaptors."})
    live_experts: float = field(
        default=0.0,
        metadata={"help": "In `task`: share of experts that stay live in a sample, for a model that takes both."},
    )
    eval_experts: str = field(
        default="none", metadata={"help": "The experts that run in the evaluation, such as `ocr`; or all."}
    )


@dataclass
class DistillationArguments(DistillationOptions, RecipeArguments):
    task: Literal["caption", "vqa"] = field(default="caption", metadata={"help": "The language task, and its data."})
    texts_per_image: int | None = field(
        default=None,
        metadata={
            "help": "In `task`: a training sample is an image with this many of its texts, drawn in each epoch. By "
            "default it has one text."
        },
    )


@dataclass
class LmDistillationArguments(DistillationOptions, run_lm.LmArguments):
    pass


class DistillationTrainer(DistillationMixin, PrismerTrainer):
    """Distils the experts of a Prismer."""


class LmDistillationTrainer(DistillationMixin, LmTrainer):
    """Distils the experts of a PrismerLM."""


def settings_of(args: DistillationOptions) -> Distillation:
    return Distillation(
        args.distil,
        args.distillation_weight,
        args.live_experts,
        args.map_weight,
        args.decorrelation_weight,
        args.balance_weight,
    )


def add_student(model, args: DistillationOptions) -> None:
    """Lets the model imitate the experts of `--imitate`, unless it does so already."""
    if model.config.imitation is not None:
        if args.imitate and set(args.imitate.split(",")) != set(model.config.imitated_experts):
            raise SystemExit(
                f"--imitate {args.imitate}: the model imitates {', '.join(model.config.imitated_experts)} already"
            )
        return
    names = args.imitate.split(",") if args.imitate not in (None, "all") else model.config.expert_names
    layers = [int(layer) for layer in args.layers.split(",")] if args.layers else None
    try:
        model.add_imitation(
            names, layers, args.num_adaptors, min(args.top_k, args.num_adaptors or 1), adaptor_size=args.adaptor_size
        )
    except ValueError as error:
        raise SystemExit(f"--imitate, --layers: {error}") from None


def run_prismer() -> None:
    args, training_args = parse_arguments(DistillationArguments, **DEFAULTS)
    model, processor = load_checkpoint(args, task=args.task)
    add_student(model, args)
    train_rows, eval_rows = load_data(args, training_args, args.task)
    is_task = args.distil == "task"
    if train_rows is not None and not args.streaming and (args.texts_per_image or not is_task):
        train_rows = group_by_image(train_rows)
    scripts = {"caption": run_captioning, "vqa": run_vqa}
    trainer = make_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        eval_rows,
        score=run_vqa.score_answers if args.task == "vqa" else run_captioning.score_captions,
        texts_per_image=args.texts_per_image if is_task else 1,
        trainer_class=DistillationTrainer,
        distillation=settings_of(args),
    )
    finish(trainer, args, getattr(scripts[args.task], "write_answers" if args.task == "vqa" else "write_captions"))


def run_language_model() -> None:
    args, training_args = parse_arguments(LmDistillationArguments, **run_lm.DEFAULTS)
    model, processor = run_lm.load_model(args, training_args.do_train)
    if model.config.has_prismer_encoder:
        raise SystemExit("--model has a Prismer's encoder: distil that Prismer, and put it into a new PrismerLM")
    add_student(model, args)
    train_rows, eval_rows = run_lm.load_texts(args, training_args)
    trainer = run_lm.make_lm_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        eval_rows,
        trainer_class=LmDistillationTrainer,
        distillation=settings_of(args),
    )
    finish(trainer, args, run_lm.WRITERS[args.stage])


def finish(trainer, args: DistillationOptions, write_results) -> None:
    """Trains and evaluates, and measures the imitation on the images of the evaluation."""
    teaching = copy.copy(trainer.eval_collator)
    if args.eval_experts != "all":
        trainer.eval_collator.experts = [name for name in args.eval_experts.split(",") if name != "none"]
    if trainer.args.do_train:
        prepare(trainer)
    run(trainer, args, write_results)
    if trainer.args.do_eval and trainer.is_world_process_zero():
        rows = trainer.eval_dataset
        first = np.unique(np.asarray(rows.with_format(None)["image_id"][:]), return_index=True)[1]  # each image once
        size = trainer.args.eval_batch_size
        batches = [first[start : start + size] for start in range(0, len(first), size)]
        network = trainer.accelerator.unwrap_model(trainer.model)
        explained = measure_imitation(
            network, (teaching([rows[int(i)] for i in batch]) for batch in batches), total=len(batches)
        )
        logger.info("share of the variance of the experts' tokens that the student explains: %s", explained)
        write_json(Path(trainer.args.output_dir, "imitation_results.json"), explained)


def main() -> None:
    parser = HfArgumentParser([DistillationArguments])
    given = parser.parse_known_args()[0].model
    is_language_model = given and AutoConfig.from_pretrained(find_checkpoint(given)).model_type == "prismer_lm"
    run_language_model() if is_language_model else run_prismer()


if __name__ == "__main__":
    main()
