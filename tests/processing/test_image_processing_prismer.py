"""The image processor prepares an image and its expert maps as the published checkpoints expect."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch.utils.data import default_collate
from transformers import AutoImageProcessor, CLIPImageProcessor, CLIPImageProcessorPil

from modeling_prismer.processing import PrismerImageProcessor, PrismerImageProcessorTorchvision


GOLDEN = Path(__file__).parents[1] / "fixtures" / "preprocessing"
BOTH = [PrismerImageProcessor, PrismerImageProcessorTorchvision]


def golden(name):
    return load_file(GOLDEN / name / "raw.safetensors"), load_file(GOLDEN / name / "expected.safetensors")


def golden_labels(raw):
    return {
        "depth": raw["depth"],
        "normal": raw["normal"],
        "edge": raw["edge"],
        "segmentation": raw["seg_coco"],
        "detection": {"ids": raw["obj_detection"], "classes": list(range(255))},
        "ocr": {"ids": raw["ocr_detection"], "features": np.ones((255, 8), np.float32)},
    }


@pytest.fixture
def labels():
    """One label of each expert, of 6×8 pixels."""
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    return {
        "depth": pixels,
        "normal": np.stack([pixels, pixels + 1, pixels + 2], axis=-1),
        "edge": pixels,
        "segmentation": {"ids": pixels},
        "detection": {"ids": np.where(pixels < 3, pixels, 255).astype(np.uint8), "classes": [5, 700, 0]},
        "ocr": {
            "ids": np.where(pixels < 2, pixels, 255).astype(np.uint8),
            "words": ["go", "stop"],
            "features": np.arange(16, dtype=np.float32).reshape(2, 8),
        },
    }


# ---- golden ----


@pytest.mark.parametrize("name", ["enlarged", "shrunk"])
@pytest.mark.parametrize("side", [96, 224])
def test_pixel_values_equal_the_recording(name, side):
    raw, expected = golden(name)
    pixel_values = PrismerImageProcessor(size=side)(raw["image"])["pixel_values"]
    assert pixel_values.dtype == torch.float32
    assert np.abs(pixel_values[0].numpy() - expected[f"rgb_{side}"]).max() <= 1e-5


@pytest.mark.parametrize("name", ["enlarged", "shrunk"])
@pytest.mark.parametrize("image_processor_class", BOTH)
def test_expert_maps_equal_the_recording(name, image_processor_class, experts):
    raw, expected = golden(name)
    image_processor = image_processor_class(experts=experts, max_instances=255, max_words=255)
    inputs = image_processor(raw["image"], golden_labels(raw))
    for expert in ("depth", "normal", "edge"):
        assert np.abs(inputs[f"{expert}_values"][0].numpy() - expected[expert]).max() <= 1e-5
    for expert, recorded in [("segmentation", "seg_coco"), ("detection", "obj_detection"), ("ocr", "ocr_detection")]:
        assert (inputs[f"{expert}_ids"].numpy() == expected[f"{recorded}_ids"]).all()


@pytest.mark.parametrize("name", ["enlarged", "shrunk"])
def test_torchvision_differs_from_pillow_as_in_transformers(name):
    raw, expected = golden(name)
    size = {"size": {"height": 96, "width": 96}, "crop_size": {"height": 96, "width": 96}}
    theirs = CLIPImageProcessor(**size)(raw["image"], return_tensors="pt")["pixel_values"]
    theirs_pillow = CLIPImageProcessorPil(**size)(raw["image"], return_tensors="pt")["pixel_values"]
    ours = PrismerImageProcessorTorchvision(size=96)(raw["image"])["pixel_values"]
    assert torch.equal(ours, theirs)
    difference = (ours[0] - torch.from_numpy(expected["rgb_96"])).abs().max()
    assert difference <= max((theirs - theirs_pillow).abs().max(), 0.0151)


# ---- tensors ----


@pytest.mark.parametrize("image_processor_class", BOTH)
def test_every_tensor_has_its_shape_and_type(image_processor_class, experts, labels, image):
    image_processor = image_processor_class(experts=experts, size=32, expert_size=16)
    inputs = image_processor([image, image], [labels, None])
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items()} == {
        "pixel_values": ((2, 3, 32, 32), torch.float32),
        "depth_values": ((2, 1, 16, 16), torch.float32),
        "normal_values": ((2, 3, 16, 16), torch.float32),
        "segmentation_ids": ((2, 16, 16), torch.uint8),
        "edge_values": ((2, 1, 16, 16), torch.float32),
        "detection_ids": ((2, 16, 16), torch.uint8),
        "detection_classes": ((2, 128), torch.int64),
        "ocr_ids": ((2, 16, 16), torch.uint8),
        "ocr_features": ((2, 128, 8), torch.float32),
        "expert_mask": ((2, 6), torch.bool),
    }
    assert list(inputs) == image_processor.model_input_names


def test_a_missing_expert_is_masked_and_padded(image_processor, labels, image):
    del labels["depth"]
    labels["segmentation"] = labels["detection"] = labels["ocr"] = None
    inputs = image_processor(image, labels)
    assert inputs["expert_mask"].tolist() == [[False, True, False, True, False, False]]
    assert (inputs["depth_values"] == 0).all()
    for expert in ("segmentation", "detection", "ocr"):
        assert (inputs[f"{expert}_ids"] == 255).all()
    assert (inputs["detection_classes"] == 0).all() and (inputs["ocr_features"] == 0).all()


def test_without_labels_every_expert_is_masked(image_processor, image):
    assert not image_processor([image, image])["expert_mask"].any()


def test_without_experts_there_are_only_pixels(image):
    assert list(PrismerImageProcessor()(image)) == ["pixel_values"]


def test_classes_and_features_fill_the_first_rows(image_processor, labels, image):
    inputs = image_processor(image, labels)
    assert inputs["detection_classes"][0, :4].tolist() == [5, 700, 0, 0]
    assert torch.equal(inputs["ocr_features"][0, :2], torch.arange(16.0).reshape(2, 8))
    assert (inputs["ocr_features"][0, 2:] == 0).all()


def test_an_image_without_text_is_not_a_missing_expert(image_processor, image):
    nothing = {"ids": np.full((6, 8), 255, np.uint8), "words": [], "features": np.zeros((0, 8), np.float32)}
    inputs = image_processor(image, {"ocr": nothing})
    assert inputs["expert_mask"][0, 5] and (inputs["ocr_ids"] == 255).all()


def test_a_sample_does_not_depend_on_its_batch(image_processor, labels, image):
    images, given = [image, image[:9, :5]], [labels, {"depth": labels["edge"]}]
    batch = image_processor(images, given)
    for row in range(2):
        alone = image_processor(images[row], given[row])
        assert all(torch.equal(alone[name][0], batch[name][row]) for name in batch)


def test_samples_stack_in_the_default_collator(image_processor, labels, image):
    samples = [image_processor(image, given) for given in (labels, None)]
    batch = default_collate([{name: tensor[0] for name, tensor in sample.items()} for sample in samples])
    assert batch["expert_mask"].shape == (2, 6)


def test_numpy_arrays_are_returned_on_request(image_processor, labels, image):
    tensors, arrays = image_processor(image, labels), image_processor(image, labels, return_tensors="np")
    for name in tensors:
        assert isinstance(arrays[name], np.ndarray) and (arrays[name] == tensors[name].numpy()).all()
    assert arrays["segmentation_ids"].dtype == np.uint8


@pytest.mark.parametrize("size", [(1, 1), (20, 20000), (20000, 20)])
def test_extreme_images_are_prepared(image_processor, size):
    image = Image.new("L", size, 255)
    inputs = image_processor(image, {"depth": image, "segmentation": np.zeros(size[::-1], np.uint8)})
    white = (1 - np.array(image_processor.image_mean)) / image_processor.image_std
    assert np.abs(inputs["pixel_values"][0].numpy() - white[:, None, None]).max() < 1e-5
    assert (inputs["segmentation_ids"] == 0).all()


def test_a_painted_map_is_never_built(experts):
    image_processor = PrismerImageProcessor(experts=experts)
    maps = np.zeros((480, 640), np.uint8)
    labels = {"segmentation": maps, "detection": {"ids": maps, "classes": [1]}}
    image_processor(maps, labels)
    tracemalloc.start()
    image_processor(maps, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 224 * 224, "not even one painted map of bytes would fit"


# ---- labels as people have them ----


def test_a_dense_map_is_stretched_over_all_its_channels(image_processor, image):
    normal = np.zeros((16, 16, 3), np.uint8)
    normal[..., 1], normal[..., 2] = 51, 102
    values = image_processor(image, {"normal": normal})["normal_values"][0, :, 0, 0]
    assert torch.allclose(values, torch.tensor([-1.0, 0.0, 1.0]), atol=1e-5)


def test_a_constant_dense_map_gives_no_nan(image_processor, image):
    values = image_processor(image, {"depth": np.full((4, 4), 7, np.uint8)})["depth_values"]
    assert torch.equal(values, torch.full_like(values, -1))


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda a: torch.from_numpy(a).long(),  # what `datasets` makes of uint8
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: a.transpose(2, 0, 1),
        lambda a: a.astype(np.int16),
        Image.fromarray,
    ],
)
def test_a_map_may_be_an_array_a_tensor_or_an_image(image_processor, labels, image, convert):
    expected = image_processor(image, {"normal": labels["normal"]})["normal_values"]
    assert torch.equal(image_processor(image, {"normal": convert(labels["normal"])})["normal_values"], expected)


def test_class_ids_may_be_bare_or_have_a_palette(image_processor, labels, image):
    ids = labels["segmentation"]["ids"]
    palette_image = Image.fromarray(ids)
    palette_image.putpalette(list(range(255, 0, -1)))
    expected = image_processor(image, {"segmentation": {"ids": ids}})["segmentation_ids"]
    for label in (ids, ids[None], ids[..., None], torch.from_numpy(ids), palette_image, {"ids": palette_image}):
        assert torch.equal(image_processor(image, {"segmentation": label})["segmentation_ids"], expected)


def test_a_custom_expert_of_two_channels_is_prepared(image):
    image_processor = PrismerImageProcessor(experts=[{"name": "flow", "kind": "dense", "channels": 2}], expert_size=4)
    flow = np.zeros((2, 4, 4), np.uint8)
    flow[1] = 255
    values = image_processor(image, {"flow": flow})["flow_values"][0]
    assert torch.allclose(values, torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 4, 4), atol=1e-5)


@pytest.mark.parametrize("expert, setting", [("detection", "max_instances"), ("ocr", "max_words")])
def test_surplus_items_become_background_with_one_warning(image_processor, image, expert, setting, warnings_once):
    ids = np.arange(16, dtype=np.uint8).repeat(16).reshape(16, 16)
    features = np.arange(16, dtype=np.float32)[:, None].repeat(8, axis=1)
    label = {"ids": ids, "classes": list(range(16)), "features": features}
    for _ in range(2):
        inputs = image_processor(image, {expert: label}, **{setting: 5})
    assert inputs[f"{expert}_ids"][0, :, 0].tolist() == [0, 1, 2, 3, 4] + [255] * 11
    items = inputs["detection_classes"][0] if expert == "detection" else inputs["ocr_features"][0, :, 0]
    assert items.tolist() == [0, 1, 2, 3, 4]
    assert len(warnings_once()) == 1
    assert f"more than 5 entries of the expert '{expert}'" in warnings_once()[0]
    assert f"({setting}=5)" in warnings_once()[0]


def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"depth": zeros(6, 8, 3)}, "depth label has 3 channels; the config's expert 'depth' has 1"),
        ({"normal": zeros(6, 8)}, "normal label has 1 channels; the config's expert 'normal' has 3"),
        ({"depth": zeros(1, 1, 6, 8)}, r"depth label has shape \(1, 1, 6, 8\); \(H, W\), \(H, W, C\)"),
        ({"depth": zeros(0, 8)}, r"depth label has an empty map: its shape is \(0, 8\)"),
        ({"depth": zeros(6, 8, dtype=np.float32)}, "depth label has float32 values; 8-bit integers, 0 to 255, are"),
        ({"depth": zeros(6, 8, dtype=np.int32) - 1}, "depth label has values from -1 to -1; 0 to 255 is accepted"),
        ({"depth": zeros(6, 8, dtype=np.float16) + np.inf}, "depth label has NaN or inf; 8-bit integers, 0 to"),
        (
            {"segmentation": zeros(6, 8, dtype=bool)},
            "segmentation label has bool ids; integers are accepted; 255",
        ),
        ({"segmentation": zeros(6, 8, dtype=np.float32)}, "segmentation label has float32 ids; integers are accepted"),
        ({"detection": {"ids": zeros(6, 8, dtype=np.float64), "classes": []}}, "detection label has float64 ids"),
        ({"segmentation": zeros(6, 8, 3)}, r"segmentation label has ids of shape \(6, 8, 3\); one id for each pixel"),
        ({"segmentation": {"map": zeros(6, 8)}}, "segmentation label has no 'ids'; its keys are: map"),
        ({"detection": zeros(6, 8)}, "detection label is a bare map; {'ids': map, 'classes': …} is needed"),
        ({"detection": {"ids": zeros(6, 8)}}, "detection label has no 'classes'; its keys are: ids"),
        (
            {"detection": {"ids": zeros(6, 8), "classes": [722]}},
            "detection label has the class 722; .* has 722 classes",
        ),
        ({"detection": {"ids": zeros(6, 8), "classes": [-1]}}, "has the class -1; class numbers start at 0"),
        ({"detection": {"ids": zeros(6, 8), "classes": ["cat"]}}, "'classes' that are not a list of class numbers"),
        ({"ocr": {"ids": zeros(6, 8), "words": ["a"]}}, "ocr label has no 'features'; its keys are: ids, words"),
        (
            {"ocr": {"ids": zeros(6, 8), "features": zeros(1, 64)}},
            r"ocr label has features of shape \(1, 64\); \(number of words, 8\) is needed",
        ),
        (
            {"ocr": {"ids": zeros(6, 8), "features": zeros(1, 8, dtype=np.float32) + np.nan}},
            "ocr label has NaN or inf in its features; accepted are finite numbers",
        ),
        (
            {"ocr": {"ids": zeros(6, 8), "words": ["a", "b"], "features": zeros(1, 8)}},
            "ocr label has 2 words and 1 features; they must be equal",
        ),
        (
            {"dept": zeros(6, 8)},
            "expert_labels has 'dept'; the config's experts are: depth, normal, segmentation, edge, detection, ocr",
        ),
        ([{}, {}], "expert_labels has 2 entries for 1 images; one for each image is needed"),
    ],
)
def test_a_wrong_label_is_named_with_the_accepted_form(image_processor, image, labels, message):
    with pytest.raises(ValueError, match=message):
        image_processor(image, labels)


# Ids as a narrow and a wide type hold them; 255 does not fit into int8, which has -1 in its place.
SIGNED = np.array([[0, 1, 2], [-1, -128, 100]])
WIDE = np.array([[0, 1, 2], [255, -1, 100]])
HUGE = np.array([[0, 1, 2], [1 << 15, -(1 << 40), 1 << 62]])
INTEGERS = [(SIGNED, "int8"), (SIGNED, "int16"), (SIGNED, "int32"), (SIGNED, "int64")]
INTEGERS += [(WIDE, "int16"), (WIDE, "int32"), (WIDE, "int64"), (HUGE, "int64")]


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("ids, dtype", INTEGERS)
@pytest.mark.parametrize("expert", ["segmentation", "detection", "ocr"])
def test_ids_mean_the_same_in_every_integer_type(image, expert, ids, dtype, convert):
    description = {"name": expert, "kind": "label", "channels": 8}
    description |= {"segmentation": {"num_classes": 2}, "detection": {"num_classes": 7, "instances": True}}.get(
        expert, {}
    )
    image_processor = PrismerImageProcessor(experts=[description], expert_size=3)
    others = {"classes": [5, 6], "features": np.ones((2, 8), np.float32)}
    of_8_bits = np.array([[0, 1, 255], [255, 255, 255]], np.uint8)
    expected = image_processor(image, {expert: {"ids": of_8_bits, **others}})
    assert expected[f"{expert}_ids"][0, 0].tolist() == [0, 1, 255]
    found = image_processor(image, {expert: {"ids": convert(ids.astype(dtype)), **others}})
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "label, message",
    [
        ({"segmentation": zeros(6, 8) + 140}, "segmentation label has ids that are not among its classes"),
        (
            {"detection": {"ids": zeros(6, 8) + 2, "classes": [1, 1]}},
            "detection label has ids without an entry in 'classes'",
        ),
        (
            {"ocr": {"ids": zeros(6, 8) + 1, "features": zeros(1, 8)}},
            "ocr label has ids without an entry in 'features'",
        ),
    ],
)
def test_ids_without_a_meaning_are_background(image_processor, image, label, message, warnings_once):
    for _ in range(2):
        inputs = image_processor(image, label)
    assert (inputs[f"{next(iter(label))}_ids"] == 255).all()
    assert warnings_once() == [f"{message}: they become background."]


@pytest.mark.parametrize(
    "label, message",
    [
        ({"depth": np.full((6, 8), np.nan)}, "depth label of sample 1 has NaN or inf"),
        ({"normal": zeros(6, 8)}, "normal label of sample 1 has 1 channels; the config's expert 'normal' has 3"),
        ({"detection": {"ids": zeros(6, 8)}}, "detection label of sample 1 has no 'classes'; its keys are: ids"),
        (
            {"ocr": {"ids": zeros(6, 8), "features": np.full((1, 8), np.inf)}},
            "ocr label of sample 1 has NaN or inf in its features",
        ),
    ],
)
def test_in_a_batch_the_sample_is_named(image_processor, image, label, message):
    with pytest.raises(ValueError, match=message):
        image_processor([image, image, image], [None, label, None])


def test_labels_of_a_wrong_type_are_refused(image_processor, image):
    with pytest.raises(TypeError, match="depth label has values of type list; a NumPy array, a torch tensor or a PIL"):
        image_processor(image, {"depth": [[1, 2]]})
    with pytest.raises(TypeError, match="expert_labels must be a dict {expert name: label}, or a list of them"):
        image_processor(image, [zeros(6, 8)])


# ---- settings ----


def test_a_wrong_description_of_an_expert_is_refused(experts):
    with pytest.raises(ValueError, match="experts has .*'map'.*; it needs a 'name' .* the 'kind' 'dense', 'label' or"):
        PrismerImageProcessor(experts=[{"name": "depth", "kind": "map", "channels": 1}])
    with pytest.raises(ValueError, match=r"experts is \['depth'\]; a list of descriptions is needed"):
        PrismerImageProcessor(experts=["depth"])
    with pytest.raises(ValueError, match="'depth' is described twice"):
        PrismerImageProcessor(experts=[experts[0], experts[0]])
    with pytest.raises(ValueError, match="'things' has 722 classes; a map of 8-bit ids has at most 255"):
        PrismerImageProcessor(experts=[{"name": "things", "kind": "label", "channels": 8, "num_classes": 722}])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": {"shortest_edge": 32}}, "size is .*'shortest_edge': 32.*; {'height': …, 'width': …} is needed"),
        (
            {"do_center_crop": True, "crop_size": 16},
            "do_center_crop is not supported: the expert maps would no longer",
        ),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"data_format": "channels_last"}, "data_format is 'channels_last'; the network reads 'channels_first'"),
    ],
)
def test_a_setting_that_would_move_the_maps_is_refused(image_processor, image, settings, message):
    with pytest.raises(ValueError, match=message):
        image_processor(image, **settings)


@pytest.mark.parametrize("image_processor_class", BOTH)
def test_without_resizing_the_images_keep_their_one_size(image_processor_class, image):
    image_processor = image_processor_class(do_resize=False)
    assert image_processor([image, image])["pixel_values"].shape == (2, 3, 24, 40)
    with pytest.raises(ValueError, match=r"do_resize is False and the images have several sizes \(20×24, 40×24\)"):
        image_processor([image, image[:, :20]])


@pytest.mark.parametrize("image_processor_class", BOTH)
def test_rescaling_and_normalising_can_be_switched_off(image_processor_class, image):
    image_processor = image_processor_class(do_resize=False, do_normalize=False)
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    assert torch.allclose(image_processor(image)["pixel_values"][0], pixels / 255)
    assert torch.equal(image_processor(image, do_rescale=False)["pixel_values"][0], pixels)


def test_the_pixel_limit_is_a_setting(image, tmp_path):
    Image.fromarray(image).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png' has 40×24 pixels; the limit is max_pixels=900"):
        PrismerImageProcessor(max_image_pixels=900)(tmp_path / "a.png")


@pytest.mark.parametrize("image_processor_class", BOTH)
def test_a_saved_image_processor_is_loaded(image_processor_class, experts, labels, image, tmp_path):
    saved = image_processor_class(experts=experts, size=32, expert_size=16, max_words=7, do_normalize=False)
    saved.save_pretrained(tmp_path)
    loaded = image_processor_class.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    expected, found = saved(image, labels), loaded(image, labels)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_auto_class_loads_the_pillow_backend(image_processor, tmp_path):
    image_processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is PrismerImageProcessor and loaded.to_dict() == image_processor.to_dict()


def test_settings_can_be_replaced_on_loading(image_processor, image, tmp_path):
    image_processor.save_pretrained(tmp_path)
    loaded = PrismerImageProcessor.from_pretrained(tmp_path, size={"height": 48, "width": 40}, experts=[])
    assert {name: tuple(tensor.shape) for name, tensor in loaded(image).items()} == {"pixel_values": (1, 3, 48, 40)}
