"""The augmentation for training moves an image and its expert maps together."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from modeling_prismer.processing import JointAugmentation, PrismerImageProcessor, augmentation


GEOMETRIC = ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"]
PHOTOMETRIC = ["identity", "autocontrast", "equalize", "brightness", "sharpness"]
WIDTH, HEIGHT = 640, 480


def ramps(width=WIDTH, height=HEIGHT):
    """An image whose colors are the positions of its pixels: red grows to the right, green downwards, blue is 255."""
    red, green = np.meshgrid((np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255)
    return np.stack([red, green, np.full_like(red, 255)], axis=-1).round().astype(np.uint8)


def regions(pixels):
    """Ids from such an image: the number of the tile of each pixel, with 8 tiles a side; 255 outside."""
    tiles = pixels[..., 0] // 32 * 8 + pixels[..., 1] // 32
    return np.where(pixels[..., 2] > 127, tiles, 255).astype(np.uint8)


def centroids(ids):
    """Of each region: number of pixels, centroid (y, x) as a share of the height and width."""
    y, x = (np.indices(ids.shape) + 0.5) / np.reshape(ids.shape, (2, 1, 1))
    return {i: (int((ids == i).sum()), y[ids == i].mean(), x[ids == i].mean()) for i in np.unique(ids) if i != 255}


@pytest.fixture
def source():
    return Image.fromarray(ramps())


@pytest.fixture
def labels():
    """A label of each expert, of the size of the image."""
    pixels = ramps()
    return {
        "depth": pixels[..., 0],
        "normal": pixels,
        "segmentation": regions(pixels),
        "edge": Image.fromarray(pixels[..., 1]),
        "detection": {"ids": regions(pixels) % 8, "classes": [700, 3, 3, 9, 0, 1, 2, 3]},
        "ocr": {
            "ids": np.where(regions(pixels) < 2, regions(pixels), 255).astype(np.uint8),
            "words": ["go", "stop"],
            "features": np.arange(16, dtype=np.float32).reshape(2, 8),
        },
    }


@pytest.fixture
def only(monkeypatch):
    """Lets RandAugment draw from these operations alone."""
    return lambda *names: monkeypatch.setattr(augmentation, "_OPERATIONS", names)


def whole_image(experts, size=(224, 224), **kwargs):
    """An augmentation that crops nothing off and does not flip."""
    kwargs = {"scale": (1, 1), "ratio": (WIDTH / HEIGHT,) * 2, "flip_probability": 0.0, **kwargs}
    return JointAugmentation(experts, size=size, **kwargs)


def augment(augmentation, source, labels, seed=0):
    torch.manual_seed(seed)
    return augmentation(source, labels)


# ---- alignment ----


def shift(image, labels):
    """The offset between maps and image, from the regions that both show: (y, x) in pixels of the map."""
    seen, there = centroids(regions(np.asarray(image))), centroids(labels["segmentation"])
    compared = [i for i in there if there[i][0] > 200]
    assert len(compared) > 15
    return np.mean([np.subtract(there[i][1:], seen[i][1:]) * labels["segmentation"].shape for i in compared], axis=0)


def differences(image, labels):
    """The positions of the map's pixels minus those of the image's pixels: (pixels, 2), in 1/255 of the scene."""
    size = labels["normal"].shape[1::-1]
    reduced = np.asarray(image.resize(size, Image.Resampling.BOX)).astype(float)
    known = (reduced[..., 2] == 255) & (labels["normal"][..., 2] == 255)
    return (labels["normal"] - reduced)[known][:, :2]


@pytest.mark.parametrize("operation", ["identity", *GEOMETRIC])
@pytest.mark.parametrize("size", [(480, 480), (192, 320)], ids=["square", "wide"])
@pytest.mark.parametrize("stored", [(WIDTH, HEIGHT), (224, 224), (150, 300)], ids=["own size", "stored", "tall"])
def test_maps_stay_over_the_image_to_less_than_a_pixel(experts, source, only, operation, size, stored):
    only(operation)
    jitter = JointAugmentation(experts, size=size, num_ops=1)
    pixels = ramps(*stored)
    for seed in range(6):
        sample = augment(jitter, source, {"normal": pixels, "segmentation": regions(pixels)}, seed)
        assert np.abs(shift(*sample)).max() < 0.7
        assert np.abs(differences(*sample).mean(axis=0)).max() < 0.5
        assert np.abs(differences(*sample)).max() <= 3


def test_maps_stay_over_the_image_through_several_operations(experts, source, labels, only):
    only(*GEOMETRIC, "identity")
    jitter = JointAugmentation(experts, size=(480, 480), num_ops=3)
    for seed in range(20):
        sample = augment(jitter, source, labels, seed)
        assert np.abs(differences(*sample).mean(axis=0)).max() < 1
        assert np.abs(differences(*sample)).max() <= 5


def test_crop_is_the_same_for_image_and_maps(experts, source, labels, monkeypatch):
    rectangle = {"top": 13, "left": 101, "height": 333, "width": 457}
    monkeypatch.setattr(v2.RandomResizedCrop, "make_params", lambda self, flat_inputs: rectangle)
    image, cropped = JointAugmentation(experts, (384, 384), flip_probability=0.0, num_ops=0)(source, labels)

    box = (101, 13, 101 + 457, 13 + 333)
    np.testing.assert_array_equal(image, source.crop(box).resize((384, 384), Image.Resampling.BICUBIC))
    for name, values in [("depth", labels["depth"]), ("segmentation", labels["segmentation"])]:
        nearest = Image.fromarray(values).crop(box).resize((224, 224), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(cropped[name], nearest)


def test_flip_is_the_same_for_image_and_maps(experts, source, labels):
    straight, straight_labels = augment(whole_image(experts, num_ops=0), source, labels)
    flipped, flipped_labels = augment(whole_image(experts, num_ops=0, flip_probability=1.0), source, labels)

    np.testing.assert_array_equal(flipped, np.asarray(straight)[:, ::-1])
    np.testing.assert_array_equal(flipped_labels["depth"], straight_labels["depth"][:, ::-1])
    np.testing.assert_array_equal(flipped_labels["detection"]["ids"], straight_labels["detection"]["ids"][:, ::-1])


def test_half_of_the_samples_are_flipped(experts, source):
    jitter = JointAugmentation(experts, (16, 16), num_ops=0)
    torch.manual_seed(0)
    flipped = [bool(np.diff(np.asarray(jitter(source)[0])[8, [0, -1], 0].astype(int))[0] < 0) for _ in range(200)]
    assert 70 < sum(flipped) < 130


@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.2, 0.3), (0.5, 1.5)])
def test_crop_takes_a_share_of_the_area_within_the_scale(experts, source, labels, scale):
    jitter = JointAugmentation(experts, (32, 32), scale=scale, num_ops=0)
    shares = []
    for seed in range(40):
        normal = augment(jitter, source, {"normal": labels["normal"]}, seed)[1]["normal"]
        shares.append(np.prod((np.ptp(normal[..., :2], axis=(0, 1)) + 1.0) / 256))
    assert scale[0] - 0.02 < min(shares) < scale[0] + 0.1
    assert min(scale[1], 1) - 0.1 < max(shares) < min(scale[1], 1) + 0.02


def test_identity_gives_the_inputs_of_evaluation(experts, source, labels):
    processor = PrismerImageProcessor(experts=experts, size={"height": 96, "width": 96}, expert_size=64)
    unchanged = processor(*whole_image(experts, (96, 96), expert_size=64, num_ops=0)(source, labels))
    for name, tensor in processor(source, labels).items():
        assert torch.equal(tensor, unchanged[name]), name


# ---- RandAugment ----


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        ("shear_x", lambda image, sign: sheared(image, 0.15 * sign, 0)),
        ("shear_y", lambda image, sign: sheared(image, 0, 0.15 * sign)),
        ("translate_x", lambda image, sign: F.affine(image, 0, [sign * 0.165 * 200, 0], 1, [0, 0])),
        ("translate_y", lambda image, sign: F.affine(image, 0, [0, sign * 0.165 * 200], 1, [0, 0])),
        ("rotate", lambda image, sign: F.rotate(image, 15 * sign)),
    ],
)
def test_geometric_operation_equals_torchvisions(experts, source, only, operation, reference):
    only(operation)
    unchanged = whole_image(experts, (200, 200), num_ops=0)(source)[0]
    found = set()
    for seed in range(12):
        moved = np.asarray(augment(whole_image(experts, (200, 200), num_ops=1), source, None, seed)[0])
        # Pillow's affine operation works in fixed point, ours does not: a few pixels may round otherwise
        agree = {sign: (moved == np.asarray(reference(unchanged, sign))).mean() for sign in (-1, 1)}
        assert max(agree.values()) > 0.99
        found.add(max(agree, key=agree.get))
    assert found == {-1, 1}


def sheared(image, x, y):
    shear = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(image, 0, [0, 0], 1, shear, center=[0, 0])


@pytest.mark.parametrize(
    ("operation", "magnitude", "reference"),
    [
        ("identity", 5, lambda image: image),
        ("autocontrast", 5, F.autocontrast),
        ("equalize", 5, F.equalize),
        ("brightness", 0, lambda image: F.adjust_brightness(image, 0.1)),
        ("brightness", 5, lambda image: image),
        ("brightness", 9, lambda image: F.adjust_brightness(image, 0.1 + 1.8 * 0.9)),
        ("sharpness", 0, lambda image: F.adjust_sharpness(image, 0.1)),
        ("sharpness", 5, lambda image: image),
        ("sharpness", 10, lambda image: F.adjust_sharpness(image, 1.9)),
    ],
)
def test_photometric_operation_changes_only_the_image(experts, labels, only, operation, magnitude, reference):
    source = Image.fromarray(np.random.default_rng(0).integers(20, 200, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    only(operation)
    image, moved = whole_image(experts, num_ops=1, magnitude=magnitude)(source, labels)
    unchanged, unmoved = whole_image(experts, num_ops=0)(source, labels)

    np.testing.assert_array_equal(image, reference(unchanged))
    np.testing.assert_equal(moved, unmoved)


def test_operations_are_drawn_equally_often():
    torch.manual_seed(0)
    draw = augmentation.JointRandAugment(num_ops=2).make_params
    source = [Image.new("RGB", (4, 4))]
    names = [name for _ in range(1000) for name, _ in draw(source)["operations"]]

    assert sorted(set(names)) == sorted(GEOMETRIC + PHOTOMETRIC)
    assert len(names) == 2000
    assert all(150 < names.count(name) < 250 for name in set(names))


def test_pixels_from_outside_are_0_or_background(experts, only):
    only("translate_x")
    source = Image.new("RGB", (WIDTH, HEIGHT), (200, 200, 200))
    grey = np.full((HEIGHT, WIDTH), 200, np.uint8)
    labels = {
        "depth": grey,
        "normal": np.stack([grey] * 3, axis=-1),
        "segmentation": grey % 100,
        "detection": {"ids": grey % 100, "classes": [1]},
    }
    image, moved = whole_image(experts, (480, 480), num_ops=1)(source, labels)

    image = np.asarray(image)
    assert ((image == 0) | (image == 200)).all()
    assert (image == 0).mean() == pytest.approx(0.165, abs=1 / 480)
    for values, fill, inside in [
        (moved["depth"], 0, 200),
        (moved["normal"], 0, 200),
        (moved["segmentation"], 255, 0),
        (moved["detection"]["ids"], 255, 0),
    ]:
        assert set(np.unique(values)) == {fill, inside}
        assert (values == fill).mean() == pytest.approx(0.165, abs=1 / 224)


# ---- labels ----


def test_maps_get_the_experts_size_and_keep_their_kind(experts, source, labels):
    image, moved = augment(JointAugmentation(experts, (48, 64), expert_size=40), source, labels)

    assert (image.mode, image.size) == ("RGB", (64, 48))
    maps = {**moved, "detection": moved["detection"]["ids"], "ocr": moved["ocr"]["ids"]}
    assert {name: values.shape for name, values in maps.items()} == {
        **dict.fromkeys(labels, (40, 40)),
        "normal": (40, 40, 3),
    }
    assert all(type(values) is np.ndarray and values.dtype == np.uint8 for values in maps.values())


def test_label_maps_keep_their_ids(experts, source):
    known = [0, 3, 17, 131, 132]
    ids = np.random.default_rng(0).choice(known, (HEIGHT, WIDTH)).astype(np.uint8)
    jitter = JointAugmentation(experts, (64, 64))
    found = {
        i
        for seed in range(20)
        for i in np.unique(augment(jitter, source, {"segmentation": ids}, seed)[1]["segmentation"])
    }
    assert found == {*known, 255}


def test_flipped_and_rotated_normals_keep_their_values(experts, source, only):
    only("rotate")
    normal = np.broadcast_to(np.array([200, 40, 90], np.uint8), (HEIGHT, WIDTH, 3))
    moved = augment(whole_image(experts, flip_probability=1.0), source, {"normal": normal})[1]["normal"]
    assert set(map(tuple, moved.reshape(-1, 3).tolist())) == {(200, 40, 90), (0, 0, 0)}


def test_classes_words_and_features_stay_the_same(experts, source, labels):
    moved = augment(JointAugmentation(experts, (64, 64)), source, labels)[1]
    assert moved["detection"].keys() == {"ids", "classes"}
    assert moved["ocr"].keys() == {"ids", "words", "features"}
    assert moved["detection"]["classes"] is labels["detection"]["classes"]
    assert moved["ocr"]["words"] is labels["ocr"]["words"]
    assert moved["ocr"]["features"] is labels["ocr"]["features"]


def test_missing_expert_stays_missing(experts, source, labels):
    jitter = JointAugmentation(experts, (64, 64))
    moved = augment(jitter, source, {"depth": None, "edge": labels["edge"]})[1]
    assert moved["depth"] is None
    assert moved.keys() == {"depth", "edge"}
    assert jitter(source, None)[1] is None


def test_sample_itself_is_unchanged(experts, source, labels):
    before = pickle.dumps((np.asarray(source), {**labels, "edge": np.asarray(labels["edge"])}))
    augment(JointAugmentation(experts, (64, 64)), source, labels)
    assert pickle.dumps((np.asarray(source), {**labels, "edge": np.asarray(labels["edge"])})) == before


@pytest.mark.parametrize("convert", [torch.from_numpy, Image.fromarray], ids=["tensor", "PIL image"])
def test_maps_can_be_tensors_and_pil_images(experts, source, labels, convert):
    jitter = JointAugmentation(experts, (64, 64))
    given = {"depth": convert(labels["depth"].copy()), "segmentation": {"ids": convert(labels["segmentation"])}}
    moved = augment(jitter, source, given)[1]
    expected = augment(jitter, source, {name: labels[name] for name in given})[1]
    np.testing.assert_array_equal(moved["depth"], expected["depth"])
    np.testing.assert_array_equal(moved["segmentation"]["ids"], expected["segmentation"])


@pytest.mark.parametrize("side", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_and_narrow_images_pass(experts, side):
    pixels = np.zeros((side[1], side[0], 3), np.uint8)
    jitter = JointAugmentation(experts, (32, 32), expert_size=16)
    for seed in range(8):
        for known in (side, (224, 224)):
            label = np.zeros(known[::-1], np.uint8)
            image, moved = augment(jitter, Image.fromarray(pixels), {"depth": label, "segmentation": label}, seed)
            assert image.size == (32, 32)
            assert moved["depth"].shape == moved["segmentation"].shape == (16, 16)


# ---- random numbers, workers ----


def test_torchs_seed_repeats_a_sample(experts, source, labels):
    jitter = JointAugmentation(experts, (64, 64))
    first = augment(jitter, source, labels, seed=3)
    random.seed(1), np.random.seed(1)
    again = augment(jitter, source, labels, seed=3)
    other = augment(jitter, source, labels, seed=4)

    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1]["depth"], other[1]["depth"])


class Samples(torch.utils.data.Dataset):
    def __init__(self, *sample):
        self.jitter, self.source, self.labels = sample

    def __len__(self):
        return 2

    def __getitem__(self, i):
        image, labels = augment(self.jitter, self.source, self.labels, seed=i)
        return np.asarray(image), labels


def test_augmentation_works_in_workers_of_a_data_loader(experts, source, labels):
    # as a worker that is not forked gets it
    samples = pickle.loads(pickle.dumps(Samples(JointAugmentation(experts, (64, 64)), source, labels)))
    for i, (image, moved) in enumerate(DataLoader(samples, batch_size=None, num_workers=1, collate_fn=lambda x: x)):
        expected, expected_labels = samples[i]
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_equal(moved, expected_labels)


# ---- errors ----


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (8, 8)), "image is a PIL image in mode L; a PIL image in mode RGB is accepted"),
        (np.zeros((8, 8, 3), np.uint8), "image is ndarray; a PIL image in mode RGB is accepted"),
    ],
)
def test_wrong_image_is_refused(experts, image, message):
    with pytest.raises(TypeError, match=message):
        JointAugmentation(experts, (8, 8))(image)


def test_wrong_label_is_named(experts, source):
    jitter = JointAugmentation(experts, (8, 8))
    with pytest.raises(ValueError, match="labels has 'motion'; the experts are: depth"):
        jitter(source, {"motion": np.zeros((8, 8), np.uint8)})
    with pytest.raises(ValueError, match="depth label has 3 channels; the config's expert 'depth' has 1"):
        jitter(source, {"depth": np.zeros((8, 8, 3), np.uint8)})
    with pytest.raises(ValueError, match="detection label is a bare map"):
        jitter(source, {"detection": np.zeros((8, 8), np.uint8)})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("scale", (1.0, 0.5)), ("ratio", (0, 1)), ("num_ops", -1), ("magnitude", 11), ("num_magnitude_bins", 0)],
)
def test_wrong_setting_is_named(experts, argument, value):
    with pytest.raises(ValueError, match=argument):
        JointAugmentation(experts, (8, 8), **{argument: value})
