"""The programs of docs/prismer_lm.md run as they are, with tiny random models in place of those of the Hub."""

import ast
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    TrainingArguments,
)

from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration
from scenes.run_lm_scenes import LmScenesArguments
from tests.processing.experts.models import depth_anything
from tests.processing.tiny_lm_processors import SIZES, make_tokenizer, make_vlm, make_vlm_processor


REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "prismer_lm.md").read_text()
QUICK_START, TRAINING, USE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose subfolders have the names of the models on the Hub, so that these are loaded from there."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    language = folder / "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokenizer = make_tokenizer()
    sizes = {**SIZES, "num_hidden_layers": 4}  # the page has a gated block before every fourth layer
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(language)
    tokenizer.save_pretrained(language)
    vision = SiglipVisionConfig(**SIZES, image_size=32, patch_size=16)
    SiglipVisionModel(vision).save_pretrained(folder / "google/siglip2-base-patch16-224")
    vlm_processor = make_vlm_processor()
    make_vlm(vlm_processor).save_pretrained(folder / "Qwen/Qwen2.5-VL-3B-Instruct")
    vlm_processor.save_pretrained(folder / "Qwen/Qwen2.5-VL-3B-Instruct")
    for part in depth_anything():
        part.save_pretrained(folder / "depth-anything/Depth-Anything-V2-Small-hf")
    (folder / "my_images").mkdir()
    random = np.random.default_rng(0)
    for name in ("my_images/a.jpg", "my_images/b.jpg", "sign.png"):
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    rows = [
        {"file_name": f"{name}.jpg", "question": "What shape is it?", "answer": answer}
        for name, answer in (("a", "A triangle"), ("b", "a circle"))
    ]
    (folder / "my_images/questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    return lambda program: exec(program, names) or names


def test_quick_start_runs(run):
    inputs = run(QUICK_START)["inputs"]
    assert "Text:" in run("text = processor.decode(inputs['input_ids'][0])")["text"]
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and "ocr_ids" not in inputs


def test_experts_are_added_to_a_vision_language_model(run, folder, capsys):
    names = run(TRAINING)
    weights = load_file(folder / "my_adapter" / "model.safetensors")
    assert not any(name.startswith("model.language_model") for name in weights)
    assert (folder / "my_adapter" / "model.safetensors").stat().st_size < 8e6
    assert names["trainer"].state.global_step == 3 and len(TRAINING.strip().splitlines()) < 50
    capsys.readouterr()
    names = run(USE)
    assert names["model"].config.expert_names == ["depth", "ocr"]
    assert names["inputs"]["depth_values"].any() and names["inputs"]["expert_mask"].all()
    assert capsys.readouterr().out.endswith("\n")


def test_size_of_the_adapter_is_counted():
    call = next(
        node for node in ast.walk(ast.parse(TRAINING)) if isinstance(node, ast.Call) and len(node.keywords) == 4
    )
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    experts = [{"name": "depth", "kind": "dense", "channels": 1}, {"name": "ocr", "kind": "label", "channels": 64}]
    experts_config = {"experts": experts, **ast.literal_eval(given["experts_config"])}
    config = PrismerLMConfig(
        text_config=Qwen2_5_VLConfig(text_config={"hidden_size": 2048, "num_hidden_layers": 1}),
        experts_config=experts_config,
        projector_hidden_size=ast.literal_eval(given["projector_hidden_size"]),
    )
    with torch.device("meta"):
        model = PrismerLMForConditionalGeneration(config).freeze_backbones()
    trained = model.num_parameters(only_trainable=True)
    assert f"The adapter has {trained / 1e6:.1f} million weights, {4 * trained / 1e6:.0f} MB in float32." in PAGE


def test_memory_table_is_that_of_its_program(monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    runpy.run_path(str(REPOSITORY / "benchmarks" / "lm_memory.py"), run_name="__main__")
    table = capsys.readouterr().out.strip()
    assert table in PAGE and table.count("Qwen2.5-") == 6


def test_commands_have_options_of_the_recipes():
    parser = HfArgumentParser((LmScenesArguments, TrainingArguments))
    used = set(re.findall(r"(?<![\w-])--[a-z_]+", PAGE))
    assert used and used <= set(parser._option_string_actions)
    assert len(re.findall(r"(?m)^ *\$lm ", PAGE)) >= 14
