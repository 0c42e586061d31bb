"""The commands of docs/how_many_experts.md run, on few images."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modeling_prismer.cli import app


REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "how_many_experts.md").read_text()
IMAGES = 3
SMALL = ("--resamples", "20", "--timed-images", "1")


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and "CHECKPOINT" not in line]


def run_script(path, *arguments):
    sys.argv[:] = [path, *arguments]
    runpy.run_path(str(REPOSITORY / path), run_name="__main__")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_commands_run(folder):
    found = commands()
    assert len(found) >= 4
    for program, *arguments in found:
        arguments = [
            re.sub(r"^\d{2,}$", str(IMAGES), own) if before == "--max_images" else own
            for before, own in zip(["", *arguments], arguments)
        ]
        if program == "python":
            run_script(*arguments)
            continue
        assert program == "prismer", program
        few = ("--experts", "detection,ocr") if "prismer-scenes" in arguments else ()  # 4 subsets, not 64
        result = CliRunner().invoke(app, [*arguments, *SMALL, *few])
        assert result.exit_code == 0, result.output
        output = Path(arguments[arguments.index("--out") + 1])
        for name in re.findall(r"(?m)^\| `([\w.]+)` \|", PAGE.split("## Output")[1].split("##")[0]):
            assert (output / name).exists(), name


def test_options_exist():
    text = CliRunner().invoke(app, ["worth", "--help"], env={"COLUMNS": "200"}).output
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.split("## Options")[1].split("\n## ")[0]))
    assert len(named) >= 9 and [name for name in named if name not in text] == []
