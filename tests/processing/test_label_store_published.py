"""Labels in the published layout: `<expert>/<data set>/<image>.png` with .json and .pt files."""

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


def test_segmentation_is_in_seg_coco(tmp_path):
    labels = six_experts()
    write_published_layout([("coco/val/a.jpg", labels)], tmp_path, ENTRIES)
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {"depth", "normal", "seg_coco", "edge", "obj_detection", "ocr_detection"}
    ((_, read),) = read_published_layout(tmp_path)
    np.testing.assert_equal(read["segmentation"], labels["segmentation"])


def test_folders_named_like_the_experts_are_read(tmp_path):
    labels = six_experts()
    own = {name: name for name in labels}
    write_published_layout([("a.jpg", labels)], tmp_path, ENTRIES, folders=own)
    assert {path.name for path in tmp_path.iterdir()} == set(labels)
    ((_, read),) = read_published_layout(tmp_path)
    np.testing.assert_equal(read, labels)


def test_unread_folders_are_reported(tmp_path, warnings_once):
    write_published_layout([("a.jpg", six_experts())], tmp_path, ENTRIES)
    list(read_published_layout(tmp_path))
    assert not warnings_once()
    for name in ("seg_ade", "flow", ".cache"):
        (tmp_path / name).mkdir()
    list(read_published_layout(tmp_path))
    (warning,) = warnings_once()
    assert "and are not read: flow, seg_ade. Name" in warning
    (tmp_path / "seg_coco").rename(tmp_path / "seg_ade/seg_coco")
    ((_, read),) = read_published_layout(tmp_path, folders={"segmentation": "seg_ade/seg_coco"})
    assert read["segmentation"] is not None


def test_image_without_words_has_no_ocr_file(tmp_path):
    labels = six_experts()
    del labels["ocr"]
    write_published_layout([("a.jpg", labels)], tmp_path, ENTRIES[:5])
    write_published_layout([("b.jpg", {"ocr": six_experts()["ocr"]})], tmp_path, ENTRIES[5:])
    nothing = {"ids": np.full((6, 8), 255, np.uint8), "words": [], "features": np.zeros((0, 64), np.float32)}
    read = dict(read_published_layout(tmp_path))
    np.testing.assert_equal(read["a"]["ocr"], nothing)
    assert read["b"]["ocr"]["words"] == ["stop", "25"] and read["b"]["depth"] is None
    # asked for OCR alone, an image that other experts have seen has no words; one that nobody has seen is missing
    read = dict(read_published_layout(tmp_path, ENTRIES[5:], keys=["a.jpg", "c.jpg"]))
    np.testing.assert_equal(read["a.jpg"]["ocr"], nothing)
    assert read["c.jpg"]["ocr"] is None


def test_names_with_dots_are_not_confused(tmp_path):
    labels = [(key, six_experts() if key == "a" else {}) for key in ("a", "a.b", "a.c.jpg")]
    assert write_published_layout(labels, tmp_path, ENTRIES[:1]) == 3
    assert {path.name for path in (tmp_path / "depth").iterdir()} == {"a.png", "a.b.png", "a.c.png"}
    (tmp_path / "depth/a.b.png").unlink()
    read = dict(read_published_layout(tmp_path, ENTRIES[:1], keys=["a", "a.jpg", "a.b", "a.b.jpg"]))
    assert [labels["depth"] is None for labels in read.values()] == [False, False, True, True]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("obj_detection/a.json", b'{"0": -1, "1": 3}', "-1 is not a whole number from 0 to 721"),
        ("obj_detection/a.json", b'{"0": 722, "1": 3}', "722 is not a whole number from 0 to 721"),
        ("obj_detection/a.json", b'{"0": 3.5, "1": 3}', "3.5 is not a whole number"),
        ("obj_detection/a.json", b'{"0": null, "1": 3}', "a.json is not {instance number: class}"),
        ("obj_detection/a.json", b'{"1000000000000": 3}', "1000000000000 is not a whole number from 0 to 254"),
        ("obj_detection/a.json", b'{"-1": 3}', "-1 is not a whole number from 0 to 254"),
        ("obj_detection/a.json", b"\xff", "a.json is not {instance number: class}"),
        ("obj_detection/a.json", b"", "has the id 1, but 0 classes"),
        ("ocr_detection/a.pt", b"", "has the id 1, but 0 words"),
        ("ocr_detection/a.pt", b"PK\x03\x04", "a.pt is not {word number"),
        ("ocr_detection/a.pt", {-1: {"features": torch.zeros(64), "text": ""}}, "-1 is not a whole number"),
        ("ocr_detection/a.pt", {10**12: {"features": torch.zeros(64), "text": ""}}, "from 0 to 254"),
        ("ocr_detection/a.pt", {0: {"features": torch.zeros(63), "text": ""}}, "a.pt is not {word number"),
        ("ocr_detection/a.pt", {0: {"features": torch.full((64,), torch.nan), "text": ""}}, "is not finite"),
        ("ocr_detection/a.pt", {0: {"text": ""}}, "a.pt is not {word number"),
        ("seg_coco/a.png", b"GIF89a", "a.png is damaged or not a PNG"),
    ],
)
def test_damaged_published_files_are_named(tmp_path, name, content, message):
    write_published_layout([("a.jpg", six_experts())], tmp_path, ENTRIES)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError) as error:
        list(read_published_layout(tmp_path))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_empty_png_is_a_missing_label(tmp_path):
    labels = {**six_experts(), "depth": None, "ocr": None}
    write_published_layout([("a.jpg", labels)], tmp_path, ENTRIES)
    assert (tmp_path / "depth/a.png").stat().st_size == (tmp_path / "ocr_detection/a.png").stat().st_size == 0
    (tmp_path / "normal/a.png").unlink()
    ((_, read),) = read_published_layout(tmp_path)
    assert [name for name, label in read.items() if label is None] == ["depth", "normal", "ocr"]


def test_missing_ocr_file_means_no_text(tmp_path):
    empty = {"ids": np.full((6, 8), 255, np.uint8), "words": [], "features": np.zeros((0, 64), np.float32)}
    write_published_layout([("a.jpg", six_experts())], tmp_path, ENTRIES)
    write_published_layout([("a.jpg", {"ocr": empty})], tmp_path, ENTRIES[5:])  # over it
    assert not (tmp_path / "ocr_detection/a.pt").exists()
    ((_, read),) = read_published_layout(tmp_path, ENTRIES[5:])
    np.testing.assert_equal(read["ocr"], empty)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_word_features_are_read_without_unpickling_objects(tmp_path, make):
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


def test_published_labels_that_do_not_fit_are_named(tmp_path):
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
    with pytest.raises(FileNotFoundError, match="no folder seg_ade; it has depth, edge, normal, obj_detection, ocr_"):
        list(read_published_layout(tmp_path, ENTRIES[2:3], folders={"segmentation": "seg_ade"}))
    for key in ("../a.jpg", "/etc/a.jpg", "a/../../b.jpg", "", "."):
        with pytest.raises(ValueError, match="leads out of .*, or to no file"):
            write_published_layout([(key, {})], tmp_path, ENTRIES)
    with pytest.raises(ValueError, match="an identifier"):
        write_published_layout([("b.jpg", {})], tmp_path, [{**ENTRIES[0], "name": "../depth"}])
    with pytest.raises(ValueError, match="'a.png' and of another key would be one file, a.png"):
        write_published_layout([("a.jpg", {}), ("a.png", {})], tmp_path, ENTRIES)
    with pytest.raises(ValueError, match="'depth' has shape .*its expert has 1 channels"):
        write_published_layout([("b.jpg", {"depth": np.zeros((4, 4, 5), np.uint8)})], tmp_path, ENTRIES)
    vectors = {"name": "vectors", "kind": "features", "channels": 3}
    with pytest.raises(ValueError, match="'vectors' gives grids of vectors; the published layout has maps alone"):
        write_published_layout([("b.jpg", {})], tmp_path, [vectors])
    with pytest.raises(ValueError, match="'depth' is dense of 5 channels; a PNG has 1 or 3"):
        write_published_layout([], tmp_path, [{**ENTRIES[0], "channels": 5}])
    for key in ("../a.jpg", "/etc/a.jpg", "a/../../b.jpg"):
        with pytest.raises(ValueError, match="leads out of .*, or to no file"):
            list(read_published_layout(tmp_path, ENTRIES[:1], keys=[key]))


def test_store_to_published_layout_and_back(tmp_path):
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
