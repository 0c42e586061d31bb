"""
Trains Prismer from scratch to answer questions about images, on real data that needs no download, and measures it.

    python training_examples/run_easy_vqa.py --do_train --do_eval --output_dir runs/easy-vqa

This command trains a small model on easy-VQA (4,000 images of one shape, 38,575 questions; the package `easy-vqa`
contains the data) with two experts that need no download, edges and text. It measures the model on the official test
split, by open generation and by ranking the 13 answers. `--model FOLDER` continues the training of a checkpoint, or
only measures it with `--do_eval` alone.
"""

import json
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
from tokenizers import ByteLevelBPETokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from modeling_prismer import PrismerForConditionalGeneration, PrismerImageProcessor, PrismerProcessor
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite, RapidOcrText
from training import Rows, load_checkpoint, make_trainer, parse_arguments, run, write_json


DEFAULTS = {
    "train_data": ["easy-vqa"],
    "eval_data": ["easy-vqa"],
    "num_train_epochs": 15,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 200,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "logging_steps": 20,
    "save_strategy": "epoch",
    "dataloader_num_workers": 1,
    "freeze": "none",
    # only flips: crops would lose the shapes, and other operations would change their colors
    "crop_scale": (1.0, 1.0),
    "randaugment": 0,
}
QUESTIONS_PER_IMAGE = 8  # drawn for an image in each epoch; the image is encoded once for all
GENERATION = {"max_new_tokens": 6}  # greedy: an answer is one word
HELD_OUT_IMAGES = 200  # of the training images, to watch the training


# ---- data: a row is an image with its questions and answers, or one question ----


def load_easy_vqa(split: str, max_images: int | None = None) -> datasets.Dataset:
    import easy_vqa

    questions = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    rows = defaultdict(lambda: {"text": [], "suffix": []})
    for question, answer, image_id in zip(*questions):
        rows[image_id]["text"].append(question)
        rows[image_id]["suffix"].append(answer)
    rows = [
        {"image_id": f"{split}/{image_id}", "image": paths[image_id], **rows[image_id]}
        for image_id in sorted(rows)[:max_images]
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def one_row_a_question(images: datasets.Dataset) -> datasets.Dataset:
    rows = [
        {"image_id": row["image_id"], "image": row["image"]["path"], "text": question, "suffix": answer}
        for row in images.cast_column("image", datasets.Image(decode=False))
        for question, answer in zip(row["text"], row["suffix"])
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


# ---- a new model ----


def train_tokenizer(texts: list[str], folder: Path) -> RobertaTokenizer:
    tokenizer = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(texts, vocab_size=400, min_frequency=1, special_tokens=special_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    return RobertaTokenizer.from_pretrained(folder)


def new_processor(images: datasets.Dataset, output_dir: Path) -> PrismerProcessor:
    # questions and answers as the processor gives them to the tokenizer
    texts = {question.capitalize() for questions in images["text"] for question in questions}
    texts |= {" " + answer.capitalize() for answers in images["suffix"] for answer in answers}
    tokenizer = train_tokenizer(sorted(texts), output_dir / "tokenizer")
    # lower thresholds than usual, because a yellow shape on a pale background has little contrast
    experts = ExpertSuite([CannyEdges(low_threshold=0.03, high_threshold=0.08), RapidOcrText()])
    image_processor = PrismerImageProcessor(
        size={"height": 64, "width": 64}, expert_size=64, experts=experts.descriptions, max_words=16
    )
    return PrismerProcessor(image_processor, tokenizer, experts=experts, task="vqa")


def new_model(processor: PrismerProcessor) -> PrismerForConditionalGeneration:
    """
    Builds a Prismer with 2.8 million parameters on untrained backbones. The usual initializer_range of 0.02 is for a
    width of 768; a network as narrow as this one learns far more slowly with it.
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
    return PrismerForConditionalGeneration.from_backbones(
        vision=CLIPVisionModel(vision),
        text=RobertaForMaskedLM(text),
        experts=processor.image_processor.experts,
        num_latents=16,
        resampler_layers=2,
    )


# ---- evaluation ----


def question_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def exact_match(predictions: list[str], rows: Rows) -> dict[str, float]:
    """The share of questions with an exact answer, of all and by type."""
    hits = defaultdict(list)
    for answer, prediction in zip(rows["suffix"], predictions, strict=True):
        hits["exact_match"].append(prediction == answer)
        hits[f"exact_match {question_type(answer)}"].append(prediction == answer)
    return {name: float(np.mean(values)) for name, values in sorted(hits.items())}


def main():
    args, training_args = parse_arguments(**DEFAULTS)
    output_dir = Path(training_args.output_dir)
    train = load_easy_vqa("train", args.max_train_rows)
    test = one_row_a_question(load_easy_vqa("test", args.max_eval_rows))
    if args.model:
        model, processor = load_checkpoint(args, "vqa")
    else:
        processor = new_processor(train, output_dir)
        model = new_model(processor)

    train_rows = eval_rows = None
    if training_args.do_train:
        held_out = min(HELD_OUT_IMAGES, len(train) // 10)
        train_rows = train.select(range(held_out, len(train)))
        eval_rows = one_row_a_question(train.select(range(held_out)))
    trainer = make_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        eval_rows,
        other_rows=[test],
        texts_per_image=QUESTIONS_PER_IMAGE,
        score=exact_match,
        generation=GENERATION,
    )
    run(trainer, args)
    if training_args.do_eval:
        results = {"generate": exact_match(trainer.predict_texts(test), test)}
        trainer.candidates = sorted(set(test["suffix"]))
        results["rank"] = exact_match(trainer.predict_texts(test), test)
        results |= {"images": len(set(test["image_id"])), "questions": len(test)}
        write_json(output_dir / "test_results.json", results)
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
