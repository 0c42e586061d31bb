"""`prismer caption`, `ask` and `classify` with checkpoints of PrismerLM."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from typer.testing import CliRunner

from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor
from modeling_prismer.cli import app
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite

from ..processing.tiny_lm_processors import EXPERTS_CONFIG, SIZES, make_tokenizer, make_vlm, make_vlm_processor


QUESTIONS = ["What shape is it?", "Is it red?"]
LABELS = ["a dog", "a circle", "yes"]


def build(language, vision, text, **kwargs):
    """A random PrismerLM with edges, and its processor."""
    suite = ExpertSuite([CannyEdges()])
    torch.manual_seed(0)
    model = PrismerLMForConditionalGeneration.from_backbones(
        language, vision, suite.descriptions, experts_config=EXPERTS_CONFIG, **kwargs
    )
    processor = PrismerLMProcessor.from_backbones(text, vision, suite, config=model.config)
    model.generation_config.max_new_tokens = 5
    return model.eval(), processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`whole` has all weights, `trained` those that were trained, `language` and `vision` the backbones."""
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    language = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=512))
    language.get_output_embeddings().weight.data.mul_(20)
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=32, patch_size=16)).save_pretrained(folder / "vision")
    model, processor = build(str(folder / "language"), [str(folder / "vision")], str(folder / "language"))
    for name, trained_only in (("whole", False), ("trained", True)):
        model.save_pretrained(folder / name, trained_only=trained_only)
        processor.save_pretrained(folder / name)
    for number in range(2):
        pixels = torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8, generator=torch.manual_seed(number))
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def texts_of(result):
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(row["experts"] == ["edge"] for row in rows), result.stderr
    return [[answer["text"] for answer in row.get("answers", [row])] for row in rows]


def answer(model, processor, image, question):
    """The answer of the API."""
    content = [{"type": "image", "image": str(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return processor.post_process_generation(model.generate(**inputs), inputs["input_ids"].shape[1])[0]


def test_captions_and_answers_equal_those_of_the_api(folder):
    model = PrismerLMForConditionalGeneration.from_pretrained(folder / "whole")
    processor = PrismerLMProcessor.from_pretrained(folder / "whole")
    images = [folder / "0.png", folder / "1.png"]
    expected = [[answer(model, processor, image, question) for question in QUESTIONS] for image in images]
    assert len({text for own in expected for text in own}) > 1
    assert texts_of(run("ask", *images, *QUESTIONS, "--model", folder / "whole", "--json")) == expected
    caption = answer(model, processor, images[0], "Describe the image in one sentence.")
    ask = ("caption", images[0], "--model", folder / "whole", "--json")
    assert texts_of(run(*ask)) == [[caption]]
    assert texts_of(run(*ask, "--prompt", QUESTIONS[0])) == [expected[0][:1]]


def test_the_prompts_of_the_training_are_used(folder, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "whole")
    processor = PrismerLMProcessor.from_pretrained(folder / "whole")
    processor.prompts = {"caption": "A", "vqa": "{}\nA triangle or a circle?"}
    processor.save_pretrained(tmp_path / "whole")
    model = PrismerLMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    image, settings = folder / "0.png", ("--model", tmp_path / "whole", "--json")
    assert texts_of(run("caption", image, *settings)) == [[answer(model, processor, image, "A")]]
    expected = answer(model, processor, image, f"{QUESTIONS[0]}\nA triangle or a circle?")
    assert texts_of(run("ask", image, QUESTIONS[0], *settings)) == [[expected]]


def test_labels_are_ranked_for_a_question(folder):
    ask = ("classify", folder / "0.png", *LABELS, "--model", folder / "whole")
    assert "a PrismerLM needs a question that the labels answer: --question" in run(*ask).stderr
    row = json.loads(run(*ask, "--question", QUESTIONS[0], "--json").stdout)
    scores = [each["score"] for each in row["labels"]]
    assert sorted(each["label"] for each in row["labels"]) == sorted(LABELS) and scores == sorted(scores)[::-1]


def test_the_language_model_can_lie_elsewhere(folder, tmp_path):
    ask = ("ask", folder / "0.png", *QUESTIONS, "--json", "--model")
    expected = texts_of(run(*ask, folder / "whole"))
    assert texts_of(run(*ask, folder / "trained")) == expected
    shutil.move(folder / "language", tmp_path / "elsewhere")
    try:
        result = run(*ask, folder / "trained")
        assert result.exit_code == 1 and f"the language model {folder / 'language'} cannot be loaded" in result.stderr
        assert "--language FOLDER" in result.stderr
        assert texts_of(run(*ask, folder / "trained", "--language", tmp_path / "elsewhere")) == expected
    finally:
        shutil.move(tmp_path / "elsewhere", folder / "language")
    assert "this has all" in run(*ask, folder / "whole", "--language", folder / "language").stderr


def test_a_vision_language_model_keeps_its_own_template(folder):
    processor = make_vlm_processor()
    model, processor = build(make_vlm(processor), None, processor)
    for part in (model, processor):
        part.save_pretrained(folder / "vlm")
    model = PrismerLMForConditionalGeneration.from_pretrained(folder / "vlm")
    images = [folder / "0.png", folder / "1.png"]
    expected = [[answer(model, processor, image, question) for question in QUESTIONS] for image in images]
    assert texts_of(run("ask", *images, *QUESTIONS, "--model", folder / "vlm", "--json")) == expected


def test_other_models_are_refused(folder):
    result = run("caption", folder / "0.png", "--model", folder / "language")
    assert result.exit_code == 1 and "is a llama; accepted are prismer and prismer_lm" in result.stderr
    result = run("caption", folder / "0.png", "--language", folder / "language")
    assert result.exit_code == 1 and "--language is for checkpoints of PrismerLM" in result.stderr
