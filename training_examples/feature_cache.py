"""
Patch features of frozen vision encoders on disk. The encoders run once for each image before the training, which then
reads the features in place of the image.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor
from modeling_prismer.processing import load_image


logger = logging.getLogger("prismer")

IMAGES_PER_FILE = 256


class FeatureCache:
    """
    Features of images by the images' ids, in files of safetensors.

    Args:
        folder (`Path`): the folder; it is made if it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._opened: dict[Path, Any] = {}
        self.files: dict[str, Path] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # a worker of a data loader opens files by itself

    def refresh(self) -> None:
        """Reads which images there are."""
        for path in sorted(self.folder.glob("*.safetensors")):
            self.files |= dict.fromkeys(self._open(path).keys(), path)

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt")
        return self._opened[path]

    def __call__(self, image_ids: Iterable[str]) -> torch.Tensor:
        """`(num_images, num_patches, channels)` float32."""
        return torch.stack([self._open(self.files[name]).get_tensor(name) for name in image_ids]).float()

    def write(self, features: dict[str, torch.Tensor]) -> None:
        """Adds images. The file gets its name when it is complete."""
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        incomplete = path.with_suffix(".incomplete")
        save_file(features, incomplete)
        incomplete.replace(path)


def cache_name(model: PrismerLMForConditionalGeneration, processor: PrismerLMProcessor, experts: Any = None) -> str:
    """A name that differs if the features do: by the encoders' weights, the images' sizes, and what they depend on."""
    config, image_processor = model.config, processor.image_processor
    encoders = [{key: entry[key] for key in ("config", "weights")} for entry in config.backbones["vision"]]
    fields = ("size", "image_mean", "image_std", "resample")
    settings = {name: getattr(image_processor, name) for name in fields}
    parts = [encoders, settings, processor.encoders, config.grid_size]
    if config.has_prismer_encoder:
        suite = None if processor.experts is None else processor.experts.to_dict()
        parts += [config.experts, experts, suite, image_processor.expert_size]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.no_grad()
def cache_features(
    model: PrismerLMForConditionalGeneration,
    processor: PrismerLMProcessor,
    images: datasets.Dataset,
    folder: Path,
    labels_for: Callable[[list[str]], list[dict] | None],
    experts: Sequence[str] | None = None,
    batch_size: int = 32,
) -> FeatureCache:
    """
    Encodes the images that are not in the cache yet. Several processes share them.

    Args:
        model ([`PrismerLMForConditionalGeneration`]): its vision encoders are frozen.
        processor ([`PrismerLMProcessor`]): its processor.
        images (`datasets.Dataset`): columns `image_id` and `image`; an image may occur several times.
        folder (`Path`): where the caches of all encoders are.
        labels_for (`Callable`): from images' ids to their labels, for an encoder that is a Prismer's.
        experts (`list[str]`, *optional*): the experts that such an encoder reads.
        batch_size (`int`, *optional*, defaults to 32): images that are encoded at a time.
    """
    cache = FeatureCache(folder / cache_name(model, processor, experts))
    first = np.unique(np.asarray(images["image_id"][:]), return_index=True)[1]
    state = PartialState()
    # shares of all images, since the other processes may have written some of the missing ones already
    share = np.sort(first)[state.process_index :: state.num_processes]
    missing = [int(row) for row in share if images[int(row)]["image_id"] not in cache.files]
    is_training = model.training
    model.eval()
    features: dict[str, torch.Tensor] = {}
    progress = datasets.utils.tqdm(total=len(missing), desc="encoding the images", unit="image", mininterval=1)
    for start in range(0, len(missing), batch_size):
        rows = images.select(missing[start : start + batch_size])
        encoded = encode_images(model, processor, list(rows), labels_for, experts)
        features |= {name: own.contiguous() for name, own in zip(rows["image_id"][:], encoded.half().cpu())}
        if len(features) >= IMAGES_PER_FILE or start + batch_size >= len(missing):
            cache.write(features)
            features = {}
        progress.update(len(rows))
    progress.close()
    state.wait_for_everyone()
    model.train(is_training)
    cache.refresh()
    logger.info("features of %d images in %s", len(cache.files), cache.folder)
    return cache


@torch.no_grad()
def encode_images(
    model: PrismerLMForConditionalGeneration,
    processor: PrismerLMProcessor,
    rows: list[dict[str, Any]],
    labels_for: Callable[[list[str]], list[dict] | None],
    experts: Sequence[str] | None = None,
) -> torch.Tensor:
    """The patch features of rows with `image` and `image_id`: `(len(rows), num_patches, channels)`."""
    opened = [load_image(row["image"], name=row["image_id"]) for row in rows]
    is_prismer = model.config.has_prismer_encoder
    labels = labels_for([row["image_id"] for row in rows]) if is_prismer else None
    inputs = processor.process_images(opened, labels, experts=experts if is_prismer else [], return_tensors="pt")
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if is_prismer:
        return model.get_image_features(**inputs).last_hidden_state
    pixels = [tensor for name, tensor in sorted(inputs.items()) if name.startswith("pixel_values")]
    return model.model.encode_patches(pixels, {}, None)
