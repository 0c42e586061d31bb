"""A checkpoint with an expert for features goes through everything that a checkpoint goes through."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionModel
from typer.testing import CliRunner

from modeling_prismer import (
    DataCollatorForPrismer,
    PrismerForConditionalGeneration,
    PrismerLMForConditionalGeneration,
    PrismerLMProcessor,
    PrismerProcessor,
    pretrained_path,
)
from modeling_prismer.cli import app
from modeling_prismer.processing.experts import VisionFeatures
from modeling_prismer.processing.labels import label_source
from tests.modeling_prismer.tiny_lm import ENCODERS, scatter_weights
from tests.processing.tiny_lm_processors import EXPERTS_CONFIG, SIZES, make_tokenizer

from .feature_checkpoint import feature_suite, save_feature_checkpoint, save_photographs
from .models import photograph


TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint, next to photographs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_photographs(folder / "photographs", 5)
    return save_feature_checkpoint(folder)


@pytest.fixture(scope="module")
def photographs(folder):
    return folder.parent / "photographs"


@pytest.fixture
def model(folder):
    return PrismerForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def processor(folder):
    return PrismerProcessor.from_pretrained(folder)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def test_its_answer_depends_on_the_vectors(model, processor):
    inputs = processor(images=photograph(), text="What is it?")
    assert inputs["features_values"].shape == (1, 32, 4, 4)
    with torch.no_grad():
        logits = model(**inputs).logits
        other = model(**{**inputs, "features_values": inputs["features_values"].flip(3)}).logits
    assert (logits - other).abs().max() > 1e-3


def test_commands_use_the_expert(folder, photographs, tmp_path):
    images = (photographs, "--model", folder, "--device", "cpu")
    asked = run("ask", *images, "--question", "What is it?", "--json")
    assert asked.exit_code == 0, asked.output
    assert {tuple(json.loads(line)["experts"]) for line in asked.stdout.splitlines()} == {("edge", "features")}
    drawn = run("experts", *images, "--out", tmp_path / "panels")
    assert drawn.exit_code == 0, drawn.output
    assert len(list((tmp_path / "panels").rglob("*.png"))) == 5


def test_stored_labels_train_the_network(folder, photographs, model, tmp_path):
    result = run("label", photographs, "--experts", folder, "--out", tmp_path / "store", "--device", "cpu")
    assert result.exit_code == 0, result.output
    processor = PrismerProcessor.from_pretrained(folder, experts=None)
    labels_for = label_source(tmp_path / "store", processor.image_processor.experts)
    rows = [
        {"image": str(photographs / f"{i}.png"), "image_id": f"{i}.png", "text": "?", "suffix": "a"} for i in range(5)
    ]
    batch = DataCollatorForPrismer(processor, labels_for)(rows)
    images = [Image.open(row["image"]) for row in rows]
    live = PrismerProcessor.from_pretrained(folder)(images=images, text=["?"] * 5)
    torch.testing.assert_close(batch["features_values"], live["features_values"], atol=0.02, rtol=0)
    assert batch["expert_mask"].all()
    model.train()(**batch).loss.backward()
    assert model.model.vision_model.expert_stems["features"].convs[0].weight.grad.abs().sum() > 0


def test_verification_names_vectors_of_another_size(photographs, tmp_path, model, processor):
    stem = model.model.vision_model.expert_stems["features"].train()
    values = processor(images=[Image.open(path) for path in sorted(photographs.iterdir())], text=["?"] * 5)
    for norm in stem.norms:
        norm.reset_running_stats()
        norm.momentum = None

    def verified(scale):
        """The line of the report about a network that was trained on such vectors."""
        with torch.no_grad():
            stem.train()(values=values["features_values"] * scale)
        model.eval().save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        for norm in stem.norms:
            norm.reset_running_stats()
        result = run("verify", tmp_path, "--images", photographs, "--device", "cpu")
        return next(line for line in result.stdout.splitlines() if "features: maps" in line)

    assert " yes " in verified(1)
    assert "its vectors are about 10 times too small" in verified(10)


def test_onnx_reads_vectors(folder, model, processor, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from modeling_prismer.conversion import OnnxPrismer

    result = run("export", folder, tmp_path / "onnx")
    assert result.exit_code == 0, result.output
    runtime = OnnxPrismer(tmp_path / "onnx")
    images = [photograph((96, 64), seed) for seed in range(3)]
    inputs = processor(images=images, text=["What is it?"] * 3)
    with torch.no_grad():
        expected = model.generate(**inputs, do_sample=False)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    assert runtime.generate(**arrays).tolist() == expected.tolist()
    image_inputs = {name: array for name, array in arrays.items() if name in runtime.image_inputs}
    encoded = runtime.encode(**image_inputs)["last_hidden_state"]
    with torch.no_grad():
        wanted = model.model.get_image_features(**{name: inputs[name] for name in image_inputs}).last_hidden_state
    np.testing.assert_allclose(encoded, wanted, **TOLERANCE)
    # without the expert: its tensor is left out, and masked
    some = dict(processor(images=images, text=["What is it?"] * 3, experts=["edge"]))
    some.pop("features_values")
    assert some["expert_mask"].tolist() == [[True, False]] * 3
    with torch.no_grad():
        expected = model.generate(**some, do_sample=False)
    assert runtime.generate(**{name: tensor.numpy() for name, tensor in some.items()}).tolist() == expected.tolist()


def test_it_is_added_to_a_trained_model(folder, tmp_path):
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path("prismer-easy-vqa"), dtype=torch.float32)
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"))
    expert = VisionFeatures(str(folder.parent / "encoder"), width=32)
    model.add_expert(**expert.description)
    processor.image_processor.experts = model.config.experts
    processor.experts["features"] = expert
    image = photograph()
    inputs = processor(images=image, text="What is it?")
    assert inputs["features_values"].shape[1] == 32
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = model.generate(**inputs)
    restored = PrismerForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    again = PrismerProcessor.from_pretrained(tmp_path)(images=image, text="What is it?")
    assert torch.equal(again["features_values"], inputs["features_values"])
    assert torch.equal(restored.generate(**again), answer)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.vision_model.expert_stems["features"].projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_language_model_reads_vectors(tmp_path, fusion):
    suite = feature_suite(tmp_path / "encoder")
    encoder = ENCODERS["siglip"]()
    parts = {"fusion": fusion, "experts_config": EXPERTS_CONFIG, "cross_attention_every": 1}
    tokenizer = make_tokenizer()
    language = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=512))
    lm = PrismerLMForConditionalGeneration.from_backbones(
        language, SiglipVisionModel(encoder), suite.descriptions, **parts
    )
    scatter_weights(lm)  # opens the gates
    processor = PrismerLMProcessor.from_backbones(tokenizer, [encoder], suite, config=lm.config)
    inputs = processor(images=photograph(), text="What is it?", suffix="A dog.")
    assert inputs["features_values"].shape == (1, 32, 2, 2)
    lm.train()(**inputs).loss.backward()
    (stem,) = (stem for name, stem in lm.named_modules() if name.endswith("expert_stems.features"))
    assert stem.convs[0].weight.grad.abs().sum() > 0

    lm.eval().save_pretrained(tmp_path / "lm")
    processor.save_pretrained(tmp_path / "lm")
    restored = PrismerLMForConditionalGeneration.from_pretrained(tmp_path / "lm")
    again = PrismerLMProcessor.from_pretrained(tmp_path / "lm")(images=photograph(), text="What is it?")
    assert torch.equal(again["features_values"], inputs["features_values"])
    first, second = (each.generate(**again, max_new_tokens=4, do_sample=False) for each in (lm, restored))
    assert torch.equal(first, second)


def test_a_language_model_reads_the_encoder_of_the_checkpoint(folder, model, processor):
    tokenizer = make_tokenizer()
    language = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=512))
    lm = PrismerLMForConditionalGeneration.from_backbones(language, str(folder)).eval()
    own = PrismerLMProcessor.from_backbones(tokenizer, str(folder), config=lm.config)
    inputs = own(images=photograph(), text="What is it?")
    assert list(own.experts) == ["edge", "features"]
    with torch.no_grad():
        logits = lm(**inputs).logits
        other = lm(**{**inputs, "features_values": -inputs["features_values"]}).logits
    assert (logits - other).abs().max() > 1e-6
