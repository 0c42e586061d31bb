"""`prismer caption`, `ask`, `classify` and `experts` over many images: sources, results, failures and resuming."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from modeling_prismer import PrismerForConditionalGeneration, pretrained_path
from modeling_prismer.cli import app
from modeling_prismer.command_line.answers import split_arguments


EASY_VQA = ("--model", pretrained_path("prismer-easy-vqa"), "--experts", "edge")
COLOR = "what color is the shape?"
SHAPES = {"circle": "red", "rectangle": "blue", "triangle": "green"}


def draw(shape, color):
    image = Image.new("RGB", (64, 64), (240, 244, 250))
    corners = (16, 18, 46, 48)
    if shape == "triangle":
        ImageDraw.Draw(image).polygon([(16, 48), (46, 48), (31, 18)], fill=color)
    else:
        getattr(ImageDraw.Draw(image), {"circle": "ellipse"}.get(shape, shape))(corners, fill=color)
    return image


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder `photos` of the working directory: three images, one of them damaged, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    draw("circle", "red").save(folder / "a circle.png")
    draw("rectangle", "blue").save(folder / "more" / "rectangle.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments, **kwargs):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def ask(*images, **kwargs):
    """The colours of images by their file, and the exit code."""
    result = run("ask", *images, COLOR, *EASY_VQA, "--json", **kwargs)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {row["file"]: row["text"] for row in rows}, result


# ---- sources ----


FOUND = {"photos/a circle.png": "red", "photos/broken.png": None, "photos/more/rectangle.png": "blue"}


def test_a_folder_is_read_at_any_depth_and_its_failures_counted(photos):
    found, result = ask("photos")
    assert found == FOUND and result.exit_code == 1
    assert "failed: photos/broken.png: 'photos/broken.png' is not an image" in result.stderr
    assert "3 images in " in result.stderr and ", 1 of them failed" in result.stderr


def test_files_globs_urls_and_a_list(photos):
    file = "photos/a circle.png"
    lines = f"{file}\n\nphotos/more\n".encode()
    assert ask(file, "photos/more/*.png", "missing.png")[0] == {
        file: "red",
        "photos/more/rectangle.png": "blue",
        "missing.png": None,
    }
    assert ask("-", input=lines)[0] == {file: "red", "photos/more/rectangle.png": "blue"}
    assert "the list on the standard input is empty" in ask("-", input=b"\n")[1].stderr


def test_tars_and_data_sets(photos):
    with tarfile.open("shapes.tar", "w") as tar:
        tar.add(photos / "a circle.png", "one.png")
        tar.addfile(tarfile.TarInfo("two.png"), io.BytesIO())
    os.makedirs("tars")
    shutil.copy("shapes.tar", "tars")
    assert ask("shapes.tar")[0] == {"shapes/one": "red", "shapes/two": None}
    assert ask("tars")[0] == {"tars/shapes/one": "red", "tars/shapes/two": None}
    assert ask("tars/shapes.tar", photos / "more")[0] == {
        "tars/shapes/one": "red",
        "tars/shapes/two": None,
        f"{photos}/more/rectangle.png": "blue",
    }
    rows = {"id": [7], "photo": [str(photos / "a circle.png")]}
    data = Dataset.from_dict(rows, Features({"id": Value("int64"), "photo": ImageFeature()}))
    data.save_to_disk("saved")
    data.to_parquet("table.parquet")
    assert ask("saved")[0] == ask("table.parquet")[0] == {"7": "red"}


@pytest.mark.parametrize(
    "arguments, images",
    [
        (["a.jpg", "what is it?"], 1),
        (["a.jpg", "b.JPG", "-", "https://x.org/c", "what is it?", "and that?"], 4),
        (["x", "no/such/file", "photos/**", "is it black/white?"], 3),
        (["x", "red/green?", "photo.jpg?"], 1),
    ],
)
def test_images_come_before_questions(arguments, images):
    assert split_arguments(arguments) == (arguments[:images], arguments[images:])


def test_a_label_that_is_also_a_file_is_refused(photos):
    assert split_arguments(["photos", "cat", "black/white"], may_be_words=True)[0] == ["photos"]
    with pytest.raises(ValueError, match="'photos' can be a label or the file of this name; write ./photos"):
        split_arguments(["a.jpg", "cat", "photos"], may_be_words=True)
    assert split_arguments(["a.jpg", "./photos", "cat"], may_be_words=True)[0] == ["a.jpg", "./photos"]
    with pytest.raises(ValueError, match="'a.jpg' comes after 'what is it\\?', which is no image"):
        split_arguments(["a.jpg", "what is it?", "a.jpg"])


# ---- output ----


def test_lines_name_the_image_if_there_are_several(photos):
    result = run("ask", "photos", COLOR, *EASY_VQA)
    assert result.stdout.splitlines() == ["photos/a circle.png: red", "photos/more/rectangle.png: blue"]
    result = run("ask", photos / "more", "--question", COLOR, "--question", "is it red?", *EASY_VQA)
    assert result.stdout.splitlines() == ["blue", "no"]
    result = run("ask", "photos", "--question", COLOR, "--question", "is it red?", *EASY_VQA)
    assert f"photos/more/rectangle.png: {COLOR}: blue" in result.stdout.splitlines()


def test_an_object_says_all_about_an_image(photos):
    (line,) = run("ask", photos / "more", COLOR, *EASY_VQA, "--json").stdout.splitlines()
    row = json.loads(line)
    assert row.pop("seconds") > 0 and -1 < row.pop("score") < 0
    assert row == {
        "file": f"{photos}/more/rectangle.png",
        "text": "blue",
        "experts": ["edge"],
        "error": None,
        "model": EASY_VQA[1],
        "question": COLOR,
    }


def test_several_questions_share_an_object(photos):
    result = run("ask", photos / "more", COLOR, "is it red?", *EASY_VQA, "--json")
    row = json.loads(result.stdout)
    assert [answer["text"] for answer in row["answers"]] == ["blue", "no"]
    assert row["questions"] == [COLOR, "is it red?"] and "text" not in row


def test_classify_ranks_for_each_image(photos):
    result = run("classify", "photos", "red", "blue", "--question", COLOR, *EASY_VQA, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["red", None, "blue"]
    ranked = rows[0]["labels"]
    assert [each["label"] for each in ranked] == ["red", "blue"] and ranked[0]["score"] == rows[0]["score"]


def test_labels_are_never_read_as_markup(photos):
    result = run("classify", photos / "more", "[red]cat[/]", ":dog:", "--question", COLOR, *EASY_VQA)
    assert "[red]cat[/]" in result.stdout and ":dog:" in result.stdout


def test_experts_draw_and_write_words(photos):
    result = run("experts", "photos", "--out", "panels", "--json", *EASY_VQA)
    rows = {row["file"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert result.exit_code == 1 and rows["photos/broken.png"]["panel"] is None
    panels = [rows[file]["panel"] for file in ("photos/a circle.png", "photos/more/rectangle.png")]
    assert panels == ["panels/photos/a circle.png.png", "panels/photos/more/rectangle.png.png"]
    assert all(Image.open(panel).width > 200 for panel in panels)
    assert sum(len(files) for *_, files in os.walk("panels")) == 2
    result = run("experts", photos / "more", "--json", "--experts", "offline", *EASY_VQA[:2])
    row = json.loads(result.stdout)
    assert row["experts"] == ["edge", "ocr"] and row["found"] == {"ocr": ["■"]}
    assert "nothing is written" in run("experts", "photos").stderr


def test_a_panel_never_leaves_its_folder(photos):
    with tarfile.open("hostile.tar", "w") as tar:
        tar.add(photos / "a circle.png", "../../up.png")
    run("experts", "hostile.tar", "--out", "panels", *EASY_VQA)
    assert not list(Path("..").glob("up*")) and not list(Path("../..").glob("up*"))
    assert list(Path().rglob("up*")) == [Path("panels/hostile/up.png")]


# ---- resuming ----


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_output_is_continued_and_failures_are_retried(photos):
    command = ("ask", "photos", COLOR, *EASY_VQA, "--output", "results.jsonl")
    result = run(*command)
    assert result.exit_code == 1 and result.stdout == "results.jsonl\n"
    assert {row["file"]: row["text"] for row in rows_of("results.jsonl")} == FOUND

    before = Path("results.jsonl").read_bytes()
    draw("triangle", "green").save(photos / "triangle.png")
    result = run(*command)
    assert "1 images in " in result.stderr and "1 failed in earlier runs, --retry-failed" in result.stderr
    assert result.exit_code == 1 and Path("results.jsonl").read_bytes().startswith(before)

    draw("circle", "red").save(photos / "broken.png")
    result = run(*command, "--retry-failed")
    assert result.exit_code == 0 and "1 images in " in result.stderr
    found = {row["file"]: row["text"] for row in rows_of("results.jsonl")}
    assert found == {**FOUND, "photos/broken.png": "red", "photos/triangle.png": "green"}
    assert len(rows_of("results.jsonl")) == 4


def test_an_unfinished_line_is_cut_off(photos):
    command = ("ask", photos / "more", photos / "a circle.png", COLOR, *EASY_VQA, "--output", "results.jsonl")
    run(*command)
    whole = Path("results.jsonl").read_text()
    Path("results.jsonl").write_text(whole[:-20])
    assert run(*command).exit_code == 0
    assert [row["text"] for row in rows_of("results.jsonl")] == ["blue", "red"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("photo.jpg\n", "has other lines than results of this command"),
        ('{"file": "a.png", "model": "other"}\n', 'has results with model "other"; this run has'),
        ('{"file": "a.png"\n', "line 1 of results.jsonl is no result of this command"),
    ],
)
def test_a_file_of_something_else_is_kept(photos, content, message):
    Path("results.jsonl").write_text(content)
    result = run("ask", photos / "more", COLOR, *EASY_VQA, "--output", "results.jsonl")
    assert result.exit_code == 1 and message in result.stderr
    assert Path("results.jsonl").read_text() == content


def test_other_questions_need_another_file(photos):
    run("ask", photos / "more", COLOR, *EASY_VQA, "--output", "results.jsonl")
    result = run("ask", photos / "more", "is it red?", *EASY_VQA, "--output", "results.jsonl")
    assert result.exit_code == 1 and f'has results with question "{COLOR}"; this run has "is it red?"' in result.stderr


def test_shares_make_one_folder_of_results(photos):
    command = ("ask", "photos", COLOR, *EASY_VQA, "--output", "results")
    for shard in ("0/2", "1/2"):
        assert run(*command, "--shard", shard).stdout == "results\n"
    files = sorted(path.name for path in Path("results").glob("results-*"))
    assert files == ["results-00000-of-00002-000000.jsonl", "results-00001-of-00002-000000.jsonl"]
    rows = [row for file in files for row in rows_of(Path("results", file))]
    assert {row["file"]: row["text"] for row in rows} == FOUND and len(rows) == 3
    assert "0 images in " in run(*command).stderr
    result = run("ask", "photos", COLOR, *EASY_VQA, "--output", "results.jsonl", "--shard", "0/2")
    assert "is one file, and 2 processes write; name a folder" in result.stderr


# ---- settings ----


def test_the_network_is_loaded_once_for_all(photos, monkeypatch):
    load, loaded = PrismerForConditionalGeneration.from_pretrained, []
    monkeypatch.setattr(
        PrismerForConditionalGeneration,
        "from_pretrained",
        lambda *args, **kwargs: loaded.append(kwargs["dtype"]) or load(*args, **kwargs),
    )
    run("ask", "photos", COLOR, *EASY_VQA, "--batch-size", "1", "--dtype", "bfloat16")
    assert [str(dtype) for dtype in loaded] == ["torch.bfloat16"]


def test_experts_can_be_left_out(photos):
    for value, names in (("none", []), ("ocr", ["ocr"]), ("edge,ocr", ["edge", "ocr"]), ("offline:edge", ["edge"])):
        result = run("ask", photos / "more", COLOR, *EASY_VQA[:2], "--experts", value, "--json")
        assert json.loads(result.stdout)["experts"] == names, result.stderr
    result = run("ask", photos / "more", COLOR, *EASY_VQA[:2], "--experts", "fast:dept")
    assert "--experts: fast has no 'dept'; it has depth, normal" in result.stderr
    result = run("ask", photos / "more", COLOR, *EASY_VQA[:2], "--experts", "fast:segmentation,edge")
    assert result.exit_code == 0 and result.stdout == "blue\n"


def test_control_characters_do_not_reach_the_terminal(photos):
    (photos / "more" / "\x1b[2J.png").write_bytes(b"no image")
    result = run("ask", photos / "more", COLOR, *EASY_VQA)
    assert "\x1b" not in result.stderr and "\ufffd[2J.png" in result.stderr
