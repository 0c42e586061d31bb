"""Questions, labels and places that fit the image."""

from types import SimpleNamespace

import numpy as np
import pytest


pytest.importorskip("gradio")

from suggestions import Examples, Thing, find_things, thing_at, words_at

from modeling_prismer import ExpertSpec
from tests.spaces_demo.conftest import ROOT


EXAMPLES = Examples.load(ROOT / "spaces_demo/examples")
NAMES = {"detection": ["cone", "ring", "class 2"], "segmentation": ["table", "wall"]}
SPECS = [
    ExpertSpec("depth", "dense", channels=1),
    ExpertSpec("normal", "dense", channels=3),
    ExpertSpec("segmentation", "label", channels=8, num_classes=2),
    ExpertSpec("detection", "label", channels=8, num_classes=3, instances=True),
    ExpertSpec("ocr", "label", channels=8),
    ExpertSpec("vectors", "features", channels=1),
]


@pytest.fixture
def six():
    return SimpleNamespace(
        specs={spec.name: spec for spec in SPECS}, class_names=NAMES.get, title=lambda name: name.capitalize()
    )


@pytest.fixture
def labels():
    """A cone on the left, with a word in it; a ring on the right, found twice; a nameless object at the top."""
    objects, words = np.full((2, 20, 40), 255, np.uint8)
    objects[5:15, 2:10] = 0
    objects[5:15, 30:38] = 1
    objects[6:15, 31:38] = 2
    objects[0:3, 18:22] = 3
    words[8:10, 4:8] = 0
    return {
        "depth": np.full((20, 40), 51, np.uint8),
        "normal": np.zeros((20, 40, 3), np.uint8),
        "segmentation": {"ids": np.ones((20, 40), np.uint8)},
        "detection": {"ids": objects, "classes": [0, 1, 1, 2]},
        "ocr": {"ids": words, "words": ["stop"], "features": np.zeros((1, 8), np.float32)},
        "vectors": {"values": np.ones((3, 4, 1), np.uint8), "low": np.zeros(1), "high": np.ones(1)},
    }


def test_things_are_named_and_counted_once(six, labels):
    assert [thing.name for thing in find_things(six, labels)] == ["cone", "ring"]
    labels["detection"]["ids"][12:15, 20:25] = 2  # now its box is another one
    assert [thing.name for thing in find_things(six, labels)] == ["cone", "ring", "ring"]


def test_missing_experts_find_nothing(six):
    assert find_things(six, dict.fromkeys(six.specs)) == []
    assert words_at(six, dict.fromkeys(six.specs), 0.5, 0.5) == []


def test_place_has_the_smallest_object_around_it():
    things = [Thing("table", (0, 0.5, 1, 1)), Thing("cone", (0.1, 0.4, 0.3, 0.8))]
    assert thing_at(things, 0.2, 0.6).name == "cone"
    assert thing_at(things, 0.8, 0.6).name == "table"
    assert thing_at(things, 0.8, 0.1) is None


def test_experts_speak_about_a_place(six, labels):
    assert words_at(six, labels, 0.15, 0.45) == [
        ("Depth", "20 % of the way from far to near"),
        ("Segmentation", "wall"),
        ("Detection", "cone"),
        ("Ocr", "“stop”"),
    ]
    assert words_at(six, labels, 1.0, 1.0)[1:] == [("Segmentation", "wall")]


def test_questions_name_an_object_only_if_there_is_one():
    assert "What color is the cone?" in EXAMPLES.questions_about("cone", 1)
    assert EXAMPLES.questions_about("ring", 2) == ["How many rings are there?"]
    assert EXAMPLES.questions_about("sign", 1) == ["What does the sign say?"]


def test_upload_gets_questions_about_its_objects():
    things = [Thing("cone", (0, 0, 1, 1)), Thing("sign", (0, 0, 1, 1)), *[Thing("ring", (0, 0, 1, 1))] * 2]
    assert EXAMPLES.questions(None, things) == [
        "What does the sign say?",
        "What color is the cone?",
        "How many rings are there?",
    ]
    assert EXAMPLES.questions("scene-33.png", things)[0] == "What color is the small cone?"


def test_labels_fit_the_objects():
    cone = EXAMPLES.classification([Thing("cone", (0, 0, 1, 1))])
    assert cone["question"] == "What color is the cone?" and "red" in cone["labels"]
    none = EXAMPLES.classification([])
    assert "shape" in none["question"] and "pyramid" in none["labels"]


@pytest.mark.parametrize("name", ["", "prismer-easy-vqa"])
def test_examples_have_their_files(name):
    examples = Examples.load(ROOT / "spaces_demo/examples", name)
    assert examples.images
    for example in examples.images.values():
        assert example.file.is_file() and example.alt and len(example.questions) >= 3
