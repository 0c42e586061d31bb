"""
Trains the vision tower of a CLIP to name what each place of a scene shows.

    export PYTHONPATH=training_examples
    python -m scenes.train_vision --data_dir runs/scenes-data --data_config scenes2 --output_dir runs/scenes2/backbones

Linear heads predict shape, color, material, size, box and distance of the object at each place, from the token of its
patch. Each attribute has a head and a loss of its own, so that the tower learns shapes apart from colors and
recognises pairs that it never saw together. Half of the images are gray, and shapes are learned mostly from these, so
that they are not recognised by their colors. The heads are used for this training alone.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import CLIPVisionConfig, CLIPVisionModel, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import ModelOutput

from modeling_prismer.processing import PrismerImageProcessor
from muon import muon_with
from training import last_checkpoint, save_model

from .render import CLASSES
from .run_scenes import evaluation_splits
from .scene import COLORS, MATERIALS, SHAPES, SIZES
from .scenes import add_data_arguments, open_data


T = TypeVar("T")
IMAGE_SIZE = 128
CELL = 8  # pixels; a patch of 16 pixels has four cells
LEAST_SHARE = 0.2  # of a cell that an object has to cover
GRAY = 0.5  # share of gray images
COLORED_SHAPES = 0.2  # weight of the shapes in colored images, next to 1 in gray ones
ATTRIBUTES = {"shape": (*SHAPES, "sign", "none"), "color": COLORS, "material": MATERIALS, "size": SIZES}
NUMBERS = 6  # middle and size of the box, depth and distance
IGNORED = -100
# Standard deviation of new positions. They are as large as the patches, so that a token tells its place.
POSITIONS = 0.5


def targets_of(row: dict[str, Any], attributes: dict[str, tuple[str, ...]] = ATTRIBUTES) -> dict[str, np.ndarray]:
    """
    Computes the targets of all cells of a scene: the object in a cell, with its attributes and place.

    Returns:
        `dict` with int64 (cells, cells) for each of `attributes`, `IGNORED` where there is none; `center`, float32
        (cells, cells), 1 in the cell with the middle of an object's visible part; and `numbers`, float32
        (cells, cells, 6): the middle of the object's box, its width and height, in image widths; a third of its depth
        and distance.
    """
    side = IMAGE_SIZE // CELL
    things = [*row["facts"]["objects"], *({**sign, "shape": "sign"} for sign in row["facts"]["signs"])]
    segments, boxes = np.asarray(row["segmentation"]), np.asarray(row["detection"])
    ids = {tuple(box): number for number, box in enumerate(row["detection_boxes"])}
    found = {name: np.full((side, side), IGNORED) for name in attributes}
    found["shape"][:] = ATTRIBUTES["shape"].index("none")
    center, numbers = np.zeros((side, side), np.float32), np.zeros((side, side, NUMBERS), np.float32)
    best = np.full((side, side), LEAST_SHARE)
    for thing in things:
        shown = (segments == CLASSES.index(thing["shape"])) & (boxes == ids[tuple(thing["box"])])
        share = shown.reshape(side, CELL, side, CELL).mean(axis=(1, 3))
        at = share > best
        best[at] = share[at]
        for name, values in attributes.items():
            found[name][at] = values.index(thing[name]) if name in thing else IGNORED
        left, top, right, bottom = (value / IMAGE_SIZE for value in thing["box"])
        middle = (left + right) / 2, (top + bottom) / 2
        numbers[at] = *middle, right - left, bottom - top, thing["depth"] / 3, thing["distance"] / 3
        column, line = (min(int(value * side), side - 1) for value in thing["center"])
        center[line, column] = 1
    return {**found, "center": center, "numbers": numbers}


class LabelledImages:
    """Makes batches of images with targets; randomly mirrored, gray, and with random brightness and contrast."""

    def __init__(self):
        self.image_processor = PrismerImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        self.jitter = v2.ColorJitter(brightness=0.15, contrast=0.15)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images: list[Image.Image] = []
        targets: dict[str, list[np.ndarray]] = {}
        gray: list[bool] = []
        for row, (is_mirrored, is_gray) in zip(rows, torch.rand(len(rows), 2).numpy() < (0.5, GRAY)):
            image, own = self.jitter(row["image"].convert("RGB")), targets_of(row)
            if is_mirrored:
                image = ImageOps.mirror(image)
                own = {name: np.ascontiguousarray(values[:, ::-1]) for name, values in own.items()}
                own["numbers"][..., 0] = 1 - own["numbers"][..., 0]
            if is_gray:
                image = ImageOps.grayscale(image).convert("RGB")
                own["color"] = np.full_like(own["color"], IGNORED)
            images.append(image)
            gray.append(bool(is_gray))
            for name, values in own.items():
                targets.setdefault(name, []).append(values)
        stacked = {name: torch.from_numpy(np.stack(values)) for name, values in targets.items()}
        return {"pixel_values": self.image_processor(images)["pixel_values"], "gray": torch.tensor(gray), **stacked}


@dataclass
class ReaderOutput(ModelOutput):
    loss: torch.Tensor | None = None


class PlaceHeads(nn.Module):
    """A linear head for each target, on tokens that are places of an image."""

    def __init__(self, width: int, patch_size: int, attributes: dict[str, tuple[str, ...]] = ATTRIBUTES):
        super().__init__()
        self.per_side = patch_size // CELL  # cells of a patch, along each side
        sizes = {**{name: len(values) for name, values in attributes.items()}, "center": 1, "numbers": NUMBERS}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size * self.per_side**2) for name, size in sizes.items()})

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """From tokens `(batch, patches, width)` to the output of each head, `(batch, cells, cells, size)`."""
        side, own = round(tokens.shape[1] ** 0.5), self.per_side
        outputs = {}
        for name, head in self.heads.items():
            cells = head(tokens).unflatten(2, (own, own, -1)).unflatten(1, (side, side))  # y, x, own y, own x, size
            outputs[name] = cells.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        return outputs

    def loss(
        self, outputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], gray: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum of the losses of all heads. With `gray`, shapes are learned mostly from the gray images."""
        losses = []
        for name in self.heads.keys() - {"shape", "center", "numbers"}:
            known = targets[name] != IGNORED
            loss = F.cross_entropy(outputs[name][known], targets[name][known], reduction="sum")
            losses.append(loss / known.sum().clamp(min=1))
        weight = torch.tensor(8.0, device=targets["center"].device)  # there are far more cells without a middle
        losses.append(
            F.binary_cross_entropy_with_logits(outputs["center"][..., 0], targets["center"], pos_weight=weight)
        )
        covered = targets["shape"] != ATTRIBUTES["shape"].index("none")
        losses.append(5 * F.l1_loss(outputs["numbers"][covered], targets["numbers"][covered]))
        shape = F.cross_entropy(outputs["shape"].permute(0, 3, 1, 2), targets["shape"], reduction="none").mean((1, 2))
        weights = torch.ones_like(shape) if gray is None else COLORED_SHAPES + (1 - COLORED_SHAPES) * gray.to(shape)
        losses.append(3 * (shape * weights).sum() / weights.sum())
        return torch.stack(losses).sum()


class PlaceReader(nn.Module):
    """A vision tower with [`PlaceHeads`], and [`LabelledImages`] as input."""

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower
        self.heads = PlaceHeads(tower.config.hidden_size, tower.config.patch_size)

    def get_output_embeddings(self) -> None:
        return None

    def predict(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.heads(inner(self.tower).post_layernorm(self.tower(pixel_values).last_hidden_state[:, 1:]))

    def forward(self, pixel_values: torch.Tensor, gray: torch.Tensor, **targets: torch.Tensor) -> ReaderOutput:
        return ReaderOutput(loss=self.heads.loss(self.predict(pixel_values), targets, gray))


def inner(tower: CLIPVisionModel) -> nn.Module:
    """The module with the layers, which some versions of transformers wrap."""
    return getattr(tower, "vision_model", tower)


def new_tower(patch_size: int, width: int, layers: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 32,
        num_hidden_layers=layers,
        image_size=IMAGE_SIZE,
        patch_size=patch_size,
        initializer_range=0.04,  # the usual 0.02 fits a width of 768
    )
    tower = CLIPVisionModel._from_config(config)
    nn.init.normal_(inner(tower).embeddings.position_embedding.weight, std=POSITIONS)
    return tower


@torch.inference_mode()
def accuracy(
    predict: Callable[[list[dict]], dict[str, dict[str, torch.Tensor]]],
    rows: Dataset,
    attributes: dict[str, tuple[str, ...]] = ATTRIBUTES,
    batch_size: int = 50,
) -> dict[str, dict[str, float]]:
    """
    The share of right cells of objects for each attribute, by site.

    Args:
        predict (`Callable`): the outputs of [`PlaceHeads`] for rows, by site.
    """
    hits: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: {name: [] for name in attributes})
    for start in range(0, len(rows), batch_size):
        batch = [rows[k] for k in range(start, min(start + batch_size, len(rows)))]
        sites = predict(batch)
        targets = [targets_of(row, attributes) for row in batch]
        for name, values in attributes.items():
            wanted = np.stack([own[name] for own in targets])
            shown = (wanted != IGNORED) & (wanted != (values.index("none") if "none" in values else IGNORED))
            for site, outputs in sites.items():
                hits[site][name].append(outputs[name].argmax(-1).cpu().numpy()[shown] == wanted[shown])
    return {
        site: {name: float(np.concatenate(found).mean()) for name, found in own.items()} for site, own in hits.items()
    }


def by_kind(measure: Callable[[Dataset], T], test: Dataset, max_rows: int | None) -> dict[str, T]:
    """What `measure` returns for test scenes like those of the training, and for those with held-out pairs."""
    titles = {"test": "like the training", "held_out": "held out"}
    return {titles[name]: measure(rows) for name, rows in evaluation_splits({"test": test}, max_rows).items()}


def accuracy_of_tower(reader: PlaceReader, rows: Dataset) -> dict[str, float]:
    reader.eval()
    image_processor = PrismerImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})

    def predict(batch: list[dict]) -> dict[str, dict[str, torch.Tensor]]:
        return {"patches": reader.predict(image_processor([row["image"] for row in batch])["pixel_values"])}

    return accuracy(predict, rows)["patches"]


def train_vision(
    train: Dataset,
    output_dir: Path,
    patch_size: int = 16,
    width: int = 192,
    layers: int = 6,
    epochs: float = 8,
    max_steps: int = -1,
    learning_rate: float = 1e-3,
    bf16: bool = False,
) -> PlaceReader:
    """Trains a new tower and saves it in `output_dir / "clip"`; resumes from the last checkpoint."""
    set_seed(0)
    reader = PlaceReader(new_tower(patch_size, width, layers))
    arguments = TrainingArguments(
        output_dir / "clip-training",
        per_device_train_batch_size=32,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        weight_decay=0.05,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_num_workers=1,
        disable_tqdm=True,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
    )
    columns = ["image", "segmentation", "detection", "detection_boxes", "facts"]
    trainer = Trainer(
        reader,
        arguments,
        LabelledImages(),
        train_dataset=train.select_columns(columns),
        optimizer_cls_and_kwargs=muon_with(learning_rate, arguments.weight_decay),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir))
    save_model(reader.tower, output_dir / "clip")
    return reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_data_arguments(parser, "scenes2")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    args = parser.parse_args()
    splits = open_data(args)
    settings = (args.patch_size, args.width, args.layers, args.epochs, args.max_steps, args.learning_rate, args.bf16)
    reader = train_vision(splits["train"], args.output_dir, *settings)
    for name, shares in by_kind(lambda rows: accuracy_of_tower(reader, rows), splits["test"], 300).items():
        print(name, shares)


if __name__ == "__main__":
    main()
