"""The command line says what it needs in its own words: versions, missing models, and options instead of arguments."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from modeling_prismer import __version__, environment, pretrained_path, sample_image
from modeling_prismer.cli import app
from modeling_prismer.command_line.arguments import model_type
from modeling_prismer.command_line.console import in_options


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


PARAMS = [
    SimpleNamespace(name="overwrite", opts=["--overwrite"]),
    SimpleNamespace(name="num_beams", opts=["--num-beams", "--beams"]),
    SimpleNamespace(name="image_column", opts=["--image-column"]),
    SimpleNamespace(name="images", opts=["images"]),
]


@pytest.mark.parametrize(
    "message, expected",
    [
        ("pass overwrite=True to replace it", "pass --overwrite to replace it"),
        ("give image_column, one of a, b", "give --image-column, one of a, b"),
        ("num_beams is 0", "--num-beams is 0"),
        ("./image_column.jpg and 'num_beams' overwrite images", "./image_column.jpg and 'num_beams' overwrite images"),
    ],
)
def test_names_of_arguments_become_options(message, expected):
    assert in_options(message, PARAMS) == expected


def test_a_full_folder_asks_for_the_option(tmp_path):
    (tmp_path / "notes.txt").touch()
    result = run("export", "prismer-easy-vqa", tmp_path)
    assert result.exit_code == 1 and "or pass --overwrite to replace it" in result.stderr


def test_a_data_set_asks_for_the_column(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"photo": ["a.jpg"]}).save_to_disk(tmp_path / "data")
    result = run("caption", tmp_path / "data")
    assert result.exit_code == 1 and "give --image-column, one of photo" in result.stderr


def test_a_missing_model_of_an_expert_is_named(tmp_path):
    sample_image().save(tmp_path / "scene.png")
    for command in (
        ("experts", tmp_path / "scene.png", "--json", "--experts", "fast:depth"),
        ("label", tmp_path / "scene.png", "--out", tmp_path / "store", "--experts", "fast:depth"),
    ):
        result = run(*command)
        assert result.exit_code == 1
        assert "the expert 'depth' cannot load its model depth-anything/Depth-Anything-V2-Small-hf: " in result.stderr


def test_env_lists_versions_and_settings(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://example.org\x1b[2J")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = run("env", "--device", "cpu")
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert result.exit_code == 0 and lines["modeling-prismer"] == __version__
    assert lines["HF_HUB_OFFLINE"] == "1" and lines["torch build"] and lines["device"] == "cpu"
    assert "hf_secret" not in result.stdout and "\x1b" not in result.stdout


def test_env_works_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.environment()["torch build"].startswith("cannot be imported: ")


def test_python_m_runs_a_command(tmp_path):
    command = [sys.executable, "-m", "modeling_prismer", "caption", "missing.png"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 1 and finished.stderr.startswith("error: IMAGES: there is no file 'missing.png'")


def test_the_kind_of_a_checkpoint_is_read_from_its_files(tmp_path):
    assert model_type("prismer-scenes") == "prismer"
    adapter = {"base_model_name_or_path": pretrained_path()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert model_type(str(tmp_path)) == "prismer"
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="the configuration in .* is damaged"):
        model_type(str(tmp_path))
