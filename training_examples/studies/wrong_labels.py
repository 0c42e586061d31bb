"""Labels that are worse than those of the experts: coarse, of other images, missing, or lies."""

import string
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from modeling_prismer.processing.experts import HashedNgrams
from scenes.scenes import DETECTION_CLASSES, EXPERTS
from scenes.words import WORDS


COARSE_SIZE = 8
Labels = dict[str, dict[str, Any]]  # the labels of each image, by its image_id


def coarse(labels: dict[str, Any], image_id: str) -> dict[str, Any]:
    """
    Reduces the maps of an image to 8x8 and enlarges them again, which removes most details smaller than a sixteenth of
    the image, and changes one random letter of each word.
    """
    random = np.random.default_rng(zlib.crc32(image_id.encode()))
    degraded = {}
    for name, label in labels.items():
        if isinstance(label, dict):
            label = {**label, "ids": _blocks(label["ids"], Image.Resampling.NEAREST)}
            if "words" in label:
                label["words"] = [_misspelt(word, random) for word in label["words"]]
                label["features"] = HashedNgrams()(label["words"])
        elif label is not None:
            is_map_of_ids = name == "segmentation"  # true labels are not dicts
            label = _blocks(label, Image.Resampling.NEAREST if is_map_of_ids else Image.Resampling.BOX)
        degraded[name] = label
    return degraded


def _blocks(values: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    height, width = values.shape[:2]
    small = Image.fromarray(values).resize((COARSE_SIZE, COARSE_SIZE), resample)
    return np.array(small.resize((width, height), Image.Resampling.NEAREST))


def _misspelt(word: str, random: np.random.Generator) -> str:
    place = random.integers(len(word))
    letter = random.choice([letter for letter in string.ascii_lowercase if letter != word[place]])
    return f"{word[:place]}{letter}{word[place + 1 :]}"


def noisy(labels: Labels, share: float, seed: int) -> Labels:
    """
    Replaces a random share of the experts' labels by those of the same expert for another image of `labels`. A larger
    share also makes all the replacements of a smaller one.
    """
    random = np.random.default_rng(seed)
    image_ids = list(labels)
    size = (len(image_ids), len(EXPERTS))
    replaced = random.random(size) < share
    others = (np.arange(len(image_ids))[:, None] + random.integers(1, len(image_ids), size)) % len(image_ids)
    return {
        image_id: {
            **labels[image_id],
            **{
                name: labels[image_ids[others[i, k]] if replaced[i, k] else image_id].get(name)
                for k, name in enumerate(EXPERTS)
            },
        }
        for i, image_id in enumerate(image_ids)
    }


# ---- lies: the same for each image ----


def mirror(label: Any) -> Any:
    """The label of the mirrored image, without its sides exchanged in the values."""
    if isinstance(label, dict):
        return {**label, "ids": np.ascontiguousarray(label["ids"][:, ::-1])}
    return np.ascontiguousarray(label[:, ::-1])


def invert(label: np.ndarray) -> np.ndarray:
    return 255 - label


def swap_classes(label: dict[str, Any]) -> dict[str, Any]:
    """Each class becomes the next one."""
    return {**label, "classes": [(own + 1) % len(DETECTION_CLASSES) for own in label["classes"]]}


def swap_words(label: dict[str, Any]) -> dict[str, Any]:
    """Each word of the data set becomes the next one; other words become the first one."""
    words = [WORDS[(WORDS.index(word) + 1) % len(WORDS)] if word in WORDS else WORDS[0] for word in label["words"]]
    return {**label, "words": words, "features": HashedNgrams()(words)}


LIES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "depth: mirrored": ("depth", mirror),
    "depth: near and far exchanged": ("depth", invert),
    "segmentation: mirrored": ("segmentation", mirror),
    "detection: mirrored": ("detection", mirror),
    "detection: classes exchanged": ("detection", swap_classes),
    "ocr: mirrored": ("ocr", mirror),
    "ocr: words exchanged": ("ocr", swap_words),
}


def lying(labels: Labels, name: str) -> Labels:
    expert, lie = LIES[name]
    return {
        image_id: {**own, expert: own[expert] if own.get(expert) is None else lie(own[expert])}
        for image_id, own in labels.items()
    }


def without(labels: Labels, *experts: str) -> Labels:
    return {image_id: {**own, **dict.fromkeys(experts)} for image_id, own in labels.items()}
