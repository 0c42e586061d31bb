"""
Trains small backbones on Scenes: a CLIP on images and captions, and a RoBERTa that fills in masked words of captions
and questions.

    export PYTHONPATH=training_examples
    python -m scenes.train_backbones --data_dir runs/scenes-data --output_dir runs/scenes/backbones

This writes `clip/`, `roberta/`, their tokenizer `tokenizer/`, and `clip-strong/`, from which `clip/` is made. Parts
that exist are not trained again. An interrupted training resumes from its last checkpoint.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from torchvision.transforms import v2
from transformers import (
    CLIPConfig,
    CLIPModel,
    DataCollatorForLanguageModeling,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_prismer.processing import PrismerImageProcessor, clean_caption, clean_question
from muon import muon_with
from training import last_checkpoint, save_model

from .language import article, phrase
from .scenes import add_data_arguments, open_data
from .train_vision import train_vision


IMAGE_SIZE, PATCH_SIZE = 128, 16
WIDTH, HEAD_WIDTH, INITIALIZER_RANGE = 192, 32, 0.04  # the usual 0.02 fits a width of 768
VISION_LAYERS, TEXT_LAYERS = 6, 4
CAPTIONS_PER_TEXT = 3  # for CLIP
BRANCHES = 0.2  # factor that weakens the layers of CLIP after its training, before a short second training


def texts_of(rows: Dataset) -> list[str]:
    """All captions and questions, in the form in which the processor tokenizes them."""
    texts = {f"A picture of {clean_caption(text).lower()}" for texts in rows["captions"] for text in texts}
    for questions in rows["questions"]:
        texts |= {f"{clean_question(each['question'])} {each['answer'].capitalize()}" for each in questions}
    return sorted(texts)


def train_tokenizer(texts: list[str], folder: Path) -> None:
    tokenizer = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(texts, vocab_size=1000, min_frequency=2, special_tokens=special_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    RobertaTokenizer.from_pretrained(folder, model_max_length=64).save_pretrained(folder)


class CaptionedImages:
    """
    Makes batches for CLIP: images with their captions, and regions with phrases such as `a large shiny red cone`.

    `regions`, `(number of regions, number of patches)`, has the share of a region in each patch that shows much of it.
    `region_images` and `region_phrases` are the indices of the image and of the phrase of each region. The text tower
    of CLIP needs a token of its own for the end of a text, the last one of the vocabulary.
    """

    def __init__(self, tokenizer: RobertaTokenizer):
        self.tokenizer = tokenizer
        self.image_processor = PrismerImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        # no flips and no crops, since captions name left and right, and numbers of objects
        self.jitter = v2.ColorJitter(brightness=0.1, contrast=0.1)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        # several captions identify an image better than one
        orders = [torch.randperm(len(row["captions"]))[:CAPTIONS_PER_TEXT] for row in rows]
        captions = [". ".join(clean_caption(row["captions"][i]) for i in order) for row, order in zip(rows, orders)]
        seen = [
            (number, thing)
            for number, row in enumerate(rows)
            for thing in row["facts"]["objects"]
            if thing["visible_share"] > 0.5
        ]
        named = [article(phrase(thing, ("size", "material", "color"))) for _, thing in seen]
        phrases = sorted(set(named))
        return {
            "pixel_values": self.image_processor([self.jitter(row["image"]) for row in rows])["pixel_values"],
            **self._tokens([each.lower() for each in captions]),
            **{f"phrase_{name}": tensor for name, tensor in self._tokens(phrases).items()},
            "regions": torch.stack([patches_of(thing["box"]) for _, thing in seen]),
            "region_images": torch.tensor([number for number, _ in seen]),
            "region_phrases": torch.tensor([phrases.index(name) for name in named]),
        }

    def _tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        input_ids = tokens["input_ids"]
        input_ids[input_ids == self.tokenizer.eos_token_id] = len(self.tokenizer)
        return {"input_ids": input_ids, "attention_mask": tokens["attention_mask"]}


def patches_of(box: list[int]) -> torch.Tensor:
    """The share of a box `(left, top, right, bottom)` in each patch, in sum 1; 0 for patches with little of it."""
    edges = torch.arange(0, IMAGE_SIZE, PATCH_SIZE)

    def covered(start: int, end: int) -> torch.Tensor:
        return ((edges + PATCH_SIZE).clamp(max=end) - edges.clamp(min=start)).clamp(min=0)

    shares = (covered(box[1], box[3])[:, None] * covered(box[0], box[2])).flatten().float()
    shares[shares < 0.3 * shares.max()] = 0
    return shares / shares.sum()


def new_clip(tokenizer: RobertaTokenizer, width: int = WIDTH, layers: int = VISION_LAYERS) -> CLIPModel:
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "initializer_range": INITIALIZER_RANGE,
    }
    config = CLIPConfig(
        vision_config={
            **shared,
            "num_hidden_layers": layers,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            **shared,
            "num_hidden_layers": 3,
            "vocab_size": len(tokenizer) + 1,
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": len(tokenizer),
        },
        projection_dim=width,
    )
    # the backward pass of sdpa is slow on CPUs for such short sequences
    return CLIPModel._from_config(config, attn_implementation="eager")


def new_roberta(tokenizer: RobertaTokenizer, width: int = WIDTH, layers: int = TEXT_LAYERS) -> RobertaForMaskedLM:
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=66,
        type_vocab_size=1,
        initializer_range=INITIALIZER_RANGE,
    )
    return RobertaForMaskedLM(config)


@torch.no_grad()
def weaken_branches(clip: CLIPModel) -> None:
    """
    Scales down the contribution of each layer of the vision tower to a token.

    In such a small CLIP, the layers contribute nine tenths of each final token. The frozen layers would do the same to
    the latents of a Prismer, and hide the features of the experts. A short second training lowers the loss again.
    """
    for layer in clip.vision_model.encoder.layers:
        for projection in (layer.self_attn.out_proj, layer.mlp.fc2):
            projection.weight.mul_(BRANCHES)
            projection.bias.mul_(BRANCHES)


class ClipTrainer(Trainer):
    """
    Trainer for CLIP on images and captions, and on regions and phrases, as in RegionCLIP (arXiv 2112.09106). With so
    few images, captions alone teach colors, but hardly any shapes. Both losses compare the whole batch.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names = ("pixel_values", "input_ids", "attention_mask")
        outputs = model(**{name: inputs[name] for name in names}, return_loss=True)
        patches = outputs.vision_model_output.last_hidden_state[inputs["region_images"], 1:]
        patches = model.vision_model.post_layernorm(patches)
        regions = model.visual_projection((inputs["regions"][..., None] * patches).sum(1))
        phrases = model.text_model(inputs["phrase_input_ids"], inputs["phrase_attention_mask"]).pooler_output
        phrases = model.text_projection(phrases)
        similarities = F.normalize(regions.float(), dim=-1) @ F.normalize(phrases.float(), dim=-1).T
        region_loss = F.cross_entropy(model.logit_scale.exp() * similarities, inputs["region_phrases"])
        loss = outputs.loss + region_loss
        return (loss, outputs) if return_outputs else loss


def train(trainer: Trainer, folder: Path) -> None:
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    save_model(trainer.model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_data_arguments(parser, "scenes")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--clip",
        choices=("captions", "facts"),
        default="captions",
        help="what the CLIP learns from: captions and phrases, or what each place shows (train_vision.py)",
    )
    parser.add_argument(
        "--clip_epochs", type=float, help="24 for captions, with a sixteenth for the second training; 8 for facts"
    )
    parser.add_argument("--roberta_epochs", type=float, default=1)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--vision_layers", type=int, default=VISION_LAYERS)
    parser.add_argument("--text_layers", type=int, default=TEXT_LAYERS)
    parser.add_argument("--max_rows", type=int, help="use this many scenes only")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    args = parser.parse_args()
    set_seed(0)
    rows = open_data(args)["train"]
    if args.max_rows:
        rows = rows.select(range(args.max_rows))
    texts = texts_of(rows.select_columns(["captions", "questions"]))
    if not (args.output_dir / "tokenizer").is_dir():
        train_tokenizer(texts, args.output_dir / "tokenizer")
    tokenizer = RobertaTokenizer.from_pretrained(args.output_dir / "tokenizer")
    shared = {
        "weight_decay": 0.05,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
        "logging_steps": 20,
        "save_steps": 200,
        "save_total_limit": 1,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
    }

    if not (args.output_dir / "roberta").is_dir():
        arguments = TrainingArguments(
            args.output_dir / "roberta-training",
            per_device_train_batch_size=128,
            num_train_epochs=args.roberta_epochs,
            learning_rate=1e-3,
            **shared,
        )
        encoded = [{"input_ids": ids[:64]} for ids in tokenizer(texts)["input_ids"]]
        collator = DataCollatorForLanguageModeling(tokenizer)
        roberta = new_roberta(tokenizer, args.width, args.text_layers)
        trainer = Trainer(roberta, arguments, collator, train_dataset=encoded)
        train(trainer, args.output_dir / "roberta")

    def train_clip(clip: CLIPModel, name: str, epochs: float, learning_rate: float, muon: bool) -> None:
        arguments = TrainingArguments(
            args.output_dir / f"{name}-training",
            per_device_train_batch_size=128,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            dataloader_num_workers=1,
            **shared,
        )
        trainer = ClipTrainer(
            clip,
            arguments,
            CaptionedImages(tokenizer),
            train_dataset=rows.select_columns(["image", "captions", "facts"]),
            optimizer_cls_and_kwargs=muon_with(learning_rate, arguments.weight_decay) if muon else None,
        )
        train(trainer, args.output_dir / name)

    if args.clip == "facts" and not (args.output_dir / "clip").is_dir():
        sizes = {"width": args.width, "layers": args.vision_layers}
        train_vision(rows, args.output_dir, **sizes, epochs=args.clip_epochs or 8, bf16=args.bf16)
    elif not (args.output_dir / "clip").is_dir():
        epochs = args.clip_epochs or 24
        if not (args.output_dir / "clip-strong").is_dir():
            clip = new_clip(tokenizer, args.width, args.vision_layers)
            train_clip(clip, "clip-strong", epochs, 1e-3, muon=True)
        clip = CLIPModel.from_pretrained(args.output_dir / "clip-strong", attn_implementation="eager")
        weaken_branches(clip)
        # short, with a small learning rate: longer training would undo the weakening
        train_clip(clip, "clip", epochs / 16, 1.5e-4, muon=False)


if __name__ == "__main__":
    main()
