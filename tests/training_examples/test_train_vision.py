"""train_vision.py learns what each place of a scene shows; run_scenes.py trains on Scenes 2 with marked objects."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel


datasets = pytest.importorskip("datasets")

from modeling_prismer import PrismerForConditionalGeneration  # noqa: E402
from scenes import run_scenes, train_backbones, train_vision  # noqa: E402
from scenes.scenes import open_scenes  # noqa: E402
from scenes.train_vision import ATTRIBUTES, IGNORED, LabelledImages, PlaceReader, new_tower, targets_of  # noqa: E402


FEW = {"train": 26, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes2"))


@pytest.fixture(scope="module")
def splits(data_dir):
    return open_scenes(data_dir, "scenes2", **FEW)


def test_targets_name_the_object_of_each_cell(splits):
    for row in splits["train"]:
        targets = targets_of(row)
        things = row["facts"]["objects"]
        clear = [thing for thing in things if thing["visible_share"] > 0.9 and thing["visible_pixels"] > 150]
        for thing in clear:
            column, line = (int(value * 16) for value in thing["center"])
            if thing["shape"] == "ring":  # its middle shows what is behind
                continue
            for name in ("shape", "color", "material", "size"):
                assert ATTRIBUTES[name][targets[name][line, column]] == thing[name]
            x, y, width, height = targets["numbers"][line, column, :4]
            left, top, right, bottom = np.array(thing["box"]) / 128
            np.testing.assert_allclose(x + (column + 0.5) / 16, (left + right) / 2, atol=1e-5)
            np.testing.assert_allclose(y + (line + 0.5) / 16, (top + bottom) / 2, atol=1e-5)
            np.testing.assert_allclose((width, height), (right - left, bottom - top), atol=1e-5)
        assert targets["center"].sum() <= len(things) + len(row["facts"]["signs"])
        none = targets["shape"] == ATTRIBUTES["shape"].index("none")
        assert (targets["color"][none] == IGNORED).all() and 0.2 < none.mean() < 1


def test_gray_images_have_no_colors_and_mirrored_ones_mirrored_targets(splits, monkeypatch):
    row = splits["train"][0]
    plain = targets_of(row)
    monkeypatch.setattr(train_vision, "GRAY", 0.2)
    for draw, mirrored, gray in ((0.9, False, False), (0.4, True, False), (0.1, True, True)):
        monkeypatch.setattr(torch, "rand", lambda *size, draw=draw: torch.full(size, draw))
        batch = LabelledImages()([row])
        wanted = plain["shape"][:, ::-1] if mirrored else plain["shape"]
        np.testing.assert_array_equal(batch["shape"][0].numpy(), wanted)
        assert (batch["color"] == IGNORED).all().item() is gray is batch["gray"].item()
        channels = batch["pixel_values"][0]
        same = torch.allclose(channels[0] * 0.2686 + 0.4815, channels[1] * 0.2613 + 0.4578, atol=1e-2)
        assert same is gray


def test_cells_of_a_large_patch_keep_their_place():
    reader = PlaceReader(new_tower(patch_size=16, width=32, layers=1))
    head = reader.heads["center"]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.arange(4))
    centers = reader.predict(torch.zeros(1, 3, 128, 128))["center"][0, :, :, 0]
    assert centers.shape == (16, 16)
    assert centers[:2, :2].tolist() == centers[6:8, 4:6].tolist() == [[0, 1], [2, 3]]


@pytest.fixture(scope="module")
def backbones(data_dir, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    numbers = [part for name, number in FEW.items() for part in (f"--{name}", number)]
    command = ["train", "--data_dir", data_dir, "--data_config", "scenes2", "--output_dir", folder, *numbers]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"WIDTH": 32, "HEADS": 2, "TEXT_LAYERS": 1}.items():
            monkeypatch.setattr(train_backbones, name, value)
        monkeypatch.setattr(train_vision, "new_tower", lambda *sizes: new_tower(8, 32, 1))
        command += ["--clip", "facts", "--clip_epochs", 1, "--roberta_epochs", 0.02]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        train_backbones.main()
    return folder


def test_the_tower_and_its_accuracy(backbones, splits):
    tower = CLIPVisionModel.from_pretrained(backbones / "clip")
    assert tower.config.patch_size == 8
    shares = train_vision.accuracy(PlaceReader(tower), splits["validation"])
    assert shares.keys() == ATTRIBUTES.keys() and all(0 <= share <= 1 for share in shares.values())


def test_half_of_the_training_scenes_have_a_mark(splits):
    labels_for = run_scenes.WithMarks(run_scenes.TrueLabels(*splits.values()), splits)
    ids = splits["train"]["image_id"][:4]
    assert ["regions" in labels for labels in labels_for(ids)] == [True, False, True, False]
    assert all("regions" in labels and "depth" in labels for labels in labels_for(splits["test"]["image_id"][:]))
    rows = run_scenes.training_rows(splits["train"])
    asked = [any("the marked object" in text for text in row["text"]) for row in rows]
    assert not any(asked[1::2]) and sum(asked[::2]) > 10


def test_lists_name_objects_and_signs_in_order(splits):
    rows = run_scenes.training_rows(splits["train"], "lists")
    for row, scene in zip(rows, splits["train"], strict=True):
        texts = dict(zip(row["text"], row["suffix"], strict=True))
        things = sorted(scene["facts"]["objects"], key=lambda thing: thing["center"][0])
        first = things[0]
        assert texts["From left to right"].startswith(
            f"{first['size']} {first['material']} {first['color']} {first['shape']}"
        )
        assert texts["From right to left"].split(", ")[0].endswith(things[-1]["shape"])
        near = min(things, key=lambda thing: thing["distance"])
        assert texts["From near to far"].split(", ")[0].endswith(f"{near['color']} {near['shape']}")
        assert all(len(text.split()) <= 30 for text in row["suffix"])  # longer captions are cut
        said = texts["Signs from left to right"]
        assert sorted(said.split(", ")) == (sorted(scene["ocr_words"]) or ["none"])


def run(monkeypatch, data_dir, backbones, output_dir, *arguments):
    command = ["run", "--data_dir", data_dir, "--data_config", "scenes2", "--backbones", backbones, *arguments]
    command += ["--freeze", "vision", "--do_train", "--output_dir", output_dir]
    command += ["--per_device_train_batch_size", 2, "--dataloader_num_workers", 0]
    command += [part for name, number in FEW.items() for part in (f"--{name}_scenes", number)]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    run_scenes.main()


def test_frozen_patches_are_not_trained(backbones, data_dir, tmp_path, monkeypatch):
    arguments = ("--suite", "none", "--texts", "lists", "--freeze_patches", "--max_steps", 2)
    run(monkeypatch, data_dir, backbones, tmp_path, *arguments)
    tower = CLIPVisionModel.from_pretrained(backbones / "clip")
    tower = getattr(tower, "vision_model", tower)
    encoder = PrismerForConditionalGeneration.from_pretrained(tmp_path).model.vision_model
    torch.testing.assert_close(encoder.embeddings.patch_embedding.weight, tower.embeddings.patch_embedding.weight)
    torch.testing.assert_close(encoder.pre_layernorm.bias, tower.pre_layrnorm.bias)


def test_a_model_of_scenes_2_is_trained_and_evaluated(backbones, data_dir, tmp_path, monkeypatch):
    arguments = ("--suite", "true", "--labels", "true", "--do_eval", "--max_steps", 1)
    run(monkeypatch, data_dir, backbones, tmp_path, *arguments)
    results = json.loads((tmp_path / "scenes_results.json").read_text())
    assert {"marked", "two steps", "same", "not"} <= results["held_out"]["answers"].keys()
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.expert_names[-1] == "regions"
