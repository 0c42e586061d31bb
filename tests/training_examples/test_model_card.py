"""Model cards of the recipes: base models by their ids, experts, metrics, a program that runs, and no local paths."""

import re

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from model_card import base_models, measured, write_model_card
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path, sample_image


@pytest.fixture(scope="module")
def easy_vqa():
    path = pretrained_path("prismer-easy-vqa")
    return PrismerForConditionalGeneration.from_pretrained(path), PrismerProcessor.from_pretrained(path)


def write(folder, easy_vqa, sources, metrics=None):
    write_model_card(folder, *easy_vqa, sources, metrics)
    assert str(folder) not in (folder / "README.md").read_text()
    return ModelCard.load(folder / "README.md")


def test_a_card_has_what_the_hub_and_a_reader_need(easy_vqa, tmp_path):
    card = write(tmp_path, easy_vqa, ["owner/name"], {"accuracy": 0.5})
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert card.data.base_model == ["owner/name"] and "prismer" in card.data.tags
    assert "trained from [owner/name](https://huggingface.co/owner/name)" in card.text
    assert "| experts | edge, ocr |" in card.text and "| accuracy | 0.5 |" in card.text
    assert "64×64 pixels" in card.text and "2.8 million" in card.text


def test_the_program_of_a_card_runs(easy_vqa, tmp_path, monkeypatch, capsys):
    model, processor = easy_vqa
    (tmp_path / "mine").mkdir()
    model.save_pretrained(tmp_path / "mine")
    only_edges = PrismerProcessor(
        processor.image_processor, processor.tokenizer, experts=processor.experts.only("edge"), task="vqa"
    )
    only_edges.save_pretrained(tmp_path / "mine")
    card = write(tmp_path / "mine", easy_vqa, [])
    monkeypatch.chdir(tmp_path)
    sample_image("shape").save("image.png")
    exec(re.search("```python\n(.*?)```", card.text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("['")


def test_base_models_are_hub_ids(easy_vqa, tmp_path):
    (tmp_path / "local").mkdir()
    for folder, sources in (("a", ["one/model", "other/model"]), ("b", [str(tmp_path / "a")])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, easy_vqa, sources)
    assert base_models([str(tmp_path / "b")]) == ["one/model", "other/model"]  # that of its base, in turn
    assert base_models([str(tmp_path / "local"), "prismer-scenes", "runs/mine/best"]) == []
    card = write(tmp_path / "b", easy_vqa, [str(tmp_path / "local")])
    assert card.data.base_model is None and "trained from a local checkpoint" in card.text
    assert "trained from `prismer-scenes` of the package" in write(tmp_path, easy_vqa, ["prismer-scenes"]).text
    assert "trained from scratch" in write(tmp_path, easy_vqa, []).text


def test_a_card_of_an_adapter_says_so(easy_vqa, tmp_path):
    path = pretrained_path("prismer-easy-vqa")
    model = get_peft_model(PrismerForConditionalGeneration.from_pretrained(path), LoraConfig())
    write_model_card(tmp_path, model, easy_vqa[1], ["owner/name"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model_relation == "adapter" and "lora" in card.data.tags
    assert "an adapter of [owner/name]" in card.text


def test_times_are_no_metrics():
    metrics = {"eval_cider": 1.5, "eval_runtime": 9.0, "eval_samples_per_second": 3.0, "epoch": 1.0}
    assert measured(metrics) == {"cider": 1.5}
