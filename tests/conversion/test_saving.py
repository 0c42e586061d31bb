"""The converted folder: transformers loads it, and it is complete or not there."""

import json
import logging
import os

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration
from modeling_prismer.conversion import convert_original_checkpoint
from modeling_prismer.conversion.convert_checkpoint import _load_tokenizer
from modeling_prismer.processing import PrismerImageProcessor, PrismerProcessor


@pytest.fixture
def convert(prismer, tokenizer):
    """Converts the golden checkpoint with everything that belongs to it."""

    def convert(output_dir=None, **kwargs):
        arguments = {"feature_tables": prismer.tables, "tokenizer": tokenizer, **kwargs}
        return convert_original_checkpoint(prismer.checkpoint, prismer.config, output_dir, **arguments)

    return convert


@pytest.mark.parametrize("model_class", [PrismerForConditionalGeneration, AutoModelForImageTextToText])
def test_a_saved_model_loads_bit_equal(model_class, convert, tmp_path):
    model = convert(tmp_path / "out")
    loaded, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is PrismerForConditionalGeneration
    assert not any(info.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.config.experts == model.config.experts


def test_the_type_is_saved(convert, tmp_path):
    convert(tmp_path / "out", dtype="bfloat16")
    assert PrismerForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_weights_are_split_into_files_of_a_given_size(convert, tmp_path):
    model = convert(tmp_path / "out", max_shard_size="1MB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 1.1e6 for shard in shards)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("caption", {"num_beams": 3, "max_length": 20, "min_length": 8}),
        ("vqa", {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 2, "length_penalty": -1.0}),
        ("classification", {"num_beams": None}),
    ],
)
def test_the_published_settings_of_a_task_are_saved(task, settings, convert, tmp_path):
    model = convert(tmp_path / "out", task=task)
    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path / "out")
    for generation_config in (model.generation_config, loaded.generation_config):
        assert {name: getattr(generation_config, name) for name in settings} == settings
        assert generation_config.eos_token_id == 2
    assert PrismerProcessor.from_pretrained(tmp_path / "out").task == task


def test_the_processor_is_saved_for_the_model(convert, prismer, tokenizer, tmp_path):
    convert(tmp_path / "out", image_size=128)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor) is PrismerProcessor
    assert dict(processor.image_processor.size) == {"height": 128, "width": 128}
    assert processor.image_processor.experts == prismer.config.experts
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()


@torch.no_grad()
def test_a_saved_folder_turns_an_image_into_text(convert, tmp_path):
    convert(tmp_path / "out", task="vqa")
    processor = PrismerProcessor.from_pretrained(tmp_path / "out")
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path / "out")
    image = torch.arange(3 * 40 * 50, dtype=torch.uint8).view(3, 40, 50)
    inputs = processor(images=image, text="hi", return_tensors="pt")
    assert 2 <= model.generate(**inputs).shape[1] - inputs["input_ids"].shape[1] <= 10


def test_the_tokenizer_may_be_a_folder(convert, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert(tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_with_more_tokens_is_refused(convert, tokenizer, tmp_path):
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    with pytest.raises(ValueError, match="the tokenizer has 135 tokens; the model's vocabulary has 120"):
        convert(tmp_path / "out", tokenizer=tokenizer)


def test_a_tokenizer_with_other_special_tokens_is_refused(convert, tokenizer, tmp_path):
    tokenizer.pad_token = "<unk>"
    with pytest.raises(ValueError, match="the tokenizer's pad_token_id is 3; the config's is 1"):
        convert(tmp_path / "out", tokenizer=tokenizer)


def test_a_missing_tokenizer_is_an_error_if_it_was_named(convert, tmp_path):
    with pytest.raises(OSError):
        convert(tmp_path / "out", tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_the_rest_is_saved_with_a_warning(convert, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "out", tokenizer=None)
    assert "No tokenizer is saved" in caplog.text
    assert PrismerImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 96
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("size", ["base", "large"])
def test_a_published_size_gets_the_tokenizer_of_its_roberta(size, tokenizer, monkeypatch):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", {f"FacebookAI/roberta-{size}": tokenizer}.get)
    assert _load_tokenizer(None, PrismerConfig.from_variant(f"prismerz_{size}")) is tokenizer


def test_an_unavailable_published_tokenizer_is_a_warning(monkeypatch, caplog):
    def offline(name):
        raise OSError("cannot connect")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with caplog.at_level(logging.WARNING):
        assert _load_tokenizer(None, PrismerConfig.from_variant("prismer_base")) is None
    assert "No tokenizer is saved: FacebookAI/roberta-base is not in the local cache" in caplog.text


# ---- complete or not at all ----


@pytest.fixture
def broken_disk(monkeypatch):
    """Writing fails after the weights are written."""

    def fail(self, folder, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(PrismerProcessor, "save_pretrained", fail)


def test_a_failed_write_leaves_no_folder(broken_disk, convert, tmp_path):
    with pytest.raises(OSError, match="no space left"):
        convert(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_old_folder(convert, tmp_path, monkeypatch):
    convert(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(self, folder, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(PrismerProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(tmp_path / "out", dtype="float16", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_move_restores_the_old_folder(convert, tmp_path, monkeypatch):
    convert(tmp_path / "out")
    rename, calls = os.rename, []

    def rename_fails_once(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk is gone")
        rename(source, target)

    monkeypatch.setattr("os.rename", rename_fails_once)
    with pytest.raises(OSError, match="disk is gone"):
        convert(tmp_path / "out", dtype="float16", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_files_is_refused_before_reading(prismer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; choose another folder, or pass overwrite=True"):
        convert_original_checkpoint(tmp_path / "nowhere.bin", prismer.config, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwriting_replaces_the_whole_folder_of_a_prismer(convert, tmp_path):
    convert(tmp_path / "out", max_shard_size="1MB")
    convert(tmp_path / "out", dtype="float16", overwrite=True)
    assert not list((tmp_path / "out").glob("model-*.safetensors"))
    assert PrismerForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"config.json": '{"model_type": "bert"}'}])
def test_overwriting_never_deletes_anything_else(content, convert, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match="has no Prismer model; other folders are not overwritten"):
        convert(tmp_path, overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_an_empty_or_missing_folder_is_accepted(convert, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "empty")
    convert(tmp_path / "a" / "b")
    assert (tmp_path / "empty" / "config.json").exists() and (tmp_path / "a" / "b" / "config.json").exists()


def test_a_file_in_place_of_the_folder_is_refused(convert, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; a folder is needed"):
        convert(tmp_path / "out", overwrite=True)


def test_the_checkpoint_is_checked_before_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_prismer.conversion.convert_checkpoint._load_tokenizer", pytest.fail)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.bin"):
        convert_original_checkpoint(tmp_path / "none.bin", "prismer_base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
