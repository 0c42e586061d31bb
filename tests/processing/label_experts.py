"""Simple experts, one for each kind of label. Programs that tests start can import them."""

import os
import signal
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_prismer.processing.experts import CannyEdges, Expert, ExpertSuite


class MeanColour(Expert):
    type = "test_mean_colour"
    name, kind, channels = "normal", "dense", 3

    def run(self, images):
        return [
            np.broadcast_to(np.asarray(image).mean((0, 1)).astype(np.uint8), np.asarray(image).shape)
            for image in images
        ]


class Flow(Expert):
    """A dense expert with five channels."""

    type = "test_flow"
    name, kind, channels = "flow", "dense", 5

    def run(self, images):
        return [np.stack([np.asarray(image)[..., 0] // (1 + i) for i in range(5)], axis=-1) for image in images]


class Brightness(Expert):
    type = "test_brightness"
    name, kind, channels, num_classes = "segmentation", "label", 8, 4

    def run(self, images):
        return [{"ids": np.asarray(image)[..., 1] // 64} for image in images]


class Halves(Expert):
    """Two instances, of class 300 and of the class numbered like the image's width; none in images of odd height."""

    type = "test_halves"
    name, kind, channels, num_classes, instances = "detection", "label", 8, 400, True

    def run(self, images):
        return [None if image.height % 2 else self.halves(image) for image in images]

    def halves(self, image):
        ids = np.full((image.height, image.width), 255, np.uint8)
        ids[: image.height // 2], ids[-1:] = 0, 1
        return {"ids": ids, "classes": [300, image.width]}


class Rows(Expert):
    """Words on the first rows of an image: none, one or two."""

    type = "test_rows"
    name, kind, channels = "ocr", "label", 3

    def run(self, images):
        return [self.rows(image, image.width % 3) for image in images]

    def rows(self, image, number):
        ids = np.full((image.height, image.width), 255, np.uint8)
        ids[:number] = np.arange(number)[:, None]
        features = np.asarray(image, np.float32)[:number, 0] / 7
        return {"ids": ids, "words": [f"wörd {row}" for row in range(number)], "features": features}


class EdgeThatKills(CannyEdges):
    """Kills its process at the `fatal`-th image. With a file `mark`, only the first time."""

    type = "test_edge_that_kills"

    def __init__(self, fatal: int = 0, mark: str | None = None):
        super().__init__()
        self.fatal, self.mark = fatal, mark
        self.seen = 0

    def run(self, images):
        self.seen += len(images)
        if self.fatal and self.seen >= self.fatal and not (self.mark and Path(self.mark).exists()):
            if self.mark:
                Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(images)


class FailsOn(Expert):
    """Fails on images of one width."""

    type = "test_fails_on"
    name, kind, channels = "depth", "dense", 1

    def __init__(self, width: int = 0):
        self.width = width

    def run(self, images):
        if any(image.width == self.width for image in images):
            raise RuntimeError("no depth here")
        return [np.asarray(image)[..., 2] for image in images]


def all_kinds() -> ExpertSuite:
    return ExpertSuite([CannyEdges(), MeanColour(), Flow(), Brightness(), Halves(), Rows()])


def write_images(folder: Path, number: int) -> list[str]:
    """Writes images of many sizes into three folders, and returns their keys."""
    keys = []
    for i in range(number):
        key = f"part{i % 3}/{i:04d}.png"
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16 + i % 4, 18 + i % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / key, compress_level=0)
        keys.append(key)
    return sorted(keys)
