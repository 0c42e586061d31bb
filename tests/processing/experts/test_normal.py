import math

import numpy as np
import pytest

from benchmarks.measuring import HeldBytes
from modeling_prismer.processing.experts import (
    DepthEstimator,
    ExpertError,
    ExpertSuite,
    NormalEstimator,
    NormalsFromDepth,
    expert_from_dict,
)

from .models import depth_anything, photograph, sapiens2, save, tipsv2


@pytest.fixture(scope="module", params=[tipsv2, sapiens2], ids=["tipsv2", "sapiens2"])
def expert(request, tmp_path_factory):
    return NormalEstimator(save(request.param, tmp_path_factory.mktemp("normal")))


def vectors(normals):
    return normals.astype(np.float32) / 127.5 - 1


def test_normals_are_at_most_of_length_one(expert):
    (normals,) = expert([photograph((56, 56))])
    assert normals.shape == (56, 56, 3)
    assert normals.dtype == np.uint8
    lengths = np.linalg.norm(vectors(normals), axis=-1)
    assert lengths.max() < 1.02  # shorter where neighbours that differ were mixed by resizing
    assert np.median(lengths) > 0.7
    assert normals.std() > 10


def test_a_batch_of_mixed_sizes_equals_one_by_one(expert):
    images = [photograph(size, seed) for seed, size in enumerate([(96, 64), (64, 96), (96, 64), (1, 1), (900, 3)])]
    together = expert(images)
    assert [normals.shape[:2] for normals in together] == [(image.height, image.width) for image in images]
    for image, normals in zip(images, together):
        assert np.abs(normals.astype(int) - expert([image])[0]).max() <= 1


def test_normals_are_resized_one_image_at_a_time(expert):
    def peak(number):
        with HeldBytes() as held:
            expert([photograph((700, 500))] * number)
        return held.peak

    # one more takes its map in 8 bit and the network's tensors of some 50 pixels square; in float32 it took 4.2 MB
    assert peak(4) - peak(3) < 1.5e6


def test_padding_of_the_image_processor_is_removed(tmp_path):
    expert = NormalEstimator(save(sapiens2, tmp_path))
    image = photograph((96, 32))  # padded above and below to 4:3, upright
    (normals,) = expert([image])
    inputs = expert._image_processor(images=image, return_tensors="pt")
    outputs = expert.model(**inputs)
    padded = expert._image_processor.post_process_normal_estimation(outputs, target_sizes=[(32, 96)])
    cut = expert._image_processor.post_process_normal_estimation(
        outputs, source_sizes=[(32, 96)], do_remove_padding=True
    )
    assert np.abs(vectors(normals) - cut[0]["normals"].permute(1, 2, 0).detach().numpy()).max() < 0.01
    assert np.abs(vectors(normals) - padded[0]["normals"].permute(1, 2, 0).detach().numpy()).max() > 0.1


def test_signs_reverse_axes(expert):
    image = photograph()
    turned = NormalEstimator(expert.model_id, signs=(-1, 1, 1))
    assert expert_from_dict(turned.to_dict()).signs == (-1, 1, 1)
    given, other = vectors(expert([image])[0]), vectors(turned([image])[0])
    assert np.abs(given * (-1, 1, 1) - other).max() < 0.02
    with pytest.raises(ValueError, match="signs is"):
        NormalEstimator(signs=(0, 1, 1))


def depth_of(inverse):
    """A map that NormalsFromDepth takes for these inverse distances, 1/8 to 1."""
    return np.round((inverse - 1 / 8) / (1 - 1 / 8) * 255).clip(0, 255).astype(np.uint8)


def view(size, field_of_view=60):
    """x to the right and y up, in units of the focal length, for every pixel."""
    scale = 2 * math.tan(math.radians(field_of_view) / 2) / max(size)
    x = (np.arange(size[0]) - (size[0] - 1) / 2) * scale
    y = -(np.arange(size[1]) - (size[1] - 1) / 2) * scale
    return x[None], y[:, None]


@pytest.mark.parametrize("size", [(160, 120), (120, 160), (800, 600)])
@pytest.mark.parametrize(
    ("normal", "distance"),
    [((0, 0, 1), 2), ((0.6, 0, 0.8), 2), ((-0.6, 0, 0.8), 2), ((0, 0.8, 0.6), 1.2), ((0.36, 0.48, 0.8), 2)],
)
def test_a_plane_has_the_same_normal_everywhere(size, normal, distance):
    x, y = view(size)
    # points p = z·(x, y, -1) with n·p = -distance
    inverse = -(normal[0] * x + normal[1] * y - normal[2]) / distance
    inverse = np.broadcast_to(inverse, (size[1], size[0])).copy()
    inside = (inverse > 0.15) & (inverse < 0.98)
    (normals,) = NormalsFromDepth()([photograph(size)], depth=[depth_of(inverse)])
    assert normals.shape == (size[1], size[0], 3)
    assert inside.mean() > 0.3
    # a map of 256 steps is a flight of stairs where it is farthest and leans most
    angles = np.degrees(np.arccos(np.clip(vectors(normals)[inside] @ np.array(normal), -1, 1)))
    assert np.median(angles) < 5
    border = np.ones_like(inside)
    border[2:-2, 2:-2] = False
    angles = np.degrees(np.arccos(np.clip(vectors(normals)[inside & border] @ np.array(normal), -1, 1)))
    assert np.median(angles) < 10


def test_a_flat_map_faces_the_camera():
    (normals,) = NormalsFromDepth()([photograph()], depth=[np.full((64, 96), 90, np.uint8)])
    assert (np.abs(normals[4:-4, 4:-4].astype(int) - (128, 128, 255)) <= 1).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 300), (20000, 20)])
def test_maps_of_any_size_have_normals(size):
    (normals,) = NormalsFromDepth()([photograph(size)], depth=[np.zeros((size[1], size[0]), np.uint8)])
    assert normals.shape == (size[1], size[0], 3)


def test_without_depth_the_error_names_the_needed_labels():
    with pytest.raises(ExpertError, match="'normal' needs the labels of depth: run it in a suite"):
        NormalsFromDepth()([photograph()])
    assert NormalsFromDepth()([photograph()], depth=[None]) == [None]


def test_a_suite_passes_the_depth_labels(tmp_path):
    depth = DepthEstimator(save(depth_anything, tmp_path))
    suite = ExpertSuite([NormalsFromDepth(), depth])  # in whichever order
    images = [photograph(), photograph((40, 50), 1)]
    labels = suite(images)
    assert [list(own) for own in labels] == [["normal", "depth"]] * 2
    for image, own in zip(images, labels):
        assert np.array_equal(own["normal"], NormalsFromDepth()([image], depth=[own["depth"]])[0])


@pytest.mark.parametrize(
    "settings", [{"field_of_view": 180}, {"far_to_near": 1}, {"sigma": -1}, {"max_pixels": 0}, {"signs": (1, 1)}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        NormalsFromDepth(**settings)
