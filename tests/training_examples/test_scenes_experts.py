"""The experts of Scenes are trained in a few steps, saved, loaded and evaluated."""

import json

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from PIL import Image

from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.labels import LabelStore


pytest.importorskip("rapidocr")

from scenes import run_scenes, train_experts
from scenes.render import CLASSES
from scenes.scenes import DETECTION_CLASSES, EXPERTS, Scenes


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> DatasetDict:
    builder = Scenes(cache_dir=str(tmp_path_factory.mktemp("scenes")), train=4, validation=2, test=0, seed=9)
    builder.download_and_prepare()
    return builder.as_dataset()


@pytest.fixture(scope="module")
def trained(splits, tmp_path_factory):
    """The folder of a suite whose networks were trained for two steps."""
    folder = tmp_path_factory.mktemp("experts")
    train_experts.train_experts(splits, folder, max_steps=2)
    return folder


def test_saved_suite_labels_a_scene(trained, splits):
    suite = ExpertSuite.from_pretrained(trained)
    (labels,) = suite([splits["validation"][0]["image"]])
    assert tuple(labels) == EXPERTS
    assert labels["depth"].shape == labels["edge"].shape == labels["segmentation"].shape == (128, 128)
    assert labels["normal"].shape == (128, 128, 3)
    assert labels["detection"]["ids"].shape == labels["ocr"]["ids"].shape == (128, 128)


def test_suite_has_the_descriptions_of_the_model(trained):
    suite = ExpertSuite.from_pretrained(trained)
    assert suite.descriptions == run_scenes.DESCRIPTIONS
    assert suite.class_names == {"segmentation": list(CLASSES), "detection": list(DETECTION_CLASSES)}


def test_networks_resize_images_to_the_size_of_scenes(trained):
    suite = ExpertSuite.from_pretrained(trained)
    for name in train_experts.NETWORKS:
        suite[name].load()
        inputs = suite[name]._image_processor(Image.new("RGB", (300, 200)), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 128, 128), name


def test_weights_are_small_and_in_half_precision(trained):
    files = list(trained.glob("experts/*/network/model.safetensors"))
    assert len(files) == len(train_experts.NETWORKS)
    assert sum(file.stat().st_size for file in files) < 12_000_000


def test_results_have_every_expert_and_a_guess(trained):
    results = json.loads((trained / "results.json").read_text())
    assert tuple(results) == EXPERTS
    for measures in results.values():
        assert set(measures["guess"]) <= set(measures) and measures["seconds_per_image"] > 0


def test_only_missing_networks_are_trained_again(trained, splits):
    kept = trained / "experts" / "depth" / "network" / "model.safetensors"
    again = trained / "experts" / "segmentation" / "network"
    written = kept.stat().st_mtime_ns
    again.rename(again.with_name("old"))
    train_experts.train_experts(splits, trained, only=("depth", "segmentation"), max_steps=2)
    assert kept.stat().st_mtime_ns == written
    assert (again / "model.safetensors").is_file()


def test_detection_starts_with_the_backbone_of_segmentation(trained):
    model, _ = train_experts.new_detection(trained)
    suite = ExpertSuite.from_pretrained(trained)
    suite["segmentation"].load()
    backbone = suite["segmentation"].model.backbone.state_dict()
    taken = model.model.backbone.model.state_dict()
    assert taken and all(torch.equal(value, backbone[name]) for name, value in taken.items())


def test_mirrored_image_and_targets_agree(splits):
    row = splits["train"][0]
    classes = train_experts.segmentation_target(row, mirrored=True)
    assert torch.equal(classes.flip(1), train_experts.segmentation_target(row, mirrored=False))
    normals = train_experts.normal_target(row, mirrored=True).flip(2)
    straight = train_experts.normal_target(row, mirrored=False)
    assert torch.allclose(normals * torch.tensor([-1.0, 1, 1])[:, None, None], straight)
    boxes = train_experts.detection_target(row, mirrored=True)["boxes"]
    left, right = (boxes[0, 0] - boxes[0, 2] / 2) * 128, (boxes[0, 0] + boxes[0, 2] / 2) * 128
    old_left, _, old_right, _ = row["detection_boxes"][0]
    assert torch.allclose(torch.stack([left, right]), torch.tensor([128.0 - old_right, 128.0 - old_left]))


@pytest.mark.parametrize("name", EXPERTS)
def test_true_labels_have_perfect_scores(splits, name):
    true = train_experts.true_labels(splits["train"], name)
    measures = train_experts.MEASURES[name](true, true)
    wrong = {"absolute_error": 0.0, "mean_angle": 0.0}
    for measure, value in measures.items():
        assert value == pytest.approx(wrong.get(measure, 1.0), abs=0.05), measure


def test_right_instance_needs_its_class_and_place():
    ids = np.full((128, 128), 255, np.uint8)
    ids[10:30, 10:30], ids[50:90, 50:90] = 0, 1
    true = {"ids": ids, "classes": [0, 3]}
    moved = {"ids": np.roll(ids, 5, axis=1), "classes": [0, 3]}
    renamed = {"ids": ids, "classes": [1, 3]}
    # the small one shares 15 of 25 columns: an IoU of 0.6
    assert train_experts.measure_detection([moved], [true])["recall"] == 1
    assert train_experts.measure_detection([renamed], [true])["precision"] == 0.5
    nothing = {"ids": np.full((128, 128), 255, np.uint8), "classes": []}
    assert train_experts.measure_detection([nothing], [true])["recall"] == 0


def test_labels_of_scenes_have_their_image_id_as_key(trained, splits, tmp_path):
    suite = ExpertSuite.from_pretrained(trained)
    with pytest.raises(ValueError, match="Train the others first"):
        train_experts.label_scenes(splits, suite.without("depth"), tmp_path / "labels")
    train_experts.label_scenes(splits, suite, tmp_path / "labels")
    store = LabelStore(tmp_path / "labels")
    assert set(store) == {*splits["train"]["image_id"], *splits["validation"]["image_id"]}
    label = store["scenes/validation/000001"]
    (expected,) = suite([splits["validation"][1]["image"]])
    # labels made in a batch can differ by one of 255
    assert np.abs(label["depth"].astype(int) - expected["depth"]).max() <= 1
    assert label["ocr"]["words"] == expected["ocr"]["words"]
