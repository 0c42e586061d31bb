import json

import numpy as np
import pytest
from PIL import Image

from modeling_prismer.processing.experts import CannyEdges, DexiNedEdges, Expert, ExpertSuite, HashedNgrams


class Brightness(Expert):
    type = "test_brightness"
    name, kind, channels = "brightness", "dense", 1

    def run(self, images):
        return [np.array(image.convert("L")) for image in images]


@pytest.fixture
def suite():
    return ExpertSuite([Brightness(), CannyEdges()])


def test_a_suite_gives_each_image_a_label_of_each_expert(suite, square):
    labels = suite([square, square.rotate(90, expand=True)])
    assert [list(own) for own in labels] == [["brightness", "edge"]] * 2
    assert [own["edge"].shape for own in labels] == [(48, 64), (64, 48)]
    assert np.array_equal(labels[0]["edge"], CannyEdges()([square])[0])
    assert suite([]) == []


def test_a_suite_is_a_dict_of_experts_in_the_order_given(suite):
    assert list(suite) == ["brightness", "edge"]
    assert len(suite) == 2
    assert "edge" in suite
    assert isinstance(suite["edge"], CannyEdges)
    assert suite.descriptions == [
        {"name": "brightness", "kind": "dense", "channels": 1},
        {"name": "edge", "kind": "dense", "channels": 1},
    ]


def test_experts_are_left_out_and_shared_by_the_suites(suite):
    assert list(suite.without("edge")) == ["brightness"]
    assert suite.without("brightness")["edge"] is suite["edge"]
    assert list(suite.only("edge")) == ["edge"]
    assert list(suite) == ["brightness", "edge"]
    with pytest.raises(KeyError, match="no expert 'depth'; there are brightness, edge"):
        suite.without("depth")


def test_an_expert_is_swapped_in_place(suite):
    suite["edge"] = other = DexiNedEdges(pretrained=False)
    assert suite["edge"] is other
    assert list(suite) == ["brightness", "edge"]
    del suite["brightness"]
    assert list(suite) == ["edge"]
    with pytest.raises(ValueError, match="has the name 'edge', not 'depth'"):
        suite["depth"] = other


def test_two_experts_of_one_name_and_strangers_are_refused():
    with pytest.raises(ValueError, match="two experts have the name 'edge'"):
        ExpertSuite([CannyEdges(), CannyEdges(0.05)])
    with pytest.raises(TypeError, match="not str"):
        ExpertSuite(["canny"])


def test_the_offline_suite_needs_no_download(page):
    suite = ExpertSuite.from_name("offline")
    assert list(suite) == ["edge", "ocr"]
    assert isinstance(suite["ocr"].word_features, HashedNgrams)
    assert not any(expert.is_loaded for expert in suite.values())
    (label,) = suite([page])
    assert label["ocr"]["words"][0] == "hello"
    suite.unload()
    assert not any(expert.is_loaded for expert in suite.values())


def test_an_unknown_suite_is_refused_by_name():
    with pytest.raises(ValueError, match="no suite of experts 'fastest'; accepted are 'offline'"):
        ExpertSuite.from_name("fastest")


def test_a_description_in_json_restores_the_suite():
    suite = ExpertSuite.from_name("offline")
    suite["edge"] = CannyEdges(0.05, 0.4)
    suite["ocr"].min_score, suite["ocr"].batch_size = 0.8, 2
    restored = ExpertSuite.from_dict(json.loads(json.dumps(suite.to_dict())))
    assert list(restored) == ["edge", "ocr"]
    assert restored["edge"].high_threshold == 0.4
    assert (restored["ocr"].min_score, restored["ocr"].batch_size) == (0.8, 2)
    assert json.dumps(restored.to_dict()) == json.dumps(suite.to_dict())


def test_a_folder_restores_the_suite(suite, square, tmp_path):
    suite["edge"] = CannyEdges(0.05, 0.4)
    suite.save_pretrained(tmp_path / "new")
    restored = ExpertSuite.from_pretrained(tmp_path / "new")
    assert restored.to_dict() == suite.to_dict()
    assert np.array_equal(restored([square])[0]["edge"], suite([square])[0]["edge"])
    with pytest.raises(OSError, match="holds no experts: there is no experts/suite.json"):
        ExpertSuite.from_pretrained(tmp_path)


def test_a_hub_id_restores_the_suite(suite, tmp_path, monkeypatch):
    suite.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repo_id, **kwargs):
        asked.append((repo_id, kwargs))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    restored = ExpertSuite.from_pretrained("me/prismer", revision="main")
    assert restored.to_dict() == suite.to_dict()
    assert asked == [("me/prismer", {"allow_patterns": "experts/*", "revision": "main"})]


def test_moving_a_suite_moves_its_experts(suite):
    assert suite.to("cpu", "bfloat16") is suite
    assert {str(expert.dtype) for expert in suite.values()} == {"torch.bfloat16"}


def test_the_report_counts_images_and_seconds(suite):
    suite([Image.new("RGB", (8, 8))] * 3)
    report = suite.report()
    assert list(report) == ["brightness", "edge"]
    assert report["edge"]["images"] == 3
    assert report["edge"]["seconds"] > 0
    assert report["edge"]["seconds_per_image"] == pytest.approx(report["edge"]["seconds"] / 3)
    assert report["edge"]["loading_seconds"] > 0
