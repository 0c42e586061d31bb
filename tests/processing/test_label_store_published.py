"""Labels in the layout in which they were published: `<expert>/<data set>/<image>.png` and what belongs to it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.labels import (
    LabelStore,
    LabelWriter,
    label_images,
    make_manifest,
    read_published_layout,
    write_published_layout,
)

from .label_experts import Brightness, Halves, MeanColour, Rows, write_images


def six_experts():
    rng = np.random.default_rng(0)
    ids = np.full((6, 8), 255, np.uint8)
    ids[0], ids[1] = 0, 1
    return {
        "depth": rng.integers(0, 256, (6, 8), dtype=np.uint8),
        "normal": rng.integers(0, 256, (6, 8, 3), dtype=np.uint8),
        "segmentation": {"ids": rng.integers(0, 133, (6, 8), dtype=np.uint8)},
        "edge": rng.integers(0, 256, (6, 8), dtype=np.uint8),
        "detection": {"ids": ids, "classes": [700, 3]},
        "ocr": {"ids": ids, "words": ["stop", "25"], "features": rng.normal(size=(2, 64)).astype(np.float32)},
    }


ENTRIES = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "normal", "kind": "dense", "channels": 3},
    {"name": "segmentation", "kind": "label", "channels": 64, "num_classes": 133},
    {"name": "edge", "kind": "dense", "channels": 1},
    {"name": "detection", "kind": "label", "channels": 64, "num_classes": 722, "instances": True},
    {"name": "ocr", "kind": "label", "channels": 64},
]


def test_all_six_experts_are_written_and_read(tmp_path):
    labels = six_experts()
    assert write_published_layout([("coco/val/a.b.jpg", labels)], tmp_path, ENTRIES) == 1
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"depth/coco/val/a.b.png", "obj_detection/coco/val/a.b.json", "ocr_detection/coco/val/a.b.pt"} < files
    assert json.loads((tmp_path / "obj_detection/coco/val/a.b.json").read_text()) == {"0": 700, "1": 3}
    ((key, read),) = read_published_layout(tmp_path)
    assert key == "coco/val/a.b"
    np.testing.assert_equal(read, labels)
    ((key, read),) = read_published_layout(tmp_path, ENTRIES[3:], keys=["coco/val/a.b.jpg"])
    assert key == "coco/val/a.b.jpg" and list(read) == ["edge", "detection", "ocr"]


def test_a_png_of_zero_bytes_means_that_nothing_is_known(tmp_path):
    labels = {**six_experts(), "depth": None, "ocr": None}
    write_published_layout([("a.jpg", labels)], tmp_path, ENTRIES)
    assert (tmp_path / "depth/a.png").stat().st_size == (tmp_path / "ocr_detection/a.png").stat().st_size == 0
    (tmp_path / "normal/a.png").unlink()
    ((_, read),) = read_published_layout(tmp_path)
    assert [name for name, label in read.items() if label is None] == ["depth", "normal", "ocr"]


def test_no_file_of_words_means_no_text(tmp_path):
    empty = {"ids": np.full((6, 8), 255, np.uint8), "words": [], "features": np.zeros((0, 64), np.float32)}
    write_published_layout([("a.jpg", six_experts())], tmp_path, ENTRIES)
    write_published_layout([("a.jpg", {"ocr": empty})], tmp_path, ENTRIES[5:])  # over it
    assert not (tmp_path / "ocr_detection/a.pt").exists()
    ((_, read),) = read_published_layout(tmp_path, ENTRIES[5:])
    np.testing.assert_equal(read["ocr"], empty)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_features_of_words_come_in_any_form_but_no_object_is_unpickled(tmp_path, make):
    numbers = np.random.default_rng(0).normal(size=64)
    (tmp_path / "ocr_detection").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "ocr_detection/a.png")
    torch.save({0: {"features": make(numbers), "text": "stop"}}, tmp_path / "ocr_detection/a.pt")
    ((_, read),) = read_published_layout(tmp_path)
    np.testing.assert_allclose(read["ocr"]["features"][0], numbers, rtol=1e-6)
    assert read["ocr"]["words"] == ["stop"]
    torch.save({0: {"features": print, "text": "stop"}}, tmp_path / "ocr_detection/a.pt")
    with pytest.raises(ValueError, match="a.pt is not"):
        list(read_published_layout(tmp_path))


def test_what_does_not_fit_is_named(tmp_path):
    write_published_layout([("a.jpg", six_experts())], tmp_path, ENTRIES)
    (tmp_path / "obj_detection/a.json").write_text('{"0": 3}')
    with pytest.raises(ValueError, match=r"obj_detection/a.png has the id 1, but 1 classes belong to it"):
        list(read_published_layout(tmp_path))
    (tmp_path / "obj_detection/a.json").write_text("[]")
    with pytest.raises(ValueError, match="a.json is not {instance number: class}"):
        list(read_published_layout(tmp_path))
    (tmp_path / "depth/a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="depth/a.png is damaged"):
        list(read_published_layout(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder seg_coco"):
        list(read_published_layout(tmp_path, ENTRIES[2:3], folders={"segmentation": "seg_coco"}))
    with pytest.raises(ValueError, match="leads out of"):
        write_published_layout([("../a.jpg", {})], tmp_path, ENTRIES)
    with pytest.raises(ValueError, match="'a.png' and 'a.jpg' would be one file"):
        write_published_layout([("a.jpg", {}), ("a.png", {})], tmp_path, ENTRIES)
    with pytest.raises(ValueError, match="has 5 channels"):
        write_published_layout([("b.jpg", {"depth": np.zeros((4, 4, 5), np.uint8)})], tmp_path, ENTRIES)


def test_a_store_goes_to_the_published_layout_and_back(tmp_path):
    suite = ExpertSuite([MeanColour(), Brightness(), Halves(), Rows()])
    keys = write_images(tmp_path / "photos", 12)
    label_images(tmp_path / "photos", suite, tmp_path / "labels", progress=False)
    store = LabelStore(tmp_path / "labels")
    assert write_published_layout(store.items(), tmp_path / "published", store.descriptions) == 12

    manifest = make_manifest(None, store.descriptions, {"source": "published"})
    with LabelWriter(tmp_path / "imported", manifest) as writer:
        for key, labels in read_published_layout(tmp_path / "published", store.descriptions, keys=keys):
            writer.write(key, labels)
    imported = LabelStore(tmp_path / "imported")
    assert list(imported) == keys
    for key in keys:
        np.testing.assert_equal(imported[key], store[key])
