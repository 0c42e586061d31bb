import numpy as np
import pytest

from modeling_prismer.processing.experts import DepthEstimator, ExpertSuite, ObjectDetector, paint_boxes

from .models import depth_anything, detr, dfine, photograph, save


# ---- painting ----


def paint(boxes, scores=None, size=(20, 10), depth=None, **settings):
    scores = np.linspace(1, 0.5, len(boxes)) if scores is None else scores
    return paint_boxes(np.array(boxes, float), np.array(scores), size, depth, **settings)


def ramp(size=(20, 10)):
    """Inverse depth: the farther to the right, the nearer."""
    return np.broadcast_to(np.arange(size[0], dtype=np.uint8) * 10, (size[1], size[0]))


def test_no_boxes_give_background():
    ids, rows = paint(np.zeros((0, 4)))
    assert ids.shape == (10, 20)
    assert ids.dtype == np.uint8
    assert (ids == 255).all()
    assert len(rows) == 0


def test_instances_are_numbered_from_the_highest_score():
    ids, rows = paint([(0, 0, 4, 4), (10, 2, 15, 8)], [0.6, 0.9])
    assert rows.tolist() == [1, 0]
    assert (ids[2:8, 10:15] == 0).all()
    assert (ids[0:4, 0:4] == 1).all()
    assert (ids == 255).sum() == 200 - 30 - 16


def test_a_box_like_one_with_a_higher_score_is_dropped():
    boxes = [(0, 0, 100, 100), (0, 0, 100, 96), (0, 0, 100, 94)]  # IoU 0.96 and 0.94 with the first
    _, rows = paint(boxes, [0.9, 0.8, 0.7], size=(100, 100))
    assert rows.tolist() == [0, 2]
    # of two near equals the surer one stays; a box that overlaps only a dropped one stays as well
    _, rows = paint(boxes, [0.7, 0.9, 0.8], size=(100, 100))
    assert rows.tolist() == [1]
    _, rows = paint([(0, 0, 100, 100), (0, 0, 100, 96), (0, 0, 100, 92)], [0.9, 0.8, 0.7], size=(100, 100))
    assert rows.tolist() == [0, 2]


@pytest.mark.parametrize("scores", [[0.9, 0.6], [0.6, 0.9]])
@pytest.mark.parametrize("depth", [None, ramp(), ramp()[:, ::-1]])
def test_a_box_inside_another_is_in_front_at_any_depth(scores, depth):
    ids, rows = paint([(0, 0, 20, 10), (12, 3, 16, 6)], scores, depth=depth)
    inner = rows.tolist().index(1)
    assert (ids[3:6, 12:16] == inner).all()
    assert (ids == inner).sum() == 12


@pytest.mark.parametrize("scores", [[0.9, 0.6], [0.6, 0.9]])
def test_the_nearer_of_two_overlapping_boxes_is_in_front(scores):
    boxes = [(0, 0, 12, 10), (8, 0, 20, 5)]
    for depth, front in [(ramp(), 1), (ramp()[:, ::-1], 0)]:
        ids, rows = paint(boxes, scores, depth=depth)
        assert (ids[0:5, 8:12] == rows.tolist().index(front)).all()


def test_the_smaller_box_is_in_front_without_a_depth_map():
    ids, _ = paint([(8, 0, 20, 5), (0, 0, 12, 10)])
    assert (ids[0:5, 8:12] == 0).all()
    ids, _ = paint([(0, 0, 12, 10), (8, 0, 20, 5)])
    assert (ids[0:5, 8:12] == 1).all()


def test_nested_boxes_keep_their_order_with_a_third_box():
    outer, inner, third = (0, 0, 12, 10), (8, 2, 11, 6), (9, 0, 20, 10)
    ids, rows = paint([outer, inner, third], depth=ramp()[:, ::-1])  # the outer is the nearest
    assert ids[4, 9] == 1  # inside: in front of the outer, which is in front of the third
    assert ids[8, 10] == 0
    assert ids[8, 15] == 2


def test_no_box_is_in_front_of_a_box_inside_it():
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 60, (60, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + 3], axis=1)
    depth = generator.integers(0, 256, (64, 64)).astype(np.uint8)
    for nearness in (depth, None):
        ids, rows = paint(boxes, size=(64, 64), depth=nearness)
        kept = boxes[rows]
        for number, (left, top, right, bottom) in enumerate(kept):
            for other in set(np.unique(ids[top:bottom, left:right])) - {number}:
                around = kept[other]
                assert not (
                    (around[:2] <= (left, top)).all()
                    and (around[2:] >= (right, bottom)).all()
                    and not np.array_equal(around, kept[number])
                )


def test_the_254_highest_scores_are_kept():
    boxes = [(column, row, column + 1, row + 1) for row in range(20) for column in range(20)]
    ids, rows = paint(boxes, np.linspace(0.5, 1, 400), size=(20, 20))
    assert len(rows) == 254
    assert rows.min() == 400 - 254
    assert set(np.unique(ids)) == {*range(254), 255}
    assert len(paint(boxes, size=(20, 20), max_instances=3)[1]) == 3


def test_boxes_are_clipped_and_have_at_least_one_pixel():
    ids, rows = paint([(-5, -5, 3, 2), (30, 2, 40, 5), (7.4, 3.4, 7.5, 3.6), (19.8, 9.9, 20, 10), (5, 5, 5, 8)])
    assert rows.tolist() == [0, 2, 3]  # one lies outside, one has no width
    assert (ids[:2, :3] == 0).all()
    assert ids[3, 7] == 1
    assert ids[9, 19] == 2
    assert (ids == 255).sum() == 200 - 6 - 2
    ids, rows = paint([(np.nan, 0, 3, 3), (0, 0, np.inf, 3)])
    assert len(rows) == 0


# ---- the detector ----


@pytest.fixture(scope="module", params=[dfine, detr], ids=["d_fine", "detr"])
def expert(request, tmp_path_factory):
    return ObjectDetector(save(request.param, tmp_path_factory.mktemp("detection")), min_score=0.3)


def test_a_label_has_instances_and_their_classes(expert):
    image = photograph()
    (label,) = expert([image])
    number = len(label["classes"])
    assert number > 0
    assert label["ids"].shape == (64, 96)
    assert set(np.unique(label["ids"])) <= {*range(number), 255}
    assert all(0 <= index < expert.num_classes for index in label["classes"])
    # as the model's own post-processing gives them
    ((_, outputs),) = expert.outputs([image])
    (result,) = expert._image_processor.post_process_object_detection(outputs, 0.3, [(64, 96)])
    ids, rows = paint_boxes(result["boxes"].detach().numpy(), result["scores"].detach().numpy(), (96, 64))
    assert np.array_equal(label["ids"], ids)
    assert label["classes"] == result["labels"].numpy()[rows].tolist()


def test_description_and_class_names_come_from_the_model(expert):
    number = 7 if "d_fine" in expert.model_config.model_type else 6
    assert expert.description == {
        "name": "detection",
        "kind": "label",
        "channels": 64,
        "num_classes": number,
        "instances": True,
    }
    assert expert.class_names[-1] == f"thing {number - 1}"


def test_unused_class_numbers_have_a_placeholder_name(expert):
    other = ObjectDetector(expert.model_id)
    other.model_config.id2label = {1: "person", 3: "car"}
    assert other.class_names == ["N/A", "person", "N/A", "car"]
    assert other.num_classes == 4


def test_min_score_is_inclusive(expert):
    image = photograph()
    ((_, outputs),) = expert.outputs([image])
    (result,) = expert._image_processor.post_process_object_detection(outputs, 0.0, [(64, 96)])
    score = float(result["scores"].detach().max())
    assert len(ObjectDetector(expert.model_id, min_score=score)([image])[0]["classes"]) >= 1
    nothing = ObjectDetector(expert.model_id, min_score=1.0)([image])[0]
    assert nothing["classes"] == []
    assert (nothing["ids"] == 255).all()
    with pytest.raises(ValueError, match="min_score"):
        ObjectDetector(min_score=2)


def test_a_batch_of_mixed_sizes_equals_one_by_one(expert):
    images = [photograph(size, seed) for seed, size in enumerate([(96, 64), (64, 96), (96, 64), (30, 40)])]
    for image, label in zip(images, expert(images)):
        (alone,) = expert([image])
        assert label["ids"].shape == (image.height, image.width)
        assert sorted(label["classes"]) == sorted(alone["classes"])
        # equal scores may change places
        assert ((label["ids"] == 255) == (alone["ids"] == 255)).mean() > 0.98


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 400), (20000, 20)])
def test_images_of_any_size_have_a_map(expert, size):
    assert expert([photograph(size)])[0]["ids"].shape == (size[1], size[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_runs_in_half_precision(expert, dtype):
    (label,) = ObjectDetector(expert.model_id, min_score=0.3).to(dtype=dtype)([photograph()])
    assert len(label["classes"]) > 0


def test_a_suite_passes_the_depth_labels(expert, tmp_path):
    image = photograph()
    depth = DepthEstimator(save(depth_anything, tmp_path))
    (label,) = ExpertSuite([expert, depth])([image])
    (given,) = expert([image], depth=[label["depth"]])
    assert np.array_equal(label["detection"]["ids"], given["ids"])
    (by_area,) = expert([image], depth=[None])
    assert np.array_equal(by_area["ids"], ExpertSuite([expert])([image])[0]["detection"]["ids"])


def test_a_folder_is_saved_and_restored_with_the_suite(expert, tmp_path):
    image = photograph()
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["detection"]
    assert restored.min_score == 0.3
    assert np.array_equal(restored([image])[0]["ids"], expert([image])[0]["ids"])
