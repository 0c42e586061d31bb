import numpy as np
import pytest
import torch
from PIL import Image

from modeling_prismer.processing.experts import ExpertSuite, SemanticSegmentation, UniversalSegmentation

from .models import mask2former, photograph, save, segformer


@pytest.fixture(scope="module", params=["universal", "semantic"])
def expert(request, tmp_path_factory):
    make, expert_class = {
        "universal": (mask2former, UniversalSegmentation),
        "semantic": (segformer, SemanticSegmentation),
    }[request.param]
    return expert_class(save(make, tmp_path_factory.mktemp(request.param)))


def test_the_default_is_the_published_expert_with_its_settings():
    expert = UniversalSegmentation()
    assert expert.model_id == "facebook/mask2former-swin-large-coco-panoptic"
    assert expert.image_processor == {"size": {"shortest_edge": 479, "longest_edge": 480}}
    ade = UniversalSegmentation("facebook/mask2former-swin-large-ade-panoptic")
    assert ade.image_processor == expert.image_processor
    assert ade.size_in_bytes == 866_000_000
    assert UniversalSegmentation("me/mask2former").image_processor == {}


def test_the_published_size_reaches_the_network(tmp_path):
    expert = UniversalSegmentation(save(mask2former, tmp_path), UniversalSegmentation().image_processor)
    expert.load()
    shapes = []
    expert.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    list(expert.outputs([photograph((640, 480)), photograph((100, 300)), photograph((50, 50))]))
    assert shapes == [(1, 3, 384, 480), (1, 3, 480, 160), (1, 3, 480, 480)]  # multiples of 32


def test_the_classes_come_from_the_model(expert):
    number = 5 if isinstance(expert, UniversalSegmentation) else 4
    unloaded = type(expert)(expert.model_id)
    assert unloaded.description == {"name": "segmentation", "kind": "label", "channels": 64, "num_classes": number}
    assert unloaded.class_names == [f"thing {index}" for index in range(number)]
    assert not unloaded.is_loaded


def test_each_pixel_has_the_class_of_the_highest_score(expert):
    image = photograph((64, 64))
    (ids,) = expert([image])
    ((_, outputs),) = expert.outputs([image])
    size = {"size": (64, 64), "mode": "bilinear"}
    with torch.no_grad():
        if isinstance(expert, UniversalSegmentation):
            classes = outputs.class_queries_logits.softmax(-1)[0, :, :-1]  # (queries, classes)
            masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, **size)[0].sigmoid()
            scores = (classes.T @ masks.flatten(1)).reshape(-1, 64, 64)
        else:
            scores = torch.nn.functional.interpolate(outputs.logits, **size)[0]
    assert (ids == scores.argmax(0).numpy()).mean() > 0.999
    assert len(np.unique(ids)) > 1


def test_a_batch_of_mixed_sizes_equals_one_by_one(expert):
    images = [photograph(size, seed) for seed, size in enumerate([(96, 64), (64, 96), (96, 64), (30, 40)])]
    for image, ids in zip(images, expert(images)):
        assert ids.shape == (image.height, image.width)
        assert (ids == expert([image])[0]).mean() > 0.995


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 400), (20000, 20)])
def test_images_of_any_size_have_a_map(expert, size):
    (ids,) = expert([photograph(size)])
    assert ids.shape == (size[1], size[0])
    assert ids.max() < expert.num_classes


def test_the_map_of_a_large_image_is_enlarged_from_max_pixels(expert):
    large = photograph((64, 64)).resize((256, 256), Image.Resampling.BICUBIC)
    limited = type(expert)(expert.model_id, max_pixels=64 * 64)
    (ids,) = limited([large])
    assert ids.shape == (256, 256)
    assert np.array_equal(ids[::4, ::4], ids[3::4, 3::4])
    assert (ids == expert([large])[0]).mean() > 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_changes_little(expert, dtype):
    image = photograph()
    half = type(expert)(expert.model_id).to(dtype=dtype)
    assert (half([image])[0] == expert([image])[0]).mean() > 0.9


def test_more_classes_than_ids_are_refused(tmp_path):
    expert = SemanticSegmentation(save(segformer, tmp_path, classes=256))
    with pytest.raises(ValueError, match="256 classes; maps of ids hold at most 255"):
        expert.load()


def test_a_folder_is_saved_and_restored_with_the_suite(expert, tmp_path):
    image = photograph()
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["segmentation"]
    assert type(restored) is type(expert)
    assert restored.num_classes == expert.num_classes
    assert np.array_equal(restored([image])[0], expert([image])[0])
