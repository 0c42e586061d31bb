import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES

from modeling_prismer import PrismerConfig
from modeling_prismer.processing.experts import ExpertSuite, SegmentAnything
from modeling_prismer.processing.experts.segment_anything import paint_masks

from .models import edgetam, photograph, sam, sam2, sam3, sam3_tracker, sam3_video, sam_hq, save


FAMILIES = {
    "sam": sam,
    "sam_hq": sam_hq,
    "sam2": sam2,
    "sam2_video": sam2,  # a model for images and videos
    "edgetam": edgetam,
    "edgetam_video": edgetam,
    "sam3_tracker": sam3_tracker,
    "sam3_video": sam3_video,
}


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    folder = save(sam2, tmp_path_factory.mktemp("sam2"))
    return SegmentAnything(folder, points_per_side=4, min_score=0, min_stability=0)


def disc(center, radius, size=(32, 24)):
    rows, columns = np.mgrid[: size[1], : size[0]]
    return (columns - center[0]) ** 2 + (rows - center[1]) ** 2 <= radius**2


def test_small_masks_lie_over_large_ones():
    large, small = disc((10, 10), 9), disc((10, 10), 3)
    for masks, scores in (([large, small], [0.9, 0.8]), ([small, large], [0.9, 0.8])):
        ids = paint_masks(masks, np.array(scores), (32, 24))
        assert ids[10, 10] == (1 if masks[0] is large else 0)  # numbered from the highest score
        assert ids[10, 2] == (0 if masks[0] is large else 1)
        assert ids[20, 30] == 255


def test_the_254_surest_masks_are_kept():
    masks = [np.eye(24, 32, k % 8, dtype=bool) for k in range(300)]
    ids = paint_masks(masks, np.linspace(0, 1, 300), (32, 24))
    assert ids.max() == 255
    assert sorted(set(ids[ids < 254].tolist()))[0] >= 0
    assert (paint_masks([], np.array([]), (32, 24)) == 255).all()


def test_a_label_has_instances_of_one_class(expert):
    images = [photograph((96, 64)), photograph((40, 60), 1)]
    for image, label in zip(images, expert(images)):
        assert label["ids"].shape == (image.height, image.width)
        assert len(label["classes"]) > 1
        assert set(label["classes"]) == {0}
        assert set(np.unique(label["ids"])) <= {*range(len(label["classes"])), 255}
        assert len(np.unique(label["ids"])) > 2
    assert expert.class_names == ("object",)


def test_every_family_of_transformers_is_tested():
    assert set(MODEL_FOR_MASK_GENERATION_MAPPING_NAMES) == set(FAMILIES)


@pytest.mark.parametrize("make", [sam, sam_hq, edgetam, sam3_tracker])
def test_other_families_make_masks(make, tmp_path):
    expert = SegmentAnything(save(make, tmp_path), points_per_side=3, min_score=0, min_stability=0)
    image = photograph((60, 40))
    (label,) = expert([image])
    assert label["ids"].shape == (40, 60)
    assert len(label["classes"]) >= 1
    assert set(label["classes"]) == {0}
    assert set(np.unique(label["ids"])) <= {*range(len(label["classes"])), 255} != {255}


def save_as_published(make, folder):
    """Saves the weights under the names of the model's own modules. Returns them."""
    torch.manual_seed(0)
    model, processor = make()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def test_all_weights_of_sam_3_are_loaded(tmp_path):
    weights = save_as_published(sam3_video, tmp_path)
    expert = SegmentAnything(str(tmp_path), points_per_side=3, min_score=0, min_stability=0)
    (label,) = expert([photograph((60, 40))])
    assert len(label["classes"]) >= 1
    names = {
        "vision_encoder.backbone.": "detector_model.vision_encoder.backbone.",
        "vision_encoder.neck.": "tracker_neck.",
    }
    for name, tensor in expert.model.state_dict().items():
        published = next((theirs + name[len(ours) :] for ours, theirs in names.items() if name.startswith(ours)), None)
        assert torch.equal(tensor, weights[published or f"tracker_model.{name}"]), name


@pytest.mark.parametrize("family", ["sam2_video", "edgetam_video"])
def test_checkpoints_for_videos_make_masks(family, tmp_path):
    folder = save(FAMILIES[family], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": family}))
    (label,) = SegmentAnything(folder, points_per_side=3, min_score=0, min_stability=0)([photograph((60, 40))])
    assert len(label["classes"]) >= 1


def test_a_model_that_reads_names_is_refused(tmp_path):
    expected = (
        "is of the family sam3; the installed transformers makes masks from points with edgetam, edgetam_video, sam"
    )
    with pytest.raises(ValueError, match=expected):
        SegmentAnything(save(sam3, tmp_path)).load()


def test_a_family_that_transformers_does_not_have_is_named(tmp_path):
    save(sam2, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "sam9"}))
    with pytest.raises(ValueError, match="sam9"):
        SegmentAnything(str(tmp_path)).load()


def test_no_mask_gives_background(expert):
    nothing = SegmentAnything(expert.model_id, points_per_side=2, min_score=1, min_stability=1)
    (label,) = nothing([photograph()])
    assert label["classes"] == []
    assert (label["ids"] == 255).all()


def test_large_images_are_reduced(expert):
    small = SegmentAnything(expert.model_id, points_per_side=4, min_score=0, min_stability=0, max_pixels=32 * 32)
    (label,) = small([photograph((128, 128))])
    assert label["ids"].shape == (128, 128)
    assert np.array_equal(label["ids"][::4, ::4], label["ids"][3::4, 3::4])  # blocks of 4×4


def test_a_network_can_be_made_for_it(expert, tmp_path):
    config = PrismerConfig(experts=[expert.description])
    assert config.expert_specs[0].tensor_names == ("masks_ids", "masks_classes")
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["masks"]
    assert restored.points_per_side == 4
    image = photograph()
    assert np.array_equal(restored([image])[0]["ids"], expert([image])[0]["ids"])


@pytest.mark.parametrize(
    "settings", [{"points_per_side": 0}, {"min_score": 2}, {"min_stability": -1}, {"max_pixels": 0}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SegmentAnything(**settings)
