"""Experts that take input instead of running."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_prismer.processing.experts import (
    CannyEdges,
    DepthEstimator,
    ExpertSuite,
    HashedNgrams,
    SensorDepth,
    UserRegions,
    expert_from_dict,
)
from modeling_prismer.processing.image_processing_prismer import PrismerImageProcessor

from .models import photograph


IMAGE = photograph((96, 64))


# ---- sensor depth ----


def test_near_is_bright_and_linear_in_the_inverse_distance():
    distances = np.array([[0.5, 1.0, 2.0, 4.0]])
    depth = SensorDepth().label_from(distances, IMAGE)
    assert depth.dtype == np.uint8
    assert np.array_equal(depth, np.round(255 * (1 / distances - 0.25) / 1.75).astype(np.uint8))
    # the unit does not matter, nor whether it is a tensor or an image
    millimetres = (distances * 1000).astype(np.int32)
    assert np.array_equal(SensorDepth().label_from(millimetres, IMAGE), depth)
    assert np.array_equal(SensorDepth().label_from(torch.from_numpy(distances), IMAGE), depth)
    assert np.array_equal(SensorDepth().label_from(Image.fromarray(millimetres), IMAGE), depth)


def test_unknown_distances_take_the_nearest_known_one():
    distances = np.array([[1, 0, np.nan, -2, np.inf, 4]])
    depth = SensorDepth().label_from(distances, IMAGE)
    assert depth[0, [0, 1, 4, 5]].tolist() == [255, 255, 0, 0]
    assert SensorDepth().label_from(np.zeros((3, 4)), IMAGE) is None


def test_a_fixed_range_makes_maps_comparable():
    expert = SensorDepth(near=1, far=10)
    assert expert.label_from(np.array([[0.5, 1, 10, 100]]), IMAGE).tolist() == [[255, 255, 0, 0]]
    assert expert.label_from(np.array([[2.0]]), IMAGE)[0, 0] == round(255 * (0.5 - 0.1) / 0.9)


def test_finished_maps_pass_through():
    depth = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert SensorDepth().label_from(depth, IMAGE) is depth
    assert SensorDepth().label_from({"values": depth}, IMAGE) == {"values": depth}
    assert SensorDepth().description == DepthEstimator().description


@pytest.mark.parametrize("given", [np.zeros((2, 3, 3)), np.array([["a"]]), np.zeros((0, 3))])
def test_other_input_than_distances_is_refused(given):
    with pytest.raises(ValueError, match="'depth' was given .*; distances"):
        SensorDepth().label_from(given, IMAGE)


@pytest.mark.parametrize("settings", [{"near": 0}, {"far": -1}, {"near": 3, "far": 2}, {"far": np.inf}])
def test_impossible_ranges_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SensorDepth(**settings)


# ---- regions ----


def test_regions_are_painted_with_the_features_of_their_names():
    mask = np.zeros((64, 96), bool)
    mask[50:60, 80:90] = True
    regions = [
        {"box": (10, 10, 20.4, 19.6), "name": " Red  Mug "},
        {"box": (0, 0, 60, 40), "name": "table"},
        {"point": (70, 20)},
        {"mask": mask, "name": "cat"},
    ]
    label = UserRegions().label_from(regions, IMAGE)
    assert label["words"] == ["red mug", "table", "object", "cat"]
    assert np.array_equal(label["features"], HashedNgrams()(label["words"]))
    ids = label["ids"]
    assert (ids[10:20, 10:20] == 0).all()  # the small box lies over the large one
    assert (ids == 0).sum() == 100
    assert (ids == 1).sum() == 60 * 40 - 100
    assert ids[20, 70] == 2
    assert 5 <= (ids == 2).sum() <= 30
    assert np.array_equal(ids == 3, mask)
    assert UserRegions().label_from(label, IMAGE) is label
    assert UserRegions().label_from([], IMAGE)["features"].shape == (0, 64)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ("cup", "'regions' was given 'cup'; a list of regions"),
        ([{"name": "cup"}], "region 0 is .*; a dict with one of 'box', 'point' and 'mask'"),
        ([{"box": (0, 0, 1, 1), "point": (0, 0)}], "one of 'box', 'point' and 'mask'"),
        ([{"box": (0, 0, 9)}], "region 0 has the box .*; left, top, right, bottom are needed"),
        ([{"box": (5, 0, 5, 9)}], "right of left and below top"),
        ([{"point": (0, float("nan"))}], "x, y are needed"),
        ([{"mask": np.ones((3, 3), bool)}], r"bool of the image's size, \(64, 96\)"),
        ([{"point": (0, 0)}] * 255, "255 regions; at most 254"),
    ],
)
def test_wrong_regions_are_named(regions, message):
    with pytest.raises(ValueError, match=message):
        UserRegions().label_from(regions, IMAGE)


def test_settings_are_saved_with_the_suite(tmp_path):
    suite = ExpertSuite([SensorDepth(1, 8), UserRegions(point_radius=0.1), CannyEdges()])
    suite.save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)
    assert (restored["depth"].near, restored["depth"].far, restored["regions"].point_radius) == (1, 8, 0.1)
    assert expert_from_dict(restored["regions"].to_dict()).word_features.channels == 64
    assert suite([IMAGE])[0]["regions"] is None  # nothing was given
    assert suite.descriptions[1] == {"name": "regions", "kind": "label", "channels": 64}


# ---- with a processor ----


def test_the_processor_makes_labels_of_the_input(tiny_processor):
    regions = [{"box": (8, 8, 40, 40), "name": "cup"}]
    distances = np.linspace(1, 4, 64 * 96).reshape(64, 96)
    labels = tiny_processor.run_experts([IMAGE, IMAGE], [{"depth": distances, "regions": regions}, None])
    assert np.array_equal(labels[0]["depth"], SensorDepth().label_from(distances, IMAGE))
    assert labels[0]["regions"]["words"] == ["cup"]
    assert labels[1]["depth"] is None
    inputs = tiny_processor.process_images([IMAGE, IMAGE], [{"depth": distances, "regions": regions}, None])
    assert inputs["expert_mask"].tolist() == [[True, True], [False, False]]
    assert inputs["regions_features"][0, 0].abs().sum() > 0
    assert inputs["depth_values"][0].min() == -1


@pytest.fixture
def tiny_processor():
    from modeling_prismer.processing.experts_processor import ExpertsProcessor

    suite = ExpertSuite([SensorDepth(), UserRegions()])
    processor = object.__new__(ExpertsProcessor)  # without a tokenizer
    processor.image_processor = PrismerImageProcessor(experts=suite.descriptions)
    processor.experts = suite
    return processor
