"""`prismer verify` names what was broken, with the likely cause, and reports nothing about a sound model."""

import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path
from modeling_prismer.cli import app
from modeling_prismer.conversion import verification, verify_model
from modeling_prismer.conversion.class_tables import (
    difference_of_names,
    fault_of_order,
    fault_of_table,
    possible_orders,
)
from modeling_prismer.conversion.stem_inputs import examine_stem
from modeling_prismer.processing import JointAugmentation, image_processing_prismer
from modeling_prismer.processing.experts import CannyEdges, Expert, ExpertSuite, HashedNgrams
from scenes.labels import DETECTION_CLASSES
from scenes.render import CLASSES
from scenes.scenes import make_example
from tests.modeling_prismer.tiny import tiny_config, tiny_model


NUM_IMAGES = 12


@pytest.fixture(scope="session")
def scenes():
    """Images and the true labels of the trained experts."""
    examples = [make_example("test", index) for index in range(NUM_IMAGES)]
    labels = [copy.deepcopy(example["labels"]) for example in examples]
    for own in labels:
        own["detection"].pop("boxes")
        own["ocr"]["features"] = HashedNgrams()(own["ocr"]["words"])
    return {f"{i}.png": Image.fromarray(each["image"]) for i, each in enumerate(examples)}, labels


@functools.cache
def trained():
    return PrismerForConditionalGeneration.from_pretrained(pretrained_path(), dtype=torch.float32)


@pytest.fixture
def model():
    """A copy of the trained checkpoint."""
    return copy.deepcopy(trained())


@pytest.fixture
def verify(scenes, model, monkeypatch):
    """Verifies the checkpoint with changed labels, without texts. Returns what is wrong, by check."""
    monkeypatch.setattr(verification, "_texts", lambda *args: [])
    processor = PrismerProcessor.from_pretrained(pretrained_path(), experts=None)

    def verify(change=lambda labels: None, number=NUM_IMAGES, suite=None):
        images = dict(list(scenes[0].items())[:number])
        labels = copy.deepcopy(scenes[1][:number])
        for own in labels:
            change(own)
        processor.experts = suite
        found = verify_model(model, processor, images, labels)
        return {check.name: check.detail for check in found.problems}

    verify.processor = processor
    return verify


# ---- a sound model ----


@pytest.mark.parametrize("number", [4, 8, NUM_IMAGES])
def test_a_sound_model_is_not_reported(number, verify):
    assert verify(number=number) == {}


def test_live_experts_and_texts_of_a_sound_model(scenes, tmp_path):
    for name, image in list(scenes[0].items())[:4]:
        image.save(tmp_path / name)
    (tmp_path / "torn.png").write_bytes(b"torn")
    arguments = ("verify", "prismer-scenes", "--images", str(tmp_path), "--device", "cpu")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "torn.png is left out" in result.stderr and " NO " not in result.stdout
    for expert in ("depth", "normal", "segmentation", "edge", "detection", "ocr"):
        assert f"{expert}: maps" in result.stdout
    assert f"{tmp_path / '0.png'}: a " in result.stdout  # its caption


def test_maps_of_an_augmented_training_are_not_reported(scenes, model):
    """The statistics come from cropped, moved and rotated maps; whole maps are compared with them."""
    processor = PrismerProcessor.from_pretrained(pretrained_path(), experts=None).image_processor
    augmentation = JointAugmentation(processor.experts, size=128, expert_size=128)
    pairs = [augmentation(image, own) for _ in range(2) for image, own in zip(scenes[0].values(), scenes[1])]
    training = processor([image for image, _ in pairs], [own for _, own in pairs], return_tensors="pt")
    whole = processor(list(scenes[0].values()), scenes[1], return_tensors="pt")
    for spec in model.config.expert_specs:
        if spec.name not in ("depth", "edge", "segmentation"):
            continue
        stem = model.model.vision_model.expert_stems[spec.name].train()
        for norm in stem.norms:
            norm.reset_running_stats()
            norm.momentum = None
        suffix = spec.tensor_suffixes[0]
        with torch.no_grad():
            stem(**{suffix: training[f"{spec.name}_{suffix}"]})
        found = examine_stem(stem.eval(), spec, {suffix: whole[f"{spec.name}_{suffix}"]})
        assert found.cause is None, (spec.name, found)


# ---- grids of vectors ----


@pytest.fixture(scope="module")
def vectors():
    """A stem with the statistics of vectors, its expert, and vectors of other images of the same kind."""
    config = tiny_config(experts=[{"name": "features", "kind": "features", "channels": 12}])
    stem = tiny_model(config).model.vision_model.expert_stems["features"].train()
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(2, 1, 12, 1, 1, generator=generator) * 2
    mixing = torch.randn(12, 12, generator=generator) / 12**0.5

    def grids(number):
        smooth = torch.randn(number, 12, 3, 3, generator=generator)
        smooth = torch.nn.functional.interpolate(smooth, size=(8, 8), mode="bilinear")
        return torch.einsum("nchw,dc->ndhw", smooth, mixing) * spread + mean

    for norm in stem.norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        stem(values=grids(64))
    return stem.eval(), config.expert_specs[0], grids(16)


def test_vectors_of_the_same_encoder_are_not_reported(vectors):
    stem, spec, values = vectors
    found = examine_stem(stem, spec, {"values": values})
    assert found.cause is None, found


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda values: values * 10, "its vectors are about 10 times too large"),
        (lambda values: values / 30, "its vectors are about 30 times too small"),
        (lambda values: -values, "its vectors have the opposite sign"),
        (lambda values: values.flip(1), "its channels are in the reverse order"),
        (lambda values: (values - values.amin()) / (values.amax() - values.amin()) * 250, "the stored 8-bit numbers"),
        (lambda values: values.mean((0, 2, 3), keepdim=True).expand_as(values), "the same everywhere in every image"),
        (lambda values: values[:, torch.randperm(12, generator=torch.Generator().manual_seed(1))], "another expert"),
    ],
)
def test_wrong_vectors_are_reported_with_their_cause(vectors, change, cause):
    stem, spec, values = vectors
    assert cause in examine_stem(stem, spec, {"values": change(values)}).cause


# ---- broken maps ----


def invert(name):
    return lambda own: own.update({name: 255 - own[name]})


def change_normals(change):
    return lambda own: own.update(normal=np.ascontiguousarray(change(own["normal"])))


def flip_sign(normals):
    return np.stack([normals[..., 0], 255 - normals[..., 1], normals[..., 2]], -1)


def shift_classes(own):
    own["segmentation"] = own["segmentation"] + np.uint8(1)


def shuffle_classes(own):
    order = np.random.default_rng(1).permutation(len(CLASSES)).astype(np.uint8)
    own["segmentation"] = order[own["segmentation"]]


def shuffle_objects(own):
    order = np.random.default_rng(1).permutation(len(DETECTION_CLASSES))
    own["detection"]["classes"] = [int(order[number]) for number in own["detection"]["classes"]]


def enlarge_features(own):
    own["ocr"]["features"] = own["ocr"]["features"] * 10


BROKEN = {
    "inverted edges": ("edge", invert("edge"), "its maps are inverted"),
    "inverted depth": ("depth", invert("depth"), "its maps are inverted"),
    "inverted normals": ("normal", invert("normal"), "its maps are inverted"),
    "BGR normals": ("normal", change_normals(lambda n: n[..., ::-1]), "are 2, 1, 0 in place of 0, 1, 2"),
    "rolled normals": ("normal", change_normals(lambda n: n[..., [1, 2, 0]]), "are 1, 2, 0 in place of 0, 1, 2"),
    "normals that point down": ("normal", change_normals(flip_sign), "the opposite sign in channel 1"),
    "constant edges": ("edge", lambda own: own.update(edge=np.zeros((128, 128), np.uint8)), "are constant"),
    "classes from 1": ("segmentation", shift_classes, "class numbers are one too large"),
    "shuffled classes": ("segmentation", shuffle_classes, "hardly better than ids in random order"),
    "large features": ("ocr", enlarge_features, "about 10 times too large"),
    "no objects": ("detection", lambda own: own["detection"]["ids"].fill(255), "finds nothing in any image"),
    "no label": ("depth", lambda own: own.update(depth=None), "no image has a label"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_maps_are_named_with_the_cause(broken, verify):
    expert, change, cause = BROKEN[broken]
    problems = verify(change)
    assert list(problems) == [f"{expert}: maps"]
    assert cause in problems[f"{expert}: maps"]


@pytest.mark.parametrize("unit", [1, 255])
def test_values_that_are_not_normalised_are_named(unit, verify, monkeypatch):
    dense_tensors = image_processing_prismer._dense_tensors

    def without_stretching(labels, expert, size):
        (item,) = dense_tensors(labels, expert, size).items()
        return {item[0]: (item[1] + 1) / 2 * unit}

    monkeypatch.setattr(image_processing_prismer, "_dense_tensors", without_stretching)
    problems = verify(invert("edge"))
    assert list(problems) == ["depth: maps", "normal: maps", "edge: maps"]
    assert all(f"from 0 to {unit} instead of -1 to 1: they are not normalised" in each for each in problems.values())
    assert ["inverted" in each for each in problems.values()] == [False, False, True]  # both faults are named


def test_an_untrained_stem_is_named(verify, model):
    for norm in model.model.vision_model.expert_stems["edge"].norms:
        norm.reset_running_stats()
    assert "the stem was never trained" in verify()["edge: maps"]


def test_few_images_are_not_judged(verify):
    assert verify(BROKEN["inverted edges"][1], number=3) == {}


def test_an_expert_that_does_not_run_is_named(scenes, model, verify):
    """A broken expert, and one with other classes than the network, do not stop the others."""
    suite = ExpertSuite([CannyEdges(sigma=-1), Named("segmentation", ["wall", "floor"])])
    problems = verify(lambda own: own.pop("edge"), number=4, suite=suite)
    assert list(problems) == ["segmentation", "edge"]
    assert "the live expert 'segmentation' has num_classes=2" in problems["segmentation"]
    assert "the expert does not run" in problems["edge"]


# ---- classes ----

NAMES = {"segmentation": list(CLASSES), "detection": list(DETECTION_CLASSES)}


class Named(Expert):
    """An expert with class names; it never runs."""

    kind, channels = "label", 64

    def __init__(self, name, class_names):
        self.name, self.class_names = name, class_names
        self.num_classes, self.instances = len(class_names), name == "detection"


def set_names(model):
    for index, spec in enumerate(model.config.expert_specs):
        if spec.name in NAMES:
            names = NAMES[spec.name]
            model.config.experts[index] = spec.with_classes(len(names), names).to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_classes_in_another_order_are_named(name, verify, model):
    set_names(model)
    verify.processor.image_processor.experts = model.config.experts
    sound = ExpertSuite([Named(each, [name.title() for name in names]) for each, names in NAMES.items()])
    assert verify(suite=sound) == {}
    other = sorted(NAMES[name])
    problem = verify(suite=ExpertSuite([Named(name, other)]))[f"{name}: classes"]
    first = next(i for i, each in enumerate(other) if each != NAMES[name][i])
    assert "the classes are in another order" in problem
    assert f"class {first} is '{NAMES[name][first]}' in the table and '{other[first]}' in the expert" in problem


def test_labels_in_the_order_of_their_names_are_mended(verify, model):
    set_names(model)
    verify.processor.image_processor.experts = model.config.experts
    other = sorted(CLASSES)
    order = np.array([other.index(name) for name in CLASSES], np.uint8)
    suite = ExpertSuite([Named("segmentation", other)])
    problems = verify(lambda own: own.update(segmentation=order[own["segmentation"]]), suite=suite)
    assert "another order than the table (by their names)" in problems["segmentation: maps"]
    assert "without this fault" in problems["segmentation: maps"]


@pytest.mark.parametrize(
    "labels, difference",
    [
        (["person", "wall other merged", "Traffic_Light", "sky"], None),
        (["person", "wall", "traffic light", "sky"], None),  # spelt differently
        (["person", "traffic light", "wall-other-merged", "sky"], "the classes are in another order: 2 of 4"),
        (["background", "person", "wall-other-merged", "traffic light"], "the classes are shifted by one"),
        (["a", "b", "c", "sky"], "other classes: 3 of 4 names differ; class 0 is 'person' in the table and 'a'"),
        (["person"], "the table has 4 classes, the expert has 1"),
    ],
)
def test_names_are_compared(labels, difference):
    found = difference_of_names(["person", "wall-other-merged", "traffic light", "sky"], labels)
    assert found is None if difference is None else found.startswith(difference)


def test_orders_come_from_names():
    orders = possible_orders(["b", "c", "a"], ["a", "b", "x"])
    assert list(orders.values()) == [[2, 0, 255], [2, 0, 1]]
    assert possible_orders(["a", "b"], ["a", "b"]) == {} and possible_orders(None, ["a"]) == {}


def table_of(names):
    return torch.from_numpy(HashedNgrams()(names))


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda rows: None, None),
        (lambda rows: rows[1].fill_(torch.nan), "not finite"),
        (lambda rows: rows[1].zero_(), "1 rows are zero, first row 1"),
        (lambda rows: rows[[2, 3]].flip(0).clone(), "rows 0 and 3 have the same name 'cat'"),
        (lambda rows: rows[1].copy_(rows[2]), "'dog' and 'tree' have the same features"),
    ],
)
def test_a_table_must_fit_its_names(change, fault):
    names = ["cat", "dog", "tree", "cat"]
    rows = table_of(names)
    swapped = change(rows)
    if isinstance(swapped, torch.Tensor) and swapped.shape == (2, 64):
        rows[[2, 3]] = swapped
    found = fault_of_table(rows, torch.ones(64), names)
    assert found is None if fault is None else fault in found


def test_a_background_of_zeros_is_named():
    assert "without background_features.pt" in fault_of_table(table_of(["cat"]), torch.zeros(64), ["cat"])


def test_rows_in_another_order_than_their_names_are_named():
    names = ["cat", "dog", "tree", "car", "bus", "cat"]
    assert fault_of_order(table_of(names) * 0.9, names, HashedNgrams()) is None
    found = fault_of_order(table_of(names[::-1]), names, HashedNgrams())
    assert found.startswith("only 33% of the rows") and "row 1, 'dog', is closest to 'bus'" in found


# ---- settings and texts ----


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"do_rescale": False, "do_normalize": False}, "they are not normalised"),
        ({"do_normalize": False}, "mean and deviation are not removed"),
        ({"image_mean": [0.5] * 3}, "are not those of CLIP"),
        ({"size": {"height": 96, "width": 96}}, "resizes to 96×96, the network reads 128×128"),
    ],
)
def test_wrong_settings_of_the_image_are_named(settings, message, verify):
    for name, value in settings.items():
        setattr(verify.processor.image_processor, name, value)
    problems = verify(number=4)
    assert list(problems) == ["image"] and message in problems["image"]


def test_another_tokenizer_is_named(verify):
    verify.processor.tokenizer.pad_token = "</s>"
    assert "pad_token_id is 2 in the tokenizer, 1 in the config" in verify(number=4)["text"]


def test_weights_that_are_not_finite_are_named(verify, model):
    model.lm_head.dense.bias.data[0] = torch.inf
    assert "lm_head.dense.bias has numbers that are not finite" in verify(number=4)["weights"]


@pytest.mark.parametrize(
    "texts, message", [(["a cat"] * 4, "same text: 'a cat'"), (["", "a", "b", "c"], "1 of 4 are")]
)
def test_texts_that_say_nothing_are_reported(texts, message):
    check = verification._check_texts(texts)
    assert check.holds is False and message in check.detail


def test_a_failed_check_ends_the_command_with_1(scenes, tmp_path, monkeypatch):
    check = verification.Check("edge: maps", False, "its maps are inverted")
    found = verification.Verification([check], {"a.png": "a [red]cat[/red]"})
    monkeypatch.setattr("modeling_prismer.conversion.verify_model", lambda *args: found)
    next(iter(scenes[0].values())).save(tmp_path / "a.png")
    arguments = ("verify", "prismer-scenes", "--images", str(tmp_path), "--device", "cpu")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "1 checks failed: edge: maps" in result.stderr
    assert "a.png: a [red]cat[/red]" in result.stdout
