"""An expert of a user's own, through the processor, and a suite of six with everything that is drawn of it."""

import json

import numpy as np
import pytest
from PIL import Image

from modeling_prismer.processing import PrismerImageProcessor, PrismerProcessor
from modeling_prismer.processing.experts import (
    CannyEdges,
    DepthEstimator,
    Expert,
    ExpertSuite,
    NormalsFromDepth,
    ObjectDetector,
    UniversalSegmentation,
)
from modeling_prismer.processing.visualization import experts_panel

from .models import depth_anything, dfine, mask2former, photograph, save


class ThermalCamera(Expert):
    """Maps of a thermal camera, `cat.thermal.png` next to `cat.png`."""

    type = "test_thermal"
    name, kind, channels = "thermal", "dense", 1

    def run(self, images):
        maps = [Image.open(image.info["file"].replace(".png", ".thermal.png")) for image in images]
        return [np.array(map.convert("L").resize(image.size)) for map, image in zip(maps, images)]


class Warmth(Expert):
    """Stands in for a thermal camera where there is none: how red a pixel is."""

    type = "test_warm"
    name, kind, channels = "thermal", "dense", 1

    def run(self, images):
        return [np.asarray(image)[..., 0].copy() for image in images]


@pytest.fixture
def make_processor(tokenizer):
    def make(suite, **settings):
        image_processor = PrismerImageProcessor(
            experts=suite.descriptions, size={"height": 32, "width": 32}, expert_size=16
        )
        return PrismerProcessor(image_processor, tokenizer, experts=suite, **settings)

    return make


def test_a_custom_expert_returns_its_maps(tmp_path):
    photo = photograph((40, 30))
    photo.save(tmp_path / "cat.png")
    thermal = np.zeros((15, 20), np.uint8)
    thermal[5:10, 5:15] = 200
    Image.fromarray(thermal).save(tmp_path / "cat.thermal.png")
    photo.info["file"] = str(tmp_path / "cat.png")
    (label,) = ThermalCamera()([photo])
    assert label.shape == (30, 40)
    assert label[15, 20] == 200
    assert label[0, 0] == 0


def test_a_custom_expert_is_saved_with_the_processor(make_processor, tmp_path):
    processor = make_processor(ExpertSuite([CannyEdges(), Warmth()]))
    image = photograph((40, 30))
    inputs = processor(images=[image, image.rotate(90, expand=True)], text="A picture of")
    assert inputs["thermal_values"].shape == (2, 1, 16, 16)
    assert inputs["thermal_values"].amax() > 0.9
    assert inputs["expert_mask"].all()
    processor.save_pretrained(tmp_path)
    restored = PrismerProcessor.from_pretrained(tmp_path)
    assert isinstance(restored.experts["thermal"], Warmth)
    assert restored(images=image)["thermal_values"].equal(processor(images=image)["thermal_values"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make: save(make, tmp_path_factory.mktemp(make.__name__)) for make in (depth_anything, mask2former, dfine)}


@pytest.fixture
def suite(folders, ocr):
    return ExpertSuite(
        [
            DepthEstimator(folders[depth_anything]),
            NormalsFromDepth(),
            UniversalSegmentation(folders[mask2former]),
            CannyEdges(),
            ObjectDetector(folders[dfine], min_score=0.5),
            ocr,
        ]
    )


def test_six_experts_fill_all_tensors(make_processor, suite, page):
    processor = make_processor(suite)
    inputs = processor(images=[page, photograph()], text="A picture of")
    assert inputs["expert_mask"].all()
    assert inputs["normal_values"].shape == (2, 3, 16, 16)
    assert inputs["segmentation_ids"].max() < 5
    assert inputs["detection_classes"].shape == (2, 128)
    assert inputs["ocr_features"][0].abs().sum() > 0


def test_a_label_does_not_depend_on_the_other_experts(make_processor, suite, page):
    processor = make_processor(suite)
    image = photograph()
    all_six = processor(images=image)
    for name in ("normal", "detection"):
        key = "normal_values" if name == "normal" else "detection_ids"
        alone = processor(images=image, experts=[name])
        assert alone[key].equal(all_six[key])
        assert alone["expert_mask"].sum() == 1


def test_a_given_depth_map_is_used_by_other_experts(make_processor, suite):
    processor = make_processor(suite)
    flat = np.full((64, 96), 90, np.uint8)
    (labels,) = processor.run_experts(photograph(), expert_labels={"depth": flat}, experts=["depth", "normal"])
    assert (np.abs(labels["normal"].astype(int) - (128, 128, 255)) <= 1).all()
    assert suite["depth"].num_images == 0


def test_a_missing_label_is_masked_out(make_processor, suite, monkeypatch):
    monkeypatch.setattr("modeling_prismer.processing.experts.suite.logger.warning", lambda text: None)
    suite.on_error = "missing"
    monkeypatch.setattr(suite["edge"], "run", lambda images: 1 / 0)
    inputs = make_processor(suite)(images=photograph())
    assert inputs["expert_mask"].tolist() == [[True, True, True, False, True, True]]
    assert not inputs["edge_values"].any()


def test_sequential_memory_by_one_argument(make_processor, suite, tmp_path, page):
    make_processor(suite.without("ocr")).save_pretrained(tmp_path)
    processor = PrismerProcessor.from_pretrained(tmp_path, experts_memory="sequential", expert_device="cpu")
    assert processor.experts.memory == "sequential"
    inputs = processor(images=[page, photograph()])
    assert inputs["expert_mask"].all()
    assert not any(expert.is_loaded for expert in processor.experts.values())
    processor.save_pretrained(tmp_path / "again")
    description = json.loads((tmp_path / "again" / "experts" / "suite.json").read_text())
    assert description["memory"] == "sequential"


def test_a_suite_by_name_reaches_the_processor(make_processor, suite, tmp_path):
    make_processor(suite).save_pretrained(tmp_path)
    processor = PrismerProcessor.from_pretrained(tmp_path, experts="fast")
    assert processor.experts["depth"].model_id == "depth-anything/Depth-Anything-V2-Small-hf"


def test_class_names_reach_the_panel(suite, page):
    assert list(suite.class_names) == ["segmentation", "detection"]
    assert suite.class_names["segmentation"][:2] == ["thing 0", "thing 1"]
    labels = suite([page])[0]
    panel = experts_panel(page, labels, suite.descriptions, suite.class_names)
    assert panel.width > 1000
