import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForDepthEstimation

from modeling_prismer.processing.experts import DepthEstimator, ExpertSuite, expert_from_dict

from .models import depth_anything, dpt_hybrid, photograph, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(depth_anything, tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def expert(folder):
    return DepthEstimator(folder)


def test_the_default_is_the_published_expert_with_its_settings():
    expert = DepthEstimator()
    assert expert.model_id == "Intel/dpt-hybrid-midas"
    assert expert.description == {"name": "depth", "kind": "dense", "channels": 1}
    assert expert.image_processor["size"] == {"height": 480, "width": 480}
    assert expert.image_processor["image_mean"] == expert.image_processor["image_std"] == [0.5] * 3
    assert (expert.license, expert.size_in_bytes) == ("apache-2.0", 490_000_000)


def test_the_published_settings_reach_the_hybrid(tmp_path):
    settings = DepthEstimator().image_processor
    expert = DepthEstimator(save(dpt_hybrid, tmp_path), image_processor=settings)
    image = photograph((96, 64))
    (depth,) = expert([image])

    pixels = np.asarray(image.resize((480, 480), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    pixels = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)[None]
    model = AutoModelForDepthEstimation.from_pretrained(tmp_path).eval()
    model.dpt.embeddings.image_size = (480, 480)
    with torch.no_grad():
        expected = model(pixels).predicted_depth[0]
    assert expected.shape == (480, 480)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    expected = Image.fromarray(expected.numpy()).resize(image.size, Image.Resampling.BILINEAR)
    assert np.abs(depth - 255 * np.asarray(expected)).max() < 4  # torchvision's bicubic is not quite PIL's
    assert depth.std() > 10


def test_the_map_is_stretched_over_the_image(expert):
    (depth,) = expert([photograph((112, 112))])
    assert (depth.min(), depth.max()) == (0, 255)
    assert depth.dtype == np.uint8


def test_a_batch_of_mixed_sizes_equals_one_by_one(expert):
    images = [photograph(size, seed) for seed, size in enumerate([(96, 64), (64, 96), (96, 64), (30, 200)])]
    together = expert(images)
    assert [depth.shape for depth in together] == [(64, 96), (96, 64), (64, 96), (200, 30)]
    for image, depth in zip(images, together):
        assert np.abs(depth.astype(int) - expert([image])[0]).max() <= 1
    assert not np.array_equal(together[0], together[2])


def test_images_of_the_same_prepared_shape_run_together(folder):
    expert = DepthEstimator(folder)
    expert.load()
    sizes = []
    expert.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    expert([photograph((96, 64)), photograph((64, 96)), photograph((96, 64), 1)])
    assert sizes == [2, 1]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 400), (20000, 20)])
def test_images_of_any_size_have_a_map(expert, size):
    assert expert([photograph(size)])[0].shape == (size[1], size[0])


def test_the_map_of_a_model_with_distances_is_inverted(folder, expert, tmp_path):
    image = photograph((112, 112))
    far = DepthEstimator(folder, metric=True)([image])[0]
    near = expert([image])[0]
    assert np.corrcoef(near.ravel(), far.ravel())[0, 1] < 0
    metric = DepthEstimator(save(depth_anything, tmp_path, depth_estimation_type="metric", max_depth=20))
    metric.load()
    assert metric._is_metric()
    assert not expert._is_metric()


def test_it_is_frozen_and_in_half_precision_only_on_cuda(folder):
    expert = DepthEstimator(folder)
    assert expert.running_dtype == torch.float32
    assert expert.to("cuda").running_dtype == torch.float16
    assert expert.to("cuda", "bfloat16").running_dtype == torch.bfloat16
    expert = DepthEstimator(folder)
    expert.load()
    assert not expert.model.training
    assert not any(parameter.requires_grad for parameter in expert.model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_changes_little_and_can_be_undone(folder, expert, dtype):
    image = photograph((112, 112))
    half = DepthEstimator(folder).to(dtype=dtype)
    difference = np.abs(half([image])[0].astype(int) - expert([image])[0])
    assert 0 < difference.mean() < 12
    assert getattr(torch, dtype) in {parameter.dtype for parameter in half.model.parameters()}
    single = half.to(dtype="float32")([image])[0]  # with weights that have been rounded
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert np.abs(single.astype(int) - expert([image])[0]).mean() <= difference.mean()


def test_a_folder_is_saved_and_restored_with_the_suite(folder, expert, tmp_path):
    image = photograph()
    ExpertSuite([expert]).save_pretrained(tmp_path / "a")
    restored = ExpertSuite.from_pretrained((tmp_path / "a").rename(tmp_path / "b"))["depth"]
    assert restored.model_id.startswith(str(tmp_path / "b"))
    assert restored.size_in_bytes > 0
    assert np.array_equal(restored([image])[0], expert([image])[0])


def test_settings_are_restored():
    expert = DepthEstimator("me/depth", image_processor={"size": {"height": 56, "width": 56}}, metric=True)
    assert expert_from_dict(expert.to_dict()).to_dict() == expert.to_dict()
    assert expert.license == "not stated"
