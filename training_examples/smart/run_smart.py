"""
Trains a reasoner on SMART-101 and measures S_acc and O_acc, by kind and by puzzle.

    export PYTHONPATH=training_examples
    python -m smart.run_smart --reasoner baseline --data_dir SMART101-Data --do_train --do_eval --output_dir runs/r50
    python -m smart.run_smart --reasoner fused --data_dir SMART101-Data --do_train --do_eval --output_dir runs/fused
    python -m smart.run_smart --reasoner prismer --model CHECKPOINT --data_dir SMART101-Data --do_train --do_eval \\
        --output_dir runs/prismer

| reasoner | network | by default |
| --- | --- | --- |
| frequent | none: the most frequent answer of each puzzle in the training part | |
| baseline | ResNet and frozen BERT, a head for each puzzle | ResNet-50, 100 epochs |
| fused | frozen encoders in place of the ResNet | SigLIP and DINOv2 |
| prismer | a Prismer that generates answers and ranks options | needs `--model` |
| prismer_lm | a PrismerLM, in the same way | SmolLM2-135M, SigLIP and DINOv2 |

`--scheme` chooses the split: IS, AS, PS or FS. `--no_image` shows the same gray image for all, and `--no_question`
asks nothing. `--epochs 1 --freeze` trains for one epoch on frozen backbones. Our own puzzles (generate.py) have the
same layout. docs/smart101.md has the commands of the measurements.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

import run_lm
import run_vqa
from modeling_prismer import PrismerLMProcessor, Task, register_task
from run_lm import LmArguments, load_model, make_lm_trainer
from training import load_checkpoint, make_trainer, parse_arguments, run, write_json

from .metrics import Score, find_hits, read_values, score_groups
from .puzzles import Puzzle, find_puzzles
from .reasoner import SHARED, ReasonerCollator, ReasonerTrainer, SmartReasoner
from .rows import SCHEMES, load_smart


RESNET_BERT = {
    "num_train_epochs": 100,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
}
DEFAULTS = {
    "frequent": {},
    "baseline": RESNET_BERT | {"freeze": "language"},
    "fused": RESNET_BERT | {"freeze": "both"},
    "prismer": run_vqa.PAPER | {"label_smoothing": 0.0},
    "prismer_lm": run_lm.DEFAULTS | {"stage": "questions"},
}
BERT, SMOLLM = "google-bert/bert-base-uncased", "HuggingFaceTB/SmolLM2-135M-Instruct"
FUSED = ("google/siglip-base-patch16-224", "facebook/dinov2-base")
BACKBONES = {"baseline": (("microsoft/resnet-50",), BERT), "fused": (FUSED, BERT), "prismer_lm": (FUSED, SMOLLM)}
GENERATION = {"num_beams": 1, "max_new_tokens": 14}  # greedy: an answer is short
NO_QUESTION = "?"
GRAY = (128, 128, 128)
# The longest question of SMART-101 has about 110 tokens. `fit_task` lowers the limit for smaller models.
register_task(Task("puzzle", max_prompt_tokens=110, generation=GENERATION), exist_ok=True)


@dataclass
class SmartArguments(LmArguments):
    reasoner: Literal["frequent", "baseline", "fused", "prismer", "prismer_lm"] = field(
        default="baseline", metadata={"help": "The reasoner; see above."}
    )
    model: str | None = field(
        default=None, metadata={"help": "A reasoner to continue from or to measure, or a Prismer or PrismerLM."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "The folder of the puzzles: SMART101-Data, or that of smart/generate.py."}
    )
    scheme: str = field(default="IS", metadata={"help": f"The split: {', '.join(SCHEMES)}."})
    fs_shots: int = field(default=100, metadata={"help": "Training instances of each held-out puzzle in FS."})
    only: list[str] = field(default_factory=list, metadata={"help": "Numbers or kinds of puzzles, by default all."})
    max_instances: int | None = field(default=None, metadata={"help": "Use the first instances of each puzzle only."})
    no_image: bool = field(default=False, metadata={"help": "Show the same gray image for all puzzles."})
    no_question: bool = field(default=False, metadata={"help": "Ask no question."})
    max_minutes: float | None = field(default=None, metadata={"help": "Stop the training after this time."})
    epochs: float | None = field(default=None, metadata={"help": "Short for --num_train_epochs."})
    freeze: str = field(
        default="both",
        metadata={"help": "Frozen backbones: none, vision, language or both (also --freeze alone).", "nargs": "?"}
        | {"const": "both"},
    )


class StopAfter(TrainerCallback):
    """Stops the training after some minutes."""

    def __init__(self, minutes: float):
        self.minutes = minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.monotonic() + 60 * self.minutes

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() > self.end


# ---- data ----


def load_part(args: SmartArguments, part: str) -> datasets.Dataset:
    if args.data_dir is None:
        raise SystemExit("--data_dir is missing: the folder SMART101-Data, or that of smart/generate.py")
    try:
        rows = load_smart(args.data_dir, args.scheme, part, args.fs_shots, args.only, args.max_instances)
    except (FileNotFoundError, ValueError) as problem:
        raise SystemExit(str(problem)) from problem
    limit = {"train": args.max_train_rows}.get(part, args.max_eval_rows)
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=0).select(range(limit))
    return hide(rows, args)


def hide(rows: datasets.Dataset, args: SmartArguments) -> datasets.Dataset:
    """The rows without their images or questions, if the arguments say so."""
    if args.no_question:
        rows = rows.remove_columns("text").add_column("text", [NO_QUESTION] * len(rows))
    if args.no_image:
        gray = datasets.Image().encode_example(Image.new("RGB", (224, 224), GRAY))
        rows = rows.remove_columns("image").add_column("image", [gray] * len(rows), feature=datasets.Image())
    return rows


# ---- the reasoners with heads ----


def count_classes(rows: datasets.Dataset, puzzles: dict[int, Puzzle], shared: bool) -> dict[str, int]:
    """The number of values that each head predicts: those up to the largest of its puzzle."""
    classes: dict[str, int] = defaultdict(int)
    for number, value in zip(rows["puzzle"][:], rows["value"][:]):
        largest = puzzles[number].fill if puzzles[number].is_sequence else 0
        name = SHARED if shared else str(number)
        classes[name] = max(classes[name], largest + 1, max(value) + 1)
    return dict(classes)


def make_reasoner(
    args: SmartArguments, training_args: TrainingArguments, parts: dict[str, datasets.Dataset]
) -> ReasonerTrainer:
    if args.model:
        model, tokenizer = SmartReasoner.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    else:
        puzzles = find_puzzles(Path(args.data_dir))
        every = datasets.concatenate_datasets(list(parts.values()))  # as published, all parts give the classes
        classes = count_classes(every, puzzles, shared=args.scheme == "PS")
        sequences = [name for name in classes if name != SHARED and puzzles[int(name)].is_sequence]
        vision, language = BACKBONES[args.reasoner]
        vision, language = args.vision or list(vision), args.language or language
        model = SmartReasoner.from_backbones(vision, language, classes, sequences, args.image_size)
        tokenizer = AutoTokenizer.from_pretrained(language)
    model.freeze_backbones(vision=args.freeze in ("vision", "both"), language=args.freeze in ("language", "both"))
    collator = ReasonerCollator(model.config, tokenizer)
    return ReasonerTrainer(
        model=model,
        args=training_args,
        train_dataset=parts.get("train"),
        eval_dataset=parts.get("validation"),
        processing_class=tokenizer,
        data_collator=collator,
    )


def predict_values(trainer: ReasonerTrainer, rows: datasets.Dataset) -> list[list[int]]:
    predicted = trainer.predict(rows).predictions.tolist()
    return [own[: len(value)] for own, value in zip(predicted, rows["value"][:])]


# ---- Prismer and PrismerLM: texts ----


def fit_task(model: Any) -> None:
    """Limits the questions to the positions of a small model, with room for an answer."""
    config = model.config.text_config
    room = config.max_position_embeddings - config.pad_token_id - 1 - GENERATION["max_new_tokens"]
    register_task(Task("puzzle", max_prompt_tokens=min(110, room), generation=GENERATION), exist_ok=True)


def make_text_trainer(
    args: SmartArguments, training_args: TrainingArguments, parts: dict[str, datasets.Dataset]
) -> Any:
    puzzles = find_puzzles(Path(args.data_dir))

    def score(texts: list[str], rows: datasets.Dataset) -> dict[str, float]:
        solved, _ = find_hits(read_values(texts, rows, puzzles), rows, puzzles)
        return {"s_acc": float(solved.mean())}

    shared = {"train_rows": parts.get("train"), "eval_rows": parts.get("validation"), "score": score}
    if args.reasoner == "prismer":
        model, processor = load_checkpoint(args, "puzzle")
        fit_task(model)
        others = [parts["test"]] if "test" in parts else []
        return make_trainer(model, processor, args, training_args, other_rows=others, generation=GENERATION, **shared)
    if not args.model:
        vision, language = BACKBONES["prismer_lm"]
        args.vision, args.language = args.vision or list(vision), args.language or language
    model, processor = load_model(args, training_args.do_train)
    return make_lm_trainer(model, processor, args, training_args, generation=GENERATION, read_text=str, **shared)


@torch.no_grad()
def choose_options(trainer: Any, rows: datasets.Dataset) -> list[int]:
    """
    The option of each row that the model ranks best: the one whose tokens have the highest mean log-probability after
    the question.
    """
    model, processor = trainer.model.eval(), trainer.processing_class
    form = {}
    if isinstance(processor, PrismerLMProcessor):
        form["task"] = "chat" if trainer.eval_collator.as_chat else "text"
    order = sorted(range(len(rows)), key=rows["puzzle"][:].__getitem__)  # instances of a puzzle share options
    chosen, size = [0] * len(rows), trainer.args.eval_batch_size
    for start in tqdm(range(0, len(rows), size), desc="ranking", leave=False, disable=trainer.args.disable_tqdm):
        places = order[start : start + size]
        batch = [rows[place] for place in places]
        texts = sorted({option for row in batch for option in row["options"]})
        inputs = trainer.eval_collator(batch) | dict(processor.prepare_candidates(texts, **form))
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        ranking = model.rank_candidates(k=len(texts), **inputs).indices.tolist()
        for place, row, indices in zip(places, batch, ranking):
            best = next(texts[index] for index in indices if texts[index] in row["options"])
            chosen[place] = row["options"].index(best)
    return chosen


# ---- measures ----


def most_frequent(train: datasets.Dataset, rows: datasets.Dataset) -> list[list[int] | None]:
    """The most frequent value of each puzzle in the training part; `None` for a puzzle that it lacks."""
    counts: dict[int, Counter] = defaultdict(Counter)
    for number, value in zip(train["puzzle"][:], train["value"][:]):
        counts[number][tuple(value)] += 1
    return [list(counts[n].most_common(1)[0][0]) if n in counts else None for n in rows["puzzle"][:]]


def as_table(scores: dict[str, Score]) -> str:
    def share(value: float, interval: tuple[float, float]) -> str:
        return f"{100 * value:.1f} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"

    lines = ["| puzzles | number | S_acc, % | O_acc, % |", "| --- | --- | --- | --- |"]
    for name, own in scores.items():
        shares = share(own.s_acc, own.s_interval), share(own.o_acc, own.o_interval)
        lines.append(f"| {name} | {own.number} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--reasoner", choices=DEFAULTS, default="baseline")
    chosen = early.parse_known_args()[0].reasoner
    shared = {"train_data": ["smart"], "eval_data": ["smart"], "augment": False}
    args, training_args = parse_arguments(SmartArguments, **shared | DEFAULTS[chosen])
    if args.epochs is not None:
        training_args.num_train_epochs = args.epochs
    if args.predict_only:
        raise SystemExit("--predict_only: a reasoner is measured with --do_eval")
    needed = {"train": training_args.do_train or args.reasoner == "frequent", "validation": True, "test": True}
    parts = {part: load_part(args, part) for part, is_needed in needed.items() if is_needed}
    is_measured = args.reasoner == "frequent" or training_args.do_eval
    for part, is_used in {"train": needed["train"], "test": is_measured}.items():
        if is_used and not len(parts[part]):
            raise SystemExit(
                f"the {part} part of --scheme {args.scheme} is empty; choose another --scheme, or more puzzles or "
                "instances: --only, --max_instances"
            )
    parts = {part: rows for part, rows in parts.items() if len(rows)}
    puzzles = find_puzzles(Path(args.data_dir))

    if args.reasoner == "frequent":
        predicted, options = most_frequent(parts["train"], parts["test"]), None
    else:
        has_heads = args.reasoner in ("baseline", "fused")
        trainer = (make_reasoner if has_heads else make_text_trainer)(args, training_args, parts)
        if args.max_minutes is not None:
            trainer.add_callback(StopAfter(args.max_minutes))
        run(trainer, args)
        if not training_args.do_eval:
            return
        trainer.model.to(training_args.device)
        if has_heads:
            predicted, options = predict_values(trainer, parts["test"]), None
        else:
            predicted = read_values(trainer.predict_texts(parts["test"]), parts["test"], puzzles)
            options = choose_options(trainer, parts["test"])
        if not trainer.is_world_process_zero():
            return
    scores = score_groups(*find_hits(predicted, parts["test"], puzzles, options), parts["test"])
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"reasoner": args.reasoner, "scheme": args.scheme}
    write_json(folder / "smart_results.json", content | {name: asdict(own) for name, own in scores.items()})
    print(json.dumps(content), as_table(scores), sep="\n")


if __name__ == "__main__":
    main()
