"""The command line: the bundled checkpoint answers, experts are drawn, bad input gets one clear line."""

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from modeling_prismer import pretrained_path
from modeling_prismer.cli import app


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A red circle, as in the data that the bundled checkpoint was trained on."""
    image = Image.new("RGB", (64, 64), (240, 244, 250))
    ImageDraw.Draw(image).ellipse((16, 18, 46, 48), fill=(255, 0, 0))
    path = tmp_path_factory.mktemp("pictures") / "circle.png"
    image.save(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "question, answer",
    [("what color is the shape?", "red"), ("what shape is in the image?", "circle"), ("is there a blue shape?", "no")],
)
def test_ask_answers_with_the_bundled_checkpoint(picture, question, answer):
    result = run("ask", picture, question)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == answer


def test_classify_ranks_the_labels_best_first(picture):
    result = run("classify", picture, "triangle", "circle", "rectangle", "--question", "what shape is in the image?")
    assert result.exit_code == 0, result.output
    positions = [result.stdout.index(label) for label in ("circle", "triangle", "rectangle")]
    assert positions[0] == min(positions)


def test_experts_writes_a_panel_and_prints_where_it_is(picture, tmp_path):
    result = run("experts", picture, "--out", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    path = tmp_path / "new" / "folder" / "circle_experts.png"
    assert result.stdout.replace("\n", "") == str(path)
    assert Image.open(path).width > 500
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ask", "missing.png", "what color?"), "missing.png"),
        (("ask", "{picture}", "what color?", "--model", "no/such/folder"), "no/such/folder"),
        (("ask", "{picture}", "what color?", "--device", "cuda:99"), "cuda:99"),
        (("caption", "{picture}"), "task is 'vqa'"),
        (("classify", "{picture}", "circle"), "needs a question"),
        (("convert", "missing.bin", "out", "--variant", "prismer_tiny"), "prismer_tiny"),
    ],
)
def test_bad_input_gets_one_clear_line(picture, arguments, message):
    result = run(*(part.format(picture=picture) for part in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_picture_is_named(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    result = run("ask", path, "what color?")
    assert result.exit_code == 1 and "notes.png" in result.stderr


def test_pretrained_path_names_the_shipped_checkpoints():
    assert pretrained_path("prismer-easy-vqa").endswith("prismer-easy-vqa")
    with pytest.raises(ValueError, match="no checkpoint 'prismer'.*prismer-easy-vqa"):
        pretrained_path("prismer")
