"""The newer families of transformers run in the experts for their kind."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForUniversalSegmentation, AutoProcessor

from modeling_prismer.processing.experts import DepthEstimator, ExpertSuite, ObjectDetector, UniversalSegmentation

from .models import chmv2, depth_pro, eomt, oneformer, photograph, rf_detr, save


SIZES = [(96, 64), (40, 100), (96, 64)]
IMAGES = [photograph(size, seed) for seed, size in enumerate(SIZES)]


@pytest.mark.parametrize("make", [depth_pro, chmv2])
def test_depth_families_give_maps_of_the_image_size(make, tmp_path):
    expert = DepthEstimator(save(make, tmp_path))
    labels = expert(IMAGES)
    assert [label.shape for label in labels] == [(height, width) for width, height in SIZES]
    assert all(label.std() > 5 for label in labels)
    # these networks return larger values for what is nearer, so that nothing is inverted
    ((_, outputs),) = expert.outputs(IMAGES[:1])
    raw = outputs.predicted_depth[0].float()
    small = torch.nn.functional.interpolate(
        torch.from_numpy(labels[0]).float()[None, None], size=raw.shape, mode="bilinear", antialias=True
    )[0, 0]
    assert torch.corrcoef(torch.stack([raw.flatten(), small.flatten()]))[0, 1] > 0.3


def test_rf_detr_finds_objects(tmp_path):
    expert = ObjectDetector(save(rf_detr, tmp_path), min_score=0)
    for image, label in zip(IMAGES, expert(IMAGES)):
        assert label["ids"].shape == (image.height, image.width)
        assert 0 < len(label["classes"]) == len(set(label["ids"].flatten().tolist()) - {255})
    assert expert.class_names[5] == "thing 5"


def test_eomt_masks_are_cut_to_the_image(tmp_path):
    expert = UniversalSegmentation(save(eomt, tmp_path))
    for image, label in zip(IMAGES, expert(IMAGES)):
        ((_, outputs),) = expert.outputs([image])
        masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, size=(64, 64), mode="bilinear")
        size = {"shortest_edge": 64, "longest_edge": 64}
        (masks,) = expert._image_processor.unpad_image(masks, [(image.height, image.width)], size)
        classes = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
        expected = torch.einsum("qc,qhw->chw", classes, masks.sigmoid())
        scores = expert.scores(outputs, 0, image, image.size)
        assert (scores - expected).abs().mean() < 0.03 * expected.std()
        assert np.array_equal(label, scores.argmax(0).numpy())


def test_eomt_pads_whatever_the_checkpoint_says(tmp_path):
    model, processor = eomt()
    processor.do_pad, processor.do_split_image = False, True
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert UniversalSegmentation(str(tmp_path))([IMAGES[1]])[0].shape == (100, 40)


def test_oneformer_is_asked_for_semantic_segmentation(tmp_path):
    expert = UniversalSegmentation(save(oneformer, tmp_path))
    (label,) = expert([IMAGES[0]])
    ((_, found),) = expert.outputs([IMAGES[0]])
    processor = AutoProcessor.from_pretrained(tmp_path, task_seq_length=24)
    model = AutoModelForUniversalSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        semantic, instance = (
            model(**processor(IMAGES[0], [task], return_tensors="pt")) for task in ("semantic", "instance")
        )
    assert torch.allclose(found.class_queries_logits, semantic.class_queries_logits, atol=1e-5)
    assert not torch.allclose(found.class_queries_logits, instance.class_queries_logits, atol=1e-5)
    (expected,) = processor.post_process_semantic_segmentation(semantic, target_sizes=[(64, 96)])
    assert (label == expected.numpy()).mean() > 0.97


def test_oneformer_opens_no_other_file(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    folder = save(oneformer, tmp_path / "model")
    settings = {"class_info_file": "secret.json", "repo_path": str(tmp_path)}
    with pytest.raises(
        ValueError, match="image_processor of the expert 'segmentation' has class_info_file, repo_path"
    ):
        UniversalSegmentation(folder, settings).load()


def test_they_are_saved_and_restored_with_a_suite(tmp_path):
    suite = ExpertSuite([UniversalSegmentation(save(oneformer, tmp_path / "oneformer"))])
    suite.save_pretrained(tmp_path / "saved")
    restored = ExpertSuite.from_pretrained(tmp_path / "saved")
    image = IMAGES[0]
    assert np.array_equal(restored([image])[0]["segmentation"], suite([image])[0]["segmentation"])
