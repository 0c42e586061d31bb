"""studies/use.py: conditions change the labels of their experts alone, and the report has the right differences."""

import sys

import pytest


pytest.importorskip("datasets")

from scenes.scenes import EXPERTS, expert_labels, open_scenes  # noqa: E402
from studies import use  # noqa: E402


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def labels(data_dir):
    scenes = open_scenes(data_dir, "scenes", 0, 0, 4)["test"]
    return {row["image_id"]: expert_labels(row) for row in scenes}


def test_conditions_have_their_labels(labels):
    found = {name: make() for name, make in use.conditions(labels, labels).items()}
    assert len(found) == 4 + len(EXPERTS) + len(use.NOISE) + len(use.LIES)
    for image_id in labels:
        assert not any(value is not None for value in found["no experts"][image_id].values())
        assert found["without ocr"][image_id]["ocr"] is None and found["without ocr"][image_id]["depth"] is not None
        assert found["100 % from other images"][image_id]["depth"] is not labels[image_id]["depth"]


HITS = {  # of three scenes with two questions each
    use.PREDICTED: [[True, True], [True, True], [True, False]],
    "without ocr": [[True, True], [True, False], [False, False]],
    "ocr: words exchanged": [[False, True], [False, False], [False, False]],
}
RESULTS = {"model": "tiny", "types": [["color", "sign"]] * 3, "hits": HITS}


def test_differences_are_paired_and_name_the_types():
    lines = use.table(RESULTS).splitlines()
    assert lines[2].startswith("| labels of the experts | 83.3 [") and "| – |" in lines[2]
    assert "| −33.3 [" in lines[3] and lines[3].endswith("| color −33, sign −33 |")


def test_thresholds(monkeypatch):
    monkeypatch.setattr(use, "LIES", {"ocr: words exchanged": use.LIES["ocr: words exchanged"]})
    # the expert gains 2 of 6 answers and its lies cost 4 of 6
    many = {name: own * 40 for name, own in HITS.items()}
    results = {**RESULTS, "types": RESULTS["types"] * 40, "hits": many}
    assert use.thresholds(results).splitlines()[-1].endswith("| 50 % |")
    swapped = {**many, "without ocr": many["ocr: words exchanged"], "ocr: words exchanged": many["without ocr"]}
    assert "lies cost less" in use.thresholds({**results, "hits": swapped})
    useless = {**many, "without ocr": many[use.PREDICTED]}
    assert "no clear gain" in use.thresholds({**results, "hits": useless})


def test_command_measures_the_shipped_checkpoint(data_dir, tmp_path, monkeypatch, labels):
    few = {name: own for name, own in use.LIES.items() if name.startswith("ocr: words")}
    monkeypatch.setattr(use, "LIES", few)
    monkeypatch.setattr(use, "NOISE", (1.0,))
    command = ["use", "--data_dir", data_dir, "--train", 0, "--validation", 0, "--test", 4, "--labels", "true"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--output_dir", str(tmp_path)])
    use.main()
    text = (tmp_path / "use.md").read_text()
    assert "| labels of the experts |" in text and "| ocr: words exchanged |" in text
    assert (tmp_path / "use.json").is_file()
