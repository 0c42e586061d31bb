"""`prismer ask`, `caption` and `classify` with `--experts auto`."""

import json
import shutil

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from modeling_prismer import pretrained_path
from modeling_prismer.cli import app
from modeling_prismer.processing.expert_router import ExpertRouter, RouterConfig, RouterPrice

from ..processing.taught_routers import taught_router


SHAPE, COLOR = "what shape is in the image?", "what color is the shape?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose router runs edges for shapes and nothing for colors, and two images."""
    folder = tmp_path_factory.mktemp("routed")
    shutil.copytree(pretrained_path("prismer-easy-vqa"), folder / "routed")
    subsets = [[], ["edge"], ["ocr"], ["edge", "ocr"]]
    taught_router({SHAPE: ["edge"], COLOR: []}, subsets, [0.0, 0.003, 0.11, 0.113]).save_pretrained(folder / "routed")
    for name, color in (("a", "red"), ("b", "blue")):
        image = Image.new("RGB", (64, 64), (240, 244, 250))
        ImageDraw.Draw(image).ellipse((16, 18, 46, 48), fill=color)
        image.save(folder / f"{name}.png")
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def rows(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("question, experts, answer", [(SHAPE, ["edge"], "circle"), (COLOR, [], "red")])
def test_question_runs_the_experts_that_it_needs(folder, question, experts, answer):
    ask = ("ask", folder / "a.png", question, "--model", folder / "routed", "--experts")
    (row,) = rows(*ask, "auto")
    assert (row["experts"], row["text"]) == (experts, answer)
    (fixed,) = rows(*ask, ",".join(experts) or "none")
    assert row["score"] == fixed["score"]


def test_questions_about_one_image_share_experts(folder):
    ask = ("ask", folder / "a.png", folder / "b.png", COLOR, SHAPE, "--model", folder / "routed", "--experts", "auto")
    assert [row["experts"] for row in rows(*ask)] == [["edge"], ["edge"]]


def test_budget_is_kept(folder):
    ask = ("ask", folder / "a.png", SHAPE, "--model", folder / "routed", "--experts", "auto", "--budget-ms")
    assert [rows(*ask, budget)[0]["experts"] for budget in (40, 1)] == [["edge"], []]


def test_labels_are_ranked_with_chosen_experts(folder):
    classify = ("classify", folder / "a.png", "circle", "triangle", "--question", SHAPE, "--model", folder / "routed")
    (row,) = rows(*classify, "--experts", "auto")
    assert (row["experts"], row["text"]) == (["edge"], "circle")


def test_router_sees_the_image_through_the_network(folder, tmp_path):
    shutil.copytree(folder / "routed", tmp_path / "routed")
    prices = [RouterPrice(0.0, 1.0, 1.0)]
    config = RouterConfig(subsets=[[], ["edge"]], seconds=[0.0, 0.003], image_size=128, prices=prices)
    ExpertRouter(config).save_pretrained(tmp_path / "routed")
    (row,) = rows("ask", folder / "a.png", SHAPE, "--model", tmp_path / "routed", "--experts", "auto")
    assert row["text"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ask", "{folder}/a.png", SHAPE, "--experts", "auto", "--model", "prismer-easy-vqa"), "has no router, which"),
        (("ask", "{folder}/a.png", SHAPE, "--budget-ms", "5"), "--budget-ms needs --experts auto"),
        (("worth", "{folder}/routed", "--data", "x", "--out", "{folder}/out", "--experts", "auto"), "fixed experts"),
        (("experts", "{folder}/a.png", "--out", "{folder}/out", "--experts", "auto"), "this command has none"),
    ],
)
def test_bad_input_gets_one_clear_line(folder, arguments, message):
    result = run(*(part.format(folder=folder) for part in arguments))
    assert result.exit_code == 1 and message in result.stderr, result.stderr
