"""
Trains small backbones for reasoners, where none can be downloaded.

    PYTHONPATH=training_examples python -m smart.train_backbones --data_dir runs/smart/data \\
        --output_dir runs/smart/backbones

| folder | network | training |
| --- | --- | --- |
| bert | BERT, width 128, two layers | masked words of questions |
| siglip | a SigLIP's image encoder, width 128, four layers | images and texts: a question with its answer |
| dinov2 | DINOv2, width 128, four layers | pixels of masked patches |
| resnet | ResNet, half as wide as a ResNet-18 | none: the baseline trains it |

They use the training part of the split IS alone. `bert` brings the tokenizer of all.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import BertWordPieceTokenizer
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    Dinov2Config,
    Dinov2Model,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainingArguments,
)

from modeling_prismer import PrismerImageProcessor

from .rows import load_smart


IMAGE_SIZE = 128
PATCH_SIZE = 16
WIDTH, LAYERS, HEADS = 128, 4, 4
MAX_LENGTH = 64  # tokens of a question with its answer
SIZES = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}


@dataclass
class BackboneArguments:
    data_dir: str = field(metadata={"help": "The folder of the puzzles."})
    output_dir: str = field(metadata={"help": "The folder for the backbones."})
    max_instances: int | None = field(default=None, metadata={"help": "Use the first instances of each puzzle only."})
    question_steps: int = field(default=300, metadata={"help": "Steps of BERT, of 64 questions."})
    image_steps: int = field(default=1000, metadata={"help": "Steps of each image encoder, of 64 images."})


def train_tokenizer(texts: list[str], folder: Path) -> BertTokenizer:
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=2000, min_frequency=1)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    return BertTokenizer.from_pretrained(folder)


class PairCollator:
    """Images with texts, for SigLIP, or images alone."""

    def __init__(self, tokenizer: BertTokenizer | None = None):
        self.tokenizer = tokenizer
        half = [0.5, 0.5, 0.5]
        self.image_processor = PrismerImageProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=half, image_std=half
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [row["image"].convert("RGB") for row in rows]
        batch: dict[str, Any] = {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}
        if self.tokenizer is not None:
            texts = [f"{row['text']} {row['suffix']}" for row in rows]
            settings = {"padding": "max_length", "truncation": True, "max_length": MAX_LENGTH}
            batch["input_ids"] = self.tokenizer(texts, return_tensors="pt", **settings)["input_ids"]
            batch["return_loss"] = True
        return batch


class MaskedPatches(nn.Module):
    """Predicts the pixels of masked patches from the other ones."""

    def __init__(self, encoder: Dinov2Model, masked: float = 0.5):
        super().__init__()
        self.encoder, self.masked = encoder, masked
        self.pixels = nn.Linear(encoder.config.hidden_size, 3 * PATCH_SIZE**2)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        patches = F.unfold(pixel_values, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)  # (batch, patches, pixels)
        mask = torch.rand(patches.shape[:2], device=patches.device) < self.masked
        features = self.encoder(pixel_values, bool_masked_pos=mask).last_hidden_state[:, 1:]
        return {"loss": F.mse_loss(self.pixels(features)[mask], patches[mask])}


def fit(model: nn.Module, rows: Any, collator: Any, folder: Path, steps: int) -> None:
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 2),
        weight_decay=0.05,
        logging_steps=50,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_num_workers=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator).train()


def train_bert(rows: datasets.Dataset, folder: Path, steps: int) -> BertTokenizer:
    texts = [f"{text} {suffix}" for text, suffix in zip(rows["text"][:], rows["suffix"][:])]
    tokenizer = train_tokenizer(texts, folder)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=128, **SIZES)
    model = BertForMaskedLM(config)
    ids = [{"input_ids": own} for own in tokenizer(rows["text"][:])["input_ids"]]
    fit(model, ids, DataCollatorForLanguageModeling(tokenizer), folder, steps)
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_siglip(tokenizer: BertTokenizer) -> SiglipModel:
    vision = {**SIZES, "num_hidden_layers": LAYERS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    text = {**SIZES, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
    text |= {
        "projection_size": WIDTH,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=text))


def make_dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        use_mask_token=True,
    )
    return Dinov2Model(config)


def save(model: PreTrainedModel, collator: PairCollator, folder: Path) -> None:
    model.save_pretrained(folder)
    collator.image_processor.save_pretrained(folder)


def main() -> None:
    (args,) = HfArgumentParser(BackboneArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    rows, output_dir = load_smart(args.data_dir, max_instances=args.max_instances), Path(args.output_dir)
    tokenizer = train_bert(rows, output_dir / "bert", args.question_steps)
    widths = [WIDTH // 4, WIDTH // 2, WIDTH, 2 * WIDTH]
    resnet = ResNetConfig(embedding_size=widths[0], hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic")
    save(ResNetModel(resnet), PairCollator(), output_dir / "resnet")
    siglip, pairs = make_siglip(tokenizer), PairCollator(tokenizer)
    fit(siglip, rows, pairs, output_dir / "siglip", args.image_steps)
    save(siglip.vision_model, pairs, output_dir / "siglip")
    dinov2, alone = make_dinov2(), PairCollator()
    fit(MaskedPatches(dinov2), rows, alone, output_dir / "dinov2", args.image_steps)
    save(dinov2, alone, output_dir / "dinov2")


if __name__ == "__main__":
    main()
