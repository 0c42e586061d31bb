"""
Trains the encoder of a Prismer to tell what each place of a scene shows.

    export PYTHONPATH=training_examples
    python -m scenes.train_encoder --backbones runs/scenes2/backbones \\
        --suite modeling_prismer/checkpoints/prismer-scenes --labels runs/scenes2/labels \\
        --data_dir runs/scenes2-data --data_config scenes2 --do_train --max_steps 1000 \\
        --output_dir runs/scenes2/encoder

Stems, resampler and adaptors are trained; the vision tower stays frozen. Linear heads, as those of train_vision.py,
tell what each place shows, and the words on signs. They read what becomes of an expert's label on its way, at four
sites: the mean of the stems' tokens, the latents of the resampler, and the encoder's output at the latents and at the
patches. Every place of every image teaches, and no decoder is needed. The heads are used for this training alone. The
output folder is a model for run_scenes.py.

The latents start as places. Their queries are the positions of the patches, which the experts' tokens also have, so
that latent k attends to what all experts say about place k. With random queries a latent is the mean of all tokens,
and what the experts say about a place is lost.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

from modeling_prismer import DataCollatorForPrismer, PrismerForConditionalGeneration
from muon import muon_with
from training import last_checkpoint, parse_arguments, write_json

from .run_scenes import (
    DEFAULTS,
    ScenesArguments,
    choose_attention,
    freeze_patches,
    known_labels,
    new_model,
)
from .scenes import first
from .train_vision import ATTRIBUTES, PlaceHeads, ReaderOutput, accuracy, by_kind, targets_of
from .words import WORDS


TARGETS = {**ATTRIBUTES, "word": tuple(WORDS)}
SITES = ("stems", "resampler", "latents", "patches")
SHARPNESS = 2.0  # of the first attention of the resampler, at the beginning
TEXTS = ("input_ids", "attention_mask")


@torch.no_grad()
def look_at_places(model: PrismerForConditionalGeneration) -> None:
    """
    Initialises stems and resampler so that latent k attends to the tokens of all experts at place k.

    The first attention compares positions: keys are the tokens themselves, queries the positions of the patches. The
    latents are these positions in another order of their numbers, which the queries' projection restores, so that a
    latent does not attend to itself. Values and output are left as they are. The stems' features get about the size of
    the positions that are added to them.
    """
    encoder = model.model.vision_model
    positions, resampler = encoder.embeddings.position_embedding, encoder.resampler
    if len(resampler.latents) != len(positions):
        raise ValueError(f"{len(resampler.latents)} latents for {len(positions)} patches; each place needs one")
    for stem in encoder.expert_stems.values():
        nn.init.normal_(stem.projection.weight, std=stem.projection.in_channels**-0.5)
    attention = resampler.layers[0].latent_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
    resampler.latents.copy_(positions.roll(1, dims=1))
    attention.q_proj.weight.copy_(SHARPNESS * attention.q_proj.weight.roll(1, dims=1))


class EncoderReader(nn.Module):
    """A Prismer's encoder with [`PlaceHeads`] on each of `SITES`."""

    def __init__(self, model: PrismerForConditionalGeneration):
        super().__init__()
        config = model.config.vision_config
        self.encoder = model.model.vision_model
        self.encode = model.get_image_features  # no module: the decoder is not trained and not in the checkpoints
        self.norms = nn.ModuleDict({site: nn.LayerNorm(config.hidden_size) for site in SITES})
        self.heads = nn.ModuleDict(
            {site: PlaceHeads(config.hidden_size, config.patch_size, TARGETS) for site in SITES}
        )

    def get_output_embeddings(self) -> None:
        return None

    def tokens(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tokens of each place, `(batch, places, width)`, by site."""
        seen: list[torch.Tensor] = []
        hook = self.encoder.resampler.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
        try:
            patches, latents = self.encode(**inputs).last_hidden_state.chunk(2, dim=1)
        finally:
            hook.remove()
        experts, resampled = seen
        stems = experts.unflatten(1, (-1, latents.shape[1])).mean(1)
        return dict(zip(SITES, (stems, resampled, latents, patches)))

    def predict(self, **inputs: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        """The outputs of the heads, by site."""
        return {site: self.heads[site](self.norms[site](own)) for site, own in self.tokens(**inputs).items()}

    def forward(self, targets: dict[str, torch.Tensor], **inputs: torch.Tensor) -> ReaderOutput:
        losses = [self.heads[site].loss(own, targets) for site, own in self.predict(**inputs).items()]
        return ReaderOutput(loss=torch.stack(losses).sum())


class LabelledScenes:
    """Makes batches of images and expert labels with targets."""

    def __init__(self, collator: DataCollatorForPrismer):
        self.collator = collator

    def inputs(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = self.collator([{"image_id": row["image_id"], "image": row["image"]} for row in rows])
        return {name: tensor for name, tensor in inputs.items() if name not in TEXTS}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        targets = [targets_of(row, TARGETS) for row in rows]
        stacked = {name: torch.from_numpy(np.stack([own[name] for own in targets])) for name in targets[0]}
        return {"targets": stacked, **self.inputs(rows)}


def measure(reader: EncoderReader, scenes: LabelledScenes, rows: Dataset) -> dict[str, dict[str, float]]:
    """The share of right cells of objects for each attribute, by site."""
    reader.eval()
    return accuracy(lambda batch: reader.predict(**scenes.inputs(batch)), rows, TARGETS)


def main() -> None:
    args, training_args = parse_arguments(ScenesArguments, **DEFAULTS)
    splits = args.open_scenes()
    if args.suite == "none":
        raise SystemExit("--suite none: there are no experts to learn from; pass a folder of experts, or true")
    model, processor = new_model(args, resampler_attention_heads=1)
    look_at_places(model)
    choose_attention(model)
    model.freeze_backbones()
    freeze_patches(model)
    labels_for = known_labels(args.labels, processor.image_processor.experts, splits)
    scenes = LabelledScenes(
        DataCollatorForPrismer(processor, labels_for, expert_dropout=args.expert_dropout, with_suffix=False)
    )
    columns = ["image_id", "image", "segmentation", "detection", "detection_boxes", "facts"]
    reader = EncoderReader(model)
    trainer = Trainer(
        reader,
        training_args,
        scenes,
        train_dataset=first(splits["train"], args.max_train_rows).select_columns(columns),
        optimizer_cls_and_kwargs=muon_with(training_args.learning_rate, training_args.weight_decay),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    scenes.collator.expert_dropout = 0.0
    results = by_kind(lambda rows: measure(reader, scenes, rows), splits["test"], args.max_eval_rows)
    for name, sites in results.items():
        print(name, json.dumps(sites, indent=2))
    write_json(Path(training_args.output_dir, "encoder_results.json"), results)
    model.save_pretrained(training_args.output_dir)
    processor.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main()
