"""studies/wrong_labels.py: labels that are coarse, of other images, or lies."""

import numpy as np
import pytest


pytest.importorskip("datasets")

from modeling_prismer.processing.experts import HashedNgrams  # noqa: E402
from scenes.labels import DETECTION_CLASSES  # noqa: E402
from scenes.scenes import EXPERTS, expert_labels, open_scenes  # noqa: E402
from scenes.words import WORDS  # noqa: E402
from studies import wrong_labels  # noqa: E402
from studies.wrong_labels import coarse, noisy  # noqa: E402


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    scenes = open_scenes(str(tmp_path_factory.mktemp("scenes")), "scenes", 0, 0, 4)["test"]
    return {row["image_id"]: expert_labels(row) for row in scenes}


def test_coarse_labels_have_blocks_and_a_wrong_letter_per_word(labels):
    for image_id, true in labels.items():
        degraded = coarse(true, image_id)
        assert degraded.keys() == true.keys()
        for name, label in degraded.items():
            old, new = (each["ids"] if isinstance(each, dict) else each for each in (true[name], label))
            assert new.shape == old.shape and new.dtype == old.dtype
            assert np.array_equal(new, new[8::16, 8::16].repeat(16, 0).repeat(16, 1))
            if name in ("segmentation", "detection", "ocr"):
                assert set(np.unique(new)) <= set(np.unique(old))  # ids are never mixed
        for word, wrong in zip(true["ocr"]["words"], degraded["ocr"]["words"], strict=True):
            assert len(word) == len(wrong) and sum(a != b for a, b in zip(word, wrong)) == 1
        assert np.array_equal(degraded["ocr"]["features"], HashedNgrams()(degraded["ocr"]["words"]))
        assert coarse({"depth": None}, image_id) == {"depth": None}
    word = {"ocr": {"ids": true["ocr"]["ids"], "words": ["coffee"]}}
    # the errors are not systematic
    assert len({coarse(word, str(number))["ocr"]["words"][0] for number in range(20)}) > 10


def test_noise_takes_a_share_of_labels_from_other_images():
    labels = {str(number): {name: (str(number), name) for name in EXPERTS} for number in range(200)}
    replaced = {}
    for share in (0, 0.25, 0.75, 1):
        changed = noisy(labels, share, seed=3)
        assert changed.keys() == labels.keys()
        assert all(label[1] == name for each in changed.values() for name, label in each.items())
        replaced[share] = {
            (image_id, name, label)
            for image_id, each in changed.items()
            for name, label in each.items()
            if label[0] != image_id
        }
        assert len(replaced[share]) == pytest.approx(share * 1200, abs=60)
        assert noisy(labels, share, seed=3) == changed
    assert replaced[0.25] < replaced[0.75] < replaced[1] and len(replaced[1]) == 1200
    assert noisy(labels, 0.25, seed=4) != noisy(labels, 0.25, seed=3)


@pytest.mark.parametrize("name", wrong_labels.LIES)
def test_a_lie_changes_its_expert_alone(labels, name):
    expert, _ = wrong_labels.LIES[name]
    lies = wrong_labels.lying(labels, name)
    for image_id, own in labels.items():
        for other in EXPERTS:
            if other != expert:
                assert lies[image_id][other] is own[other]
    same = [
        np.array_equal(np.asarray(_values(own[expert], name)), np.asarray(_values(lies[image_id][expert], name)))
        for image_id, own in labels.items()
    ]
    assert not all(same)
    assert wrong_labels.lying(wrong_labels.without(labels, expert), name)[image_id][expert] is None


def _values(label, name):
    if not isinstance(label, dict):
        return label
    return label["classes"] if "classes" in name else label["words"] if "words" in name else label["ids"]


def test_exchanged_classes_and_words_stay_in_the_vocabulary(labels):
    for own in labels.values():
        classes = wrong_labels.swap_classes(own["detection"])["classes"]
        assert all(0 <= new < len(DETECTION_CLASSES) for new in classes)
        assert all(new != old for new, old in zip(classes, own["detection"]["classes"], strict=True))
        words = wrong_labels.swap_words(own["ocr"])
        assert set(words["words"]) <= set(WORDS) and len(words["features"]) == len(own["ocr"]["words"])
        assert not set(words["words"]) & set(own["ocr"]["words"])
