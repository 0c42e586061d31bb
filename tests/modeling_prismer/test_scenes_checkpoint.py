"""The default checkpoint: six experts see the bundled scene, it is captioned and asked about, photographs are told."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import modeling_prismer
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path
from modeling_prismer.cli import app


SCENE = str(Path(modeling_prismer.__file__).parent / "assets" / "scene.png")


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def test_is_the_default_and_small_enough_to_ship():
    assert pretrained_path() == pretrained_path("prismer-scenes")
    files = [path for path in Path(pretrained_path()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_scenes_checkpoint_answers_with_live_experts():
    processor = PrismerProcessor.from_pretrained(pretrained_path())
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path(), dtype="float32")
    assert list(processor.experts) == model.config.expert_names
    assert model.config.expert_names == ["depth", "normal", "segmentation", "edge", "detection", "ocr"]
    questions = ["What shape is the shiny red object?", "What does the sign say?"]
    inputs = processor(images=SCENE, text=questions)
    assert inputs["expert_mask"].all()
    said = processor.post_process_generation(model.generate(**inputs), inputs["input_ids"].shape[1])
    assert said == ["ring", "frog"]


def test_the_bundled_scene_is_captioned_without_a_warning():
    result = run("caption", SCENE)
    assert "blue pyramid on the left" in result.stdout
    assert "unlike" not in result.stderr


@pytest.mark.parametrize("seed", [0, 1])
def test_a_picture_that_is_no_scene_gets_a_warning(seed, tmp_path):
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "blobs.png")
    result = run("caption", str(tmp_path / "blobs.png"))
    assert "unlike those that the checkpoint was trained on" in result.stderr
