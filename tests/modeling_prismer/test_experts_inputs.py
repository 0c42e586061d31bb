"""Inputs from experts: painting of ids, missing experts, rows of instances, errors."""

import copy

import pytest
import torch
from torch.nn import functional as F

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration

from .largest_tensor import LargestTensor
from .tiny import EXPERTS, TOLERANCE, image_inputs, pick, tiny_config, tiny_model, training_inputs, without


NAMES = [expert["name"] for expert in EXPERTS]
LABELS = ["segmentation", "detection", "ocr"]


def encode(model, **inputs):
    with torch.no_grad():
        return model.get_image_features(**inputs).last_hidden_state


def mask_of(*rows):
    """One row a sample: the experts it has."""
    return torch.tensor([[name in row for name in NAMES] for row in rows])


def painted(stem, ids, table):
    """The definition of painting: the whole map, then torch's resize."""
    table = table.expand(ids.shape[0], -1, -1)
    ids = ids.long()
    ids = torch.where((ids == 255) | (ids >= table.shape[1] - 1), table.shape[1] - 1, ids)
    maps = torch.stack([rows[sample] for rows, sample in zip(table, ids)]).permute(0, 3, 1, 2)
    return F.interpolate(maps, scale_factor=stem.scale_factor, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("patch_size", [4, 8, 14, 16])
@pytest.mark.parametrize("size", [(32, 32), (56, 56), (33, 47), (224, 224)])
@torch.no_grad()
def test_painting_is_a_bilinear_resize_of_the_painted_map(size, patch_size):
    config = tiny_config()
    config.vision_config.patch_size = patch_size
    stem = tiny_model(config).model.vision_model.expert_stems["segmentation"]
    ids = torch.randint(0, 11, (2, *size), dtype=torch.uint8)
    ids[ids == 10] = 255
    table = stem.class_features[None]
    torch.testing.assert_close(stem.paint(ids, table), painted(stem, ids, table), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LABELS)
def test_ids_equal_the_painted_map(model, name):
    inputs = image_inputs()
    stem = model.model.vision_model.expert_stems[name]
    table = stem.feature_table(inputs.get(f"{name}_classes"), inputs.get(f"{name}_features"), 3)
    ids = inputs[f"{name}_ids"].long()
    ids = torch.where(ids == 255, table.shape[1] - 1, ids)
    maps = torch.stack([rows[sample] for rows, sample in zip(table.expand(3, -1, -1), ids)]).permute(0, 3, 1, 2)
    dense = {**without(inputs, name), f"{name}_values": maps}
    if name == "detection":
        dense["detection_ids"] = inputs["detection_ids"]  # for the instance embedding alone
    torch.testing.assert_close(encode(model, **dense), encode(model, **inputs), **TOLERANCE)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_every_integer_type_are_the_same(model, dtype, training):
    """255 is -1 in int8, and background in both."""
    model.train(training)
    inputs = image_inputs()
    cast = {key: tensor.to(dtype) if key.endswith("_ids") else tensor for key, tensor in inputs.items()}
    assert cast["detection_ids"].min() == (-1 if dtype == torch.int8 else 0)
    results = []
    for given in (cast, inputs):
        torch.manual_seed(0)  # the rows of instances are drawn in training
        results.append(encode(model, **given))
    assert torch.equal(*results)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("unknown", [-1, -32768, 32768, 70_000, 2**40])
def test_an_id_that_no_map_holds_is_background(model, unknown, training):
    model.train(training)
    inputs = image_inputs()
    background = {key: tensor.clone() for key, tensor in inputs.items()}
    for name in LABELS:
        inputs[f"{name}_ids"] = inputs[f"{name}_ids"].long()
        inputs[f"{name}_ids"][:, :9] = unknown
        background[f"{name}_ids"][:, :9] = 255
    results = []
    for given in (inputs, background):
        torch.manual_seed(0)
        results.append(encode(model, **given))
    assert torch.equal(*results)


def test_an_id_without_a_feature_is_background(model):
    inputs = image_inputs()
    background = {key: tensor.clone() for key, tensor in inputs.items()}
    for name in LABELS:
        inputs[f"{name}_ids"][:, :9] = 200  # less than an instance's number can be, so it still has a row
        background[f"{name}_ids"][:, :9] = 255
    rows = {"detection_rows": torch.zeros(3, 32, 32, dtype=torch.long)}
    assert torch.equal(encode(model, **inputs, **rows), encode(model, **background, **rows))


def test_an_instance_is_painted_as_its_class(model):
    inputs = image_inputs()
    classes = inputs["detection_classes"]
    renumbered = inputs | {
        "detection_ids": torch.where(inputs["detection_ids"] == 255, 255, 7 - inputs["detection_ids"]),
        "detection_classes": classes.flip(1),
        "detection_rows": torch.zeros(3, 32, 32, dtype=torch.long),
    }
    inputs["detection_rows"] = renumbered["detection_rows"]
    assert torch.equal(encode(model, **renumbered), encode(model, **inputs))


def test_instances_without_their_classes_are_refused(model):
    inputs = image_inputs()
    del inputs["detection_classes"]
    with pytest.raises(ValueError, match="detection_ids count instances.*detection_classes"):
        encode(model, **inputs)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_painting_never_makes_the_painted_map(training):
    experts = [{**expert, "channels": 64} for expert in EXPERTS if expert["kind"] == "label"]
    config = tiny_config(experts)
    config.vision_config.patch_size = 16
    model = tiny_model(config).train(training)
    inputs = image_inputs(batch_size=2, experts=experts, map_size=224)
    with LargestTensor() as seen:
        loss = model.get_image_features(**inputs).last_hidden_state.sum()
        if training:
            loss.backward()
    full, needed = 2 * 64 * 224 * 224, 2 * 64 * 56 * 56
    assert needed <= seen.largest < full / 8


def test_class_features_are_saved_with_the_model(model, tmp_path):
    inputs = image_inputs()
    before = encode(model, **inputs)
    features, background = torch.randn(20, 8), torch.randn(8)
    model.set_class_features("segmentation", features, background)
    stem = model.model.vision_model.expert_stems["segmentation"]
    assert torch.equal(stem.class_features, torch.cat([features, background[None]]))
    assert model.config.experts[2]["num_classes"] == 20
    after = encode(model, **inputs)
    assert not torch.allclose(before, after)

    model.save_pretrained(tmp_path)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.experts == model.config.experts
    assert torch.equal(encode(loaded, **inputs), after)


def test_fewer_features_than_classes_need_class_names(model):
    config, table = copy.deepcopy(model.config.experts), model.model.vision_model.expert_stems["segmentation"]
    before = table.class_features.clone()
    with pytest.raises(ValueError, match=r"3 rows of features for 'segmentation', whose ids go up to 9"):
        model.set_class_features("segmentation", torch.zeros(3, 8))
    assert model.config.experts == config and torch.equal(table.class_features, before)
    model.set_class_features("segmentation", torch.zeros(3, 8), class_names=["sky", "tree", "road"])
    assert model.config.class_names == {"segmentation": ["sky", "tree", "road"]}
    assert model.config.experts[2]["num_classes"] == 3


def test_more_features_than_classes_are_warned_about(model, caplog):
    model.set_class_features("segmentation", torch.zeros(11, 8))
    assert "11 rows of features for 'segmentation', which has num_classes=10" in caplog.text
    caplog.clear()
    model.set_class_features("segmentation", torch.zeros(11, 8))
    assert caplog.text == ""


def test_class_names_stay_where_their_features_change(model, tmp_path):
    names = [f"thing {index % 7}" for index in range(10)]  # some have the same name
    model.set_class_features("segmentation", torch.randn(10, 8), class_names=names)
    model.set_class_features("segmentation", torch.randn(10, 8))
    model.save_pretrained(tmp_path)
    assert PrismerConfig.from_pretrained(tmp_path).class_names == {"segmentation": names}
    with pytest.raises(ValueError, match="11 rows of features for the 10 class_names of 'segmentation'"):
        model.set_class_features("segmentation", torch.randn(11, 8))
    model.set_class_features("segmentation", torch.zeros(0, 8))
    assert model.config.class_names == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": torch.full((10, 8), torch.nan)}, "features of 'segmentation' has numbers that are not finite"),
        ({"features": torch.zeros(10, 8).long()}, "features of 'segmentation' is of the type torch.int64; floating"),
        ({"background": torch.zeros(7)}, r"cannot take a background of the shape \(7,\); \(8,\) is needed"),
        ({"background": torch.zeros(8, 1)}, r"cannot take a background of the shape \(8, 1\)"),
        ({"background": torch.full((8,), torch.inf)}, "background of 'segmentation' has numbers that are not finite"),
        ({"class_names": ["a", "b"]}, "2 class_names for the 10 rows of features for 'segmentation'"),
        ({"class_names": list(range(10))}, "class_names=.* a list of strings is needed"),
        ({"class_names": "segmentats"}, "class_names='segmentats'; a list of strings is needed"),
    ],
)
def test_bad_class_features_change_nothing(model, changes, message):
    config, stem = copy.deepcopy(model.config.experts), model.model.vision_model.expert_stems["segmentation"]
    before = stem.class_features.clone()
    with pytest.raises(ValueError, match=message):
        model.set_class_features("segmentation", **{"features": torch.zeros(10, 8), **changes})
    assert model.config.experts == config and torch.equal(stem.class_features, before)


def test_features_beyond_the_models_precision_are_refused(model):
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        model.half().set_class_features("segmentation", torch.full((10, 8), 1e6))


def test_setting_classes_keeps_the_background(model):
    stem = model.model.vision_model.expert_stems["ocr"]
    background = stem.class_features[-1].clone()
    model.set_class_features("ocr", torch.zeros(3, 8))
    assert torch.equal(stem.class_features, torch.cat([torch.zeros(3, 8), background[None]]))
    model.set_class_features("ocr", torch.zeros(0, 8))
    assert "num_classes" not in model.config.experts[5]
    assert torch.equal(stem.class_features, background[None])


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("segmentation", (10, 7), r"\(label, 8 channels\) cannot take features of the shape \(10, 7\)"),
        ("segmentation", (8,), r"cannot take features of the shape \(8,\)"),
        ("depth", (10, 1), "dense"),
        ("heat", (10, 8), "no expert 'heat'; the config has depth, normal"),
    ],
)
def test_class_features_of_other_shape_are_refused(model, name, shape, message):
    with pytest.raises(ValueError, match=message):
        model.set_class_features(name, torch.zeros(shape))


# ---- missing experts


def test_missing_expert_without_mask_is_an_error(model):
    with pytest.raises(ValueError, match="experts normal, ocr are neither given nor masked out"):
        encode(model, **without(image_inputs(), "normal", "ocr"))


def test_without_strict_experts_given_ones_are_used(model):
    inputs = without(image_inputs(), "normal", "ocr")
    masked = encode(model, **inputs, expert_mask=mask_of(*[{"depth", "segmentation", "edge", "detection"}] * 3))
    model.config.strict_experts = False
    assert torch.equal(encode(model, **inputs), masked)


def test_mask_that_claims_a_missing_expert_is_an_error(model):
    with pytest.raises(ValueError, match="expert_mask says that there are edge, but their tensors are not given"):
        encode(model, **without(image_inputs(), "edge"), expert_mask=mask_of(NAMES, [], []))


@pytest.mark.parametrize("shape", [(3, 5), (6,), (3, 7)])
def test_a_mask_of_another_shape_is_an_error(model, shape):
    with pytest.raises(ValueError, match=r"expert_mask has the shape .* \(batch, 6\) is needed"):
        encode(model, **image_inputs(), expert_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_mask_with_other_number_of_rows_is_an_error(model, rows, training):
    with pytest.raises(ValueError, match=f"expert_mask has {rows} rows for 3 images"):
        encode(model.train(training), **image_inputs(), expert_mask=torch.ones(rows, 6, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_numbers_is_a_mask(model, dtype):
    mask = mask_of(NAMES, ["depth"], [])
    assert torch.equal(
        encode(model, **image_inputs(), expert_mask=mask.to(dtype)), encode(model, **image_inputs(), expert_mask=mask)
    )


def test_a_mask_that_has_everything_changes_nothing(model):
    inputs = image_inputs()
    torch.testing.assert_close(
        encode(model, **inputs, expert_mask=mask_of(NAMES, NAMES, NAMES)), encode(model, **inputs), **TOLERANCE
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0.0, float("nan"), float("inf")])
def test_a_masked_out_expert_leaves_no_trace_in_evaluation(model, attention, padding):
    model.set_attn_implementation(attention)
    inputs = image_inputs()
    has = [set(NAMES), {"depth", "ocr"}, set()]
    padded = {key: tensor.clone() for key, tensor in inputs.items()}
    for row, names in enumerate(has):
        for key in padded:
            name = key.rpartition("_")[0]
            if name in NAMES and name not in names:
                padded[key][row] = padding if padded[key].is_floating_point() else 0
    together = encode(model, **padded, expert_mask=mask_of(*has))
    for row, names in enumerate(has):
        sample = without(pick(inputs, slice(row, row + 1)), *(set(NAMES) - names))
        alone = encode(model, **sample, expert_mask=mask_of(names))
        torch.testing.assert_close(together[row : row + 1], alone, **TOLERANCE)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_no_expert_at_all_is_the_latents_alone(model, training):
    model.train(training)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs = training_inputs()
    mask = mask_of([], [], [])
    given = model(**inputs, expert_mask=mask)
    left_out = model(**without(inputs, *NAMES), expert_mask=mask)
    assert torch.isfinite(given.loss)
    torch.testing.assert_close(given.logits, left_out.logits, **TOLERANCE)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    given.loss.backward()
    for parameter in model.model.vision_model.expert_stems.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert model.model.vision_model.resampler.latents.grad.any()


@pytest.mark.parametrize("expert", EXPERTS, ids=NAMES)
def test_a_masked_out_expert_leaves_no_trace_in_training(expert):
    model = tiny_model(experts=[expert]).train().double()  # some gradients are about 30, too large for float32
    with_it, without_it = [0, 2], [1, 3]
    inputs = training_inputs(batch_size=4, experts=[expert])
    inputs = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}
    name = expert["name"]
    if expert.get("instances"):
        inputs["detection_rows"] = torch.randint(128, (4, 32, 32))
    mask = torch.tensor([[True], [False], [True], [False]])
    padded = {key: tensor.clone() for key, tensor in inputs.items()}
    for key in padded:
        if key.startswith(name):
            padded[key][without_it] = float("nan") if padded[key].is_floating_point() else 99
    if expert.get("instances"):
        padded["detection_classes"][without_it] = 0

    masked, apart = copy.deepcopy(model), copy.deepcopy(model)
    loss = masked(**padded, expert_mask=mask).loss_per_sample
    loss.sum().backward()
    first = apart(**pick(inputs, with_it)).loss_per_sample
    second = apart(**without(pick(inputs, without_it), name), expert_mask=mask[without_it]).loss_per_sample
    (first.sum() + second.sum()).backward()

    torch.testing.assert_close(loss[with_it], first, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss[without_it], second, atol=1e-4, rtol=0)
    expected = dict(apart.named_buffers())
    for buffer_name, buffer in masked.named_buffers():
        torch.testing.assert_close(buffer, expected[buffer_name], msg=buffer_name, **TOLERANCE)
    assert masked.model.vision_model.expert_stems[name].norms[0].num_batches_tracked == 1
    expected = dict(apart.named_parameters())
    for parameter_name, parameter in masked.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[parameter_name].grad, atol=1e-4, rtol=1e-4, msg=parameter_name
        )


# ---- numbers that are not finite


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("key", ["pixel_values", "depth_values", "normal_values", "ocr_features"])
def test_training_names_a_sample_that_is_not_finite(model, key, value):
    model.train()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs = training_inputs(batch_size=5)
    inputs[key][3].flatten()[7] = value
    with pytest.raises(ValueError, match=f"^{key} of sample 3 holds numbers that are not finite"):
        model(**inputs)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


def test_training_names_all_samples_that_are_not_finite(model):
    inputs = training_inputs(batch_size=4)
    inputs["depth_values"][[1, 3]] = torch.nan
    inputs["edge_values"][2] = torch.inf
    with pytest.raises(ValueError, match="^depth_values of sample 1, 3; edge_values of sample 2 holds"):
        model.train()(**inputs)


def test_training_names_a_painted_map_that_is_not_finite(model):
    inputs = without(training_inputs(), "segmentation")
    inputs["segmentation_values"] = torch.zeros(3, 8, 32, 32)
    inputs["segmentation_values"][1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="segmentation_values of sample 1"):
        model.train()(**inputs)


def test_samples_are_counted_with_those_that_are_masked_out(model):
    inputs = training_inputs()
    inputs["depth_values"][0], inputs["depth_values"][2] = torch.nan, torch.nan
    mask = mask_of([name for name in NAMES if name != "depth"], NAMES, NAMES)
    with pytest.raises(ValueError, match="^depth_values of sample 2 holds"):
        model.train()(**inputs, expert_mask=mask)


def test_rows_of_a_masked_out_expert_may_be_anything(model):
    inputs = image_inputs()
    inputs["detection_rows"] = torch.zeros(3, 32, 32, dtype=torch.long)
    inputs["detection_rows"][1] = -1
    mask = mask_of(NAMES, [name for name in NAMES if name != "detection"], NAMES)
    results = []
    for rows in (-1, 0):
        inputs["detection_rows"][1] = rows
        results.append(encode(model, **inputs, expert_mask=mask))
    assert torch.equal(*results)


# ---- a sample and its batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_evaluation_does_not_depend_on_the_batch(model, attention):
    model.set_attn_implementation(attention)
    inputs = training_inputs(batch_size=4)
    with torch.no_grad():
        together = model(**inputs)
        for row in range(4):
            alone = model(**pick(inputs, slice(row, row + 1)))
            torch.testing.assert_close(together.logits[row : row + 1], alone.logits, **TOLERANCE)
            torch.testing.assert_close(together.loss_per_sample[row : row + 1], alone.loss_per_sample)


def test_evaluation_gives_instances_rows_by_number(model):
    inputs = image_inputs()
    ids = inputs["detection_ids"].long()
    ids[:, :8] = 130
    inputs["detection_ids"] = ids.to(torch.uint8)
    rows = torch.where(ids == 255, 127, ids % 127)
    assert torch.equal(encode(model, **inputs, detection_rows=rows), encode(model, **inputs))
    assert not torch.equal(
        encode(model, **inputs, detection_rows=rows + 1 - 2 * (rows == 127)), encode(model, **inputs)
    )


def test_training_draws_a_random_row_for_each_value(model):
    stem = model.model.vision_model.expert_stems["detection"].train()
    ids = image_inputs()["detection_ids"]
    draws = []
    for _ in range(30):
        rows = stem.instance_rows(ids)
        assert 0 <= rows.min() and rows.max() < 128
        row_of_value = {value: rows[ids == value].unique().tolist() for value in ids.unique().tolist()}
        assert all(len(drawn) == 1 for drawn in row_of_value.values())  # one row for a value, in the whole batch
        draws.append(row_of_value)
    for value in (0, 255):  # background's too
        assert len({draw[value][0] for draw in draws}) > 15


def test_instance_map_is_resized_by_the_floor_rule(model):
    stem = model.model.vision_model.expert_stems["detection"]
    rows = torch.randint(128, (2, 33, 47))
    for grid in ((4, 4), (3, 5), (14, 14)):
        nearest = F.interpolate(rows[:, None].float(), size=grid, mode="nearest")[:, 0].long()
        assert torch.equal(stem.embed_instances(rows, grid), stem.instance_embedding[nearest])


# ---- inputs that do not fit


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth_values": torch.zeros(3, 3, 32, 32)}, r"depth_values has the shape .* \(batch, 1, height, width\)"),
        ({"depth_values": torch.zeros(3, 32, 32)}, r"depth_values has the shape .* \(batch, 1, height, width\)"),
        ({"depth_values": torch.zeros(2, 1, 32, 32)}, "depth_values has 2 rows for 3 images"),
        ({"ocr_features": torch.zeros(2, 6, 8)}, "ocr_features has 2 rows for 3 images"),
        (
            {"segmentation_ids": torch.zeros(3, 1, 32, 32)},
            r"segmentation_ids has the shape .* \(batch, height, width\)",
        ),
        ({"ocr_features": None}, "neither a table of class features in the model .* nor ocr_features"),
        ({"ocr_ids": None}, "ocr_features given without ocr_ids or ocr_values"),
        ({"heat_values": torch.zeros(3, 1, 32, 32)}, "heat_values given, but the config's experts are: depth, normal"),
        ({"depht_values": torch.zeros(3, 1, 32, 32)}, "depht_values given, but the config's experts are: depth"),
        ({"segmentaton_ids": torch.zeros(3, 32, 32)}, "segmentaton_ids given, but the config's experts are: depth"),
        ({"ocr_feature": None, "orc_rows": torch.zeros(3)}, "orc_rows given, but the config's experts are: depth"),
        ({"segmentation_ids": torch.zeros(3, 32, 32)}, "segmentation_ids is of the type torch.float32; an integer"),
        ({"detection_classes": torch.zeros(3, 8)}, "detection_classes is of the type torch.float32; an integer type"),
        ({"detection_rows": torch.zeros(3, 32, 32)}, "detection_rows is of the type torch.float32; an integer type"),
        ({"depth_values": torch.zeros(3, 1, 32, 32).byte()}, "depth_values is of the type torch.uint8; floating"),
        ({"ocr_features": torch.zeros(3, 6, 8).long()}, "ocr_features is of the type torch.int64; floating"),
        ({"depth_values": None, "depth_ids": torch.zeros(3, 32, 32).byte()}, "the dense expert 'depth' takes depth_v"),
        ({"depth_values": [[0.0]]}, "depth_values is a list; a tensor is needed"),
        ({"pixel_values": torch.zeros(3, 3, 40, 40)}, r"needs \(batch, 3, 32, 32\).*resize_position_embeddings"),
        ({"pixel_values": torch.zeros(3, 1, 32, 32)}, r"needs \(batch, 3, 32, 32\)"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"needs \(batch, 3, 32, 32\)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        encode(model, **{**image_inputs(), **changes})


def test_inputs_of_other_models_pass_through(model):
    inputs = training_inputs()
    others = {
        "mm_token_type_ids": torch.zeros_like(inputs["input_ids"]),
        "token_type_ids": torch.zeros_like(inputs["input_ids"]),
        "image_sizes": torch.tensor([[32, 32]] * 3),
        "pixel_attention_mask": torch.ones(3, 32, 32),
        "image_position_ids": torch.zeros(3, 16, 2).long(),
        "pixel_values_videos": None,
        "video_features": torch.zeros(3, 4, 8),
    }
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            outputs = []
            for given in (inputs, inputs | others):
                torch.manual_seed(0)
                outputs.append(model(**given).logits)
        assert torch.equal(*outputs)


def test_an_expert_that_the_vision_model_lacks_is_named(model):
    with pytest.raises(ValueError, match="expert_inputs has 'heat'; the config's experts are: depth"):
        model.model.vision_model(image_inputs()["pixel_values"], {"heat": {"values": torch.zeros(3, 1, 32, 32)}})


def test_generate_names_a_misspelt_expert(model):
    inputs = training_inputs()
    del inputs["labels"]
    with pytest.raises(ValueError, match="depht_values given, but the config's experts are: depth"):
        model.generate(**inputs, depht_values=torch.zeros(3, 1, 32, 32), max_new_tokens=1)


def test_maps_without_an_image_are_refused(model):
    inputs = training_inputs()
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="depth_values, .* given without pixel_values"):
        model(**inputs)


def test_an_expert_of_a_model_without_experts_is_refused(model_without_experts):
    inputs = image_inputs()
    with pytest.raises(ValueError, match="depth_values given, but the config's experts are: none"):
        encode(model_without_experts, pixel_values=inputs["pixel_values"], depth_values=inputs["depth_values"])


def test_maps_of_other_sizes_and_shapes(model):
    for shape in ((32, 32), (64, 64), (40, 24)):
        inputs = image_inputs()
        inputs["depth_values"] = torch.randn(3, 1, *shape)
        inputs["segmentation_ids"] = torch.randint(10, (3, *shape), dtype=torch.uint8)
        assert torch.isfinite(encode(model, **inputs)).all()


# ---- experts of one's own


HEAT = {"name": "heat", "kind": "dense", "channels": 2}
PARTS = {"name": "parts", "kind": "label", "channels": 5, "num_classes": 7, "instances": True}


def test_own_experts_come_by_keyword():
    model = tiny_model(experts=[HEAT, PARTS])
    inputs = training_inputs(experts=[HEAT, PARTS])
    outputs = model(**inputs)
    inputs["heat_values"] = inputs["heat_values"] + 1
    assert not torch.allclose(model(**inputs).logits, outputs.logits)
    with pytest.raises(ValueError, match="experts heat are neither given nor masked out"):
        model(**without(inputs, "heat"))


@pytest.mark.parametrize("start", ["model", "model_without_experts"])
def test_an_expert_can_be_added(request, start, tmp_path):
    model = request.getfixturevalue(start)
    old = list(model.config.experts)
    statistics = [name for name, _ in model.named_buffers()]
    stem = model.add_expert(**HEAT)
    model.add_expert(**PARTS)
    assert model.config.experts == [*old, HEAT, PARTS]
    assert model.model.vision_model.expert_stems["heat"] is stem
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert set(statistics) < {name for name, _ in model.named_buffers()}
    assert not any(module.training for module in model.modules())

    inputs = training_inputs(experts=[*old, HEAT, PARTS])
    outputs = model(**inputs)
    outputs.loss.backward()
    assert stem.convs[0].weight.grad.any() and model.model.vision_model.resampler.latents.grad.any()
    model.save_pretrained(tmp_path)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.experts == model.config.experts
    assert torch.equal(loaded(**inputs).logits, outputs.logits)


def test_added_expert_without_tensors_changes_nothing(model):
    inputs = image_inputs()
    before = encode(model, **inputs)
    model.add_expert(**HEAT)
    mask = torch.tensor([[True] * 6 + [False]] * 3)
    torch.testing.assert_close(encode(model, **inputs, expert_mask=mask), before, **TOLERANCE)


def test_an_added_expert_has_the_type_and_mode_of_the_model(model):
    model.to(torch.bfloat16).train()
    stem = model.add_expert(**PARTS)
    assert {parameter.dtype for parameter in stem.parameters()} == {torch.bfloat16}
    assert stem.class_features.dtype == torch.bfloat16 and stem.training


def test_an_expert_that_is_there_already_is_refused(model):
    with pytest.raises(ValueError, match="'depth' is described twice"):
        model.add_expert("depth", "dense", 1)
    assert model.config.experts == EXPERTS
    with pytest.raises(ValueError, match="accepted are"):
        model.add_expert("sound", "audio", 1)


def test_a_config_belongs_to_its_model_alone():
    config = tiny_config(experts=[HEAT])
    model = PrismerForConditionalGeneration(PrismerConfig(**config.to_dict()))
    model.add_expert(**PARTS)
    assert config.expert_names == ["heat"] and HEAT == {"name": "heat", "kind": "dense", "channels": 2}
