"""
Tests what the paper claims about training with experts: trains many small Prismers on Scenes 2 and compares them.

    export PYTHONPATH=training_examples
    python -m scenes.train_backbones --data_dir runs/scenes2-data --data_config scenes2 --clip facts --clip_epochs 4 \\
        --width 96 --vision_layers 4 --text_layers 3 --roberta_epochs 0.25 --output_dir runs/study-backbones
    python -m studies.claims --backbones runs/study-backbones --labels runs/scenes2/labels \\
        --data_dir runs/scenes2-data --data_config scenes2 --output_dir runs/claims
    python -m studies.claims ... --report docs/study/claims.md

All models start from the same backbones and learn from the same scenes, for the same number of steps, to list the
objects of a scene with their attributes. Each condition is trained with each learning rate of `--learning_rates` and
the first seed, and with its best rate on the validation scenes and the other seeds. A score is the share of right
words, each after the right words before it. The seed decides the new weights, the order of the scenes and the choice
of texts. You can stop and restart the program, and several processes can work on one folder.

The third command makes the tables and the figure. A claim is decided if the 95 % interval of the difference, from a
bootstrap over scenes that is paired, and the differences of all seeds agree.
"""

import argparse
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, set_seed

from comparison.measuring import peak_memory
from comparison.report import markdown, write_interval
from comparison.scores import Interval, difference, interval
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor
from muon import muon_with
from scenes.run_scenes import (
    DEFAULTS,
    DESCRIPTIONS,
    ScenesArguments,
    choose_attention,
    freeze_patches,
    from_backbones,
    known_labels,
    training_rows,
)
from scenes.scene import COLORS, MATERIALS, SHAPES, SIZES
from scenes.scenes import EXPERTS, add_data_arguments, first, open_data
from training import PrismerTrainer, has_bfloat16, make_trainer, write_text

from .adaptation import AllTokens, replace_adaptors
from .answers import right_words
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
from .wrong_labels import Labels, coarse, lying


SETTINGS = ("train_scenes", "eval_scenes", "steps", "batch_size", "texts_per_image")
NOISE = {"name": "noise", "kind": "dense", "channels": 1}  # an expert that knows nothing
LIE = "detection: classes exchanged"
LYING = "test, lies"  # the split with `LIE` on all images
LATER = (25, 50, 100, 200, 400)  # steps of the stem of a new expert after which it is measured
ATTRIBUTES = {"color": COLORS, "shape": SHAPES, "material": MATERIALS, "size": SIZES}
KINDS = {word: kind for kind, words in ATTRIBUTES.items() for word in words}
MARGIN = 1.0  # points that "no worse" may lose


# ---- conditions and claims ----


@dataclass(frozen=True)
class Condition:
    """
    The settings in which the trainings differ.

    Args:
        experts (`tuple[str]`): the experts of the model, in the order of `EXPERTS`.
        labels (`str`): the labels in training and evaluation: `"predicted"`, `"true"` or `"coarse"`.
        noise (`bool`): whether there is one more expert, whose maps are random.
        lies (`float`): share of the training images with `LIE`.
        freeze (`str`): the frozen backbones: `"both"`, `"vision"` or `"none"`.
        freeze_patches (`bool`): whether the patch embedding is frozen. The paper trains it.
        resampler (`bool`): whether the model has a resampler. Without it, the encoder gets all tokens of the experts.
        adaptation (`str`): how frozen backbones are adapted: by the paper's `"adaptors"`, or peft's `"LoRA"`,
            `"DoRA"` or `"(IA)³"` in place of them.
        later (`str`, *optional*): an expert that is added after the training. Its stem is then trained alone.
    """

    experts: tuple[str, ...] = EXPERTS
    labels: str = "predicted"
    noise: bool = False
    lies: float = 0.0
    freeze: str = "both"
    freeze_patches: bool = True
    resampler: bool = True
    adaptation: str = "adaptors"
    later: str | None = None


SIX, NONE = "six experts", "no experts"
CONDITIONS: dict[str, Condition] = {
    SIX: Condition(),
    NONE: Condition(experts=()),
    "everything trained": Condition(freeze="none", freeze_patches=False),
    "detection": Condition(experts=("detection",)),
    "true labels": Condition(labels="true"),
    "coarse labels": Condition(labels="coarse"),
    "six experts and noise": Condition(noise=True),
    "language trained": Condition(freeze="vision"),
    "patch embedding trained": Condition(freeze_patches=False),
    "LoRA": Condition(adaptation="LoRA"),
    "lies in training": Condition(lies=0.3),
    "detection later": Condition(experts=tuple(name for name in EXPERTS if name != "detection"), later="detection"),
    "(IA)³": Condition(adaptation="(IA)³"),
    "depth": Condition(experts=("depth",)),
    "DoRA": Condition(adaptation="DoRA"),
    "no resampler": Condition(resampler=False),
}


@dataclass(frozen=True)
class Claim:
    """
    A claim that one condition is better than another, or no worse by more than `margin` points.

    Args:
        text (`str`): the claim.
        better, worse (`str`): the conditions.
        margin (`float`): what the first one may lose; 0 if it has to be better.
        split (`str`): the split that is compared.
    """

    text: str
    better: str
    worse: str
    margin: float = 0.0
    split: str = "test"


CLAIMS = (
    Claim("More experts help: six against none", SIX, NONE),
    Claim("More experts help: six against detection", SIX, "detection"),
    Claim("More experts help: detection against none", "detection", NONE),
    Claim("More experts help: depth against none", "depth", NONE),
    Claim("Better experts help: against coarse labels", SIX, "coarse labels"),
    Claim("Better experts help: true labels", "true labels", SIX),
    Claim("Noise does not hurt: one more expert that is noise", "six experts and noise", SIX, MARGIN),
    Claim("Few trained weights are enough: against everything trained", SIX, "everything trained", MARGIN),
    Claim("Frozen is better than everything trained", SIX, "everything trained"),
    Claim("Frozen is better than a trained language backbone", SIX, "language trained"),
    Claim("The patch embedding has to be trained", "patch embedding trained", SIX),
    Claim("The resampler is needed", SIX, "no resampler"),
    Claim("Adaptors are better than LoRA", SIX, "LoRA"),
    Claim("Adaptors are better than DoRA", SIX, "DoRA"),
    Claim("Adaptors are better than (IA)³", SIX, "(IA)³"),
    Claim("Training with lies helps against lies", "lies in training", SIX, split=LYING),
    Claim("Training with lies costs nothing without lies", "lies in training", SIX, MARGIN),
    Claim("A new expert later is as good as from the start", "detection later", SIX, MARGIN),
)


def verdict(found: Interval, seeds: Sequence[float], margin: float = 0.0) -> str:
    """`"confirmed"` or `"refuted"` if the interval and all seeds say so, otherwise `"undecided"`."""
    if found.low is None or found.high is None:
        return "undecided"
    if found.low > -margin and all(each > -margin for each in seeds):
        return "confirmed"
    if found.high < -margin and all(each < -margin for each in seeds):
        return "refuted"
    return "undecided"


# ---- labels ----


def labels_for(
    condition: Condition, known: Callable[[list[str]], list[dict]], lies: float = 0.0
) -> Callable[[list[str]], list[dict]]:
    """A function from ids of images to the labels of a condition. A share of the images, `lies`, has `LIE`."""

    def read(image_ids: list[str]) -> list[dict]:
        found: Labels = {
            image_id: {name: own.get(name) for name in condition.experts}
            for image_id, own in zip(image_ids, known(image_ids), strict=True)
        }
        liars = {image_id: own for image_id, own in found.items() if zlib.crc32(image_id.encode()) / 2**32 < lies}
        found |= lying(liars, LIE)
        if condition.labels == "coarse":
            found = {image_id: coarse(own, image_id) for image_id, own in found.items()}
        if condition.noise:
            found = {image_id: {**own, NOISE["name"]: noise(image_id)} for image_id, own in found.items()}
        return [found[image_id] for image_id in image_ids]

    return read


def noise(image_id: str) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(image_id.encode()))
    return random.integers(0, 256, (128, 128), dtype=np.uint8)


# ---- models ----


def new_model(condition: Condition, backbones: Path) -> tuple[PrismerForConditionalGeneration, PrismerProcessor]:
    descriptions = [each for each in DESCRIPTIONS if each["name"] in condition.experts]
    model, processor = from_backbones(backbones, [*descriptions, *[NOISE] * condition.noise])
    choose_attention(model)
    if not condition.resampler:
        model.model.vision_model.resampler = AllTokens()
    if condition.adaptation != "adaptors":
        replace_adaptors(model, condition.adaptation)
    return model, processor


def add_stem(model: PrismerForConditionalGeneration, processor: PrismerProcessor, name: str) -> PrismerProcessor:
    """Adds an expert whose stem alone is trained, and returns the processor for it."""
    description = next(each for each in DESCRIPTIONS if each["name"] == name)
    stem = model.add_expert(**description)
    model.requires_grad_(False)
    stem.requires_grad_(True)
    image_processor = processor.image_processor
    settings = {
        field: getattr(image_processor, field) for field in ("size", "expert_size", "max_instances", "max_words")
    }
    image_processor = type(image_processor)(experts=[*image_processor.experts, description], **settings)
    return PrismerProcessor(image_processor, processor.tokenizer, task=processor.task, tasks=processor.tasks)


def trainer_of(
    model: PrismerForConditionalGeneration,
    processor: PrismerProcessor,
    condition: Condition,
    training: Training,
    args: argparse.Namespace,
    rows: Dataset,
    known: Callable[[list[str]], list[dict]],
) -> PrismerTrainer:
    settings = {
        **DEFAULTS,
        "output_dir": str(args.output_dir),
        "freeze": condition.freeze,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "max_steps": args.steps,
        "warmup_steps": 0.05,
        "seed": training.seed,
        "weight_decay": 0.05,
        "logging_steps": 20,
        "bf16": has_bfloat16(),
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,  # a study runs several trainings at a time
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    recipe_args, training_args = HfArgumentParser((ScenesArguments, TrainingArguments)).parse_dict(settings)
    trainer = make_trainer(
        model,
        processor,
        recipe_args,
        training_args,
        rows,
        labels_for=labels_for(condition, known, condition.lies),
        texts_per_image=args.texts_per_image,
        optimizer_cls_and_kwargs=muon_with(training_args.learning_rate, training_args.weight_decay),
    )
    if condition.freeze_patches:
        freeze_patches(model)
    return trainer


# ---- one training ----


class After(TrainerCallback):
    """Calls a function after some of the steps."""

    def __init__(self, steps: Sequence[int], function: Callable[[int], None]):
        self.steps = steps
        self.function = function

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.function(state.global_step)
            model.train()


def train(training: Training, args: argparse.Namespace) -> dict[str, Any]:
    """
    Trains and evaluates a model.

    Returns:
        `dict` with `trained` and `total`, the numbers of weights; `seconds_per_step`; `megabytes`, the growth of
        memory at its peak; and `counts`, for each split and scene how many words of each kind are right, and how many
        there are.
    """
    condition = CONDITIONS[training.condition]
    splits = scenes_of(args)
    known = known_labels("true" if condition.labels == "true" else args.labels, DESCRIPTIONS, splits)
    rows = {name: training_rows(scenes, "objects") for name, scenes in splits.items()}
    set_seed(training.seed)
    model, processor = new_model(condition, args.backbones)
    trainer = trainer_of(model, processor, condition, training, args, rows["train"], known)
    times = StepTimes()
    trainer.add_callback(times)
    weights = list(model.parameters())
    result: dict[str, Any] = {
        "trained": sum(each.numel() for each in weights if each.requires_grad),
        "total": sum(each.numel() for each in weights),
        "counts": {},
    }

    def measure(name: str, split: str, lies: float = 0.0) -> None:
        collator = trainer.eval_collator
        collator.labels_for, collator.with_suffix = labels_for(condition, known, lies), True
        with trainer.accelerator.autocast():
            result["counts"][name] = right_words(model, collator, rows[split], KINDS.get)

    memory = peak_memory()
    trainer.train()
    result |= {"seconds_per_step": float(np.median(times.seconds)), "megabytes": peak_memory() - memory}
    if condition.later is not None:
        measure(later(0), "test")
        processor = add_stem(model, processor, condition.later)
        condition = replace(condition, experts=(*condition.experts, condition.later))
        trainer = trainer_of(model, processor, condition, training, args, rows["train"], known)
        trainer.add_callback(After(LATER, lambda step: measure(later(step), "test")))
        trainer.train()
    for split in ("validation", "test"):
        measure(split, split)
    if any(claim.split == LYING and training.condition in (claim.better, claim.worse) for claim in CLAIMS):
        measure(LYING, "test", lies=1.0)
    return result


def later(step: int) -> str:
    """The name of the test split after some steps of the stem of a new expert."""
    return f"test, {step} steps later"


def scenes_of(args: argparse.Namespace) -> dict[str, Dataset]:
    numbers = {"train": args.train_scenes, "validation": args.eval_scenes, "test": args.eval_scenes}
    splits = open_data(args)
    return {name: first(splits[name], number) for name, number in numbers.items()}


# ---- the report ----


def table_of_conditions(trials: Trials) -> str:
    rows = []
    for name in trials.conditions:
        results = trials.results(name)
        if results is None:
            continue
        kinds = [f"{score_of(results, 'test', [kind]).value:.1f}" for kind in ATTRIBUTES]
        rows.append(
            [
                name,
                write_interval(interval(score_of(results))),
                ", ".join(f"{score_of([each]).value:.1f}" for each in results),
                *kinds,
                write_rate(trials, results),
                write_validation(trials, name),
                f"{100 * results[0]['trained'] / results[0]['total']:.0f}",
                *write_costs(results),
            ]
        )
    head = ["condition", "right words", "seeds", *ATTRIBUTES, "best rate", "validation by rate"]
    return markdown([*head, "trained, %", "s a step", "MB"], rows)


@dataclass(frozen=True)
class Finding:
    claim: Claim
    found: Interval
    seeds: list[float]

    @property
    def verdict(self) -> str:
        return verdict(self.found, self.seeds, self.claim.margin)


def findings(trials: Trials) -> tuple[list[Finding], list[str]]:
    """The difference for each claim, and the conditions that lack results."""
    found, missing = [], []
    for claim in CLAIMS:
        better, worse = (trials.results(name) for name in (claim.better, claim.worse))
        missing += [name for name, own in ((claim.better, better), (claim.worse, worse)) if own is None]
        if better is None or worse is None:
            continue
        scores = [score_of(results, claim.split) for results in (better, worse)]
        pairs = ([score_of([result], claim.split).value for result in pair] for pair in zip(better, worse))
        found.append(Finding(claim, difference(*scores), [a - b for a, b in pairs]))
    return found, list(dict.fromkeys(missing))


def table_of_claims(found: Sequence[Finding]) -> str:
    rows = [
        [
            each.claim.text + (f" (loses at most {each.claim.margin:g} point)" if each.claim.margin else ""),
            write_interval(each.found, signed=True),
            ", ".join(write_interval(Interval(seed, None, None), signed=True) for seed in each.seeds),
            each.verdict,
        ]
        for each in found
    ]
    return markdown(["claim", "difference", "seeds", "verdict"], rows)


def table_of_later(trials: Trials) -> str | None:
    """Right words after the steps of a new expert's stem."""
    rows = []
    for name in trials.conditions:
        results = trials.results(name)
        if results is None or CONDITIONS[name].later is None:
            continue
        for step in (0, *(step for step in LATER if later(step) in results[0]["counts"])):
            found = interval(score_of(results, later(step)))
            rows.append([name, str(step), str(step * trials.settings["batch_size"]), write_interval(found)])
    return markdown(["condition", "steps of the stem", "images", "right words"], rows) if rows else None


COLORS_OF_VERDICTS = {"confirmed": "#009E73", "refuted": "#D55E00", "undecided": "#666666"}


def figure(found: Sequence[Finding], path: Path) -> None:
    """The difference of each claim with its interval and its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 0.36 * len(found) + 1), layout="constrained")
    axis = drawing.subplots()
    for place, each in enumerate(found):
        color = COLORS_OF_VERDICTS[each.verdict]
        axis.plot(each.found.value, place, "o", color=color)
        axis.plot([each.found.low, each.found.high], [place, place], color=color, marker="|")
        axis.plot(each.seeds, [place] * len(each.seeds), "o", ms=3, mfc="white", mec=color, mew=0.8, zorder=3)
    for name, color in COLORS_OF_VERDICTS.items():
        axis.plot([], [], "o", color=color, label=name)
    axis.axvline(0, color="0.35", linewidth=1)
    axis.set_yticks(range(len(found)), [each.claim.text for each in found])
    axis.invert_yaxis()
    axis.set_xlabel("difference of right words, points (95 % interval; white: single seeds)")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xscale("symlog", linthresh=5)
    drawing.legend(loc="outside lower center", ncols=3, frameon=False)
    drawing.set_dpi(130)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(48).save(path, optimize=True)


def report(trials: Trials, path: Path) -> None:
    """Writes the tables, with a figure beside them, and what is missing."""
    found, missing = findings(trials)
    settings = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in trials.settings.items())
    text = [
        "# Claims about training with experts",
        f"{settings}; {trials.seeds} seeds. The tables have percent and points, with 95 % intervals.",
        "## Claims",
    ]
    if found:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure(found, path.with_suffix(".png"))
        text += [f"![Differences of the claims with intervals]({path.stem}.png)", table_of_claims(found)]
    text += ["## Conditions", table_of_conditions(trials)]
    text.append(AT_AN_END)
    if (table := table_of_later(trials)) is not None:
        text += ["## A new expert later", table]
    if missing:
        text.append(f"Missing: {', '.join(missing)}.")
    write_text(path, "\n\n".join(text) + "\n")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, learning_rates=(1.5e-3, 3e-3, 6e-3))
    add_data_arguments(parser, "scenes2")
    parser.add_argument("--backbones", type=Path, required=True, help="output folder of scenes/train_backbones.py")
    parser.add_argument(
        "--labels", required=True, help="label store of scenes/train_experts.py; or true, for a trial run"
    )
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--train_scenes", type=int, default=3000)
    parser.add_argument("--eval_scenes", type=int, default=200, help="scenes of validation, and as many of the test")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8, help="images in a step")
    parser.add_argument("--texts_per_image", type=int, default=4)
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def trials_of(args: argparse.Namespace) -> Trials:
    settings = {name: getattr(args, name) for name in SETTINGS}
    return Trials(args.output_dir, settings, args.conditions, args.learning_rates, args.seeds)


def main() -> None:
    args = parse_arguments()
    run(args, trials_of(args), train, report, __spec__.name)


if __name__ == "__main__":
    main()
