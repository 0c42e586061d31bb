"""A published checkpoint becomes a model, exactly and strictly, and goes back to the same tensors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration
from modeling_prismer.conversion import convert_original_checkpoint, to_original_state_dict
from modeling_prismer.conversion.convert_checkpoint import _published_image_size, original_tensors
from modeling_prismer.conversion.original_names import IGNORED_NAMES, TIED_NAMES


def refusal(checkpoint, config) -> str:
    """The message of the error that a checkpoint is refused with."""
    with pytest.raises(ValueError) as error:
        convert_original_checkpoint(checkpoint, config)
    return str(error.value)


# ---- the same tensors ----


def test_round_trip_gives_the_same_names_and_values(golden):
    model = convert_original_checkpoint(golden.checkpoint, golden.config, feature_tables=golden.tables)
    back, original = to_original_state_dict(model), golden.state
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert back[name].dtype == expected.dtype and torch.equal(back[name], expected), name


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_round_trip_in_the_stored_type_is_bit_equal(prismer, dtype):
    model = convert_original_checkpoint(prismer.checkpoint, prismer.config, dtype=dtype)
    assert model.dtype == torch.float16
    back = to_original_state_dict(model)
    for name, tensor in prismer.state.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_converting_back_and_again_gives_the_same_model(prismer, save_checkpoint):
    first = convert_original_checkpoint(prismer.checkpoint, prismer.config, feature_tables=prismer.tables)
    path = save_checkpoint(to_original_state_dict(first))
    second = convert_original_checkpoint(path, prismer.config, feature_tables=prismer.tables)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@torch.no_grad()
def test_a_converted_model_returns_the_recorded_outputs(patch14):
    model = convert_original_checkpoint(patch14.checkpoint, patch14.config, feature_tables=patch14.tables)
    inputs, expected = patch14.inputs, patch14.expected
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=inputs["labels"],
        pixel_values=inputs["pixel_values"],
        depth_values=inputs["depth"],
        segmentation_ids=inputs["segmentation_class_ids"][:, 0],
        ocr_ids=inputs["ocr_word_ids"][:, 0],
        ocr_features=inputs["ocr_word_features"],
    )
    there = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[there], expected["logits"][there], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss_per_sample, expected["loss_per_sample"], atol=1e-4, rtol=0)


def test_a_converted_model_is_ready_for_use_and_training(prismer):
    model = convert_original_checkpoint(prismer.checkpoint, prismer.config, feature_tables=prismer.tables)
    assert not model.training
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    assert model.lm_head.decoder.weight is model.model.text_model.embeddings.word_embeddings.weight
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(s.nbytes() == p.numel() * p.element_size() for s, p in zip(storages, model.parameters()))


def test_the_given_configuration_is_not_changed(prismer):
    config = prismer.config
    convert_original_checkpoint(prismer.checkpoint, config, image_size=128)
    assert config.to_dict() == prismer.config.to_dict()


def test_custom_experts_keep_their_names(prismer, save_checkpoint):
    config = prismer.config
    model = convert_original_checkpoint(prismer.checkpoint, config, feature_tables=prismer.tables)
    model.add_expert("saliency", "dense", channels=1)
    state = to_original_state_dict(model)
    assert state["expert_encoder.conv1.saliency.1.weight"].shape == (8, 1, 3, 3)
    back = convert_original_checkpoint(save_checkpoint(state), model.config, feature_tables=prismer.tables)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_two_experts_with_instances_cannot_be_converted_back(prismer):
    model = convert_original_checkpoint(prismer.checkpoint, prismer.config)
    model.add_expert("faces", "label", channels=64, num_classes=2, instances=True)
    with pytest.raises(ValueError, match="has one expert with instances; the config has detection, faces"):
        to_original_state_dict(model)


# ---- the published sizes ----

VARIANTS = ["prismer_base", "prismerz_base", "prismer_large", "prismerz_large", "prismer_huge", "prismerz_huge"]
PARAMETERS = {  # trainable with both backbones frozen, and all, in millions
    "prismer_base": (157.4, 327.5),
    "prismerz_base": (104.2, 274.3),
    "prismer_large": (362.5, 967.1),
    "prismerz_large": (268.2, 872.9),
    "prismer_huge": (482.8, 1414.8),
    "prismerz_huge": (335.6, 1267.6),
}


def model_without_memory(variant: str) -> PrismerForConditionalGeneration:
    with torch.device("meta"):
        return PrismerForConditionalGeneration(PrismerConfig.from_variant(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_needs_the_published_names_and_shapes(variant, original_state_dicts):
    published = original_state_dicts[variant]["state_dict"]
    needed = {name: list(tensor.shape) for name, tensor in original_tensors(model_without_memory(variant)).items()}
    assert needed == {name: shape for name, shape in published.items() if name not in IGNORED_NAMES}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_goes_back_to_the_published_names_and_shapes(variant, original_state_dicts):
    back = to_original_state_dict(model_without_memory(variant))
    assert {name: list(tensor.shape) for name, tensor in back.items()} == original_state_dicts[variant]["state_dict"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_published_number_of_parameters(variant):
    model = model_without_memory(variant).freeze_backbones(vision=True, language=True)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (round(trainable / 1e6, 1), round(model.num_parameters() / 1e6, 1)) == PARAMETERS[variant]


MEASURE_MEMORY = """
import sys
import torch
from modeling_prismer import PrismerConfig
from modeling_prismer.conversion import convert_original_checkpoint

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
config = PrismerConfig.from_pretrained(sys.argv[2])
before = peak()
model = convert_original_checkpoint(sys.argv[1], config, sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_conversion_needs_the_memory_of_one_checkpoint(tmp_path):
    vision = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "patch_size": 16}
    text = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}
    config = PrismerConfig(vision_config=vision, text_config=text)
    config.save_pretrained(tmp_path / "config")
    state = to_original_state_dict(PrismerForConditionalGeneration(config))
    torch.save(state, tmp_path / "checkpoint.bin")
    size = (tmp_path / "checkpoint.bin").stat().st_size
    largest = max(tensor.nbytes for tensor in state.values())
    assert size > 150e6 and largest < 5e6
    arguments = [tmp_path / "checkpoint.bin", tmp_path / "config", tmp_path / "out"]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    assert int(measured.stdout) < size + largest + 40e6  # what Python and the writer of safetensors themselves take


# ---- strictness ----


def test_a_missing_tensor_is_named(prismer, save_checkpoint):
    state = prismer.state
    del state["expert_encoder.transformer.resblocks.1.1.adaptor.down_proj.bias"]
    message = refusal(save_checkpoint(state), prismer.config)
    assert "missing in the checkpoint (1)" in message
    assert "expert_encoder.transformer.resblocks.1.1.adaptor.down_proj.bias" in message
    assert "left over" not in message and "another shape" not in message


def test_an_unused_tensor_is_named(prismer, save_checkpoint):
    message = refusal(save_checkpoint(prismer.state | {"momentum_queue": torch.zeros(3)}), prismer.config)
    assert "left over in the checkpoint (1):\n  momentum_queue" in message
    assert "missing" not in message and "another shape" not in message


def test_a_tensor_of_another_shape_is_named(prismer, save_checkpoint):
    state = prismer.state
    state["expert_encoder.resampler.latents"] = torch.zeros(32, 64)
    message = refusal(save_checkpoint(state), prismer.config)
    assert "expert_encoder.resampler.latents: (32, 64), the config needs (64, 64)" in message
    assert "missing" not in message and "left over" not in message


def test_integers_in_place_of_weights_are_refused(prismer, save_checkpoint):
    state = prismer.state
    state["expert_encoder.ln_pre.weight"] = torch.zeros(64, dtype=torch.int8)
    assert "expert_encoder.ln_pre.weight: torch.int8" in refusal(save_checkpoint(state), prismer.config)


def test_one_error_lists_everything_that_does_not_fit(prismer, save_checkpoint):
    state = prismer.state | {"queue": torch.zeros(3), "expert_encoder.ln_pre.weight": torch.zeros(65)}
    del state["text_decoder.lm_head.bias"]
    message = refusal(save_checkpoint(state), prismer.config)
    assert all(name in message for name in ("queue", "expert_encoder.ln_pre.weight", "text_decoder.lm_head.bias"))


def test_missing_experts_are_named(prismer, prismerz):
    message = refusal(prismerz.checkpoint, prismer.config)
    for original, expert in {"depth": "depth", "seg": "segmentation", "ocr_detection": "ocr"}.items():
        assert f"  expert_encoder.conv1.{original}.* (expert '{expert}')" in message
    assert "  expert_encoder.resampler.*" in message


def test_unexpected_experts_are_named(prismer, prismerz):
    message = refusal(prismer.checkpoint, prismerz.config)
    assert "left over" in message and "expert_encoder.conv1.obj_detection.* (expert 'detection')" in message


def test_missing_layers_take_one_line(prismer):
    config = prismer.config
    config.vision_config.num_hidden_layers += 3
    message = refusal(prismer.checkpoint, config)
    assert message.splitlines()[-1] == "  expert_encoder.transformer.resblocks.{2…4}.*"


def test_another_variant_is_refused_and_the_right_one_is_named(original_state_dicts, save_checkpoint):
    # one number stands for all of a tensor, so that the file is small
    shapes = original_state_dicts["prismerz_large"]["state_dict"]
    path = save_checkpoint({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})
    message = refusal(path, "prismer_base")
    assert "(it looks like a prismerz_large)" in message
    assert "missing" in message and "left over" in message and "another shape" in message
    assert len(message.splitlines()) < 50


@pytest.mark.parametrize("change", [lambda tensor: tensor + 1, lambda tensor: tensor[1:], torch.Tensor.double])
@pytest.mark.parametrize("name", TIED_NAMES)
def test_a_copy_with_other_values_is_refused(name, change, prismer, save_checkpoint):
    state = prismer.state
    state[name] = change(state[name])
    message = refusal(save_checkpoint(state), prismer.config)
    assert f"  {name}: tied to {TIED_NAMES[name]}" in message


def test_other_position_ids_are_refused(prismer, save_checkpoint):
    state = prismer.state
    state["text_decoder.roberta.embeddings.position_ids"] = torch.arange(1, 67)[None]
    assert "position_ids: a constant" in refusal(save_checkpoint(state), prismer.config)


def test_copies_and_constants_may_be_left_out(prismer, save_checkpoint):
    state = {name: tensor for name, tensor in prismer.state.items() if name not in IGNORED_NAMES}
    model = convert_original_checkpoint(save_checkpoint(state), prismer.config)
    assert to_original_state_dict(model).keys() == prismer.state.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "prismer_tiny"}, "no variant 'prismer_tiny'; there are prismer_base"),
        ({"dtype": "float8"}, "dtype is 'float8'; accepted are float32, float16, bfloat16"),
        ({"task": "poetry"}, "task is 'poetry'; accepted are 'caption', 'vqa', 'classification'"),
        ({"image_size": 8}, "image_size=8 is smaller than patch_size=16"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, message, prismer):
    with pytest.raises(ValueError, match=message):
        convert_original_checkpoint(**{"checkpoint": prismer.checkpoint, "config": prismer.config, **arguments})


# ---- resolution ----


def resized(positions: torch.Tensor, grid: int) -> torch.Tensor:
    side = round(len(positions) ** 0.5)
    table = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    return table[0].permute(1, 2, 0).flatten(0, 1)


def positions(model) -> torch.Tensor:
    return model.model.vision_model.embeddings.position_embedding


@pytest.mark.parametrize("in_the_config", [False, True])
def test_positions_are_resized_to_the_wanted_image_size(in_the_config, prismer):
    config = prismer.config
    if in_the_config:
        config.vision_config.image_size = 128
        model = convert_original_checkpoint(prismer.checkpoint, config)
    else:
        model = convert_original_checkpoint(prismer.checkpoint, config, image_size=128)
    assert model.config.vision_config.image_size == 128
    expected = resized(prismer.state["expert_encoder.positional_embedding"], 8)
    torch.testing.assert_close(positions(model).detach(), expected)


def test_an_image_size_with_the_same_patches_keeps_the_positions(patch14):
    model = convert_original_checkpoint(patch14.checkpoint, patch14.config, image_size=90)  # 6 patches, 6 pixels over
    assert model.config.vision_config.image_size == 90
    assert torch.equal(positions(model), patch14.state["expert_encoder.positional_embedding"].float())


@pytest.mark.parametrize("variant", ["prismerz_base", "prismerz_large"])
@pytest.mark.parametrize("image_size", [224, 384, 480])
def test_the_number_of_patches_tells_the_published_image_size(variant, image_size):
    config = PrismerConfig.from_variant(variant, image_size=image_size)
    config.vision_config.image_size -= image_size % config.vision_config.patch_size
    assert _published_image_size(config) == image_size


def test_the_image_size_of_a_variant_is_that_of_the_checkpoint(prismer, monkeypatch):
    config = prismer.config
    config.vision_config.image_size = 224
    monkeypatch.setattr(PrismerConfig, "from_variant", lambda variant: config)
    model = convert_original_checkpoint(prismer.checkpoint, "prismer_base")
    assert model.config.vision_config.image_size == 96
    assert torch.equal(positions(model), prismer.state["expert_encoder.positional_embedding"].float())


def test_an_unpublished_image_size_is_kept():
    assert _published_image_size(PrismerConfig.from_variant("prismerz_base", image_size=320)) == 320
