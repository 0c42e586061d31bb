"""The command line answers, draws experts and labels images; bad input gets one clear line."""

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path, sample_image
from modeling_prismer.cli import app
from modeling_prismer.conversion import read_feature_tables
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing.labels import LabelStore


EASY_VQA = pretrained_path("prismer-easy-vqa")
LABEL = {"kind": "label", "channels": 64, "num_classes": 80}


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """A red circle, as in the training data of the shipped checkpoint."""
    image = Image.new("RGB", (64, 64), (240, 244, 250))
    ImageDraw.Draw(image).ellipse((16, 18, 46, 48), fill=(255, 0, 0))
    path = tmp_path_factory.mktemp("images") / "circle.png"
    image.save(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "question, answer",
    [("what color is the shape?", "red"), ("what shape is in the image?", "circle"), ("is there a blue shape?", "no")],
)
def test_ask_answers_with_the_bundled_checkpoint(circle, question, answer):
    result = run("ask", circle, question, "--model", EASY_VQA)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == answer


def test_caption_equals_that_of_a_script(tmp_path):
    path = tmp_path / "scene.png"
    sample_image("scene").save(path)
    processor = PrismerProcessor.from_pretrained(pretrained_path())
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path(), dtype=torch.float32)
    inputs = processor(path, task="caption")
    generated = model.generate(**inputs)
    (caption,) = processor.post_process_generation(generated, inputs["input_ids"].shape[1], task="caption")
    assert run("caption", path).stdout.strip() == caption
    assert run("caption", path, "--beams", 1).stdout.strip() != caption


def test_shipped_checkpoint_is_found_by_its_name(circle):
    result = run("ask", circle, "what color is the shape?", "--model", "prismer-easy-vqa")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "red"


def test_classify_ranks_labels_best_first(circle):
    labels = ("triangle", "circle", "rectangle")
    result = run("classify", circle, *labels, "--question", "what shape is in the image?", "--model", EASY_VQA)
    assert result.exit_code == 0, result.output
    positions = [result.stdout.index(label) for label in ("circle", "triangle", "rectangle")]
    assert positions[0] == min(positions)


def test_experts_writes_a_panel_and_prints_its_path(circle, tmp_path):
    result = run("experts", circle, "--out", tmp_path / "new" / "folder", "--model", EASY_VQA)
    assert result.exit_code == 0, result.output
    path = tmp_path / "new" / "folder" / "circle_experts.png"
    assert result.stdout.replace("\n", "") == str(path)
    assert Image.open(path).width > 500
    assert list(path.parent.iterdir()) == [path]


def test_label_continues_its_store(circle, tmp_path):
    arguments = ("label", Path(circle).parent, "--out", tmp_path / "store")
    assert run(*arguments).exit_code == 0
    again = run(*arguments)
    assert again.exit_code == 0 and again.stderr.strip().splitlines()[-1].startswith("0 images labelled")
    assert set(LabelStore(tmp_path / "store")["circle.png"]) == {"edge", "ocr"}


def test_features_makes_a_table_that_conversion_reads(clip_folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{letter}{number}" for letter in "abcdefgh" for number in range(10)))
    result = run("features", names, "--out", tmp_path / "tables.safetensors", "--text-encoder", clip_folder)
    assert result.exit_code == 0, result.output
    tables = read_feature_tables(tmp_path / "tables.safetensors", [{"name": "segmentation", **LABEL}])
    assert tables["segmentation"].shape == (80, 64) and tables["background"].shape == (64,)
    # the fitted analysis gives the same table again
    again = ("--out", tmp_path / "again.safetensors", "--pca", tmp_path / "tables_pca.safetensors")
    assert run("features", names, *again, "--text-encoder", clip_folder).exit_code == 0
    same = read_feature_tables(tmp_path / "again.safetensors", [{"name": "segmentation", **LABEL}])
    torch.testing.assert_close(same["segmentation"], tables["segmentation"])
    # and so does the same analysis in the published format
    analysis = PCA()
    fitted = load_file(tmp_path / "tables_pca.safetensors")
    analysis.mean_, analysis.components_ = fitted["mean"].double().numpy(), fitted["components"].double().numpy()
    (tmp_path / "clip_pca.pkl").write_bytes(pickle.dumps(analysis, protocol=4))
    published = ("--out", tmp_path / "published.safetensors", "--pca", tmp_path / "clip_pca.pkl")
    assert run("features", names, *published, "--text-encoder", clip_folder).exit_code == 0
    assert (tmp_path / "published.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_features_of_few_names_need_an_analysis(clip_folder, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    output = tmp_path / "t.safetensors"
    result = run("features", tmp_path / "names.txt", "--out", output, "--text-encoder", clip_folder)
    assert result.exit_code == 1 and "at least 64" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ask", "missing.png", "what color?"), "missing.png"),
        (("ask", "{circle}", "what color?", "--model", "no/such/folder"), "no/such/folder"),
        (("ask", "{circle}", "what color?", "--device", "cuda:99"), "cuda:99"),
        (("ask", "{circle}", " "), "a question is empty"),
        (("caption", "{circle}", "--model", EASY_VQA), "made for vqa"),
        (("classify", "{circle}", "circle", "--model", EASY_VQA), "needs a question"),
        (("experts", "{circle}", "--out", "{circle}", "--model", EASY_VQA), "is a file; a folder is needed"),
        (("convert", "missing.bin", "out", "--variant", "prismer_tiny"), "prismer_tiny"),
    ],
)
def test_bad_input_gets_one_clear_line(circle, arguments, message):
    result = run(*(part.format(circle=circle) for part in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_file_that_is_not_an_image_is_named(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not an image")
    result = run("ask", path, "what color?")
    assert result.exit_code == 1 and "notes.png" in result.stderr


def test_pretrained_path_names_the_shipped_checkpoints():
    assert pretrained_path("prismer-easy-vqa").endswith("prismer-easy-vqa")
    with pytest.raises(ValueError, match="no checkpoint 'prismer'.*prismer-easy-vqa"):
        pretrained_path("prismer")


def test_experts_runs_a_suite_by_name(circle, tmp_path):
    result = run("experts", str(circle), "--out", str(tmp_path), "--experts", "offline")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "circle_experts.png").is_file()
    result = run("experts", str(circle), "--out", str(tmp_path), "--experts", "best")
    assert result.exit_code == 1 and "there is no 'best'; the experts of prismer-scenes are depth" in result.stderr


def test_folder_comes_before_a_shipped_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("prismer-easy-vqa") == EASY_VQA and find_checkpoint("me/mine") == "me/mine"
    (tmp_path / "prismer-easy-vqa").mkdir()
    assert find_checkpoint("prismer-easy-vqa") == "prismer-easy-vqa"
