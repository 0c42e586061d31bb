"""The trainings that test_resume.py starts in new processes. They use every source of random numbers."""

import os
import signal
from pathlib import Path

import datasets
import numpy as np
from transformers import TrainerCallback, TrainingArguments

from modeling_prismer import (
    DataCollatorForPrismer,
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    PrismerProcessor,
)
from modeling_prismer.processing import JointAugmentation
from tests.modeling_prismer.tiny import EXPERTS, tiny_config, tiny_model


STEPS = 8
STREAM = {"max_steps": 3, "dataloader_num_workers": 0}  # batches and dropout share a random generator


def save_checkpoint_with_dropout(folder: Path, tokenizer):
    """Saves a model with six experts, random rows for detected instances, and dropout in every attention."""
    config = tiny_config()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.1
    config.vision_config.attention_dropout = 0.1
    tiny_model(config).save_pretrained(folder)
    image_processor = PrismerImageProcessor(experts=EXPERTS, size={"height": 32, "width": 32}, expert_size=32)
    PrismerProcessor(image_processor, tokenizer).save_pretrained(folder)


def labels_for(image_ids: list[str]) -> list[dict]:
    """Random expert labels for images of 64 by 48 pixels."""
    labels = []
    for image_id in image_ids:
        random = np.random.default_rng(int(image_id[:2]) if image_id else 0)
        ids = random.integers(4, size=(48, 64), dtype=np.uint8)
        labels.append(
            {
                "depth": random.integers(256, size=(48, 64), dtype=np.uint8),
                "normal": random.integers(256, size=(48, 64, 3), dtype=np.uint8),
                "segmentation": ids,
                "edge": random.integers(256, size=(48, 64), dtype=np.uint8),
                "detection": {"ids": ids, "classes": [3, 1, 4, 1]},
                "ocr": {"ids": ids, "words": list("abcd"), "features": random.random((4, 8), dtype=np.float32)},
            }
        )
    return labels


def captions(image_folder: Path) -> datasets.Dataset:
    """14 rows for 12 images. With two batches of two per step, an epoch has four steps, the last with one batch."""
    names = sorted(path.name for path in image_folder.glob("*.png"))
    names += names[:2]
    rows = {"image": [str(image_folder / name) for name in names], "image_id": names}
    rows["suffix"] = [f"a {('red', 'green', 'blue')[number % 3]} square" for number in range(len(names))]
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))


class Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.killpg(0, signal.SIGKILL)  # this process and the worker of the data loader


def train(folder: Path, checkpoint: Path, rows, resume_from: Path | None = None, kill_at: int | None = None, **kwargs):
    from training import PrismerTrainer

    processor = PrismerProcessor.from_pretrained(checkpoint)
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    trainer = PrismerTrainer(
        PrismerForConditionalGeneration.from_pretrained(checkpoint),
        TrainingArguments(**{**defaults, **kwargs}),
        train_dataset=rows,
        data_collator=DataCollatorForPrismer(
            processor, labels_for, JointAugmentation(EXPERTS, size=(32, 32), expert_size=32), expert_dropout=0.3
        ),
        callbacks=[] if kill_at is None else [Kill(kill_at)],
    )
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))


def stream(image_folder: Path) -> datasets.IterableDataset:
    """A stream without names of the images."""
    return captions(image_folder).remove_columns("image_id").to_iterable_dataset().shuffle(seed=3, buffer_size=5)


def straight(folder: Path, image_folder: Path):
    checkpoint = folder / "checkpoint"
    train(folder / "straight", checkpoint, captions(image_folder), save_steps=4)
    train(folder / "stream", checkpoint, stream(image_folder), save_steps=1, **STREAM)


def killed(folder: Path, image_folder: Path):
    train(folder / "killed", folder / "checkpoint", captions(image_folder), kill_at=7)


def resumed(folder: Path, image_folder: Path):
    checkpoint, straight = folder / "checkpoint", folder / "straight"
    train(folder / "resumed", checkpoint, captions(image_folder), resume_from=folder / "killed" / "checkpoint-6")
    train(folder / "from_4", checkpoint, captions(image_folder), resume_from=straight / "checkpoint-4")
    train(folder / "stream_from_1", checkpoint, stream(image_folder), folder / "stream" / "checkpoint-1", **STREAM)
