"""
Trains a checkpoint to answer questions about images, measures the accuracy of the VQA challenge, and writes result
files for its server.

    python training_examples/run_vqa.py --model CHECKPOINT --train_data my_images --eval_data my_images \\
        --do_train --do_eval --output_dir runs/answers --total_batch_size 32

This command takes a folder of images with a file of questions and answers (docs/own_data.md). The next one repeats
the paper's fine-tuning on VQAv2 (annotations next to the questions) and Visual Genome. The weight of an answer is its
share among the annotators:

    accelerate launch training_examples/run_vqa.py --model CHECKPOINT --do_train --bf16 --output_dir runs/vqa \\
        --train_data v2_OpenEnded_mscoco_{train,val}2014_questions.json visual_genome/question_answers.json \\
        --image_folder coco coco visual_genome
    python training_examples/run_vqa.py --model runs/vqa --predict_only --output_dir runs/vqa --image_folder coco \\
        --eval_data v2_OpenEnded_mscoco_test-dev2015_questions.json

The defaults are the paper's: 10 epochs, batches of 512, learning rate 5e-5 with a cosine to 0, weight decay 0.05,
480×480 pixels, the vision backbone frozen. Answers are generated. `--candidates answers.txt` ranks the answers of a
file instead, one per line or as a JSON list. run_easy_vqa.py trains from scratch on a real data set that comes as a
package, in half an hour.
"""

from dataclasses import dataclass, field

from modeling_prismer.processing.data import group_by_image, read_candidates
from modeling_prismer.processing.metrics import load_metric
from result_files import write_vqa_results
from training import RecipeArguments, load_checkpoint, load_data, make_trainer, parse_arguments, run


PAPER = {
    "num_train_epochs": 10,
    "total_batch_size": 512,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "image_size": 480,
    "freeze": "vision",
}


@dataclass
class VqaArguments(RecipeArguments):
    candidates: str | None = field(
        default=None,
        metadata={"help": "Rank the answers in this file (a JSON list, or one per line) instead of generating."},
    )
    questions_per_image: int | None = field(
        default=None,
        metadata={
            "help": "A training sample is an image with this many of its questions, drawn in each epoch. The image is "
            "encoded once for all of them."
        },
    )


def score_answers(answers, rows):
    accuracy = load_metric("vqa_accuracy")
    return accuracy.compute(predictions=answers, references=rows["references"])


def write_answers(path, answers, rows):
    write_vqa_results(path, rows["question_id"], answers)


def main():
    args, training_args = parse_arguments(VqaArguments, **PAPER)
    model, processor = load_checkpoint(args, task="vqa")
    train_rows, eval_rows = load_data(args, training_args, "vqa")
    if args.questions_per_image and train_rows is not None:
        train_rows = group_by_image(train_rows)
    candidates = None
    if args.candidates:
        candidates = read_candidates(args.candidates)
    trainer = make_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        eval_rows,
        score=score_answers,
        candidates=candidates,
        texts_per_image=args.questions_per_image,
    )
    run(trainer, args, write_answers)


if __name__ == "__main__":
    main()
