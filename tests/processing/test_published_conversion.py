"""Published labels become a store, and a store becomes published labels, without a loss and by one command."""

import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_prismer.cli import app
from modeling_prismer.processing.labels import (
    LabelStore,
    LabelWriter,
    convert_published_labels,
    make_manifest,
    write_published_layout,
)

from .test_label_store_published import ENTRIES, six_experts


EDGE = ENTRIES[3:4]


@pytest.fixture
def published(tmp_path):
    """All that occurs: words and none, instances and none, empty files, nested folders and names with dots."""
    nothing = {"ids": np.full((6, 8), 255, np.uint8)}
    no_words = {"words": [], "features": np.zeros((0, 64), np.float32)}
    labels = {
        "coco/val/a.b": six_experts(),
        "coco/val/quiet": {**six_experts(), "ocr": {**nothing, **no_words}},
        "coco/val/bare": {**six_experts(), "detection": {**nothing, "classes": []}},
        "vg/empty": dict.fromkeys(six_experts()),
        "vg/half": {**six_experts(), "depth": None, "detection": None},
    }
    write_published_layout(labels.items(), tmp_path / "published", ENTRIES)
    return tmp_path / "published"


def files_of(folder):
    """The contents of all files by their paths."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".pt":
            words = torch.load(path, weights_only=True)
            content = {number: (word["text"], word["features"].numpy()) for number, word in words.items()}
        found[path.relative_to(folder).as_posix()] = content
    return found


def convert(*arguments):
    return CliRunner().invoke(app, ["convert-labels", *map(str, arguments)])


def test_both_directions_are_one_command(published, tmp_path):
    result = convert(published, tmp_path / "store")
    assert result.exit_code == 0 and "5 images converted, 0 of them damaged" in result.stderr, result.output
    result = convert(tmp_path / "store", tmp_path / "again")
    assert result.exit_code == 0 and "5 images converted" in result.stderr, result.output
    before, after = files_of(published), files_of(tmp_path / "again")
    assert "ocr_detection/coco/val/quiet.png" not in before  # no file for an image without words
    assert before["depth/vg/empty.png"] == b"" and before["obj_detection/coco/val/bare.json"] == b"{}"
    np.testing.assert_equal(after, before)


def test_the_labels_stay_the_same(published, tmp_path):
    convert_published_labels(published, tmp_path / "store", progress=False)
    store = LabelStore(tmp_path / "store")
    assert list(store) == ["coco/val/a.b", "coco/val/bare", "coco/val/quiet", "vg/empty", "vg/half"]
    np.testing.assert_equal(store["coco/val/a.b"], six_experts())
    assert store["coco/val/quiet"]["ocr"]["words"] == [] and store["coco/val/bare"]["detection"]["classes"] == []
    assert set(store["vg/empty"].values()) == {None}
    convert_published_labels(tmp_path / "store", tmp_path / "again", progress=False)
    convert_published_labels(tmp_path / "again", tmp_path / "store again", progress=False)
    np.testing.assert_equal(dict(LabelStore(tmp_path / "store again")), dict(store))


def test_maps_are_not_encoded_again(published, tmp_path):
    """Other PNGs of the same pixels come back as they were; those that a store cannot keep are encoded anew."""
    normal = Image.open(published / "normal/coco/val/a.b.png")
    normal.save(published / "normal/coco/val/a.b.png", compress_level=0)
    edge = Image.open(published / "edge/coco/val/a.b.png")
    edge.convert("RGBA").save(published / "edge/coco/val/a.b.png")
    before = files_of(published)
    convert_published_labels(published, tmp_path / "store", progress=False)
    convert_published_labels(tmp_path / "store", tmp_path / "again", progress=False)
    after = files_of(tmp_path / "again")
    assert after["normal/coco/val/a.b.png"] == before["normal/coco/val/a.b.png"]
    stored = LabelStore(tmp_path / "store")["coco/val/a.b"]
    np.testing.assert_equal(stored["edge"], six_experts()["edge"])
    assert after["edge/coco/val/a.b.png"] != before["edge/coco/val/a.b.png"]


def test_keys_come_from_a_folder_of_images(published, tmp_path):
    for name in ("coco/val/a.b.jpg", "vg/half.png", "vg/new.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / name)
    result = convert(published, tmp_path / "store", "--images", tmp_path / "images")
    assert result.exit_code == 0, result.output
    store = LabelStore(tmp_path / "store")
    assert list(store) == ["coco/val/a.b.jpg", "vg/half.png", "vg/new.jpg"]
    np.testing.assert_equal(store["coco/val/a.b.jpg"], six_experts())
    assert set(store["vg/new.jpg"].values()) == {None}


def test_other_folders_and_experts_can_be_named(published, tmp_path):
    (published / "seg_coco").rename(published / "seg_ade")
    convert_published_labels(published, tmp_path / "store", ENTRIES[:3], {"segmentation": "seg_ade"}, progress=False)
    assert list(LabelStore(tmp_path / "store")["vg/half"]) == ["depth", "normal", "segmentation"]
    result = convert(tmp_path / "store", tmp_path / "again", "--folder", "segmentation=seg_ade")
    assert result.exit_code == 0 and (tmp_path / "again/seg_ade/vg/half.png").stat().st_size
    assert convert(published, tmp_path / "other", "--folder", "segmentation").exit_code == 1


def test_an_interrupted_conversion_is_continued(published, tmp_path):
    assert convert_published_labels(published, tmp_path / "store", progress=False).images == 5
    write_published_layout([("vg/late", six_experts())], published, ENTRIES)
    report = convert_published_labels(published, tmp_path / "store", progress=False)
    assert report.images == 1 and len(LabelStore(tmp_path / "store")) == 6


def test_damaged_files_are_left_out_and_named(published, tmp_path):
    (published / "edge/coco/val/a.b.png").write_bytes(b"torn")
    (published / "obj_detection/coco/val/a.b.json").write_text("[")
    result = convert(published, tmp_path / "store")
    assert result.exit_code == 0 and "5 images converted, 1 of them damaged" in result.stderr
    store = LabelStore(tmp_path / "store")
    labels, error = store["coco/val/a.b"], store.errors["coco/val/a.b"]
    assert labels["edge"] is None and labels["detection"] is None and labels["depth"] is not None
    assert "edge/coco/val/a.b.png is damaged" in error and "a.b.json is not {instance number: class}" in error


@pytest.mark.parametrize("key", ["../evil", "/tmp/evil", "a/../../evil", "."])
def test_keys_of_a_store_cannot_leave_the_folder(key, tmp_path):
    with LabelWriter(tmp_path / "store", make_manifest(None, EDGE, {})) as writer:
        writer.write(key, {"edge": np.zeros((2, 2), np.uint8)})
    with pytest.raises(ValueError, match="leads out of .*, or to no file"):
        convert_published_labels(tmp_path / "store", tmp_path / "deep/out", progress=False)
    assert not list(tmp_path.rglob("evil*")) and not os.path.exists("/tmp/evil.png")


def test_a_stored_map_must_be_a_png(tmp_path):
    with LabelWriter(tmp_path / "store", make_manifest(None, EDGE, {})) as writer:
        writer.write_row({"key": "a", "error": None, "edge": {"bytes": b"#!/bin/sh", "path": None}})
    with pytest.raises(ValueError, match="stored map of 'edge' is not a PNG"):
        convert_published_labels(tmp_path / "store", tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_links_do_not_lead_into_a_circle(published, tmp_path):
    (published / "depth/coco/loop").symlink_to(published / "depth")
    assert convert_published_labels(published, tmp_path / "store", progress=False).images == 5


def test_wrong_places_are_refused(tmp_path):
    assert "there is no folder" in convert(tmp_path / "nowhere", tmp_path / "out").stderr
    (tmp_path / "other").mkdir()
    assert "has no folder depth" in convert(tmp_path / "other", tmp_path / "out").stderr
    with LabelWriter(tmp_path / "store", make_manifest(None, EDGE, {})):
        pass
    with pytest.raises(ValueError, match="is a label store, which has experts and keys"):
        convert_published_labels(tmp_path / "store", tmp_path / "out", EDGE)
    assert not (tmp_path / "out").exists()


def test_several_shards_of_images_there_and_back(tmp_path, record_property):
    number = int(os.environ.get("PRISMER_PUBLISHED_IMAGES", 2500))  # three shards, three folders
    folder = tmp_path / "published/edge"
    for group in range(0, number, 1000):
        (folder / f"{group:06}").mkdir(parents=True)
        one = folder / f"{group:06}/{group:06}.png"
        Image.fromarray(np.full((4, 4), group % 251, np.uint8)).save(one)
        for index in range(group + 1, min(group + 1000, number)):
            os.link(one, one.with_name(f"{index:06}.png"))
    start = time.process_time()
    report = convert_published_labels(tmp_path / "published", tmp_path / "store", progress=False)
    assert report.images == number and report.failed == 0
    written = convert_published_labels(tmp_path / "store", tmp_path / "again", progress=False)
    seconds = time.process_time() - start
    assert written.images == number
    record_property("images_per_cpu_second", number / seconds)
    print(f"{number} images there and back: {number / seconds:,.0f} per CPU second")
    last = f"{(number - 1) // 1000 * 1000:06}/{number - 1:06}.png"
    assert (tmp_path / "again/edge" / last).read_bytes() == (folder / last).read_bytes()
    assert len(list((tmp_path / "store").glob("labels-*"))) == -(-number // 1024)
    assert LabelStore(tmp_path / "store").keys() >= {last.removesuffix(".png")}
