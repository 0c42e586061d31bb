"""
Few-shot classification: trains a checkpoint on k images of each class, classifies by ranking the names of the classes,
and measures the top-1 accuracy.

    python training_examples/run_classification.py --model CHECKPOINT --train_data imagenet/train \\
        --eval_data imagenet/val --class_names classes.json --shots 4 --do_train --do_eval --output_dir runs/4-shot

This command takes folders with a folder of images for each class. The names of the classes are those of the folders,
or come from a JSON file {folder: name}. The defaults are the paper's: 20 epochs, batches of 64, learning rate 5e-5,
384×384 pixels, the caption `A photo of a <class>`, the vision backbone frozen, 32 candidates scored in full.
"""

from dataclasses import dataclass, field

from modeling_prismer.processing.data import read_class_names
from modeling_prismer.processing.metrics import load_metric
from training import RecipeArguments, load_checkpoint, load_data, make_trainer, parse_arguments, run, write_json


PAPER = {
    "num_train_epochs": 20,
    "total_batch_size": 64,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "image_size": 384,
    "freeze": "vision",
}
NUM_RANKED = 32


@dataclass
class ClassificationArguments(RecipeArguments):
    shots: int | None = field(
        default=None, metadata={"help": "Train on this many images of each class, drawn by --seed; by default all."}
    )
    class_names: str | None = field(default=None, metadata={"help": "JSON file {folder: name of the class}."})


def top_1(classes, rows):
    accuracy = load_metric("top_accuracy")
    references = [names[0] for names in rows["references"]]
    return accuracy.compute(predictions=[[name] for name in classes], references=references)


def write_classes(path, classes, rows):
    write_json(path, dict(zip(rows["image_id"], classes, strict=True)))


def main():
    args, training_args = parse_arguments(ClassificationArguments, **PAPER)
    model, processor = load_checkpoint(args, task="classification")
    class_names = args.class_names and read_class_names(args.class_names)
    train_rows, eval_rows = load_data(
        args, training_args, "classification", class_names=class_names, shots=args.shots, seed=training_args.seed
    )
    candidates = set((class_names or {}).values())
    if not candidates:
        candidates |= set(train_rows["suffix"]) if train_rows is not None else set()
        candidates |= {name for names in eval_rows["references"] for name in names} if eval_rows is not None else set()
    trainer = make_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        eval_rows,
        score=top_1,
        candidates=sorted(candidates),
        num_ranked=NUM_RANKED,
    )
    run(trainer, args, write_classes)


if __name__ == "__main__":
    main()
