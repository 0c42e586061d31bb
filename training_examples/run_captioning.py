"""
Trains a checkpoint to caption images, measures CIDEr, BLEU, METEOR and ROUGE, and writes result files for the servers
of COCO and NoCaps.

    python training_examples/run_captioning.py --model CHECKPOINT --train_data my_images --eval_data my_images \\
        --do_train --do_eval --output_dir runs/captions --total_batch_size 32

This command takes a folder of images with a file of captions (docs/own_data.md). The next one repeats the paper's
fine-tuning on COCO, from the annotation list of Karpathy's splits:

    accelerate launch training_examples/run_captioning.py --model CHECKPOINT --image_folder coco \\
        --train_data dataset_coco.json --train_split train --eval_data dataset_coco.json --eval_split test \\
        --do_train --do_eval --output_dir runs/coco --bf16

The defaults are the paper's: 3 epochs, batches of 256, learning rate 5e-5 with a cosine to 0, weight decay 0.05,
480×480 pixels, the vision backbone frozen. `--predict_only` writes captions for images without captions.
"""

import shutil

from modeling_prismer.processing.metrics import load_metric
from result_files import write_caption_results
from training import load_checkpoint, load_data, make_trainer, parse_arguments, run


PAPER = {
    "num_train_epochs": 3,
    "total_batch_size": 256,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "image_size": 480,
    "freeze": "vision",
}


def score_captions(captions, rows):
    metrics = load_metric("caption_metrics")
    # without Java, measure approximately what is possible (with a warning), so that no training is lost
    options = {} if shutil.which("java") else {"metrics": ["cider", "bleu", "rouge_l"], "tokenizer": "regex"}
    return metrics.compute(predictions=captions, references=rows["references"], **options)


def write_captions(path, captions, rows):
    column = "image_number" if "image_number" in rows.column_names else "image_id"
    write_caption_results(path, rows[column], captions)


def run_captions(model, processor, args, training_args):
    train_rows, eval_rows = load_data(args, training_args, "caption")
    trainer = make_trainer(
        model,
        processor,
        args,
        training_args,
        train_rows,
        eval_rows,
        score=score_captions,
    )
    run(trainer, args, write_captions)


def main():
    args, training_args = parse_arguments(**PAPER)
    model, processor = load_checkpoint(args, task="caption")
    run_captions(model, processor, args, training_args)


if __name__ == "__main__":
    main()
