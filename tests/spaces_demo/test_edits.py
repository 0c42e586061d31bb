import numpy as np
import pytest


pytest.importorskip("gradio")

from checks import Refused
from edits import apply_edit, boxes_of, check_edit, noise, tool_for

from modeling_prismer import ExpertSpec
from modeling_prismer.processing.expert_labels import read_experts, read_vectors


DEPTH = ExpertSpec("depth", "dense", channels=1)
NORMAL = ExpertSpec("normal", "dense", channels=3)
SEGMENTS = ExpertSpec("segmentation", "label", channels=64, num_classes=5)
OBJECTS = ExpertSpec("detection", "label", channels=64, num_classes=4, instances=True)
WORDS = ExpertSpec("ocr", "label", channels=8)
VECTORS = ExpertSpec("features", "features", channels=6)
SIX = [DEPTH, NORMAL, SEGMENTS, OBJECTS, WORDS]
SIZE = (40, 20)  # width, height


def encode_words(words):
    return np.ones((len(words), 8), np.float32)


def stroke(value, *points, width=0.1):
    return {"strokes": [{"value": value, "width": width, "points": [list(point) for point in points]}]}


def test_each_kind_of_map_has_its_tool():
    assert [tool_for(each) for each in SIX] == ["paint", "paint", "paint", "boxes", "words"]
    assert tool_for(VECTORS) == "none"


def test_paint_changes_only_the_painted_pixels():
    label = np.full((20, 40), 7, np.uint8)
    painted = apply_edit(label, check_edit(stroke(200, (0.25, 0.5)), DEPTH), DEPTH, SIZE, encode_words)
    assert painted[10, 10] == 200
    assert painted[10, 30] == 7 and painted[0, 0] == 7
    assert label[10, 10] == 7  # the expert's label is unchanged


def test_normals_are_painted_in_all_channels():
    label = np.zeros((20, 40, 3), np.uint8)
    painted = apply_edit(label, check_edit(stroke([1, 2, 3], (0.5, 0.5)), NORMAL), NORMAL, SIZE, encode_words)
    assert painted[10, 20].tolist() == [1, 2, 3]


def test_classes_are_painted_as_ids():
    painted = apply_edit(None, check_edit(stroke(4, (0.5, 0.5)), SEGMENTS), SEGMENTS, SIZE, encode_words)
    assert painted["ids"][10, 20] == 4
    assert painted["ids"][0, 0] == 255


def test_objects_become_boxes_and_back():
    ids = np.full((20, 40), 255, np.uint8)
    ids[5:10, 10:20] = 0
    boxes = boxes_of({"ids": ids, "classes": [3]})
    assert boxes == [{"box": [0.25, 0.25, 0.5, 0.5], "class": 3}]
    again = apply_edit(None, check_edit({"boxes": boxes}, OBJECTS), OBJECTS, SIZE, encode_words)
    assert again["classes"] == [3]
    np.testing.assert_array_equal(again["ids"], ids)


def test_small_box_covers_a_large_one():
    boxes = [{"box": [0.4, 0.4, 0.6, 0.6], "class": 1}, {"box": [0, 0, 1, 1], "class": 2}]
    label = apply_edit(None, check_edit({"boxes": boxes}, OBJECTS), OBJECTS, SIZE, encode_words)
    assert label["ids"][10, 20] == 0 and label["ids"][0, 0] == 1


def test_edited_words_are_encoded_and_empty_ones_omitted():
    boxes = [{"box": [0, 0, 0.5, 0.5], "text": " stop "}, {"box": [0, 0, 1, 1], "text": ""}]
    label = apply_edit(None, check_edit({"boxes": boxes}, WORDS), WORDS, SIZE, encode_words)
    assert label["words"] == ["stop"]
    assert label["features"].shape == (1, 8)


@pytest.mark.parametrize("spec", SIX, ids=lambda spec: spec.name)
def test_noise_has_the_form_of_the_expert(spec):
    label = noise(spec, SIZE, encode_words)
    values = label["ids"] if spec.is_label else label
    channels = (3,) if spec.channels == 3 else ()
    assert values.shape == (20, 40, *channels) and values.dtype == np.uint8
    np.testing.assert_array_equal(
        values,
        noise(spec, SIZE, encode_words)["ids"] if spec.is_label else noise(spec, SIZE, encode_words),
    )


def test_noise_of_vectors_is_a_grid_that_the_network_reads():
    label = noise(VECTORS, SIZE, encode_words)
    (fields,) = read_experts([VECTORS.to_dict()])
    vectors = read_vectors(label, fields)
    assert vectors.shape == (6, 12, 12)
    assert 0.9 < vectors.std() < 1.1
    assert np.array_equal(label["values"], noise(VECTORS, SIZE, encode_words)["values"])


@pytest.mark.parametrize(
    "edit, description",
    [
        (None, VECTORS),
        (stroke([1] * 6, (0, 0)), VECTORS),
        ({"boxes": []}, VECTORS),
        (None, DEPTH),
        ({"strokes": 3}, DEPTH),
        (stroke([1, 2, 3], (0, 0)), DEPTH),
        (stroke(1, (0, 0)), NORMAL),
        (stroke(9, (0, 0)), SEGMENTS),
        (stroke(1, (float("nan"), 0)), DEPTH),
        ({"boxes": [{"box": [0, 0, 1], "class": 0}]}, OBJECTS),
        ({"boxes": [{"box": [0, 0, 1, 1], "class": 4}]}, OBJECTS),
        ({"boxes": [{"box": [0, 0, 1, 1], "class": 0}] * 61}, OBJECTS),
        (stroke(1, *[(0, 0)] * 20_001), DEPTH),
        (stroke(1, *[(0, 0), (1, 1)] * 400, width=0.5), DEPTH),
        (stroke(True, (0, 0)), DEPTH),
        (stroke("1", (0, 0)), DEPTH),
        (stroke(1, ("0", 0)), DEPTH),
        (stroke(1, (0, 0), width=None), DEPTH),
        (stroke([1, 2, {}], (0, 0)), NORMAL),
        (stroke(float("inf"), (0, 0)), DEPTH),
        ({"boxes": [{"box": [0, 0, 1, 1], "text": 5}]}, WORDS),
        ({"boxes": [{"box": [0, 0, 1, 1], "text": "\ud800"}]}, WORDS),
        ({"boxes": [{"box": [0, 0, 1, 1], "class": "1"}]}, OBJECTS),
    ],
)
def test_wrong_edit_is_refused(edit, description):
    with pytest.raises(Refused, match="^(edit|word): "):
        check_edit(edit, description)


def test_word_longer_than_the_limit_is_cut():
    edit = check_edit({"boxes": [{"box": [0, 0, 1, 1], "text": "w" * 100}]}, WORDS)
    assert edit["boxes"][0]["text"] == "w" * 40


def test_edited_map_is_painted_once(monkeypatch, reader, shape):
    import edits
    from sessions import Session

    painted, apply = [], edits.apply_edit
    monkeypatch.setattr(edits, "apply_edit", lambda *args: painted.append(1) or apply(*args))
    session = Session(image=shape, seen={"edge": np.zeros((64, 64), np.uint8)}, modes={"edge": "edited"})
    for value in (200, 100):
        session.edits["edge"] = check_edit(stroke(value, (0.5, 0.5)), reader.specs["edge"])
        assert [session.label("edge", reader)[32, 32] for _ in range(3)] == [value] * 3
    assert len(painted) == 2
