"""
Parameter-efficient fine-tuning with LoRA, DoRA or (IA)³ on the decoder, the encoder or the resampler, for captions or
questions. Experts and all other weights stay frozen. The trained weights are a few megabytes.

    python training_examples/run_peft.py --model CHECKPOINT --task caption --train_data my_images --do_train \\
        --method lora --parts decoder,resampler --output_dir runs/lora

This command takes a folder of images with a file of captions, or with `--task vqa` a file of questions and answers
(docs/own_data.md). It writes the adapter with its processor. Load the adapter again to evaluate it, to train it
further, or to merge it into its model:

    python training_examples/run_peft.py --adapter runs/lora --task caption --eval_data my_images --do_eval \\
        --output_dir runs/lora --merge_to runs/merged

`PrismerForConditionalGeneration.from_pretrained` loads both folders. docs/peft.md describes peft's other methods, the
choice of modules, and training without this script.
"""

from dataclasses import dataclass, field
from typing import Literal

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model

import run_captioning
import run_vqa
from modeling_prismer import PrismerProcessor
from training import RecipeArguments, load_checkpoint, load_data, make_trainer, parse_arguments, run


DEFAULTS = {
    "num_train_epochs": 3,
    "total_batch_size": 32,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "freeze": "both",
}
# how each task is measured, and how its results are written
RESULTS = {
    "caption": (run_captioning.score_captions, run_captioning.write_captions),
    "vqa": (run_vqa.score_answers, run_vqa.write_answers),
}
PARTS = {"decoder": "text_model", "encoder": "vision_model", "resampler": "resampler"}


@dataclass
class PeftArguments(RecipeArguments):
    task: Literal["caption", "vqa"] = field(default="caption", metadata={"help": "The task to learn."})
    method: Literal["lora", "dora", "ia3"] = field(
        default="lora", metadata={"help": "The method. (IA)³ needs a larger --learning_rate (3e-3 in its paper)."}
    )
    parts: str = field(
        default="decoder", metadata={"help": "Any of decoder, encoder, resampler, with commas between."}
    )
    rank: int = field(default=16, metadata={"help": "Rank of LoRA and DoRA."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout in LoRA and DoRA."})
    train_whole: str | None = field(
        default=None,
        metadata={"help": "Modules to train in full and save with the adapter, such as `depth`, an expert's stem."},
    )
    adapter: str | None = field(default=None, metadata={"help": "A saved adapter to evaluate or to train further."})
    merge_to: str | None = field(
        default=None, metadata={"help": "Write the model with the merged adapter, and its processor, to this folder."}
    )


def adapter_config(args):
    """The configuration of the adapter. Its patterns match whole names of modules, `…layers.3.cross_attn.q_proj`."""
    if unknown := set(args.parts.split(",")) - set(PARTS):
        raise SystemExit(f"--parts {args.parts}: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    parts = "|".join(PARTS[part] for part in args.parts.split(","))
    layers = rf".*({parts})\.layers\.\d+\.\w+"
    train_whole = args.train_whole and args.train_whole.split(",")
    if args.method == "ia3":
        return IA3Config(
            target_modules=rf"{layers}\.(k_proj|v_proj|fc2)",
            feedforward_modules=r".*\.fc2",
            modules_to_save=train_whole,
        )
    return LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        use_dora=args.method == "dora",
        target_modules=rf"{layers}\.(q_proj|v_proj)",
        modules_to_save=train_whole,
    )


def load_model(args, do_train):
    """Loads the model with a new adapter, or with `--adapter` at the resolution of its training."""
    if args.adapter:
        args.model = args.model or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
        size = PrismerProcessor.from_pretrained(args.adapter).image_processor.size
        args.image_size = args.image_size or size["height"]
    model, processor = load_checkpoint(args, args.task, processor_path=args.adapter)
    if args.adapter:
        if len(processor.tokenizer) > model.config.vocab_size:  # the adapter has the rows of added tokens
            model.resize_token_embeddings(len(processor.tokenizer))
        return PeftModel.from_pretrained(model, args.adapter, is_trainable=do_train), processor
    return get_peft_model(model, adapter_config(args)), processor


def main():
    args, training_args = parse_arguments(PeftArguments, **DEFAULTS)
    score, write_results = RESULTS[args.task]
    model, processor = load_model(args, training_args.do_train)
    train_rows, eval_rows = load_data(args, training_args, args.task)
    trainer = make_trainer(model, processor, args, training_args, train_rows, eval_rows, score=score)
    run(trainer, args, write_results)
    if args.merge_to and trainer.is_world_process_zero():
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(args.merge_to)
        processor.save_pretrained(args.merge_to)


if __name__ == "__main__":
    main()
