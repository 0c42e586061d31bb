"""
Trains Prismer to answer questions about images, and measures it.

    python training_examples/run_vqa.py --do_train --do_eval --output_dir runs/easy-vqa

trains a small Prismer from scratch on easy-VQA (4,000 images of one shape, 38,575 questions; the package `easy-vqa`
brings the data) with two experts that need no download, edges and text, and measures it on the official test split by
open generation and by ranking the 13 answers. With `--model FOLDER` an existing checkpoint is trained on or, with
`--do_eval` alone, only measured. All arguments of `transformers.TrainingArguments` are taken too;
`--resume_from_checkpoint runs/easy-vqa/checkpoint-500` goes on with a training that was stopped.
"""

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import ImageOps
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    HfArgumentParser,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_prismer import PrismerForConditionalGeneration, PrismerImageProcessor, PrismerProcessor
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite, RapidOcrText
from modeling_prismer.processing.labels import label_images, label_source


logger = logging.getLogger("run_vqa")


@dataclass
class VqaArguments:
    model: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from; left out, a new small model."}
    )
    labels: str = field(
        default="precomputed",
        metadata={
            "help": "`precomputed` runs the experts over all images once, before the training, and keeps what they "
            "saw in a label store in the output folder; `live` runs them on every batch; else the folder of a store."
        },
    )
    questions_per_image: int = field(
        default=8, metadata={"help": "Questions drawn for an image each time it is seen; it is encoded once for all."}
    )
    experts: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate with these experts only, such as `edge` or `edge,ocr`; `none` masks out all of them."
        },
    )
    max_images: int | None = field(default=None, metadata={"help": "Use this many images of each split only."})
    validation_images: int = field(default=200, metadata={"help": "Training images held out to watch the training."})
    publish_to: str | None = field(
        default=None, metadata={"help": "Write the trained model here in half precision, with its processor."}
    )


# ---- data: one row an image, with its questions and answers ----


def load_easy_vqa(split: str, max_images: int | None = None) -> datasets.Dataset:
    import easy_vqa

    questions = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    rows = defaultdict(lambda: {"questions": [], "answers": []})
    for question, answer, image_id in zip(*questions):
        rows[image_id]["questions"].append(question)
        rows[image_id]["answers"].append(answer)
    rows = [
        {"image_id": f"{split}/{image_id}", "image": paths[image_id], **rows[image_id]}
        for image_id in sorted(rows)[:max_images]
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def label_datasets(parts: list[datasets.Dataset], processor: PrismerProcessor, labels: str, folder: Path) -> Callable:
    """
    The function from images' ids to what the experts saw in them. `labels` is `live`, a label store, or `precomputed`:
    then the experts run over all images now, unless an earlier run has left its store in the folder.
    """
    if labels == "precomputed":
        labels = str(folder / "expert_labels")
        for dataset in parts:
            images = dataset.select_columns(["image_id", "image"]).cast_column("image", datasets.Image(decode=False))
            label_images(images, processor.experts, labels, key_column="image_id")
    return label_source(labels, processor.image_processor.experts)


def image_inputs(rows: list[dict], labels_for: Callable) -> dict:
    """The arguments of the processor that come from the images: them, and what the experts saw where it is stored."""
    labels = labels_for([row["image_id"] for row in rows])
    return {"images": [row["image"].convert("RGB") for row in rows], "expert_labels": labels}


def flip(inputs: dict, flipped: list[bool]) -> dict:
    """Mirrors the images for which `flipped` says so, and what the experts saw in them."""
    images = [ImageOps.mirror(image) if flip else image for image, flip in zip(inputs["images"], flipped)]
    labels = inputs["expert_labels"]
    if labels is None:  # the experts will run on the mirrored image
        return {"images": images}
    labels = [
        {"edge": label["edge"][:, ::-1], "ocr": {**label["ocr"], "ids": label["ocr"]["ids"][:, ::-1]}}
        if flip
        else label
        for label, flip in zip(labels, flipped)
    ]
    return {"images": images, "expert_labels": labels}


def collate_for_training(
    rows: list[dict], processor: PrismerProcessor, labels_for: Callable, questions_per_image: int
) -> dict:
    questions, answers = [], []
    for row in rows:
        number = len(row["questions"])
        drawn = torch.randperm(number)[:questions_per_image].tolist()
        drawn += torch.randint(number, (questions_per_image - len(drawn),)).tolist()
        questions.append([row["questions"][i] for i in drawn])
        answers.append([row["answers"][i] for i in drawn])
    inputs = flip(image_inputs(rows, labels_for), (torch.rand(len(rows)) < 0.5).tolist())
    return dict(processor(**inputs, text=questions, suffix=answers, return_tensors="pt"))


# ---- a new model ----


def train_tokenizer(texts: list[str], folder: Path) -> RobertaTokenizer:
    tokenizer = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(texts, vocab_size=400, min_frequency=1, special_tokens=special_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    return RobertaTokenizer.from_pretrained(folder)


def new_processor(dataset: datasets.Dataset, output_dir: Path) -> PrismerProcessor:
    # Every question and answer in the form in which the processor hands it to the tokenizer.
    texts = {question.capitalize() for questions in dataset["questions"] for question in questions}
    texts |= {" " + answer.capitalize() for answers in dataset["answers"] for answer in answers}
    tokenizer = train_tokenizer(sorted(texts), output_dir / "tokenizer")
    # Lower thresholds than Canny's usual ones: a yellow shape on a pale ground has little contrast.
    experts = ExpertSuite([CannyEdges(low_threshold=0.03, high_threshold=0.08), RapidOcrText()])
    image_processor = PrismerImageProcessor(
        size={"height": 64, "width": 64}, expert_size=64, experts=experts.descriptions, max_words=16
    )
    return PrismerProcessor(image_processor, tokenizer, experts=experts, task="vqa")


def new_model(processor: PrismerProcessor) -> PrismerForConditionalGeneration:
    """
    A Prismer of 2.8 million parameters, on backbones that have not been trained either. So narrow a network learns
    far slower from the customary initializer_range of 0.02, which is made for a width of 768.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        initializer_range=0.06,
    )
    text = RobertaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.06,
    )
    model = PrismerForConditionalGeneration.from_backbones(
        vision=CLIPVisionModel(vision),
        text=RobertaForMaskedLM(text),
        experts=processor.image_processor.experts,
        num_latents=16,
        resampler_layers=2,
    )
    model.generation_config.max_new_tokens = 6
    return model


# ---- evaluation ----


def question_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


@torch.no_grad()
def predict(
    model: PrismerForConditionalGeneration,
    processor: PrismerProcessor,
    dataset: datasets.Dataset,
    labels_for: Callable,
    by_ranking: bool = False,
    candidates: list[str] | None = None,
    experts: list[str] | None = None,
    batch_size: int = 50,
) -> list[list[str]]:
    """Answers to all questions of a data set, by open generation or as the best of the candidates."""
    model.eval()
    predictions = []
    ranking = dict(processor.prepare_candidates(candidates).to(model.device)) if by_ranking else {}
    for start in tqdm(range(0, len(dataset), batch_size), desc="rank" if by_ranking else "generate", leave=False):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        most = max(len(row["questions"]) for row in rows)  # every image takes the same number: repeat, and cut later
        questions = [(row["questions"] * most)[:most] for row in rows]
        inputs = processor(**image_inputs(rows, labels_for), text=questions, experts=experts, return_tensors="pt")
        inputs = inputs.to(model.device)
        if by_ranking:
            best = model.rank_candidates(**ranking, k=len(candidates), **inputs).indices[:, 0].tolist()
            answers = [candidates[index] for index in best]
        else:
            generated = model.generate(**inputs)
            answers = processor.post_process_generation(generated, inputs["input_ids"].shape[1])
        for i, row in enumerate(rows):
            predictions.append(answers[i * most : i * most + len(row["questions"])])
    return predictions


def exact_match(predictions: list[list[str]], answers: list[list[str]]) -> dict[str, float]:
    """Share of the questions that are answered exactly, in all and by type."""
    hits = defaultdict(list)
    for expected, predicted in zip(answers, predictions):
        for answer, prediction in zip(expected, predicted):
            hits["exact_match"].append(prediction == answer)
            hits[f"exact_match {question_type(answer)}"].append(prediction == answer)
    return {name: float(np.mean(values)) for name, values in sorted(hits.items())}


class VqaTrainer(Trainer):
    """Trainer whose evaluation answers the questions."""

    def __init__(self, *args, labels_for: Callable, **kwargs):
        super().__init__(*args, **kwargs)
        self.labels_for = labels_for

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        scores = exact_match(predict(self.model, self.processing_class, dataset, self.labels_for), dataset["answers"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train()
        return metrics


def write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def main():
    parser = HfArgumentParser((VqaArguments, TrainingArguments))
    defaults = {"learning_rate": 4e-4, "weight_decay": 0.05, "warmup_steps": 100, "lr_scheduler_type": "cosine"}
    defaults |= {"per_device_train_batch_size": 32, "num_train_epochs": 15, "logging_steps": 20, "report_to": "none"}
    defaults |= {"save_strategy": "epoch", "save_total_limit": 2, "dataloader_num_workers": 1, "max_grad_norm": 1.0}
    parser.set_defaults(**defaults)
    args, training_args = parser.parse_args_into_dataclasses()
    training_args.remove_unused_columns = False  # the collator needs all columns
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    set_seed(training_args.seed)
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    train = load_easy_vqa("train", args.max_images)
    test = load_easy_vqa("test", args.max_images)
    if args.model:
        processor = PrismerProcessor.from_pretrained(args.model)
        model = PrismerForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    else:
        processor = new_processor(train, output_dir)
        model = new_model(processor)
    logger.info("%d images to train on, %d to test; %d parameters", len(train), len(test), model.num_parameters())
    parts = [train, test] if training_args.do_train else [test]
    labels_for = label_datasets(parts, processor, args.labels, output_dir)

    held_out = min(args.validation_images, len(train) // 10)
    trainer = VqaTrainer(
        model=model,
        args=training_args,
        train_dataset=train.select(range(held_out, len(train))),
        eval_dataset=train.select(range(held_out)),
        data_collator=partial(
            collate_for_training,
            processor=processor,
            labels_for=labels_for,
            questions_per_image=args.questions_per_image,
        ),
        processing_class=processor,
        labels_for=labels_for,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
    if training_args.do_eval:
        candidates = sorted({answer for answers in test["answers"] for answer in answers})
        experts = args.experts and [name for name in args.experts.split(",") if name != "none"]
        answer = partial(predict, model, processor, test, labels_for, experts=experts)
        metrics = {
            "generate": exact_match(answer(), test["answers"]),
            "rank": exact_match(answer(by_ranking=True, candidates=candidates), test["answers"]),
            "images": len(test),
            "questions": sum(map(len, test["questions"])),
        }
        write_json(output_dir / "test_results.json", metrics)
        print(json.dumps(metrics, indent=2))
    if args.publish_to:
        model.half().save_pretrained(args.publish_to)
        processor.save_pretrained(args.publish_to)


if __name__ == "__main__":
    main()
