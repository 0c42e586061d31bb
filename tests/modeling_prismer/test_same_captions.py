"""The command line, the pipeline and the API give the same text for the same image: that of the generation config."""

import json

import pytest
import torch
from transformers import GenerationConfig, pipeline
from typer.testing import CliRunner

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path, sample_image
from modeling_prismer.cli import app


QUESTION = "What does the sign say?"


@pytest.fixture(scope="module")
def processor():
    return PrismerProcessor.from_pretrained(pretrained_path())


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.png"
    sample_image("scene").save(path)
    return str(path)


def of_command_line(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["text"]


def of_api(path, processor, image, text, task):
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    inputs = processor(image, text, task=task)
    return processor.post_process_generation(model.generate(**inputs), inputs["input_ids"].shape[1], task=task)[0]


def of_pipeline(path, processor, image, text):
    pipe = pipeline("image-text-to-text", model=path, processor=processor)
    return pipe(image, text, return_full_text=False)[0]["generated_text"].strip().lower()


def test_a_caption_is_the_same_everywhere(scene, processor):
    path = pretrained_path()
    caption = of_api(path, processor, scene, None, "caption")
    assert len(caption.split()) > 5
    assert of_command_line("caption", scene) == caption
    assert of_pipeline(path, processor, scene, "A picture of") == caption


def test_an_answer_is_the_same_everywhere(scene, processor):
    path = pretrained_path()
    answer = of_api(path, processor, scene, QUESTION, "vqa")
    assert of_command_line("ask", scene, QUESTION) == answer
    assert of_pipeline(path, processor, scene, QUESTION) == answer


def test_the_generation_config_decides_everywhere(scene, processor, tmp_path):
    """Nothing sets a default of its own, be it the number of beams or sampling."""
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path())
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=2, pad_token_id=1, do_sample=True, temperature=5.0, max_new_tokens=4
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    texts = []
    for caption in (
        lambda: of_api(tmp_path, processor, scene, None, "caption"),
        lambda: of_command_line("caption", scene, "--model", str(tmp_path)),
        lambda: of_pipeline(str(tmp_path), processor, scene, "A picture of"),
    ):
        torch.manual_seed(1)
        texts.append(caption().lower())
    assert len(set(texts)) == 1 and texts[0] != of_api(pretrained_path(), processor, scene, None, "caption")
