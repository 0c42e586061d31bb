"""ONNX: the two graphs, run by onnxruntime, give what the network gives, and the folder has what is needed to run."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    PrismerProcessor,
    conversion,
    pretrained_path,
)
from modeling_prismer.cli import app
from tests.modeling_prismer.tiny import EXPERTS, IMAGE_SIZE, MAP_SIZE, image_inputs, prompts, tiny_config, tiny_model


pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
SOME_EXPERTS = [EXPERTS[index] for index in (2, 3, 4, 5)]  # classes, a dense map, instances, words
PAD = 1


def small_model(experts, **kwargs):
    config = tiny_config(experts=experts, **kwargs)
    config.vision_config.num_hidden_layers = config.vision_config.resampler_layers = 1
    if not experts:
        config.text_config.num_hidden_layers = 2
    config.text_config.vocab_size = 371  # that of the shipped tokenizer
    return tiny_model(config)


def image_processor(experts, size=IMAGE_SIZE):
    return PrismerImageProcessor(
        experts=experts, size={"height": size, "width": size}, expert_size=MAP_SIZE, max_instances=8, max_words=6
    )


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory):
    """A model with experts, which imitates one of them, and the same in onnxruntime: exported on the command line."""
    folder = tmp_path_factory.mktemp("export")
    model = small_model(SOME_EXPERTS, imitation={"experts": ["segmentation"], "layers": [0], "num_adaptors": 3})
    model.generation_config.update(max_new_tokens=7, min_new_tokens=3)
    model.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(pretrained_path("prismer-easy-vqa"))
    PrismerProcessor(image_processor(SOME_EXPERTS), tokenizer, task="vqa").save_pretrained(folder / "model")
    result = CliRunner().invoke(app, ["export", str(folder / "model"), str(folder / "onnx")])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(folder / "onnx")
    return model, conversion.OnnxPrismer(folder / "onnx"), folder / "onnx"


@pytest.fixture(scope="module")
def without_experts(tmp_path_factory):
    """A model without, which was exported in half precision and in training mode, and stayed as it was."""
    folder = tmp_path_factory.mktemp("export")
    model = small_model([]).half().train()
    assert conversion.export_onnx(model, image_processor([]), folder / "onnx") == folder / "onnx"
    assert model.dtype == torch.float16 and model.training
    assert model.config._attn_implementation == "sdpa"
    return model.float().eval(), conversion.OnnxPrismer(folder / "onnx"), folder / "onnx"


@pytest.fixture(params=["experts", "none"])
def exported(request):
    return request.getfixturevalue("with_experts" if request.param == "experts" else "without_experts")


def image_inputs_of(model, number, **kwargs):
    return image_inputs(number, experts=model.config.experts, **kwargs)


def arrays(tensors):
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def padded_prompts(rows, length=5):
    """The first row is shorter than the others."""
    input_ids, attention_mask = prompts(rows, length), torch.ones(rows, length, dtype=torch.long)
    input_ids[0, :2], input_ids[0, 2], attention_mask[0, :2] = PAD, 0, 0
    return input_ids, attention_mask


# ---- the graphs ----


@pytest.mark.parametrize("number", [1, 3])
def test_the_encoder_equals_the_network_for_any_number_of_images(exported, number):
    model, runtime, _ = exported
    images = image_inputs_of(model, number)
    expected = model.get_image_features(**images).last_hidden_state
    given = runtime.encode(**arrays(images))
    torch.testing.assert_close(torch.tensor(given["last_hidden_state"]), expected, **TOLERANCE)
    for index, layer in enumerate(model.model.text_model.layers[:-1]):
        for part, tensor in zip(("key", "value"), layer.cross_attn.project_keys_values(expected)):
            array = given[f"past_key_values.{index}.encoder.{part}"]
            torch.testing.assert_close(torch.tensor(array), tensor, **TOLERANCE)


def test_imitation_is_part_of_the_encoder(with_experts):
    model, runtime, _ = with_experts
    images, names = image_inputs_of(model, 3), model.config.expert_names
    for given in (["edge", "detection", "ocr"], []):
        mask = torch.tensor([[name in given for name in names], [True] * 4, [name in given for name in names]])
        expected = model.get_image_features(**images, expert_mask=mask).last_hidden_state
        found = runtime.encode(**arrays(images), expert_mask=mask.numpy())["last_hidden_state"]
        torch.testing.assert_close(torch.tensor(found), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
def test_background_may_be_negative(with_experts, dtype):
    model, runtime, _ = with_experts
    images = arrays(image_inputs_of(model, 2))
    expected = runtime.encode(**images)["last_hidden_state"]
    for key in [key for key in images if key.endswith("_ids")]:
        assert (images[key] == 255).any()
        images[key] = np.where(images[key] == 255, -1, images[key].astype(int)).astype(dtype)
    assert np.array_equal(runtime.encode(**images)["last_hidden_state"], expected)


def test_each_image_may_lack_other_experts(with_experts):
    model, runtime, _ = with_experts
    images = image_inputs_of(model, 3)
    images["expert_mask"] = torch.tensor([[True] * 4, [True, False, False, True], [False] * 4])
    expected = model.get_image_features(**images).last_hidden_state
    given = runtime.encode(**arrays(images))["last_hidden_state"]
    torch.testing.assert_close(torch.tensor(given), expected, **TOLERANCE)


def test_an_expert_that_no_image_has_may_be_left_out(with_experts):
    model, runtime, _ = with_experts
    images = {
        key: tensor for key, tensor in image_inputs_of(model, 2).items() if not key.startswith(("detection", "edge"))
    }
    mask = torch.tensor([[True, False, False, True]] * 2)
    expected = model.get_image_features(**images, expert_mask=mask).last_hidden_state
    given = runtime.encode(**arrays(images), expert_mask=mask.numpy())["last_hidden_state"]
    torch.testing.assert_close(torch.tensor(given), expected, **TOLERANCE)
    with pytest.raises(ValueError, match="(edge|detection)_[a-z]+ is missing"):
        runtime.encode(**arrays(images))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_prompt_and_every_step_give_the_networks_logits(exported, rows):
    model, runtime, _ = exported
    images = image_inputs_of(model, 1 if rows < 6 else 2)
    input_ids, attention_mask = padded_prompts(rows, length=8)
    expected = model(input_ids=input_ids, attention_mask=attention_mask, **images).logits
    encoded, past, logits = runtime.encode(**arrays(images)), None, []
    for start, end in ((0, 5), (5, 6), (6, 8)):
        step, past = runtime.forward(
            input_ids[:, start:end].numpy(), attention_mask[:, :end].numpy(), encoded, past=past
        )
        logits.append(torch.tensor(step))
    real = attention_mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], **TOLERANCE)
    assert past["past_key_values.1.decoder.key"].shape[2] == 8


# ---- generation ----


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("each", [1, 2], ids=["one_prompt", "two_prompts"])
def test_generation_is_the_networks_greedy_generation(exported, each):
    model, runtime, _ = exported
    images, (input_ids, attention_mask) = image_inputs_of(model, 3), padded_prompts(3 * each)
    expected = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, **images, num_beams=1, do_sample=False
    )
    given = runtime.generate(input_ids.numpy(), attention_mask.numpy(), **arrays(images))
    assert given.tolist() == expected.tolist()
    assert given.shape[1] == 5 + (7 if model.config.experts else 20)
    encoded = runtime.encode(**arrays(images))
    assert np.array_equal(runtime.generate(input_ids.numpy(), encoded=encoded), given)  # the mask is inferred


def test_a_finished_row_is_padded(without_experts):
    model, runtime, _ = without_experts
    images, input_ids = image_inputs_of(model, 3), prompts(3)
    free = runtime.generate(input_ids.numpy(), max_new_tokens=9, **arrays(images)).tolist()
    end = 5 + next(place for place, token in enumerate(free[0][5:]) if token not in (*free[1], *free[2]))
    runtime = copy.copy(runtime)
    runtime.eos_token_ids = [2, free[0][end]]
    search = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": runtime.eos_token_ids}
    expected = model.generate(input_ids=input_ids, **images, **search)
    given = runtime.generate(input_ids.numpy(), max_new_tokens=9, **arrays(images))
    assert given.tolist() == expected.tolist()
    assert given.shape == (3, 14) and given[0, end + 1 :].tolist() == [PAD] * (13 - end)


def test_the_folder_has_its_processor(with_experts):
    model, runtime, folder = with_experts
    processor = PrismerProcessor.from_pretrained(folder)
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    labels = {"segmentation": np.arange(10, dtype=np.uint8).repeat(120).reshape(30, 40), "edge": None}
    call = {"images": image, "text": "What color is it?", "expert_labels": labels}
    inputs = processor(**call)
    given = runtime.generate(**processor(**call, return_tensors="np"))
    assert given.tolist() == model.generate(**inputs, do_sample=False).tolist()
    assert given.tolist() == runtime.generate(**inputs).tolist()  # torch's tensors on the CPU will do
    assert len(processor.post_process_generation(given, inputs["input_ids"].shape[1])) == 1


def test_the_runtime_needs_neither_torch_nor_transformers(without_experts):
    model, runtime, folder = without_experts
    script = f"""
import importlib.util, sys
import numpy as np
for name in ("torch", "transformers", "modeling_prismer"):
    sys.modules[name] = None
spec = importlib.util.spec_from_file_location("onnx_generation", {conversion.onnx_generation.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
pixel_values = np.zeros((1, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), np.float32)
print(module.OnnxPrismer({str(folder)!r}).generate(np.array([[0, 7, 8]]), pixel_values=pixel_values).tolist())
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    pixel_values = np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    assert printed.strip() == str(runtime.generate(np.array([[0, 7, 8]]), pixel_values=pixel_values).tolist())


def test_the_files_have_no_paths_of_this_machine(with_experts):
    for path in with_experts[2].glob("*.onnx*"):
        assert b"modeling_prismer.py" not in path.read_bytes()


# ---- what does not fit ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"depth_values": np.zeros((3, 1, 32, 32))},
            "depth_values is not an input of this model; its inputs are pixel_val",
        ),
        ({"pixel_values": np.zeros((3, 3, 16, 16))}, r"pixel_values has the shape \(3, 3, 16, 16\)"),
        ({"segmentation_ids": np.full((3, 32, 32), 300)}, "segmentation_ids holds values from 300 to 300"),
        ({"segmentation_ids": np.full((3, 32, 32), 1.5)}, "segmentation_ids is of the type float64; an integer type"),
        ({"edge_values": None}, "edge_values is missing, and expert_mask does not mask its expert out"),
        ({"pixel_values": None}, "pixel_values is missing"),
        ({"attention_mask": np.array([[1, 1, 0]] * 3)}, "padded on the right"),
        ({"input_ids": np.full((2, 3), 5)}, "2 rows of text for 3 images"),
        ({"input_ids": np.full((3, 60), 5)}, "63 tokens; this model takes at most 62"),
        ({"encoded": {}}, "give encoded or pixel_values, .* not both"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(with_experts, changes, message):
    model, runtime, _ = with_experts
    inputs = {"input_ids": np.full((3, 3), 5), **arrays(image_inputs_of(model, 3))}
    with pytest.raises(ValueError, match=message):
        runtime.generate(**inputs | changes)


def test_a_folder_without_graphs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no encoder.onnx"):
        conversion.OnnxPrismer(tmp_path)


@pytest.mark.parametrize(
    "model, processor, error, message",
    [
        (torch.nn.Linear(1, 1), image_processor([]), TypeError, "model is a Linear"),
        (small_model([]), image_processor(SOME_EXPERTS), ValueError, r"processor's experts \(segm.*model's \(none\)"),
        (small_model([]), image_processor([], size=64), ValueError, "images of 64×64 pixels; the model takes 32×32"),
    ],
)
def test_models_that_cannot_be_exported_are_refused(tmp_path, model, processor, error, message):
    with pytest.raises(error, match=message):
        conversion.export_onnx(model, processor, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_class_names_may_differ_from_the_processors(tmp_path, monkeypatch):
    named = [{**SOME_EXPERTS[0], "class_names": [f"thing {i}" for i in range(SOME_EXPERTS[0]["num_classes"])]}]
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the export itself
        conversion.export_onnx(small_model(named), image_processor(SOME_EXPERTS[:1]), tmp_path / "onnx")


def test_an_export_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversion.export_onnx(small_model([]), image_processor([]), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_files_in_the_folder_are_only_overwritten_on_request(with_experts):
    model, _, folder = with_experts
    with pytest.raises(FileExistsError, match="is not empty"):
        conversion.export_onnx(model, image_processor(SOME_EXPERTS), folder)
    result = CliRunner().invoke(app, ["export", pretrained_path("prismer-easy-vqa"), str(folder)])
    assert result.exit_code == 1 and "is not empty" in result.stderr


# ---- the library's own exporters ----


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.treespec.children_specs. is deprecated:FutureWarning")
def test_torch_exports_one_program_for_any_number_of_images():
    exporters = pytest.importorskip("transformers.exporters")
    model = small_model(SOME_EXPERTS[:2]).requires_grad_(False)

    def inputs(rows, length):
        return {
            "input_ids": prompts(rows, length),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
            "expert_mask": torch.tensor([[True, False], [False, True], [True, True]])[:rows],
            **image_inputs_of(model, rows, seed=rows),
        }

    program = exporters.DynamoExporter().export(model, inputs(3, 5), exporters.DynamoConfig(dynamic=True))
    for rows, length in ((3, 5), (2, 7)):
        expected = model(**inputs(rows, length)).logits
        torch.testing.assert_close(program(**inputs(rows, length)).logits, expected, **TOLERANCE)


def test_loading_an_export_as_a_model_is_a_clear_error(with_experts):
    with pytest.raises(OSError, match="model.safetensors"):
        PrismerForConditionalGeneration.from_pretrained(with_experts[2])
