"""
Distils the experts of a Prismer on Scenes, and measures the network without experts, with imitated and with live ones.

    export PYTHONPATH=training_examples
    scenes="--data_dir runs/scenes-data --labels true"
    python -m scenes.distil_scenes --model prismer-scenes --distil teachers $scenes --do_train \\
        --output_dir runs/distillation/teachers
    python -m scenes.distil_scenes --model runs/distillation/teachers --distil experts $scenes --do_train --do_eval \\
        --output_dir runs/distillation/experts
    python -m scenes.distil_scenes --model runs/distillation/experts --distil task $scenes --do_train --do_eval \\
        --output_dir runs/distillation/task
    python -m scenes.distil_scenes --model prismer-scenes --distil none --experts none $scenes --do_train --do_eval \\
        --output_dir runs/distillation/without

The first command trains the student with one teacher for each sample, the second one with dynamic routers, and the
third one lets the network learn its texts on the imitations. The last command is the control: the same network learns
the same texts without experts. `--do_eval` alone measures a model, with the live experts of `--eval_experts`. The
results are in `distillation_results.json`: answers by type with an interval, captions, the imitation of tokens, maps
against the true ones, and which routed adaptor serves which expert. report_distillation.py makes tables and figures.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dense.measures import MaxF, MeanAngle, MeanIoU, Measure, Rmse
from distillation import embed_patches, measure_imitation, prepare, teachers_of
from modeling_prismer import DataCollatorForPrismer
from modeling_prismer.imitation_loss import teacher_tokens, token_losses
from run_distillation import DistillationOptions, DistillationTrainer, add_student, settings_of
from training import PrismerTrainer, load_checkpoint, make_trainer, parse_arguments, run, write_json

from .run_scenes import (
    CAPTION_PROMPT,
    DEFAULTS,
    GENERATION,
    ScenesArguments,
    TrueLabels,
    choose_attention,
    evaluation_splits,
    interval_of,
    no_labels,
    say,
    score_answers,
    score_captions,
    training_rows,
)


@dataclass
class ScenesDistillationArguments(DistillationOptions, ScenesArguments):
    distil: Literal["teachers", "experts", "task", "none"] = field(
        default="teachers",
        metadata={"help": "As in run_distillation.py; `none` trains the language task without a distillation."},
    )
    texts_per_image: int = field(default=20, metadata={"help": "Texts of an image in a training sample."})
    texts: str = field(default="all", metadata={"help": "all; the distillation has no other choice."})


# ---- measures ----


def measure_texts(model, processor, scenes: Dataset, collator: DataCollatorForPrismer) -> dict[str, Any]:
    """Answers by type, with the right and wrong answers of each scene and their types, and captions."""
    collator.with_suffix = False
    questions = [[each["question"] for each in row] for row in scenes["questions"]]
    answers = say(model, processor, scenes, collator, questions, "vqa", num_beams=1, max_new_tokens=8)
    captions = say(model, processor, scenes, collator, [[CAPTION_PROMPT]] * len(scenes), "caption", num_beams=3)
    hits = [
        [answer == question["answer"] for answer, question in zip(own, asked, strict=True)]
        for own, asked in zip(answers, scenes["questions"], strict=True)
    ]
    return {
        "answers": score_answers(answers, scenes),
        "interval": interval_of(hits),
        "captions": score_captions([said for (said,) in captions], scenes),
        "hits": hits,
        "types": [[question["type"] for question in asked] for asked in scenes["questions"]],
    }


def new_measures(num_classes: int) -> dict[str, Measure]:
    """The measures of the maps that the student reads out."""
    return {"depth": Rmse(), "normal": MeanAngle(), "segmentation": MeanIoU(num_classes + 1), "edge": MaxF()}


def batches_of(scenes: Dataset, collator: DataCollatorForPrismer, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
    collator.with_suffix = False
    for start in range(0, len(scenes), size):
        rows = [scenes[i] for i in range(start, min(start + size, len(scenes)))]
        yield collator([{"image": row["image"], "image_id": row["image_id"]} for row in rows])


@torch.no_grad()
def read_out(model: nn.Module, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, float]:
    """
    The maps of the student against the experts' maps as the network gets them, in their size: the root mean square
    error of inverse depth, stretched to [-1, 1] in each image; the mean angle of normals; the mean intersection over
    union of classes, with the background; and the F score of edges, pixel by pixel (β² is 0.3).
    """
    model.eval()
    spec = {spec.name: spec for spec in model.config.expert_specs}
    measures = new_measures(spec["segmentation"].num_classes or 0)
    for batch in tqdm(batches, desc="maps", leave=False):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        maps = model.imitate(batch["pixel_values"]).maps
        for name, measure in measures.items():
            if name not in maps:
                continue
            true = batch[f"{name}_ids" if name == "segmentation" else f"{name}_values"]
            found = F.interpolate(maps[name].float(), size=true.shape[-2:], mode="bilinear").cpu()
            for own, label in zip(found, true.cpu()):
                if name == "segmentation":
                    classes = label.long().masked_fill(label == 255, spec[name].num_classes or 0)
                    measure.add(own.argmax(dim=0).numpy(), classes.numpy())
                elif name == "normal":
                    measure.add(own.permute(1, 2, 0).numpy(), label.permute(1, 2, 0).numpy())
                elif name == "edge":  # dark lines on white
                    measure.add((1 - own[0].numpy()) / 2, (label[0] < 0).numpy().astype(np.uint8))
                else:
                    measure.add(own[0].numpy(), label[0].numpy())
    return {name: measure.result() for name, measure in measures.items() if not np.isnan(measure.result())}


@torch.no_grad()
def measure_routes(model: nn.Module, batches: Iterator[dict[str, torch.Tensor]], is_dynamic: bool) -> dict[str, Any]:
    """
    Which routed adaptor serves which expert, for each level: `[level][expert][adaptor]`.

    - `gates`: the mean gate of each adaptor if the routers imitate this expert, for teacher-conditioned routers.
    - `losses`: by how much the token loss of this expert rises if the adaptor is switched off, for dynamic routers.
    """
    model.eval()
    network = model.expert_network
    imitation = network.imitation
    names, adaptors = imitation.names, list(imitation.adaptors)
    number = adaptors[0].num_adaptors
    table = np.zeros((len(adaptors), len(names), number))
    images = 0
    for batch in tqdm(batches, desc="routes", leave=False):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        patches = embed_patches(model, batch)
        images += len(patches)
        if not is_dynamic:
            for place in range(len(names)):
                teachers = torch.full((len(patches),), place, device=patches.device)
                for level, routes in enumerate(network.imitate(patches, teachers=teachers).routes):
                    table[level, place] += routes.gates.mean(dim=1).sum(dim=0).cpu().numpy()
            continue
        teachers, _ = teachers_of(model, batch)
        targets = teacher_tokens(network, teachers, round(patches.shape[1] ** 0.5))
        whole = network.imitate(patches).tokens
        for level, module in enumerate(adaptors):
            size = module.up_proj.in_features // number
            for own in range(number):
                columns = slice(own * size, (own + 1) * size)
                kept = module.up_proj.weight[:, columns].clone()
                module.up_proj.weight[:, columns] = 0
                without = network.imitate(patches).tokens
                module.up_proj.weight[:, columns] = kept
                for place, name in enumerate(names):
                    head = imitation.heads[name]
                    losses = [
                        token_losses(head.normalize(tokens[name]), head.normalize(targets[name])).sum().item()
                        for tokens in (without, whole)
                    ]
                    table[level, place, own] += losses[0] - losses[1]
    return {"experts": names, ("losses" if is_dynamic else "gates"): (table / images).tolist()}


def evaluate(args: ScenesDistillationArguments, trainer: PrismerTrainer, splits: dict[str, Dataset]) -> dict[str, Any]:
    model, processor = trainer.model, trainer.processing_class
    scenes = evaluation_splits({"test": splits["test"]}, args.max_eval_rows)
    results: dict[str, Any] = {name: {} for name in scenes}
    if args.distil in ("task", "none") or not trainer.args.do_train:
        for name, rows in scenes.items():
            results[name] = measure_texts(model, processor, rows, trainer.eval_collator)
    if model.config.imitation is not None:
        teaching = DataCollatorForPrismer(processor, TrueLabels(splits["test"]), with_suffix=False)
        rows = scenes["test"]
        results["imitation"] = measure_imitation(model, batches_of(rows, teaching))
        results["maps"] = read_out(model, batches_of(rows, teaching))
        if model.config.imitation_spec.num_adaptors:
            few = rows.select(range(min(64, len(rows))))
            results["routes"] = measure_routes(model, batches_of(few, teaching), args.distil != "teachers")
    return results


def main() -> None:
    args, training_args = parse_arguments(ScenesDistillationArguments, **{**DEFAULTS, "num_train_epochs": 3})
    splits = args.open_scenes()
    model, processor = load_checkpoint(args, "vqa")
    choose_attention(model)
    if args.distil != "none":
        add_student(model, args)

    train_rows = None
    if training_args.do_train:
        scenes = splits[args.train_split or "train"]
        train_rows = training_rows(scenes.select(range(min(args.max_train_rows or len(scenes), len(scenes)))))
    labels_for: Any = TrueLabels(*splits.values()) if args.labels == "true" else None
    if args.experts == "none":
        labels_for = no_labels
    distils = {"trainer_class": DistillationTrainer, "distillation": settings_of(args)}
    trainer = make_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        labels_for=labels_for,
        texts_per_image=args.texts_per_image if args.distil in ("task", "none") else 1,
        generation=GENERATION,
        **(distils if args.distil != "none" else {}),
    )
    if args.distil != "none" and training_args.do_train:
        prepare(trainer)
    if args.eval_experts != "all":
        trainer.eval_collator.experts = [name for name in args.eval_experts.split(",") if name != "none"]
    run(trainer, args)
    if training_args.do_eval:
        results = evaluate(args, trainer, splits)
        write_json(Path(training_args.output_dir, "distillation_results.json"), results)
        for own in results.values():
            own.pop("hits", None)
            own.pop("types", None)
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
