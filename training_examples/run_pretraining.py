"""
Pre-training: puts the experts between a frozen CLIP vision encoder and a frozen RoBERTa, and trains the new weights on
captions.

    accelerate launch training_examples/run_pretraining.py --vision openai/clip-vit-base-patch16 \\
        --text FacebookAI/roberta-base --expert_suite published --train_data 'cc12m/*.tar' --image_folder . \\
        --do_train --output_dir runs/pretraining --bf16 --dataloader_num_workers 8

This command reads any list of images with captions (docs/own_data.md). `--model CHECKPOINT` continues the training of
a model. The defaults are the paper's: 20 epochs, batches of 1024, learning rate 3e-4 (use 1e-4 for large models) after
2000 steps from 1e-6, with a cosine to 1e-6, weight decay 0.05, 224×224 pixels, both backbones frozen, crops of up to
1.5 times the image's area (crops above 1 become the whole image). Evaluation is zero-shot captioning.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer

from modeling_prismer import PrismerForConditionalGeneration, PrismerImageProcessor, PrismerProcessor
from modeling_prismer.conversion import class_features_from_names
from modeling_prismer.processing.experts import ClipTextFeatures, ExpertSuite
from run_captioning import run_captions
from training import RecipeArguments, load_checkpoint, parse_arguments


PAPER = {
    "num_train_epochs": 20,
    "total_batch_size": 1024,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine_warmup_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6, "warmup_lr_rate": 1e-6 / 3e-4},
    "warmup_steps": 2000,
    "image_size": 224,
    "freeze": "both",
    "crop_scale": (0.5, 1.5),
}


@dataclass
class PretrainingArguments(RecipeArguments):
    vision: str = field(
        default="openai/clip-vit-base-patch16", metadata={"help": "CLIP vision encoder: a folder or a Hub id."}
    )
    text: str = field(default="FacebookAI/roberta-base", metadata={"help": "RoBERTa: a folder or a Hub id."})
    expert_suite: str = field(
        default="published",
        metadata={"help": "published, fast, commercial, offline, or none for a model without experts."},
    )
    text_encoder: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={
            "help": "CLIP whose text embeddings, reduced to 64 dimensions, become the features of classes and words."
        },
    )
    pca: str | None = field(
        default=None,
        metadata={"help": "The reduction, from `prismer features`. By default it is made from the class names."},
    )
    num_latents: int = field(default=64, metadata={"help": "Number of latents of the resampler."})
    resampler_layers: int = field(default=4, metadata={"help": "Number of layers of the resampler."})


def new_model(args: PretrainingArguments, output_dir: str) -> tuple[PrismerForConditionalGeneration, PrismerProcessor]:
    """Builds a model on the two backbones, and a processor with the experts."""
    suite = ExpertSuite() if args.expert_suite == "none" else ExpertSuite.from_name(args.expert_suite)
    model = PrismerForConditionalGeneration.from_backbones(
        vision=args.vision,
        text=args.text,
        experts=suite.descriptions,
        image_size=args.image_size,
        num_latents=args.num_latents,
        resampler_layers=args.resampler_layers,
    )
    if suite.class_names:
        pca = args.pca
        if pca is None:
            names = sorted({name for names in suite.class_names.values() for name in names})
            pca = f"{output_dir}/pca.safetensors"
            ClipTextFeatures.fit_pca(names, pca, model_name=args.text_encoder)
        tables = class_features_from_names(suite.class_names, ClipTextFeatures(pca=pca, model_name=args.text_encoder))
        background = tables.pop("background")
        for expert, table in tables.items():
            model.set_class_features(expert, table, background, suite.class_names[expert])
    size = model.config.vision_config.image_size
    image_processor = PrismerImageProcessor(experts=suite.descriptions, size={"height": size, "width": size})
    tokenizer = AutoTokenizer.from_pretrained(args.text)
    return model, PrismerProcessor(image_processor, tokenizer, experts=suite or None, task="caption")


def main():
    args, training_args = parse_arguments(PretrainingArguments, **PAPER)
    model, processor = load_checkpoint(args, "caption") if args.model else new_model(args, training_args.output_dir)
    run_captions(model, processor, args, training_args)


if __name__ == "__main__":
    main()
