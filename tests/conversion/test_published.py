"""A published checkpoint becomes a folder that is ready for use, in one call, from the Hub's files and the tables."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from transformers import AutoTokenizer
from typer.testing import CliRunner

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.cli import app
from modeling_prismer.conversion import PUBLISHED_CHECKPOINTS, convert_published
from modeling_prismer.processing.experts import ClipTextFeatures


def names_of(number: int) -> list[str]:
    return [f"class {index}" for index in range(number)]


@pytest.fixture
def hub(prismer, prismerz, tokenizer, monkeypatch, tmp_path):
    """A Hub with the golden checkpoints in the published places. Its list has the files that were fetched."""
    fetched = []

    def hf_hub_download(repo_id, filename, revision=None):
        fetched.append((repo_id, filename, revision))
        name = filename.split("/")[0]
        if (
            repo_id != "shikunl/prismer"
            or name not in PUBLISHED_CHECKPOINTS
            or filename != f"{name}/pytorch_model.bin"
        ):
            raise LocalEntryNotFoundError("offline")
        return str((prismer if "prismer_" in name else prismerz).checkpoint)

    def from_variant(variant):
        return (prismer if variant.startswith("prismer_") else prismerz).config

    monkeypatch.setattr("modeling_prismer.conversion.tensor_files.hf_hub_download", hf_hub_download)
    monkeypatch.setattr(PrismerConfig, "from_variant", from_variant)
    tokenizers = {f"FacebookAI/roberta-{size}": tokenizer for size in ("base", "large")}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizers.__getitem__)
    return fetched


@pytest.fixture
def dataset(prismer, tmp_path) -> Path:
    """The published `dataset` folder: its files have the published containers."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for file, name in (("coco_features", "segmentation"), ("detection_features", "detection")):
        table = prismer.tables[name]
        torch.save({"labels": names_of(len(table)), "features": table}, folder / f"{file}.pt")
    torch.save(prismer.tables["background"], folder / "background_features.pt")
    analysis = PCA(64)
    analysis.mean_, analysis.components_ = np.zeros(96), np.eye(64, 96)
    (folder / "clip_pca.pkl").write_bytes(pickle.dumps(analysis, protocol=4))
    (folder / "utils.py").write_text("")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_one_command_makes_a_folder_that_is_ready(hub, dataset, prismer, tmp_path):
    out = tmp_path / "out"
    variant = ("--variant", "vqa_prismer_base", "--image-size", 128)
    result = run("shikunl/prismer", *variant, out, "--feature-tables", dataset)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().replace("\n", "") == str(out)
    assert hub == [("shikunl/prismer", "vqa_prismer_base/pytorch_model.bin", None)]
    model = PrismerForConditionalGeneration.from_pretrained(out)
    assert model.config.vision_config.image_size == 128
    stems, tables = model.model.vision_model.expert_stems, prismer.tables
    for name in ("segmentation", "detection"):
        assert model.config.class_names[name] == names_of(len(tables[name]))
        expected = torch.cat([tables[name], tables["background"][None]]).float()
        assert torch.equal(stems[name].class_features, expected)
    assert model.generation_config.num_beams == 3 and model.generation_config.length_penalty == -1.0


def test_the_processor_brings_task_tokenizer_and_experts(hub, dataset, tmp_path, monkeypatch):
    convert_published("vqa_prismer_base", tmp_path / "out", dataset)
    monkeypatch.undo()
    processor = PrismerProcessor.from_pretrained(tmp_path / "out")
    assert processor.task == "vqa" and processor.image_processor.size["height"] == 96
    assert list(processor.experts) == ["depth", "normal", "segmentation", "edge", "detection", "ocr"]
    words = processor.experts["ocr"].word_features
    assert isinstance(words, ClipTextFeatures) and Path(words.pca).is_relative_to(tmp_path / "out" / "experts")
    assert torch.equal(load_file(words.pca)["components"], torch.eye(64, 96))


def test_licence_and_origin_are_in_the_model_card(hub, dataset, tmp_path):
    convert_published("vqa_prismer_base", tmp_path / "out", dataset, revision="abc")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.base_model == "shikunl/prismer"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert "https://huggingface.co/shikunl/prismer/tree/abc/vqa_prismer_base" in card.text
    assert "no commercial use" in card.text and "k=16" in card.text and "{" not in card.text.replace("**{", "")
    assert "resized" not in card.text


def test_another_image_size_is_in_the_model_card(hub, tmp_path):
    convert_published("caption_prismerz_base", tmp_path / "out", image_size=128)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "resized to images of 128×128 pixels" in text and "It has no experts" in text


def test_missing_tables_name_the_place_of_publication(hub, dataset, tmp_path):
    out = tmp_path / "out"
    for arguments in ((), ("--feature-tables", tmp_path / "nowhere")):
        result = run("shikunl/prismer", "--variant", "vqa_prismer_base", out, *arguments)
        assert result.exit_code == 1 and "https://github.com/NVlabs/prismer/tree/main/dataset" in result.stderr
        assert "detection_features.pt" in result.stderr
    (dataset / "detection_features.pt").unlink()
    result = run("shikunl/prismer", "--variant", "vqa_prismer_base", out, "--feature-tables", dataset)
    assert result.exit_code == 1 and "no table of detection" in result.stderr and "NVlabs" in result.stderr
    assert hub == [] and not out.exists()  # before anything was downloaded


def test_tables_can_be_left_out_on_request(hub, tmp_path):
    convert_published("vqa_prismer_base", tmp_path / "out", without_feature_tables=True)
    assert "converted without feature tables" in (tmp_path / "out" / "README.md").read_text()


def test_a_prismerz_needs_no_tables_and_has_no_experts(hub, tmp_path, monkeypatch):
    result = run("shikunl/prismer", "--variant", "vqa_prismerz_large", tmp_path / "out")
    assert result.exit_code == 0, result.output
    monkeypatch.undo()
    assert PrismerProcessor.from_pretrained(tmp_path / "out").experts is None


def test_a_pretrained_checkpoint_starts_from_an_empty_prompt(hub, tmp_path, monkeypatch):
    convert_published("pretrain_prismerz_base", tmp_path / "out")
    monkeypatch.undo()
    processor = PrismerProcessor.from_pretrained(tmp_path / "out")
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path / "out")
    image = Image.new("RGB", (40, 30))
    inputs = processor(images=image)
    assert inputs["input_ids"].tolist() == [[0]]
    generated = model.generate(**inputs)
    assert 8 <= generated.shape[1] <= 20
    image.save(tmp_path / "image.png")
    caption = ("caption", str(tmp_path / "image.png"), "--model", str(tmp_path / "out"), "--device", "cpu")
    result = CliRunner().invoke(app, caption)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("place", ["repository", "folder", "file"])
def test_local_copies_are_converted_without_the_hub(place, hub, prismerz, tmp_path):
    folder = tmp_path / "copy" / "caption_prismerz_base"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(prismerz.checkpoint.read_bytes())
    source = {"repository": folder.parent, "folder": folder, "file": folder / "pytorch_model.bin"}[place]
    variant = ("--variant", "caption_prismerz_base") if place == "repository" else ()
    result = run(source, tmp_path / "out", *variant)
    assert result.exit_code == 0, result.output
    assert hub == [] and "a copy of [shikunl/prismer]" in (tmp_path / "out" / "README.md").read_text()


def test_the_name_may_be_in_the_place(hub, tmp_path, monkeypatch):
    assert run("shikunl/prismer/vqa_prismerz_base", tmp_path / "out").exit_code == 0
    assert hub == [("shikunl/prismer", "vqa_prismerz_base/pytorch_model.bin", None)]
    monkeypatch.undo()
    assert PrismerProcessor.from_pretrained(tmp_path / "out", experts=None).task == "vqa"


def test_an_unavailable_checkpoint_is_named(hub, tmp_path):
    result = run("someone/else", "--variant", "vqa_prismerz_base", tmp_path / "out")
    assert result.exit_code == 1 and "vqa_prismerz_base/pytorch_model.bin of someone/else is not available" in (
        result.stderr
    )


def test_an_unavailable_tokenizer_is_an_error(hub, tmp_path, monkeypatch):
    def offline(name):
        raise OSError("offline")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match="FacebookAI/roberta-base is not in the local cache.*--tok"):
        convert_published("vqa_prismerz_base", tmp_path / "out")
    assert hub == [] and not (tmp_path / "out").exists()


def test_the_twelve_are_listed_and_none_is_huge():
    result = run("--list")
    assert result.exit_code == 0
    assert len(PUBLISHED_CHECKPOINTS) == 12 and all(name in result.stdout for name in PUBLISHED_CHECKPOINTS)
    assert "huge" not in result.stdout and "shikunl/prismer" in result.stdout


@pytest.mark.parametrize("variant", ["vqa_prismer_huge", "prismer_tiny", "vqa"])
def test_unknown_names_are_refused_with_the_list(variant, tmp_path):
    result = run("shikunl/prismer", "--variant", variant, tmp_path / "out")
    assert result.exit_code == 1 and "pretrain_prismerz_large" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_repository_alone_is_not_a_checkpoint(tmp_path):
    result = run("shikunl/prismer", tmp_path / "out")
    assert result.exit_code == 1 and "--variant" in result.stderr and "vqa_prismer_base" in result.stderr


def test_names_agree_with_the_networks():
    for name, each in PUBLISHED_CHECKPOINTS.items():
        assert name == each.name == f"{name.split('_')[0]}_{each.variant}"
        assert bool(PrismerConfig.from_variant(each.variant).experts) == each.has_experts
