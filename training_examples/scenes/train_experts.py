"""
Trains small experts on Scenes and evaluates them.

    export PYTHONPATH=training_examples
    python -m scenes.train_experts --data_dir runs/scenes-data --output_dir runs/scenes/experts
    python -m scenes.train_experts --data_dir runs/scenes-data --output_dir runs/scenes/experts \\
        --only depth,normal --bf16
    python -m scenes.train_experts --data_dir runs/scenes-data --output_dir runs/scenes/experts \\
        --labels runs/scenes/labels

This writes a suite of six experts, `ExpertSuite.from_pretrained("runs/scenes/experts")`: networks of transformers for
segmentation, depth, detection and normals, which are trained here; Canny edges and RapidOCR, with settings for these
images. `results.json` has the scores of each expert on the validation split, next to those of a guess without the
image. Networks that exist are not trained again. An interrupted training resumes from its last checkpoint.

`--bf16` computes in bfloat16 where that is safe, up to three times as fast on processors and GPUs that support it.
`--labels` writes the experts' labels for all scenes into one label store, for run_scenes.py.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from PIL import Image, ImageOps
from torch.nn.functional import cosine_similarity, interpolate, normalize
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments, set_seed

from modeling_prismer.processing.experts import (
    CannyEdges,
    DepthEstimator,
    Expert,
    ExpertSuite,
    NormalEstimator,
    ObjectDetector,
    RapidOcrText,
    SemanticSegmentation,
)
from modeling_prismer.processing.labels import label_images
from training import last_checkpoint, save_model, write_json

from .render import CLASSES
from .scenes import DETECTION_CLASSES, EXPERTS, add_data_arguments, expert_labels, open_data


IMAGE_SIZE = 128
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def class_names(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


# ---- the networks ----


def backbone(stages: list[int]) -> transformers.ResNetConfig:
    """The convolutional backbone of segmentation and detection, with strides 4, 8, 16 and 32."""
    return transformers.ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 2, 2, 2],
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in stages],
    )


def new_segmentation(output_dir: Path) -> tuple[transformers.PreTrainedModel, Any]:
    config = transformers.UperNetConfig(
        backbone_config=backbone([1, 2, 3, 4]),
        hidden_size=48,
        pool_scales=[1, 2, 4],
        use_auxiliary_head=False,
        **class_names(CLASSES),
    )
    processor = transformers.SegformerImageProcessor(size=SIZE)
    return transformers.UperNetForSemanticSegmentation(config), processor


def new_depth(output_dir: Path) -> tuple[transformers.PreTrainedModel, Any]:
    config = transformers.GLPNConfig(
        hidden_sizes=[16, 32, 64, 96],
        num_attention_heads=[1, 2, 4, 4],
        depths=[1, 2, 2, 2],
        sr_ratios=[4, 2, 1, 1],
        mlp_ratios=[3, 3, 3, 3],
        decoder_hidden_size=32,
        drop_path_rate=0.0,
        initializer_range=0.05,  # the usual 0.02 fits wider networks
        max_depth=1,
    )
    processor = transformers.DPTImageProcessor(size=SIZE)
    return transformers.GLPNForDepthEstimation(config), processor


def new_detection(output_dir: Path) -> tuple[transformers.PreTrainedModel, Any]:
    """A new detector. It starts with the backbone of the segmentation network, if that exists."""
    config = transformers.RTDetrV2Config(
        backbone_config=backbone([2, 3, 4]),
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[64, 96, 128],
        encoder_hidden_dim=64,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=64,
        decoder_in_channels=[64, 64, 64],
        decoder_layers=2,
        decoder_ffn_dim=128,
        decoder_attention_heads=4,
        num_queries=30,
        num_denoising=20,
        **class_names(DETECTION_CLASSES),
    )
    model = transformers.RTDetrV2ForObjectDetection(config)
    folder = network_folder(output_dir, "segmentation")
    if folder.is_dir():
        trained = transformers.UperNetForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
        model.model.backbone.model.load_state_dict(trained.backbone.state_dict(), strict=False)
    return model, transformers.RTDetrImageProcessor(size=SIZE)


def new_normal(output_dir: Path) -> tuple[transformers.PreTrainedModel, Any]:
    vision = transformers.Tipsv2VisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=3,
        out_indices=[2, 3, 4],
        reshape_hidden_states=False,
    )
    config = transformers.Tipsv2DptConfig(
        backbone_config=vision,
        neck_hidden_sizes=[32, 48, 64],
        reassemble_factors=[2, 1, 0.5],
        fusion_hidden_size=32,
    )
    return transformers.Tipsv2DptForNormalEstimation(config), transformers.Tipsv2DptImageProcessor(size=SIZE)


# ---- from rows to batches; half of the images are mirrored ----


def segmentation_target(row: dict[str, Any], mirrored: bool) -> torch.Tensor:
    return torch.from_numpy(mirror(row["segmentation"], mirrored)).long()  # (128, 128)


def depth_target(row: dict[str, Any], mirrored: bool) -> torch.Tensor:
    return torch.from_numpy(mirror(row["depth"], mirrored)).float() / 255  # (128, 128), 1 is nearest


def normal_target(row: dict[str, Any], mirrored: bool) -> torch.Tensor:
    normals = torch.from_numpy(mirror(row["normal"], mirrored)).permute(2, 0, 1).float() / 127.5 - 1  # (3, 128, 128)
    if mirrored:
        normals[0] *= -1
    return normalize(normals, dim=0)


def detection_target(row: dict[str, Any], mirrored: bool) -> dict[str, torch.Tensor]:
    """Boxes as middle, width and height, in image widths."""
    boxes = torch.tensor(row["detection_boxes"], dtype=torch.float32).reshape(-1, 4) / IMAGE_SIZE
    start, end = boxes[:, :2], boxes[:, 2:]
    boxes = torch.cat([(start + end) / 2, end - start], dim=1)
    if mirrored:
        boxes[:, 0] = 1 - boxes[:, 0]
    return {"class_labels": torch.tensor(row["detection_classes"], dtype=torch.long), "boxes": boxes}


def mirror(image: Image.Image, mirrored: bool) -> np.ndarray:
    return np.array(ImageOps.mirror(image) if mirrored else image)


class Collator:
    """Makes batches of images, randomly mirrored and with random brightness and color, with their targets."""

    def __init__(self, image_processor: Any, target: Callable[[dict[str, Any], bool], Any]):
        self.image_processor = image_processor
        self.target = target
        self.jitter = v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        mirrored = (torch.rand(len(rows)) < 0.5).tolist()
        images = [Image.fromarray(mirror(row["image"], own)) for row, own in zip(rows, mirrored)]
        inputs = self.image_processor([self.jitter(image) for image in images], return_tensors="pt")
        labels: Any = [self.target(row, own) for row, own in zip(rows, mirrored)]
        if isinstance(labels[0], torch.Tensor):
            labels = torch.stack(labels)
        pixel_values = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return {"pixel_values": pixel_values, "labels": labels}


def depth_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """The absolute error of the depth, plus that of its differences between neighboring pixels."""
    error = outputs.predicted_depth.float() - labels  # (batch, 128, 128)
    return error.abs().mean() + error.diff(dim=1).abs().mean() + error.diff(dim=2).abs().mean()


def normal_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    normals = interpolate(outputs.normals.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return (1 - cosine_similarity(normals, labels, dim=1)).mean()


# ---- training ----


@dataclass(frozen=True)
class Network:
    """
    The recipe for one expert.

    Args:
        new: makes the network and its image processor.
        expert: the class of the expert, with its `settings`.
        columns: the columns of a row that `target` needs.
        target: makes the target from a row and whether it is mirrored.
        loss: computes the loss from the network's output and a batch of targets. `None` if the network does that.
    """

    new: Callable[[Path], tuple[transformers.PreTrainedModel, Any]]
    expert: type[Expert]
    columns: tuple[str, ...]
    target: Callable[[dict[str, Any], bool], Any]
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    steps: int = 3000
    learning_rate: float = 1e-3
    settings: dict[str, Any] = field(default_factory=dict)


NETWORKS = {
    "segmentation": Network(
        new_segmentation,
        SemanticSegmentation,
        ("segmentation",),
        segmentation_target,
        steps=2500,
        learning_rate=1.5e-3,
    ),
    # the network predicts relative inverse depth; networks of its family predict distances by default
    "depth": Network(
        new_depth, DepthEstimator, ("depth",), depth_target, depth_loss, steps=2000, settings={"metric": False}
    ),
    "detection": Network(
        new_detection,
        ObjectDetector,
        ("detection_boxes", "detection_classes"),
        detection_target,
        steps=3000,
        settings={"min_score": 0.4},
    ),
    "normal": Network(new_normal, NormalEstimator, ("normal",), normal_target, normal_loss, steps=2000),
}


class NetworkTrainer(Trainer):
    """Trainer for networks that do not compute their loss themselves."""

    def __init__(self, *args, loss: Callable[[Any, Any], torch.Tensor] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss = loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = self.loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def network_folder(output_dir: Path, name: str) -> Path:
    """The folder of an expert's own weights in a suite that is saved in `output_dir`."""
    return output_dir / "experts" / name / "network"


def train(name: str, rows: Dataset, output_dir: Path, max_steps: int | None = None, bf16: bool = False) -> None:
    """Trains one of `NETWORKS` on rows of the data set, and saves it in half precision in the folder of the suite."""
    network = NETWORKS[name]
    set_seed(0)
    model, image_processor = network.new(output_dir)
    arguments = TrainingArguments(
        output_dir / "training" / name,
        max_steps=max_steps or network.steps,
        per_device_train_batch_size=16,
        learning_rate=network.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.02,
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = NetworkTrainer(
        model.to(memory_format=torch.channels_last),  # convolutions are faster
        arguments,
        Collator(image_processor, network.target),
        train_dataset=rows.select_columns(["image", *network.columns]),
        loss=network.loss,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir))
    model.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    save_model(model, network_folder(output_dir, name), image_processor)


def make_suite(output_dir: Path) -> ExpertSuite:
    """The experts of Scenes, without those whose network does not exist yet."""
    experts: dict[str, Expert] = {
        "edge": CannyEdges(low_threshold=0.1, high_threshold=0.3),
        "ocr": RapidOcrText(min_score=0.65, num_threads=1),
    }
    for name, network in NETWORKS.items():
        folder = network_folder(output_dir, name)
        if folder.is_dir():
            experts[name] = network.expert(str(folder), **network.settings)
    return ExpertSuite(experts[name] for name in EXPERTS if name in experts)


# ---- evaluation ----


def measure_depth(said: list[np.ndarray], true: list[np.ndarray]) -> dict[str, float]:
    """Both depths are scaled to 0..1 in each image."""
    pairs = [(np.float32(one) / 255, np.float32(other) / 255) for one, other in zip(said, true)]
    return {
        "absolute_error": float(np.mean([np.abs(one - other).mean() for one, other in pairs])),
        "correlation": float(np.mean([np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs])),
    }


def measure_normal(said: list[np.ndarray], true: list[np.ndarray]) -> dict[str, float]:
    angles = [np.degrees(np.arccos(np.clip((unit(a) * unit(b)).sum(-1), -1, 1))) for a, b in zip(said, true)]
    return {
        "mean_angle": float(np.mean(angles)),
        "within_11.25": float(np.mean(np.array(angles) < 11.25)),
        "within_30": float(np.mean(np.array(angles) < 30)),
    }


def unit(normals: np.ndarray) -> np.ndarray:
    vectors = np.float32(normals) / 127.5 - 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def measure_segmentation(said: list[np.ndarray], true: list[np.ndarray]) -> dict[str, float]:
    """Pixels predicted as background are left out."""
    from sklearn.metrics import accuracy_score, jaccard_score

    said_ids, true_ids = (np.concatenate([ids.ravel() for ids in maps]) for maps in (said, true))
    known = said_ids < len(CLASSES)
    return {
        "mean_iou": float(jaccard_score(true_ids[known], said_ids[known], average="macro")),
        "right_pixels": float(accuracy_score(true_ids[known], said_ids[known])),
    }


def measure_edge(said: list[np.ndarray], true: list[np.ndarray], tolerance: int = 2) -> dict[str, float]:
    """An edge pixel is right if the other map has one at most `tolerance` pixels away."""

    def near(lines: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_pool2d(lines.float(), 2 * tolerance + 1, 1, tolerance) > 0

    one, other = (torch.from_numpy(np.stack(maps))[:, None] < 128 for maps in (said, true))
    precision = (one & near(other)).sum() / one.sum().clamp(min=1)
    recall = (other & near(one)).sum() / other.sum().clamp(min=1)
    return rates(float(precision), float(recall))


def measure_detection(said: list[dict[str, Any]], true: list[dict[str, Any]]) -> dict[str, float]:
    """An instance is right if its class is and the boxes around the painted pixels have an IoU of at least 0.5."""
    from torchvision.ops import box_iou

    right = found = wanted = 0
    for own, other in zip(said, true):
        (boxes, classes), (true_boxes, true_classes) = painted(own), painted(other)
        fits = box_iou(boxes, true_boxes) * (classes[:, None] == true_classes)
        found, wanted = found + len(boxes), wanted + len(true_boxes)
        while fits.numel() and fits.max() >= 0.5:
            row, column = divmod(int(fits.argmax()), fits.shape[1])
            fits[row], fits[:, column] = 0, 0
            right += 1
    return rates(right / max(1, found), right / max(1, wanted))


def painted(label: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (instances, 4) around the painted pixels of each instance of a label, and their classes."""
    from torchvision.ops import masks_to_boxes

    numbers = [number for number in np.unique(label["ids"]).tolist() if number < len(label["classes"])]
    if not numbers:
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    boxes = masks_to_boxes(torch.from_numpy(np.stack([label["ids"] == number for number in numbers])))
    return boxes + torch.tensor([0, 0, 1, 1]), torch.tensor([label["classes"][number] for number in numbers])


def measure_ocr(said: list[dict[str, Any]], true: list[dict[str, Any]]) -> dict[str, float]:
    """A word is right if all its letters are."""
    counts = [(Counter(own["words"]), Counter(other["words"])) for own, other in zip(said, true)]
    right, found, wanted = (sum(part.total() for part in parts) for parts in zip(*((a & b, a, b) for a, b in counts)))
    return rates(right / max(1, found), right / max(1, wanted))


def rates(precision: float, recall: float) -> dict[str, float]:
    return {
        "precision": precision,
        "recall": recall,
        "f_score": 2 * precision * recall / max(precision + recall, 1e-12),
    }


MEASURES = {
    "depth": measure_depth,
    "normal": measure_normal,
    "segmentation": measure_segmentation,
    "edge": measure_edge,
    "detection": measure_detection,
    "ocr": measure_ocr,
}


def guess(name: str, labels: list[Any], number: int) -> list[Any]:
    """
    Labels that do not depend on the image: the mean of `labels` for depth and normals, the most frequent class of each
    pixel for segmentation, and otherwise the labels of other images.
    """
    if name in ("depth", "normal"):
        return [np.mean(labels, axis=0).round().astype(np.uint8)] * number
    if name == "segmentation":
        counts = [(np.stack(labels) == index).sum(0) for index in range(len(CLASSES))]
        return [np.argmax(counts, axis=0).astype(np.uint8)] * number
    return [labels[index % len(labels)] for index in range(number)]


def true_labels(rows: Dataset, name: str) -> list[Any]:
    columns = [name, *(column for column in rows.column_names if column.startswith(f"{name}_"))]
    return [expert_labels(row, names=(name,))[name] for row in rows.select_columns(columns)]


def measure(expert: Expert, rows: Dataset, others: Dataset) -> dict[str, Any]:
    """
    Compares the labels of an expert with the true labels.

    Args:
        expert (`Expert`): the expert, from a saved suite.
        rows (`Dataset`): images with true labels.
        others (`Dataset`): other images, whose true labels make the guess.

    Returns:
        `dict`: the scores of the expert; those of the `guess`; `seconds_per_image`, processor time; `size_in_bytes`.
    """
    true = true_labels(rows, expert.name)
    expert.load()
    expert([rows[0]["image"]])  # the first call is slower
    start = time.process_time()
    said = []
    for row in rows.select_columns(["image"]):
        said += expert([row["image"]])
    seconds = (time.process_time() - start) / len(rows)
    compare = MEASURES[expert.name]
    guessed = guess(expert.name, true_labels(others, expert.name), len(rows))
    return {
        **compare(said, true),
        "guess": compare(guessed, true),
        "seconds_per_image": seconds,
        "size_in_bytes": expert.size_in_bytes,
    }


def train_experts(
    splits: Mapping[str, Dataset],
    output_dir: Path,
    only: tuple[str, ...] = tuple(NETWORKS),
    max_steps: int | None = None,
    max_eval_rows: int = 500,
    bf16: bool = False,
) -> ExpertSuite:
    """
    Trains the networks that do not exist yet, saves the suite, and evaluates the experts that `results.json` lacks.

    Args:
        splits (`dict`): Scenes, with `train` and `validation`.
        output_dir (`Path`): the folder of the suite; checkpoints of the trainings are in `training/`.
        only (`tuple[str]`, *optional*): the networks to train, by default all.
        max_steps (`int`, *optional*): steps of each training, by default those in `NETWORKS`.
        max_eval_rows (`int`, *optional*, defaults to 500): number of scenes for the evaluation.
        bf16 (`bool`, *optional*, defaults to `False`): whether to compute in bfloat16 where that is safe.

    Returns:
        The saved [`ExpertSuite`].
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        if name in only and not network_folder(output_dir, name).is_dir():
            print(f"{name}: training", flush=True)
            train(name, splits["train"], output_dir, max_steps, bf16)
    make_suite(output_dir).save_pretrained(output_dir)
    suite = ExpertSuite.from_pretrained(output_dir)
    rows = splits["validation"].select(range(min(max_eval_rows, len(splits["validation"]))))
    others = splits["train"].select(range(min(max_eval_rows, len(splits["train"]))))
    path = output_dir / "results.json"
    for name in suite:
        results = json.loads(path.read_text()) if path.exists() else {}
        if name not in results:
            found = measure(suite[name], rows, others)
            results = json.loads(path.read_text()) if path.exists() else {}  # it can have changed meanwhile
            results[name] = found
            write_json(path, {each: results[each] for each in EXPERTS if each in results})
            print(name, json.dumps(results[name], indent=2), flush=True)
    return suite


def label_scenes(splits: Mapping[str, Dataset], suite: ExpertSuite, folder: Path) -> None:
    """Writes the experts' labels for the images of all splits into one store, with their `image_id` as keys."""
    if tuple(suite) != EXPERTS:
        raise ValueError(f"the suite has {', '.join(suite)}; labels need {', '.join(EXPERTS)}. Train the others first")
    for rows in splits.values():
        images = rows.select_columns(["image_id", "image"])
        label_images(images, suite, folder, image_column="image", key_column="image_id")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_data_arguments(parser, "scenes")
    parser.add_argument("--output_dir", type=Path, help="the folder of the suite")
    parser.add_argument("--suite", type=Path, help="use these trained experts, and train none")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks to train, separated by commas")
    parser.add_argument("--max_rows", type=int, help="train on this many scenes only")
    parser.add_argument("--max_steps", type=int, help="steps of each training")
    parser.add_argument("--max_eval_rows", type=int, default=500, help="measure on this many scenes")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--labels", type=Path, help="write labels for all scenes into this store")
    args = parser.parse_args()
    only = tuple(args.only.split(","))
    unknown = sorted(set(only) - set(NETWORKS))
    if unknown:
        parser.error(f"--only has {', '.join(unknown)}; accepted are {', '.join(NETWORKS)}")
    if (args.suite is None) == (args.output_dir is None):
        parser.error("--output_dir (to train experts) or --suite (to use trained ones) is needed")
    splits = open_data(args)
    if args.suite:
        suite = ExpertSuite.from_pretrained(args.suite).only(*EXPERTS)
    else:
        suite = train_experts(
            {**splits, "train": splits["train"].select(range(min(args.max_rows or 10**9, len(splits["train"]))))},
            args.output_dir,
            only,
            args.max_steps,
            args.max_eval_rows,
            args.bf16,
        )
    if args.labels:
        label_scenes(splits, suite, args.labels)


if __name__ == "__main__":
    main()
