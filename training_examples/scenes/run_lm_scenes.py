"""
Trains PrismerLM on Scenes, and measures its answers by type of question, as run_scenes.py does for Prismer.

    export PYTHONPATH=training_examples
    scenes="--language runs/SmolLM2-135M-Instruct --labels runs/scenes/labels --data_dir runs/scenes-data"
    python -m scenes.run_lm_scenes $scenes --vision prismer-scenes --stage captions --cache_features --max_steps 300 \\
        --do_train --output_dir runs/lm/aligned
    python -m scenes.run_lm_scenes $scenes --model runs/lm/aligned --stage questions --cache_features \\
        --max_steps 3000 --texts_per_image 16 --do_train --do_eval --output_dir runs/lm/tokens

`make smollm2` prepares the language model, docs/scenes.md the labels. `--labels true` uses true labels, and
`--trained_weights 4e6` chooses the width of the new modules. `--without_types relation,nearest` leaves types of
questions out of the training. With `--shots 0 2 4 8` these are answered after examples, which are random or those of
similar images (`--shots_by`). docs/prismer_lm.md lists the commands of each comparison.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from feature_cache import encode_images
from lm_training import LmTrainer, generate_texts, tidy_answer, with_learned_logits
from modeling_prismer.processing.prompts import NOT_LEARNED
from run_lm import DEFAULTS, LmArguments, load_model, make_lm_trainer
from training import label_rows, parse_arguments, run, write_json

from .language import TYPES
from .run_scenes import (
    CAPTION_PROMPT,
    TrueLabels,
    choose_attention,
    evaluation_splits,
    interval_of,
    score_answers,
    score_captions,
    training_rows,
)
from .scenes import ScenesOptions


SCENES_DEFAULTS = {
    **DEFAULTS,
    "train_data": ["scenes"],
    "eval_data": ["scenes"],
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "question_prompt": "{}",
    "caption_prompt": CAPTION_PROMPT,
}
ANSWERS = {"num_beams": 1, "max_new_tokens": 8}
CAPTIONS = {"num_beams": 3, "max_new_tokens": 30}


@dataclass
class LmScenesArguments(ScenesOptions, LmArguments):
    trained_weights: float | None = field(
        default=None,
        metadata={"help": "Choose the width of the new modules so that about as many weights are trained."},
    )
    without_types: str | None = field(
        default=None, metadata={"help": f"Types of questions to leave out of the training: {', '.join(TYPES)}."}
    )
    watch_types: str | None = field(
        default=None,
        metadata={"help": "Types of questions to answer every --eval_steps of the training (--eval_strategy steps)."},
    )
    shots: list[int] = field(
        default_factory=list,
        metadata={"help": "Answer the questions of --without_types after this many examples; several numbers."},
    )
    shots_by: Literal["random", "similar"] = field(
        default="random", metadata={"help": "Whether examples are random, or of similar images (RICES)."}
    )
    packed_answers: bool = field(
        default=False,
        metadata={
            "help": "Count an answer as right if each of its tokens is the most probable one, all questions of an "
            "image in one row. Greedy generation finds the same answers right, but takes several times as long."
        },
    )
    num_support: int = field(default=2048, metadata={"help": "Training scenes from which examples are taken."})


def split_types(types: str | None) -> list[str]:
    found = types.split(",") if types else []
    if unknown := [name for name in found if name not in TYPES]:
        raise SystemExit(f"there is no type of question {unknown[0]!r}; accepted are {', '.join(TYPES)}")
    return found


# ---- data ----


def rows_to_train(scenes: datasets.Dataset, stage: str, without_types: list[str]) -> datasets.Dataset:
    """A row is an image with its captions, or in the second stage also with its questions."""
    left_out = set(TYPES) if stage == "captions" else set(without_types)

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {"questions": [question for question in row["questions"] if question["type"] not in left_out]}

    if left_out:
        scenes = scenes.map(keep, desc="questions")
    return training_rows(scenes).remove_columns(["task", "weight"])


def rows_to_watch(scenes: datasets.Dataset, types: list[str]) -> datasets.Dataset:
    """A row is a question of one of the types."""
    asked = [
        (number, question)
        for number, questions in enumerate(scenes["questions"][:])
        for question in questions
        if question["type"] in types
    ]
    rows = scenes.select_columns(["image_id", "image"]).select([number for number, _ in asked])
    rows = rows.add_column("text", [question["question"] for _, question in asked])
    return rows.add_column("references", [[question["answer"]] for _, question in asked])


def score_exact(answers: list[str], rows: datasets.Dataset) -> dict[str, float]:
    hits = [answer in known for answer, known in zip(answers, rows["references"][:], strict=True)]
    return {"exact": float(np.mean(hits))}


# ---- evaluation ----


@torch.no_grad()
def find_answers(trainer: LmTrainer, scenes: datasets.Dataset, batch_size: int = 4) -> list[list[str]]:
    """
    The true answers that greedy generation would give, because each of their tokens is the most probable one; "" for
    the other questions. The questions about an image are packed into one row.
    """
    model = trainer.model.eval()
    collator = copy.copy(trainer.eval_collator)
    collator.pack = collator.with_suffix = True
    found = []
    for start in tqdm(range(0, len(scenes), batch_size), desc="answers", leave=False):
        rows = list(scenes.select(range(start, min(start + batch_size, len(scenes)))))
        inputs = collator(
            [
                {
                    "image": row["image"],
                    "image_id": row["image_id"],
                    "text": [question["question"] for question in row["questions"]],
                    "suffix": [question["answer"] for question in row["questions"]],
                }
                for row in rows
            ]
        )
        inputs = with_learned_logits({name: tensor.to(model.device) for name, tensor in inputs.items()})
        labels, next_tokens = inputs.pop("labels"), inputs.pop("shift_labels")
        is_right = torch.zeros_like(labels, dtype=torch.bool)
        is_right[:, inputs["logits_to_keep"] + 1] = model(**inputs).logits.argmax(dim=-1) == next_tokens
        for row, *own in zip(rows, labels.tolist(), is_right.tolist()):
            hits = runs_right(*own)
            found.append([q["answer"] if hit else "" for q, hit in zip(row["questions"], hits, strict=True)])
    return found


def runs_right(labels: list[int], is_right: list[bool]) -> list[bool]:
    """Whether all tokens of each text are right. The learned tokens of a text are a run in its row."""
    runs = groupby(zip(labels, is_right), key=lambda pair: pair[0] != NOT_LEARNED)
    return [all(right for _, right in run) for is_learned, run in runs if is_learned]


def answers_interval(said: list[list[str]], scenes: datasets.Dataset) -> list[float | None]:
    """The 95 % interval of the share of right answers, by a bootstrap over scenes."""
    pairs = zip(said, scenes["questions"][:], strict=True)
    return interval_of([[answer == q["answer"] for answer, q in zip(answers, own)] for answers, own in pairs])


def measure(trainer: LmTrainer, scenes: datasets.Dataset, packed_answers: bool = False) -> dict[str, Any]:
    """Exact answers by type of question with the interval of all, captions, and the seconds for each."""
    images = scenes.select_columns(["image_id", "image"])
    questions = [[question["question"] for question in own] for own in scenes["questions"][:]]
    prompts = [[CAPTION_PROMPT]] * len(scenes)
    said, seconds = {}, {}
    for name, texts, settings in (("answers", questions, ANSWERS), ("captions", prompts, CAPTIONS)):
        if name == "answers" and packed_answers:
            continue
        start, lengths = time.perf_counter(), [len(own) for own in texts]

        def row_of(number: int, texts: list[list[str]] = texts) -> dict[str, Any]:
            return {**images[number], "text": texts[number]}

        size = trainer.args.eval_batch_size
        said[name] = generate_texts(trainer.model, trainer.eval_collator, row_of, lengths, size, **settings)
        seconds[name] = (time.perf_counter() - start) / sum(lengths)
    if packed_answers:
        answers = find_answers(trainer, scenes)
    else:
        answers = [[tidy_answer(text) for text in own] for own in said["answers"]]
    return {
        "answers": score_answers(answers, scenes),
        "interval": answers_interval(answers, scenes),
        "captions": score_captions([text for (text,) in said["captions"]], scenes),
        "seconds": seconds,
    }


class Examples:
    """
    Training scenes from which examples are taken.

    Args:
        trainer ([`LmTrainer`]): its model encodes images for `by="similar"`.
        scenes (`Dataset`): the scenes.
        by (`str`): `"random"` or `"similar"`.
    """

    def __init__(self, trainer: LmTrainer, scenes: datasets.Dataset, by: str):
        self.trainer, self.by = trainer, by
        self.images = scenes.select_columns(["image_id", "image"])
        self.questions = scenes["questions"][:]
        if by == "similar" and not trainer.model.config.vision_config:
            raise SystemExit("--shots_by similar needs a vision encoder")
        self.features = self.encode(self.images) if by == "similar" else None
        self.random = np.random.default_rng(trainer.args.seed)

    def encode(self, images: datasets.Dataset, batch_size: int = 32) -> torch.Tensor:
        """The mean patch of each image, of length 1: `(len(images), channels)`."""
        trainer, collator = self.trainer, self.trainer.eval_collator
        means = []
        for start in range(0, len(images), batch_size):
            rows = [images[number] for number in range(start, min(start + batch_size, len(images)))]
            labels, experts = collator.labels_for, collator.experts
            features = encode_images(trainer.model, trainer.processing_class, rows, labels, experts)
            means.append(F.normalize(features.float().mean(dim=1), dim=-1).cpu())
        return torch.cat(means)

    def choose(self, kind: str, number: int, feature: torch.Tensor | None) -> list[tuple[dict, dict]]:
        """Pairs of an image and a question of a type. The most similar image is the last."""
        having = [i for i, questions in enumerate(self.questions) if any(q["type"] == kind for q in questions)]
        if feature is None:
            chosen = self.random.permutation(having)[:number].tolist()
        else:
            likeness = self.features[having] @ feature
            chosen = [having[i] for i in likeness.topk(min(number, len(having))).indices.flip(0).tolist()]
        asked = [[question for question in self.questions[i] if question["type"] == kind] for i in chosen]
        return [(self.images[i], own[self.random.integers(len(own))]) for i, own in zip(chosen, asked)]


def row_with_examples(
    examples: list[tuple[dict, dict]], image: dict[str, Any], question: str, is_chat: bool
) -> dict[str, Any]:
    """A row of the collator: examples of an image with question and answer, then an image with a question."""
    images = [example for example, _ in examples] + [image]
    row = {"images": [own["image"] for own in images], "image_ids": [own["image_id"] for own in images]}
    if not is_chat:
        shown = [f"<image>{asked['question']} {asked['answer']}\n" for _, asked in examples]
        return {**row, "text": "".join([*shown, f"<image>{question}"])}
    messages = []
    for _, asked in examples:
        messages.append({"role": "user", "content": f"<image>{asked['question']}"})
        messages.append({"role": "assistant", "content": asked["answer"]})
    return {**row, "messages": [*messages, {"role": "user", "content": f"<image>{question}"}]}


def measure_shots(
    trainer: LmTrainer, scenes: datasets.Dataset, examples: Examples, number: int, types: list[str]
) -> dict[str, float]:
    """Exact answers to questions of some types after `number` examples of the same type."""
    images = scenes.select_columns(["image_id", "image"])
    features = examples.encode(images) if examples.by == "similar" else [None] * len(scenes)
    asked = [
        (i, own) for i, questions in enumerate(scenes["questions"][:]) for own in questions if own["type"] in types
    ]

    def row_of(place: int) -> dict[str, Any]:
        i, question = asked[place]
        shown = examples.choose(question["type"], number, features[i])
        return row_with_examples(shown, images[i], question["question"], trainer.eval_collator.as_chat)

    size = max(1, trainer.args.eval_batch_size // (number + 1))
    said = generate_texts(trainer.model, trainer.eval_collator, row_of, [1] * len(asked), size, **ANSWERS)
    hits = [tidy_answer(text) == question["answer"] for (text,), (_, question) in zip(said, asked)]
    by_type = {name: [hit for hit, (_, own) in zip(hits, asked) if own["type"] == name] for name in types}
    return {"all": float(np.mean(hits)), **{name: float(np.mean(own)) for name, own in by_type.items() if own}}


# ---- the same number of trained weights ----


def choose_width(args: LmScenesArguments) -> None:
    """Sets the width inside the projections or the gated blocks, so that about as many weights are trained."""
    model, _ = load_model(args, do_train=True)
    own = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if args.fusion == "cross_attention":
        name, widened = (
            "cross_attention_intermediate_size",
            [block.mlp.fc1 for block in model.model.cross_blocks.values()],
        )
    else:
        projections = [getattr(model.model, part, None) for part in ("vision_projection", "experts_projection")]
        name, widened = "projector_hidden_size", [projection.fc1 for projection in projections if projection]
    if not widened:
        raise SystemExit("--trained_weights: the model has no new modules")
    hidden_size = model.config.hidden_size
    per_unit = sum(layer.in_features + 1 + hidden_size for layer in widened)  # a row of fc1 and a column of fc2
    width = round(widened[0].out_features + (args.trained_weights - own) / per_unit)
    if width < 1:
        raise SystemExit(f"--trained_weights {args.trained_weights:.0f}: the other new modules have {own} already")
    setattr(args, name, width)


def main() -> None:
    args, training_args = parse_arguments(LmScenesArguments, **SCENES_DEFAULTS)
    without_types, watch_types = split_types(args.without_types), split_types(args.watch_types)
    if args.shots and not without_types:
        raise SystemExit("--shots needs --without_types: the types of questions that the training has left out")
    output_dir = Path(training_args.output_dir)
    splits = args.open_scenes()
    if args.trained_weights and not args.model:
        choose_width(args)
    model, processor = load_model(args, training_args.do_train)
    choose_attention(model.language_model)
    if args.packed_answers and (model.config.question_queries or model.config.has_vision_language_model):
        raise SystemExit("--packed_answers: the questions of this model cannot be packed; leave it out to generate")

    train_scenes = splits["train"].select(
        range(min(args.max_train_rows or len(splits["train"]), len(splits["train"])))
    )
    support = train_scenes.select(range(min(args.num_support, len(train_scenes))))
    scenes = evaluation_splits(splits, args.max_eval_rows)
    if args.labels == "true":
        names = tuple(expert["name"] for expert in processor.image_processor.experts)
        labels_for = TrueLabels(*splits.values(), names=names)
    else:
        parts = [train_scenes] if training_args.do_train else [support] if args.shots else []
        parts += list(scenes.values()) if training_args.do_eval or watch_types else []
        wanted = [] if args.experts == "none" else None
        labels_for = label_rows(parts, processor, args.labels, output_dir / "expert_labels", wanted)
    watched = rows_to_watch(scenes["validation"], watch_types) if watch_types else None
    trainer = make_lm_trainer(
        model,
        processor,
        args,
        training_args,
        rows_to_train(train_scenes, args.stage, without_types) if training_args.do_train else None,
        watched,
        labels_for=labels_for,
        score=score_exact,
        read_text=tidy_answer,
        generation=ANSWERS,
    )
    trainer.facts.training = f"Trained on the {'captions' if args.stage == 'captions' else 'questions'} of Scenes."
    run(trainer, args)
    if training_args.do_eval:
        trainer.model.to(training_args.device)
        results: dict[str, Any] = {}
        if args.shots:
            examples = Examples(trainer, support, args.shots_by)
            for name, rows in scenes.items():
                results[name] = {
                    str(number): measure_shots(trainer, rows, examples, number, without_types) for number in args.shots
                }
        else:
            results = {name: measure(trainer, rows, args.packed_answers) for name, rows in scenes.items()}
        if trainer.is_world_process_zero():
            write_json(output_dir / "scenes_results.json", results)
            print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
