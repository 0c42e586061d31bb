"""
Trains a Prismer on Scenes and evaluates it.

    export PYTHONPATH=training_examples
    python -m scenes.run_scenes --backbones runs/scenes/backbones --suite runs/scenes/experts \\
        --labels runs/scenes/labels --data_dir runs/scenes-data --freeze both --texts signs --max_steps 300 \\
        --per_device_train_batch_size 48 --do_train --output_dir runs/scenes/signs
    python -m scenes.run_scenes --model runs/scenes/signs --labels runs/scenes/labels \\
        --data_dir runs/scenes-data --freeze both --max_steps 2200 --do_train --output_dir runs/scenes/stage-1
    python -m scenes.run_scenes --model runs/scenes/stage-1 --labels runs/scenes/labels \\
        --data_dir runs/scenes-data --freeze vision --max_steps 1000 --learning_rate 5e-4 --do_train --do_eval \\
        --output_dir runs/scenes/stage-2

The first command builds a model from the frozen backbones of train_backbones.py and the experts of train_experts.py,
and trains its new weights to read signs. The second command trains them on all captions and questions. The third also
trains the language backbone. With `--labels true` the model gets true labels instead of the experts' predictions.
`--suite none` makes a PrismerZ. With `--blind` the model gets a gray image and no experts, to measure how much the
questions alone reveal.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPVisionModel, PreTrainedModel, RobertaForMaskedLM

from comparison.scores import Score, interval
from modeling_prismer import (
    DataCollatorForPrismer,
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    PrismerProcessor,
)
from modeling_prismer.conversion import class_features_from_names
from modeling_prismer.familiarity import Familiarity, image_features
from modeling_prismer.processing.data_collator import TEXT_COLUMNS
from modeling_prismer.processing.experts import ExpertSuite, HashedNgrams, UserRegions
from modeling_prismer.processing.labels import label_source, open_source
from modeling_prismer.processing.metrics import load_metric
from muon import muon_with
from training import RecipeArguments, load_checkpoint, make_trainer, parse_arguments, run, write_json

from .labels import EXPERTS
from .language import phrase, true_share
from .render import CLASSES
from .scenes import DETECTION_CLASSES, ScenesOptions, expert_labels, first


IMAGE_SIZE = 128
EXPERT_GRID = 8  # tokens of an expert, along each side
DESCRIPTIONS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "normal", "kind": "dense", "channels": 3},
    {"name": "segmentation", "kind": "label", "channels": 64, "num_classes": len(CLASSES)},
    {"name": "edge", "kind": "dense", "channels": 1},
    {
        "name": "detection",
        "kind": "label",
        "channels": 64,
        "num_classes": len(DETECTION_CLASSES),
        "instances": True,
    },
    {"name": "ocr", "kind": "label", "channels": 64},
]
MARK = {"name": "regions", "kind": "label", "channels": 64}  # the marked object of Scenes 2
DEFAULTS = {
    "train_data": ["scenes"],
    "eval_data": ["scenes"],
    "num_train_epochs": 8,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 50,
    "save_steps": 200,
    "dataloader_num_workers": 1,
    "freeze": "both",
    # flips and crops would make the texts wrong about left and right, and about numbers of objects
    "augment": False,
}
GENERATION = {"num_beams": 3, "max_new_tokens": 30}  # captions are longer than in COCO
TEXTS_PER_IMAGE = {"all": 20, "signs": 3, "lists": 8, "objects": 4}  # texts drawn for an image in each epoch
ATTRIBUTES = ("size", "material", "color", "shape")
LISTED = 5  # objects; more words do not fit into an answer
RANDOM_LISTS = 4  # of a scene
CAPTIONS = 5  # of a scene
CAPTION_BATCHES = 0.2  # share of the batches; the others have questions
WEIGHTS = {"sign": 3.0}  # loss weights by type; 200 words are learned from one question per image
CAPTION_PROMPT = "A picture of"
FAMILIAR = 3000  # scenes that the published checkpoint compares images with


@dataclass
class ScenesArguments(ScenesOptions, RecipeArguments):
    backbones: str | None = field(default=None, metadata={"help": "Output folder of scenes/train_backbones.py."})
    suite: str = field(
        default="none",
        metadata={"help": "Output folder of scenes/train_experts.py; true (experts without live networks); or none."},
    )
    texts: str = field(
        default="all",
        metadata={
            "help": "all; signs (scenes with a sign: the question for its word, and two other texts); lists (of "
            "objects and signs); or objects (lists of objects in a fixed order)."
        },
    )
    photographs: str | None = field(
        default=None,
        metadata={"help": "Folder of images that are not scenes; counts those that a published --model warns about."},
    )
    freeze_patches: bool = field(
        default=False,
        metadata={
            "help": "Also freeze the patch embedding, the positions and the norms of the vision encoder. The paper "
            "trains them; at the high learning rate of such a small network, they lose what the backbone has learned."
        },
    )
    blind: bool = field(default=False, metadata={"help": "Replace images by gray ones, without experts."})


# ---- data ----


def training_rows(scenes: Dataset, only: str = "all") -> Dataset:
    """
    Makes one row per image with all its questions and captions. With `only="signs"`, rows are images with a sign, and
    have the question for its word and two other texts. With `only="lists"`, the texts list objects and signs, and with
    `only="objects"` objects in a fixed order.
    Rows without a mark have no questions about it.
    """
    order = np.random.default_rng(0)

    def texts(row, index):
        if only in ("lists", "objects"):
            found = lists_of(row["facts"], order if only == "lists" else None)
            return {name: [text[name] for text in found] for name in ("text", "suffix", "task", "weight")}
        found = [
            {"text": q["question"], "suffix": q["answer"], "task": "vqa", "type": q["type"]}
            for q in row["questions"]
            if q["type"] != "marked" or is_marked(index)
        ]
        found += [
            {"text": CAPTION_PROMPT, "suffix": caption, "task": "caption", "type": "caption"}
            for caption in row["captions"]
        ]
        if only == "signs":
            signs = [text for text in found if text["type"] == "sign"]
            others = [text for text in found if text["type"] != "sign"]
            drawn = order.permutation(len(others))[: TEXTS_PER_IMAGE["signs"] - 1]
            found = [*signs[:1], *(others[i] for i in drawn)] if signs else []
        columns = {name: [text[name] for text in found] for name in ("text", "suffix", "task")}
        return columns | {"weight": [WEIGHTS.get(text["type"], 1.0) for text in found]}

    sources = ["questions", "captions", "facts"]
    rows = scenes.select_columns(sources)
    rows = rows.map(texts, with_indices=True, remove_columns=sources, desc="texts")
    rows = concatenate_datasets([scenes.select_columns(["image_id", "image"]), rows], axis=1)
    return rows.select([i for i, found in enumerate(rows["text"]) if found])


def lists_of(facts: dict[str, Any], order: np.random.Generator | None = None) -> list[dict[str, Any]]:
    """
    Texts that name the objects of a scene with all attributes, from one side to the other. Nearly every word needs the
    image, so they teach a decoder sooner than questions, whose answer is one word.

    With `order`, there are also texts that name the words on signs, and objects and their attributes in random order.
    In these, a word follows from those before it as an answer from a question: the words `red cube` tell which object
    it is, and the next one is its size.
    """
    orders: dict[str, Callable[[dict[str, Any]], float]] = {
        "From left to right": lambda thing: thing["center"][0],
        "From right to left": lambda thing: -thing["center"][0],
        "From near to far": lambda thing: thing["distance"],
        "From far to near": lambda thing: -thing["distance"],
    }
    texts = []
    for text, place in orders.items():
        things = sorted(facts["objects"], key=place)[:LISTED]
        texts.append((text, ", ".join(phrase(thing, ("size", "material", "color")) for thing in things), 1.0))
    if order is not None:
        words = [sign["word"] for sign in sorted(facts["signs"], key=lambda sign: sign["center"][0])]
        texts.append(("Signs from left to right", ", ".join(words) or "none", WEIGHTS["sign"]))
        for _ in range(RANDOM_LISTS):
            things = [facts["objects"][place] for place in order.permutation(len(facts["objects"]))[:LISTED]]
            names = [" ".join(thing[name] for name in order.permutation(ATTRIBUTES)) for thing in things]
            texts.append(("In any order", ", ".join(names), 1.0))
    return [{"text": text, "suffix": said, "task": "vqa", "weight": weight} for text, said, weight in texts]


def is_marked(index: int) -> bool:
    """Whether a training scene comes with its mark. Every second one does not, as most images of users."""
    return index % 2 == 0


class TrueLabels:
    """Returns the true labels for the ids of images."""

    def __init__(self, *parts: Dataset, names: tuple[str, ...] = EXPERTS):
        self.parts = parts
        self.names = names
        self.places = {name: (part, i) for part, rows in enumerate(parts) for i, name in enumerate(rows["image_id"])}

    def __call__(self, image_ids: list[str]) -> list[dict]:
        places = [self.places[image_id] for image_id in image_ids]
        return [expert_labels(self.parts[part][row], names=self.names) for part, row in places]


class WithMarks:
    """Adds the mark of a scene to its other labels, except for training scenes without a mark."""

    def __init__(self, labels_for: Callable[[list[str]], list[dict] | None], splits: dict[str, Dataset]):
        self.labels_for = labels_for
        self.marks = TrueLabels(*splits.values(), names=(MARK["name"],))
        ids = splits["train"]["image_id"] if "train" in splits else []
        self.unmarked = {image_id for index, image_id in enumerate(ids) if not is_marked(index)}

    def __call__(self, image_ids: list[str]) -> list[dict]:
        labels = zip(image_ids, self.labels_for(image_ids), self.marks(image_ids), strict=True)
        return [{**own, **({} if name in self.unmarked else mark)} for name, own, mark in labels]


class OneTaskPerBatch(DataCollatorForPrismer):
    """
    Makes batches of captions alone or of questions alone. Captions are longer; in a mixed batch, every question would
    be padded to their length.
    """

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not self.with_suffix or not isinstance(rows[0]["task"], list):
            return super().__call__(rows)
        draw = random.Random(f"{self.seed} {self.epoch} {rows[0]['image_id']}").random()
        task = "caption" if draw < CAPTION_BATCHES else "vqa"
        chosen = []
        for row in rows:
            places = [place for place, own in enumerate(row["task"]) if own == task]
            chosen.append({**row, **{name: [row[name][place] for place in places] for name in TEXT_COLUMNS}})
        return super().__call__(chosen)

    def _draw_texts(self, row: dict[str, Any], texts_per_image: int) -> None:
        super()._draw_texts(row, CAPTIONS if row["task"][0] == "caption" else texts_per_image)


def known_labels(
    labels: str, experts: list[dict[str, Any]], splits: dict[str, Dataset]
) -> Callable[[list[str]], list[dict[str, Any]]]:
    """
    A function from ids of images to labels: those of `labels`, a label store or `"true"`, and marks if `experts` have
    [`MARK`].
    """
    others = [each for each in experts if each["name"] != MARK["name"]]
    known: Any = TrueLabels(*splits.values()) if labels == "true" else label_source(labels, others)
    return known if len(others) == len(experts) else WithMarks(known, splits)


def no_labels(image_ids: list[str]) -> list[dict]:
    return [{} for _ in image_ids]


# ---- a new model ----


def new_model(args: ScenesArguments, **kwargs: Any) -> tuple[PrismerForConditionalGeneration, PrismerProcessor]:
    """A model as the arguments say. `kwargs` are further fields of [`PrismerConfig`]."""
    folder = Path(args.backbones or "")
    if args.backbones is None or not all((folder / part).is_dir() for part in ("clip", "roberta", "tokenizer")):
        raise SystemExit(
            f"--backbones {args.backbones}: a new model needs the output folder of scenes/train_backbones.py, with "
            "clip, roberta and tokenizer; or pass a trained model as --model"
        )
    suite = None
    if args.suite not in ("none", "true"):
        suite = ExpertSuite.from_pretrained(args.suite)
    descriptions = [] if args.suite == "none" else DESCRIPTIONS
    if descriptions and args.data_config == "scenes2":
        descriptions = [*DESCRIPTIONS, MARK]
        suite = suite and ExpertSuite([*suite.values(), UserRegions()])
    return from_backbones(folder, descriptions, suite, **kwargs)


def from_backbones(
    folder: Path, descriptions: list[dict[str, Any]], suite: ExpertSuite | None = None, **kwargs: Any
) -> tuple[PrismerForConditionalGeneration, PrismerProcessor]:
    """A model with new weights around the backbones of train_backbones.py, and its processor."""
    vision = CLIPVisionModel.from_pretrained(folder / "clip")
    model = PrismerForConditionalGeneration.from_backbones(
        vision=vision,
        # no dropout: this small network does not overfit on so many texts
        text=RobertaForMaskedLM.from_pretrained(
            folder / "roberta", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
        experts=descriptions,
        **{"num_latents": EXPERT_GRID**2, "resampler_layers": 2, **kwargs},
    )
    names = {"segmentation": list(CLASSES), "detection": list(DETECTION_CLASSES)}
    tables = class_features_from_names(names, HashedNgrams())
    for expert in names.keys() & set(model.config.expert_names):
        model.set_class_features(expert, tables[expert], tables["background"])
    image_processor = PrismerImageProcessor(
        experts=descriptions,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        expert_size=EXPERT_GRID * vision.config.patch_size,
        max_instances=32,
        max_words=16,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return model, PrismerProcessor(image_processor, tokenizer, suite, task="vqa", tasks=["caption", "vqa"])


def choose_attention(model: PreTrainedModel) -> None:
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # the backward pass of sdpa is slow on CPUs for such short sequences


def freeze_patches(model: PrismerForConditionalGeneration) -> None:
    """Freezes what an image passes before, between and after the layers of the vision encoder."""
    encoder = model.model.vision_model
    for part in (encoder.embeddings, encoder.pre_layernorm, encoder.post_layernorm):
        part.requires_grad_(False)


# ---- evaluation ----


@torch.no_grad()
def say(model, processor, scenes, collator, texts, task, batch_size=64, **generation) -> list[list[str]]:
    """The outputs of the model for the texts of each scene. Each scene is encoded once for all its texts."""
    model.eval()
    said = []
    for start in tqdm(range(0, len(scenes), batch_size), desc=task, leave=False):
        batch = texts[start : start + batch_size]
        rows = [scenes[i] for i in range(start, start + len(batch))]
        most = max(map(len, batch))  # each image needs the same number of texts: repeat them, and cut the outputs
        for row, asked in zip(rows, batch):
            row.update(text=(asked * most)[:most], task=[task] * most)
        inputs = {name: tensor.to(model.device) for name, tensor in collator(rows).items()}
        generated = model.generate(**inputs, **generation)
        answers = processor.post_process_generation(generated, inputs["input_ids"].shape[1], task=task)
        said += [answers[i * most : i * most + len(asked)] for i, asked in enumerate(batch)]
    return said


def score_answers(said: list[list[str]], scenes: Dataset) -> dict[str, float]:
    """The share of exact answers, of all questions and by type."""
    hits = defaultdict(list)
    for answers, questions in zip(said, scenes["questions"], strict=True):
        for answer, question in zip(answers, questions, strict=True):
            for name in ("all", question["type"]):
                hits[name].append(answer == question["answer"])
    return {name: float(np.mean(values)) for name, values in hits.items()}


def interval_of(hits: list[list[bool]]) -> list[float | None]:
    """The 95 % interval of the share of right answers, by a bootstrap over scenes."""
    scenes = np.repeat(np.arange(len(hits)), [len(own) for own in hits])
    found = interval(Score.of_samples("answers", np.concatenate(hits), scenes, unit=1))
    return [found.low, found.high]


def score_captions(captions: list[str], scenes: Dataset) -> dict[str, float]:
    """CIDEr; the share of named objects that exist with all their attributes; the number of named objects."""
    metrics = load_metric("caption_metrics")
    scores = metrics.compute(predictions=captions, references=scenes["captions"], metrics=["cider"], tokenizer="regex")
    right, said = np.sum([true_share(caption, facts) for caption, facts in zip(captions, scenes["facts"])], axis=0)
    return {
        "cider": scores["cider"],
        "exact_attributes": float(right / max(said, 1)),
        "objects": float(said / len(captions)),
    }


def evaluation_splits(splits: dict[str, Dataset], max_rows: int | None = None) -> dict[str, Dataset]:
    """
    The splits to evaluate on, each with its first `max_rows` scenes: `validation`; `test`, which is like `validation`;
    and `held_out`, the scenes of the split `test` with pairs of color and shape that never occur in training.
    """
    found = {"validation": splits["validation"]} if "validation" in splits else {}
    held_out = np.array(splits["test"]["held_out"])
    found |= {"test": splits["test"].select(np.flatnonzero(~held_out))}
    found |= {"held_out": splits["test"].select(np.flatnonzero(held_out))}
    return {name: first(rows, max_rows) for name, rows in found.items() if len(rows)}


def measure(model, processor, scenes, collator, num_beams: int = 3) -> dict[str, dict[str, float]]:
    collator.with_suffix = False
    questions = [[each["question"] for each in row] for row in scenes["questions"]]
    answers = say(model, processor, scenes, collator, questions, "vqa", num_beams=1, max_new_tokens=8)
    prompts = [[CAPTION_PROMPT]] * len(scenes)
    captions = say(model, processor, scenes, collator, prompts, "caption", num_beams=num_beams)
    return {
        "answers": score_answers(answers, scenes),
        "captions": score_captions([said for (said,) in captions], scenes),
    }


@torch.no_grad()
def features_of(model, scenes, collator, batch_size=64) -> torch.Tensor:
    """The features that [`Familiarity`] compares, `(scenes, width)`."""
    model.eval()
    features = []
    for start in tqdm(range(0, len(scenes), batch_size), desc="features", leave=False):
        rows = scenes.select(range(start, min(start + batch_size, len(scenes)))).select_columns(["image_id", "image"])
        inputs = {name: tensor.to(model.device) for name, tensor in collator(list(rows)).items()}
        texts = ("input_ids", "attention_mask")
        encoded = model.get_image_features(**{name: tensor for name, tensor in inputs.items() if name not in texts})
        features.append(image_features(model, encoded))
    return torch.cat(features)


def measure_familiarity(args: ScenesArguments, model, processor, scenes: dict[str, Dataset], collator) -> dict:
    """
    The share of images that `prismer` warns about, for `test`, `held_out` and `--photographs`, and the smallest, the
    median and the largest distance.
    """
    familiarity = args.model and Familiarity.from_pretrained(args.model)
    if not familiarity:
        raise SystemExit("--photographs needs a --model that knows its training images, as --publish_to saves it")
    found = open_source(args.photographs)
    photographs = Dataset.from_list([{"image_id": key, "image": image} for key, image in found])
    images = {name: (scenes[name], collator) for name in ("test", "held_out") if name in scenes}
    images["photographs"] = photographs, DataCollatorForPrismer(processor, with_suffix=False)
    results = {}
    for name, (rows, labelled) in images.items():
        distance = familiarity.distance(features_of(model, rows, labelled))
        spread = torch.quantile(distance, torch.tensor([0.0, 0.5, 1.0])).tolist()
        warned = (distance > familiarity.limit).float().mean().item()
        results[name] = {"warned": warned, **dict(zip(("nearest", "median", "farthest"), spread))}
    return {"limit": familiarity.limit, **results}


def main() -> None:
    args, training_args = parse_arguments(ScenesArguments, **DEFAULTS)
    if args.texts not in TEXTS_PER_IMAGE:
        raise SystemExit(f"--texts is {args.texts!r}; accepted are {', '.join(TEXTS_PER_IMAGE)}")
    output_dir = Path(training_args.output_dir)
    splits = args.open_scenes()
    model, processor = load_checkpoint(args, "vqa") if args.model else new_model(args)
    choose_attention(model)

    train_rows = None
    if training_args.do_train:
        train_rows = training_rows(first(splits["train"], args.max_train_rows), args.texts)
    labels_for = no_labels if args.blind else None
    if not args.blind and (args.labels == "true" or MARK["name"] in model.config.expert_names):
        labels_for = known_labels(args.labels, processor.image_processor.experts, splits)
    trainer = make_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        labels_for=labels_for,
        texts_per_image=TEXTS_PER_IMAGE[args.texts],
        collator_class=OneTaskPerBatch if args.texts == "all" else DataCollatorForPrismer,
        generation=GENERATION,
        optimizer_cls_and_kwargs=muon_with(training_args.learning_rate, training_args.weight_decay),
    )
    if args.freeze_patches:
        freeze_patches(model)
    if args.blind:
        trainer.data_collator.augmentation = trainer.eval_collator.augmentation = hide
    run(trainer, args)
    if args.publish_to:
        collator = trainer.eval_collator
        collator.with_suffix = False
        known = first(splits["train"], FAMILIAR)
        features = (features_of(model, scenes, collator) for scenes in (known, splits["validation"]))
        Familiarity.fit(*features).save_pretrained(args.publish_to)
    if training_args.do_eval:
        results = {}
        scenes = evaluation_splits(splits, args.max_eval_rows)
        if args.photographs:
            results["familiarity"] = measure_familiarity(args, model, processor, scenes, trainer.eval_collator)
        for name, rows in scenes.items():
            results[name] = measure(model, processor, rows, trainer.eval_collator)
        write_json(output_dir / "scenes_results.json", results)
        print(json.dumps(results, indent=2))


def hide(image: Image.Image, labels: dict) -> tuple[Image.Image, dict]:
    return Image.new("RGB", image.size, (128, 128, 128)), {}


if __name__ == "__main__":
    main()
