import json

import numpy as np
import pytest
from PIL import Image

from modeling_prismer.processing.experts import (
    BaeNormals,
    CannyEdges,
    DexiNedEdges,
    Expert,
    ExpertError,
    ExpertSuite,
    HashedNgrams,
    OpenVocabularyDetector,
)


class Brightness(Expert):
    type = "test_suite_brightness"
    name, kind, channels = "brightness", "dense", 1

    def run(self, images):
        return [np.array(image.convert("L")) for image in images]


@pytest.fixture
def suite():
    return ExpertSuite([Brightness(), CannyEdges()])


def test_a_suite_returns_a_label_of_each_expert_for_each_image(suite, square):
    labels = suite([square, square.rotate(90, expand=True)])
    assert [list(own) for own in labels] == [["brightness", "edge"]] * 2
    assert [own["edge"].shape for own in labels] == [(48, 64), (64, 48)]
    assert np.array_equal(labels[0]["edge"], CannyEdges()([square])[0])
    assert suite([]) == []


def test_a_suite_is_a_dict_in_the_given_order(suite):
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


def test_equal_names_and_other_objects_are_refused():
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
    with pytest.raises(
        ValueError, match="no suite of experts 'fastest'; accepted are 'published', 'fast', 'commercial', 'offline'"
    ):
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


@pytest.mark.parametrize("name", ["published", "fast", "commercial"])
def test_suites_of_six_have_the_order_of_the_configuration(name):
    suite = ExpertSuite.from_name(name)
    assert list(suite) == ["depth", "normal", "segmentation", "edge", "detection", "ocr"]
    assert not any(expert.is_loaded for expert in suite.values())
    assert [expert.license != "not stated" for expert in suite.values()] == [True] * 6
    restored = ExpertSuite.from_dict(json.loads(json.dumps(suite.to_dict())))
    assert restored.to_dict() == suite.to_dict()


def test_the_published_suite_has_the_available_published_models():
    suite = ExpertSuite.from_name("published")
    assert suite["depth"].model_id == "Intel/dpt-hybrid-midas"
    assert suite["segmentation"].model_id == "facebook/mask2former-swin-large-coco-panoptic"
    assert isinstance(suite["normal"], BaeNormals)
    assert isinstance(suite["edge"], DexiNedEdges)
    assert isinstance(suite["detection"], OpenVocabularyDetector)
    assert (suite["detection"].min_score, suite["detection"].max_overlap) == (0.5, 0.95)
    assert sum(expert.size_in_bytes for expert in suite.values()) < 3e9


def test_names_of_a_network_go_to_experts_without_names():
    suite = ExpertSuite.from_name("published")
    names = {"detection": ["lamp", "sofa"], "segmentation": ["wall"], "other": ["thing"]}
    suite.use_class_names(names)
    assert suite["detection"].class_names == ["lamp", "sofa"]
    suite.use_class_names({"detection": ["cup"]})  # they are those of its network now
    assert suite["detection"].class_names == ["lamp", "sofa"]
    chosen = ExpertSuite([OpenVocabularyDetector(["cat"])])
    chosen.use_class_names(names)
    assert chosen["detection"].class_names == ["cat"]


# ---- experts that need others ----


class Darkness(Expert):
    """Needs the brightness; uses the edges, if there are any."""

    type = "test_darkness"
    name, kind, channels = "darkness", "dense", 1
    needs, uses = ("brightness",), ("edge",)

    def run(self, images, brightness, edge=None):
        self.saw_edges = edge is not None
        return [None if own is None else 255 - own for own in brightness]


def test_an_expert_gets_the_labels_it_needs_in_any_order(square):
    for suite in (ExpertSuite([Brightness(), Darkness()]), ExpertSuite([Darkness(), Brightness()])):
        suite["darkness"].batch_size = 2
        images = [square, square.rotate(90, expand=True), square.resize((10, 8))]
        labels = suite(images)
        assert [list(own) for own in labels] == [list(suite)] * 3
        for own in labels:
            assert np.array_equal(own["darkness"], 255 - own["brightness"])
        assert suite["brightness"].num_images == 3
        assert not suite["darkness"].saw_edges


def test_labels_that_an_expert_uses_are_optional(square):
    suite = ExpertSuite([Darkness(), CannyEdges(), Brightness()])
    suite([square])
    assert suite["darkness"].saw_edges


def test_a_left_out_expert_still_runs_for_those_that_need_it(square):
    suite = ExpertSuite([Brightness(), Darkness()])
    for part in (suite.without("brightness"), suite.only("darkness")):
        (label,) = part([square])
        assert list(label) == ["darkness"]
        assert np.array_equal(label["darkness"], 255 - np.array(square.convert("L")))
    del suite["brightness"]
    with pytest.raises(ExpertError, match="'darkness' needs the labels of brightness"):
        suite([square])


def test_known_labels_are_not_computed_again(square):
    suite = ExpertSuite([Brightness(), Darkness()])
    known = np.full((48, 64), 7, np.uint8)
    (label,) = suite.only("darkness")([square], labels=[{"brightness": known}])
    assert (label["darkness"] == 248).all()
    assert suite["brightness"].num_images == 0
    with pytest.raises(ValueError, match="2 labels for 1 images"):
        suite([square], labels=[None, None])


def test_experts_that_need_each_other_are_refused(square):
    class Shadow(Expert):
        name, kind, channels = "brightness", "dense", 1
        needs = ("darkness",)

    with pytest.raises(ValueError, match="in a circle: brightness → darkness → brightness"):
        ExpertSuite([Shadow(), Darkness()])([square])


def test_labels_that_an_expert_does_not_take_are_refused(square):
    with pytest.raises(TypeError, match="'brightness' takes no labels of 'edge'; it takes those of none"):
        Brightness()([square], edge=[None])
    with pytest.raises(ValueError, match="0 labels of 'brightness' for 1 images"):
        Darkness()([square], brightness=[])


# ---- failures, memory, cost ----


class Fragile(Expert):
    """Fails on upright images, or while it is loaded."""

    type = "test_fragile"
    name, kind, channels = "fragile", "dense", 1

    def __init__(self, loads=True):
        self.loads = loads
        self.events = []

    def load_model(self):
        if not self.loads:
            raise OSError("no weights")
        self.events.append("load")

    def unload(self):
        super().unload()
        self.events.append("unload")

    def run(self, images):
        if any(image.height > image.width for image in images):
            raise ValueError("upright")
        return [np.zeros((image.height, image.width), np.uint8) for image in images]


def test_a_failing_expert_raises_by_default(square):
    suite = ExpertSuite([Fragile()])
    assert suite.on_error == "raise"
    with pytest.raises(ExpertError, match="'fragile' failed on image 1"):
        suite([square, square.rotate(90, expand=True)])
    with pytest.raises(ValueError, match="on_error is 'ignore'; accepted are 'raise', 'missing'"):
        suite.on_error = "ignore"


def test_a_failing_expert_is_only_missing_where_it_fails(square, monkeypatch):
    monkeypatch.setattr("modeling_prismer.processing.experts.suite.logger.warning", lambda text: heard.append(text))
    heard = []
    suite = ExpertSuite([Fragile(), Brightness()], on_error="missing")
    upright = square.rotate(90, expand=True)
    labels = suite([square, upright, square, upright])
    assert [own["fragile"] is None for own in labels] == [False, True, False, True]
    assert all(own["brightness"] is not None for own in labels)
    suite([upright])
    suite.only("fragile")([upright])
    assert len(heard) == 1
    assert "'fragile' failed on image 1, where its label is missing: " in heard[0]


def test_an_expert_that_cannot_be_loaded_is_missing(square, monkeypatch):
    monkeypatch.setattr("modeling_prismer.processing.experts.suite.logger.warning", lambda text: heard.append(text))
    heard = []
    suite = ExpertSuite([Fragile(loads=False), Brightness()], on_error="missing")
    assert [own["fragile"] for own in suite([square, square])] == [None, None]
    assert "'fragile' cannot be loaded: its labels are missing (no weights)" in heard[0]
    suite.on_error = "raise"
    with pytest.raises(OSError, match="no weights"):
        suite([square])


def test_experts_that_need_a_failed_label_are_missing_too(square, monkeypatch):
    monkeypatch.setattr("modeling_prismer.processing.experts.suite.logger.warning", lambda text: None)
    fragile = Fragile()
    fragile.name = "brightness"
    suite = ExpertSuite([fragile, Darkness()], on_error="missing")
    labels = suite([square, square.rotate(90, expand=True)])
    assert [own["darkness"] is None for own in labels] == [False, True]


def test_sequential_memory_keeps_one_expert_loaded(square):
    events = []

    def watched(expert_name, needed=()):
        class Watched(Expert):
            name, kind, channels, batch_size, needs = expert_name, "dense", 1, 2, needed

            def load_model(self):
                events.append(f"load {self.name}")

            def unload(self):
                super().unload()
                events.append(f"unload {self.name}")

            def run(self, images, **others):
                events.append(f"{self.name} {len(images)}")
                return [None] * len(images)

        return Watched()

    suite = ExpertSuite([watched("first", ("second",)), watched("second")], memory="sequential")
    suite([square] * 3)
    second = ["load second", "second 2", "second 1", "unload second"]
    assert events == [*second, *(event.replace("second", "first") for event in second)]
    assert not any(expert.is_loaded for expert in suite.values())
    suite.memory = "all"
    suite([square])
    assert all(expert.is_loaded for expert in suite.values())
    with pytest.raises(ValueError, match="memory is 'little'; accepted are 'all', 'sequential'"):
        ExpertSuite(memory="little")


def test_a_failing_expert_is_freed_as_well(square):
    suite = ExpertSuite([Fragile()], memory="sequential")
    with pytest.raises(ExpertError):
        suite([square.rotate(90, expand=True)])
    assert suite["fragile"].events == ["load", "unload"]


def test_on_error_and_memory_are_saved_and_shared_by_parts(suite, tmp_path):
    assert set(suite.to_dict()) == {"experts"}
    suite.on_error, suite.memory = "missing", "sequential"
    assert (suite.without("edge").on_error, suite.only("edge").memory) == ("missing", "sequential")
    suite.save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)
    assert (restored.on_error, restored.memory) == ("missing", "sequential")
    assert restored.to_dict() == suite.to_dict()


def test_the_report_has_the_peak_of_memory(suite, square, monkeypatch):
    assert suite.report()["edge"]["peak_memory_bytes"] is None
    suite([square])
    assert suite.report()["edge"]["peak_memory_bytes"] >= 0
    # how far the process's own peak grew while the expert was loaded and ran, at most so far
    peaks = iter([100, 350, 350, 400])
    monkeypatch.setattr("modeling_prismer.processing.experts.base._peak_of_process", lambda: next(peaks))
    suite = ExpertSuite([Brightness()])
    suite([square])
    suite([square])
    assert suite.report()["brightness"]["peak_memory_bytes"] == 250
