"""`ExpertSpec`: what it accepts, plain JSON, the names of tensors, and new classes."""

import dataclasses
import json
import logging

import pytest

from modeling_prismer import ExpertSpec, PrismerConfig
from modeling_prismer.conversion import onnx_generation
from modeling_prismer.expert_spec import (
    BACKGROUND,
    PUBLISHED_EXPERTS,
    is_expert_input,
    read_specs,
    seems_expert_input,
)
from modeling_prismer.processing import expert_labels


def dense(**changes):
    return {"name": "depth", "kind": "dense", "channels": 1, **changes}


def label(**changes):
    return {"name": "segmentation", "kind": "label", "channels": 64, **changes}


ACCEPTED = [
    dense(),
    dense(channels=3),
    dense(num_classes=None, class_names=None, instances=False),
    label(),
    label(num_classes=133),
    label(num_classes=2, class_names=["cat", "dog"]),
    label(num_classes=2, class_names=("cat", "cat")),
    label(num_classes=722, instances=True),
    label(instances=True),
    *(spec.to_dict() for spec in PUBLISHED_EXPERTS),
]
# with wrong values in fields that the processor reads
REFUSED = {
    "identifier such as 'depth'": [dense(name="my depth"), dense(name=None), dense(name="../x"), dense(name=7)],
    "accepted are 'dense', 'label' and 'features'": [dense(kind="video"), dense(kind=None), dense(kind=["dense"])],
    "channels=.*a positive integer is needed": [
        *(dense(channels=value) for value in (0, -1, None, "three", True, 1.0, float("nan")))
    ],
    "num_classes=.*a positive integer or None": [label(num_classes=value) for value in (0, -3, True, "ten", 2.0)],
    "cannot be named 'pixel': its tensors would be taken": [dense(name="pixel")],
    "cannot be named 'input': its tensors would be taken": [label(name="input")],
}
# with wrong values in the others
REFUSED_HERE = {
    "cannot be named 'mm_token_type'": [label(name="mm_token_type")],
    "cannot be named '(items|training)': torch's ModuleDict": [dense(name="items"), dense(name="training")],
    r"'segmentation' has unknown fields \['colour'\]; known: \['channels', 'class_names', ": [label(colour="red")],
    "belong to the kind 'label'": [dense(num_classes=3), dense(instances=True), dense(class_names=["cat"])],
    "instances='no'; True or False": [label(instances="no")],
    "has 2 class_names; num_classes=3 needs as many": [label(num_classes=3, class_names=["cat", "dog"])],
    "has 1 class_names; num_classes=None needs as many": [label(class_names=["cat"])],
    "class_names='cat'; a list of strings": [label(num_classes=3, class_names="cat")],
    r"class_names=\[7\]; a list of strings": [label(num_classes=1, class_names=[7])],
    "experts has the entry 'depth'; a dict such as {'name': 'depth'": ["depth", None],
}


def pairs(refused):
    return [(description, message) for message, descriptions in refused.items() for description in descriptions]


@pytest.mark.parametrize("description, message", pairs(REFUSED) + pairs(REFUSED_HERE))
def test_a_wrong_description_is_refused(description, message):
    with pytest.raises(ValueError, match=message.replace("entry 'depth'", f"entry {description!r}")):
        ExpertSpec.from_dict(description)


@pytest.mark.parametrize("experts", ["depth", {"depth": 1}, None])
def test_experts_must_be_a_list(experts):
    with pytest.raises(ValueError, match=f"experts is a {type(experts).__name__}; a list of descriptions"):
        read_specs(experts)
    with pytest.raises(ValueError, match="'depth' is described twice"):
        read_specs([dense(), dense(channels=2)])


@pytest.mark.parametrize("description", ACCEPTED)
def test_a_spec_is_plain_json_without_defaults(description):
    spec = ExpertSpec.from_dict(description)
    saved = json.loads(json.dumps(spec.to_dict()))
    assert saved.items() <= json.loads(json.dumps(description)).items()
    assert None not in saved.values() and False not in saved.values()
    assert ExpertSpec.from_dict(saved) == spec and ExpertSpec.from_dict(spec) is spec


@pytest.mark.parametrize("description", ACCEPTED)
def test_the_processor_reads_what_the_spec_says(description):
    (fields,), spec = expert_labels.read_experts([description]), ExpertSpec.from_dict(description)
    for name in (*fields._fields, "is_dense", "tensor_suffixes"):
        assert (getattr(fields, name) or None) == (getattr(spec, name) or None), name


@pytest.mark.parametrize("description, _", pairs(REFUSED))
def test_the_processor_refuses_what_the_spec_refuses(description, _):
    with pytest.raises(ValueError, match="experts has {.*; it needs a 'name'"):
        expert_labels.read_experts([description])


def test_background_is_the_same_in_every_part():
    assert BACKGROUND == expert_labels.BACKGROUND == onnx_generation.BACKGROUND


@pytest.mark.parametrize(
    "spec, names, parts",
    [
        (ExpertSpec("normal", "dense", 3), ["normal_values"], ()),
        (ExpertSpec("parts", "label", 64, num_classes=9), ["parts_ids"], ()),
        (
            ExpertSpec("things", "label", 64, num_classes=9, instances=True),
            ["things_ids", "things_classes"],
            ["classes"],
        ),
        (ExpertSpec("ocr", "label", 64), ["ocr_ids", "ocr_features"], ["words", "features"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_names_of_tensors_and_parts_of_labels(spec, names, parts):
    assert spec.tensor_names == tuple(names) and spec.label_parts == tuple(parts)
    assert spec.is_dense == (spec.kind == "dense") != spec.is_label
    assert all(spec.owns(name) for name in names)
    assert spec.owns(f"{spec.name}_rows") and not spec.owns(f"my_{spec.name}_ids") and not spec.owns(spec.name)


def test_inputs_of_the_library_are_not_taken_for_an_experts():
    assert is_expert_input("depth_values", ["depth"]) and not is_expert_input("depth_values", ["edge"])
    for key in ("depth_values", "dept_ids", "thermal_rows", "thermal_values"):
        assert seems_expert_input(key, ["edge"]), key
    for key in ("edge_values", "pixel_values", "input_ids", "mm_token_type_ids", "image_features", "labels", "_ids"):
        assert not seems_expert_input(key, ["edge"]), key


def test_a_spec_cannot_be_changed():
    spec = ExpertSpec("parts", "label", 64, num_classes=2, class_names=["head", "tail"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.channels = 3
    assert len({spec, ExpertSpec.from_dict(spec.to_dict())}) == 1


def test_first_difference_is_named_without_class_names():
    spec = ExpertSpec("parts", "label", 64, num_classes=2, class_names=["head", "tail"])
    assert spec.difference(dataclasses.replace(spec, class_names=None)) is None
    assert spec.difference(dataclasses.replace(spec, instances=True)) == "instances"
    assert spec.difference(ExpertSpec("parts", "dense", 3)) == "kind"
    assert spec.difference(ExpertSpec("other", "dense", 3)) == "name"


def test_new_classes_make_a_new_spec(caplog):
    spec = ExpertSpec("parts", "label", 64, num_classes=2)
    assert spec.with_classes(2) == spec
    assert spec.with_classes(1, ["tail"]) == ExpertSpec("parts", "label", 64, 1, ["tail"])
    assert spec.with_classes(0) == ExpertSpec("parts", "label", 64)
    with caplog.at_level(logging.WARNING):
        assert spec.with_classes(3).num_classes == 3
    assert "3 rows of features for 'parts', which has num_classes=2" in caplog.text
    named = spec.with_classes(2, ("head", "tail"))
    assert named.with_classes(2).class_names == ("head", "tail")
    for rows, names, message in [
        (1, None, "1 rows of features for 'parts', whose ids go up to 1"),
        (3, None, "3 rows of features for the 2 class_names of 'parts'"),
        (2, ["one"], "1 class_names for the 2 rows of features for 'parts'"),
        (2, "ab", "class_names='ab'; a list of strings"),
    ]:
        with pytest.raises(ValueError, match=message):
            named.with_classes(rows, names)


def test_the_configuration_gives_its_experts_as_specs():
    config = PrismerConfig(experts=[dense(), label(num_classes=3)])
    assert config.expert_specs == config.vision_config.expert_specs
    assert config.expert_specs == [ExpertSpec("depth", "dense", 1), ExpertSpec("segmentation", "label", 64, 3)]
    config.experts[0]["channels"] = 0
    with pytest.raises(ValueError, match="'depth' has channels=0"):
        config.expert_specs  # noqa: B018
