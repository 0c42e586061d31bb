"""Sixty odd or broken images go through every expert into a label store, and none of them ends the run."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from modeling_prismer.processing.experts import (
    CannyEdges,
    DepthEstimator,
    DexiNedEdges,
    ExpertSuite,
    NormalsFromDepth,
    ObjectDetector,
    RapidOcrText,
    UniversalSegmentation,
)
from modeling_prismer.processing.labels import LabelStore, label_images

from . import models


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F")
SIZES = (
    (1, 1),
    (1, 200),
    (200, 1),
    (2, 3),
    (7, 7),
    (3000, 4),
    (4, 3000),
    (33, 31),
    (255, 256),
    (640, 480),
    (900, 1),
    (5, 500),
)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")


def photo(size=(64, 48)):
    image = Image.new("RGB", size, (220, 230, 240))
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=(200, 30, 30))
    return image


def encoded(image, format="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **settings)
    return buffer.getvalue()


def odd_images():
    """File names and contents: (readable, broken)."""
    readable, broken = {}, {}
    for mode in MODES:
        image = photo().convert("L") if mode in ("I;16", "F", "I") else photo().convert(mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        elif mode in ("F", "I"):
            image = image.convert(mode)
        format = {"CMYK": "JPEG", "YCbCr": "JPEG", "HSV": "TIFF", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG")
        content = encoded(image if mode != "HSV" else photo(), format)
        readable[f"mode_{mode.replace(';', '_')}.{format.lower()}"] = content
    for size in SIZES:
        readable[f"size_{size[0]}x{size[1]}.png"] = encoded(photo(size))
    for format in FORMATS:
        readable[f"format.{format.lower()}"] = encoded(photo(), format)
    for turn in range(1, 9):  # upright, mirrored, turned
        exif = Image.Exif()
        exif[0x0112] = turn
        readable[f"exif_{turn}.jpg"] = encoded(photo(), "JPEG", exif=exif)
    frames = [photo((48, 48)).rotate(90 * number) for number in range(3)]
    readable["animated.gif"] = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    readable["animated.webp"] = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    for name, color in (("black", 0), ("white", 255), ("grey", 128)):
        readable[f"flat_{name}.png"] = encoded(Image.new("L", (50, 40), color))
    readable["transparent.png"] = encoded(Image.new("RGBA", (40, 40), (10, 20, 30, 0)))
    noise = torch.randint(0, 256, (60, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    readable["noise.png"] = encoded(Image.fromarray(noise.numpy()))
    readable["wrong_suffix.jpg"] = encoded(photo(), "PNG")
    readable["long_20000x20.png"] = encoded(photo((20000, 20)))

    for suffix, format in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("webp", "WEBP")):
        content = encoded(photo((200, 150)), format)
        broken[f"half.{suffix}"] = content[: len(content) // 2]
        broken[f"header_only.{suffix}"] = content[:20]
    broken["empty.png"] = b""
    broken["text.png"] = b"this is not an image"
    broken["zeros.jpg"] = bytes(500)
    broken["html.jpg"] = b"<!DOCTYPE html><html><body>404 not found</body></html>"
    header = bytearray(encoded(Image.new("L", (16, 16))))
    header[16:24] = (60000).to_bytes(4, "big") * 2  # it claims 3.6 billion pixels
    broken["bomb.png"] = bytes(header)
    return readable, broken


@pytest.fixture(scope="module")
def six_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return ExpertSuite(
        [
            DepthEstimator(models.save(models.depth_anything, folder / "depth")),
            NormalsFromDepth(),
            UniversalSegmentation(models.save(models.mask2former, folder / "segmentation")),
            CannyEdges(),
            ObjectDetector(models.save(models.dfine, folder / "detection")),
            RapidOcrText(),
        ]
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    readable, broken = odd_images()
    for name, content in (readable | broken).items():
        (folder / name).write_bytes(content)
    return folder, readable, broken


def test_sixty_odd_images_go_through_every_expert(six_experts, images, tmp_path):
    folder, readable, broken = images
    assert len(readable) + len(broken) >= 60
    report = label_images(folder, six_experts, tmp_path / "store", batch_size=8, progress=False)
    store = LabelStore(tmp_path / "store")
    assert report.images == len(readable) + len(broken)
    assert set(store.errors) == set(broken)
    for name in readable:
        labels = store[name]
        assert set(labels) == set(six_experts), name
        sizes = {np.asarray(label["ids"] if isinstance(label, dict) else label).shape[:2] for label in labels.values()}
        assert len(sizes) == 1, name  # every map has the size of its image


def test_dexined_takes_odd_sizes(images):
    dexined = DexiNedEdges(pretrained=False)
    sizes = [(1, 1), (300, 4)]
    maps = dexined([photo(size) for size in sizes])
    assert [map.shape for map in maps] == [(height, width) for width, height in sizes]
