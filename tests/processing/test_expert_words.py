"""Labels of experts, written as text for a language model."""

import numpy as np
import pytest

from modeling_prismer.processing.expert_labels import read_experts
from modeling_prismer.processing.expert_words import write_experts


EXPERTS = read_experts(
    [
        {"name": "depth", "kind": "dense", "channels": 1},
        {"name": "segmentation", "kind": "label", "channels": 8, "num_classes": 3},
        {"name": "detection", "kind": "label", "channels": 8, "num_classes": 3, "instances": True},
        {"name": "ocr", "kind": "label", "channels": 8},
    ]
)
CLASS_NAMES = {"segmentation": ["sky", "grass", "wall_tile"], "detection": ["dog", "cat", "ball"]}


def write(labels, max_tokens=1000, class_names=CLASS_NAMES, **kwargs):
    return write_experts(labels, EXPERTS, class_names, max_tokens, lambda text: len(text.split()), **kwargs)


def empty_map(height=30, width=60):
    return np.full((height, width), 255, np.uint8)


def objects(*classes):
    """Instances on the diagonal from the top left, each smaller than the one before."""
    ids = empty_map(30, 30)
    for number in range(len(classes)):
        start = 10 * number
        ids[start : start + 10 - number, start : start + 10 - number] = number
    return {"ids": ids, "classes": list(classes)}


def words(*texts):
    ids = empty_map(30, 60)
    for number in range(len(texts)):
        ids[10 * number : 10 * number + 5, 0:10] = number
    return {"ids": ids, "words": list(texts), "features": np.zeros((len(texts), 8), np.float32)}


def test_detection_gives_counts_and_positions():
    assert write({"detection": objects(0, 1, 0)}) == "Objects: 2 dog (top left, bottom right), 1 cat (center)."


def test_detection_can_give_boxes_in_percent():
    assert write({"detection": objects(2)}, positions="boxes") == "Objects: 1 ball ([0, 0, 33, 33])."


def test_a_hidden_object_is_counted():
    label = {"ids": empty_map(), "classes": [1]}
    assert write({"detection": label}) == "Objects: 1 cat."


def test_segmentation_gives_shares_of_the_image():
    ids = np.zeros((10, 10), np.uint8)
    ids[6:] = 1
    ids[9, 9] = 2
    assert write({"segmentation": ids}) == "Regions: sky 60 %, grass 39 %, wall tile 1 %."
    assert write({"segmentation": np.kron(ids, np.ones((20, 20), np.uint8))}).endswith("wall tile 1 %.")


def test_regions_of_a_few_pixels_are_left_out():
    ids = np.zeros((30, 30), np.uint8)
    ids[0, 0] = 1
    assert write({"segmentation": ids}) == "Regions: sky 100 %."


def test_words_come_in_quotes_with_their_position():
    assert write({"ocr": words("stop", "here")}) == 'Text: "stop" (top left), "here" (left).'


def test_words_at_one_place_share_quotes():
    label = words("main", "street", "7")
    label["ids"][:] = 255
    label["ids"][12:15, 5:9], label["ids"][12:15, 10:14], label["ids"][28:, 58:] = 0, 1, 2
    assert write({"ocr": label}) == 'Text: "main street" (left), "7" (bottom right).'


def test_quotes_and_line_breaks_in_words_are_harmless():
    assert write({"ocr": words('say "hi"\nnow')}) == "Text: \"say 'hi' now\" (top left)."


def test_an_expert_without_findings_says_none():
    assert write({"detection": objects(), "ocr": words()}) == "Objects: none. Text: none."


@pytest.mark.parametrize("labels", [{}, {"detection": None, "ocr": None}, {"depth": empty_map()}])
def test_missing_and_dense_experts_write_nothing(labels):
    assert write(labels) == ""


def test_experts_without_names_of_classes_write_nothing():
    labels = {"detection": objects(0), "segmentation": np.zeros((4, 4), np.uint8), "ocr": words("a")}
    assert write(labels, class_names={}) == 'Text: "a" (top left).'
    del labels["ocr"]["words"]
    assert write(labels, class_names={}) == ""


def test_the_limit_cuts_the_smallest_items_of_each_expert():
    labels = {"detection": objects(0, 1, 2), "ocr": words("a", "b", "c")}
    labels["ocr"]["ids"][20:29, 20:60] = 2  # the last word is the largest
    whole = write(labels)
    assert whole.startswith("Objects: 1 dog (top left), 1 cat (center), 1 ball (bottom right). ")
    assert whole.endswith('Text: "a" (top left), "b" (left), "c" (bottom).')
    assert write(labels, 8) == 'Objects: 1 dog (top left). Text: "c" (bottom).'
    for limit in range(len(whole.split()) + 1):
        text = write(labels, limit)
        assert len(text.split()) <= limit and (not text or text.endswith("."))


def test_items_stay_whole_and_in_order_under_the_limit():
    label = words("first", "second", "third")
    label["ids"][20:29, 20:60] = 2
    assert write({"ocr": label}, 7) == 'Text: "first" (top left), "third" (bottom).'


def test_text_is_counted_as_it_is_written():
    def clean(text):
        return text.replace("<image>", "< image>")

    label = words("<image>")
    assert write({"ocr": label}, clean=clean) == 'Text: "< image>" (top left).'
    assert write({"ocr": label}, 4, clean=clean) == ""


def test_large_maps_keep_their_positions():
    ids = empty_map(3000, 4000)
    ids[2500:, 3500:] = 0
    assert write({"detection": {"ids": ids, "classes": [0]}}) == "Objects: 1 dog (bottom right)."
