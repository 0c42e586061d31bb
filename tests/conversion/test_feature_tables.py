"""Tables of class features come from the published files in all their forms, or from names."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_prismer.conversion import (
    class_features_from_names,
    convert_original_checkpoint,
    read_feature_tables,
    save_class_features,
)


EXPERTS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "segmentation", "kind": "label", "channels": 4, "num_classes": 3},
    {"name": "detection", "kind": "label", "channels": 4, "num_classes": 5, "instances": True},
    {"name": "ocr", "kind": "label", "channels": 4},
]
SEGMENTATION = torch.arange(12.0).view(3, 4)
DETECTION = -torch.arange(20.0).view(5, 4)
BACKGROUND = torch.full((4,), 7.0)


def same(tables, **expected) -> bool:
    return tables.keys() == expected.keys() and all(torch.equal(tables[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "table",
    [
        SEGMENTATION,
        SEGMENTATION.half(),
        SEGMENTATION[:, None],
        torch.nn.Parameter(SEGMENTATION),
        list(SEGMENTATION),
        [row[None] for row in SEGMENTATION],
        SEGMENTATION.tolist(),
        dict(zip(["wall", "cat", "sky"], SEGMENTATION)),
        {2: SEGMENTATION[2], 0: SEGMENTATION[0], 1: SEGMENTATION[1]},
        {str(i): row for i, row in reversed(list(enumerate(SEGMENTATION)))},
        {i: {"features": row, "text": "word"} for i, row in enumerate(SEGMENTATION)},
        {"features": SEGMENTATION},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_every_form_of_a_table_is_read(table, in_a_file, tmp_path):
    if in_a_file:
        torch.save(table, tmp_path / "table.pt")
        table = tmp_path / "table.pt"
    tables = read_feature_tables({"segmentation": table, "background": BACKGROUND}, EXPERTS)
    assert same(tables, segmentation=SEGMENTATION, background=BACKGROUND)
    assert all(table.dtype == torch.float32 for table in tables.values())


def test_a_table_may_be_a_numpy_array_or_a_safetensors_file(tmp_path):
    save_file({"features": DETECTION}, tmp_path / "detector.safetensors")
    tables = {
        "segmentation": SEGMENTATION.numpy(),
        "detection": str(tmp_path / "detector.safetensors"),
        "background": BACKGROUND[None].numpy(),
    }
    tables = read_feature_tables(tables, EXPERTS)
    assert same(tables, segmentation=SEGMENTATION, detection=DETECTION, background=BACKGROUND)


def test_one_safetensors_file_may_hold_all_tables(tmp_path):
    tables = {"segmentation": SEGMENTATION, "detection": DETECTION, "background": BACKGROUND}
    save_file(tables, tmp_path / "tables.safetensors")
    assert same(read_feature_tables(tmp_path / "tables.safetensors", EXPERTS), **tables)


def test_tables_in_a_folder_are_matched_by_name(tmp_path):
    torch.save(DETECTION, tmp_path / "segmentation.pt")  # more classes than in the configuration
    save_file({"background": BACKGROUND}, tmp_path / "background.safetensors")
    assert same(read_feature_tables(tmp_path, EXPERTS), segmentation=DETECTION, background=BACKGROUND)


def test_tables_in_a_folder_are_matched_by_number_of_classes(tmp_path):
    torch.save(SEGMENTATION, tmp_path / "coco.pt")
    torch.save(DETECTION, tmp_path / "objects.pt")
    torch.save(BACKGROUND, tmp_path / "nothing.pt")
    torch.save(torch.zeros(9, 4), tmp_path / "ade.pt")  # nobody's
    torch.save({"epoch": "three"}, tmp_path / "log.pt")
    (tmp_path / "readme.txt").write_text("tables")
    tables = read_feature_tables(str(tmp_path), EXPERTS)
    assert same(tables, segmentation=SEGMENTATION, detection=DETECTION, background=BACKGROUND)


def test_the_name_of_a_table_outranks_its_number_of_classes(tmp_path):
    torch.save(SEGMENTATION, tmp_path / "segmentation.pt")
    torch.save(SEGMENTATION + 1, tmp_path / "another.pt")
    torch.save(BACKGROUND, tmp_path / "background.pt")
    assert same(read_feature_tables(tmp_path, EXPERTS), segmentation=SEGMENTATION, background=BACKGROUND)


def test_two_files_with_the_same_number_of_classes_are_refused(tmp_path):
    for name in ("one.pt", "two.pt"):
        torch.save(SEGMENTATION, tmp_path / name)
    with pytest.raises(ValueError, match="one.pt and two.pt in .* could both be the table of 'segmentation'"):
        read_feature_tables(tmp_path, EXPERTS)


def test_two_experts_with_the_same_number_of_classes_need_names(tmp_path):
    torch.save(SEGMENTATION, tmp_path / "table.pt")
    torch.save(BACKGROUND, tmp_path / "background.pt")
    experts = [EXPERTS[1], {**EXPERTS[1], "name": "materials"}]
    assert same(read_feature_tables(tmp_path, experts), background=BACKGROUND)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"depth": SEGMENTATION}, r"has 'depth'; accepted are the label experts .* \(segmentation, detection, ocr\)"),
        ({"seg": SEGMENTATION}, "has 'seg'; accepted are"),
        ({"segmentation": SEGMENTATION}, "feature_tables has no 'background'"),
        ({}, "feature_tables has no 'background', .*; it has nothing"),
        ({"background": SEGMENTATION}, "the table of 'background' has 3 rows; the background is one vector"),
        ({"background": torch.zeros(5)}, "has 5 channels; the config's expert 'segmentation' has 4"),
        ({"detection": torch.zeros(5, 3)}, "the table of 'detection' has 3 channels; .* expert 'detection' has 4"),
        ({"detection": torch.zeros(5, 2, 4)}, r"has the shape \(5, 2, 4\); \(classes, channels\) is needed"),
        ({"detection": [torch.zeros(4), torch.zeros(3)]}, "is not a list of vectors of the same length"),
        ({"detection": ["cat", "dog"]}, "is not a list of vectors of the same length"),
        ({"detection": {0: BACKGROUND, 2: BACKGROUND}}, "class numbers, but they are not 0 to 1"),
        ({"detection": 3}, "is a int; a tensor, a list or a dict of vectors is needed"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        read_feature_tables(tables, EXPERTS)


def test_a_missing_file_is_named(tmp_path):
    for tables in (tmp_path / "nowhere", {"segmentation": tmp_path / "nowhere.pt", "background": BACKGROUND}):
        with pytest.raises(FileNotFoundError, match="there is no table of class features .*nowhere"):
            read_feature_tables(tables, EXPERTS)


def test_a_folder_without_tables_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(ValueError, match="no table of class features in .*: it has none; one is needed for each of"):
        read_feature_tables(tmp_path, EXPERTS)


def test_a_safetensors_file_of_one_table_has_one_tensor(tmp_path):
    save_file({"cat": BACKGROUND, "ant": BACKGROUND + 1}, tmp_path / "rows.safetensors")  # their order is lost
    with pytest.raises(ValueError, match="has 2 tensors; a safetensors file of one table has one"):
        read_feature_tables({"segmentation": tmp_path / "rows.safetensors", "background": BACKGROUND}, EXPERTS)


def test_a_file_of_all_tables_has_a_background(tmp_path):
    save_file({"segmentation": SEGMENTATION}, tmp_path / "tables.safetensors")
    with pytest.raises(ValueError, match="is not a file of .expert: table"):
        read_feature_tables(tmp_path / "tables.safetensors", EXPERTS)


# ---- in a converted model ----


def stems(model):
    return model.model.vision_model.expert_stems


def test_tables_are_set_with_the_background_last(prismer):
    tables = prismer.tables
    model = convert_original_checkpoint(prismer.checkpoint, prismer.config, feature_tables=tables)
    for name in ("segmentation", "detection"):
        assert torch.equal(stems(model)[name].class_features, torch.cat([tables[name], tables["background"][None]]))
    assert torch.equal(stems(model)["ocr"].class_features, tables["background"][None])
    assert model.config.experts == prismer.config.experts


def test_a_larger_table_changes_num_classes(prismer):
    tables = prismer.tables | {"segmentation": torch.randn(150, 64)}
    model = convert_original_checkpoint(prismer.checkpoint, prismer.config, feature_tables=tables)
    assert stems(model)["segmentation"].class_features.shape == (151, 64)
    assert model.config.experts[2]["num_classes"] == 150


def test_tables_take_the_type_of_the_model(prismer):
    model = convert_original_checkpoint(
        prismer.checkpoint, prismer.config, feature_tables=prismer.tables, dtype="bfloat16"
    )
    assert stems(model)["detection"].class_features.dtype == torch.bfloat16


def test_without_tables_classes_are_dropped_with_a_warning(prismer, caplog):
    with caplog.at_level(logging.WARNING):
        model = convert_original_checkpoint(prismer.checkpoint, prismer.config)
    assert not any("num_classes" in expert for expert in model.config.experts)
    assert not stems(model)["segmentation"].class_features.any()
    assert "No table of class features for segmentation, detection" in caplog.text
    assert "set_class_features" in caplog.text and "No feature of the background" in caplog.text


def test_experts_without_a_table_are_named_in_a_warning(prismer, caplog):
    tables = {name: table for name, table in prismer.tables.items() if name != "detection"}
    with caplog.at_level(logging.WARNING):
        model = convert_original_checkpoint(prismer.checkpoint, prismer.config, feature_tables=tables)
    assert "No table of class features for detection:" in caplog.text
    assert "No feature of the background" not in caplog.text
    assert torch.equal(stems(model)["detection"].class_features, tables["background"][None])


def test_a_network_without_experts_needs_no_tables(prismerz, caplog):
    with caplog.at_level(logging.WARNING):
        convert_original_checkpoint(prismerz.checkpoint, prismerz.config)
    assert caplog.text == ""


def test_tables_can_be_set_afterwards(prismer):
    tables = prismer.tables
    later = convert_original_checkpoint(prismer.checkpoint, prismer.config)
    for name in ("segmentation", "detection"):
        later.set_class_features(name, tables[name], tables["background"])
    later.set_class_features("ocr", torch.zeros(0, 64), tables["background"])
    at_once = convert_original_checkpoint(prismer.checkpoint, prismer.config, feature_tables=tables)
    assert all(torch.equal(tensor, later.state_dict()[name]) for name, tensor in at_once.state_dict().items())
    assert later.config.experts == at_once.config.experts


# ---- from names ----


def test_tables_are_made_from_names():
    def length_and_vowels(texts):
        return np.array([[len(text), sum(text.count(vowel) for vowel in "aeiou"), 0, 1] for text in texts])

    tables = class_features_from_names({"segmentation": ["wall", "cat", "sky"]}, length_and_vowels)
    assert tables["segmentation"].tolist() == [[4, 1, 0, 1], [3, 1, 0, 1], [3, 0, 0, 1]]
    assert tables["background"].tolist() == [10, 3, 0, 1]
    assert same(read_feature_tables(tables, EXPERTS), **tables)


def test_names_that_are_one_string_are_refused():
    with pytest.raises(ValueError, match="names has a string for 'segmentation'; a list of class names is needed"):
        class_features_from_names({"segmentation": "cat"}, np.zeros)


def test_tables_from_names_are_saved_and_read_again(tmp_path):
    names = {"segmentation": ["wall", "cat", "sky"]}
    path = tmp_path / "new" / "tables.safetensors"
    tables = save_class_features(names, lambda texts: np.array([[len(text), 0, 0, 1] for text in texts]), path)
    assert same(read_feature_tables(path, EXPERTS), **tables)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["segmentation"]) == ["wall", "cat", "sky"]
