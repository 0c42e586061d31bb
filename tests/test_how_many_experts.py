"""The commands of docs/how_many_experts.md run, on few images."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from string import Template

import pytest
from typer.testing import CliRunner

from modeling_prismer.cli import app


REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "how_many_experts.md").read_text()
SMALL_VALUES = {"--max_images": "3", "--max_steps": "1", "--imitate": "detection"}
SMALL_VALUES["--budget-seconds"] = "60"  # the machine may be busy
MORE = {
    "worth": ("--resamples", "20", "--timed-images", "1"),
    "training_examples/train_router.py": ("--folds", "2", "--timed_rows", "2"),
    "training_examples/run_distillation.py": (
        *("--labels", "live"),  # the store has labels of two experts alone
        *("--per_device_train_batch_size", "2", "--use_cpu"),
    ),
}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    variables = dict(re.findall(r'(?m)^(\w+)="(.*)"$', "\n".join(lines)))
    lines = [Template(line).substitute(variables) for line in lines if not re.match(r"\w+=", line)]
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
    assert len(found) >= 11
    for program, *arguments in found:
        arguments = [SMALL_VALUES.get(before, own) for before, own in zip(["", *arguments], arguments)]
        arguments += MORE.get(arguments[0], ())
        if program == "python":
            run_script(*arguments)
            continue
        assert program == "prismer", program
        if arguments[0] == "worth" and "prismer-scenes" in arguments:
            arguments += ("--experts", "detection,ocr")  # 4 subsets, not 64
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        if arguments[0] != "worth":
            continue
        output = Path(arguments[arguments.index("--out") + 1])
        for name in re.findall(r"(?m)^\| `([\w.]+)` \|", PAGE.split("## Output")[1].split("##")[0]):
            assert (output / name).exists() or name == "labels" and "--labels" in arguments, name
    assert Path("runs/routed/router.png").exists()


def test_options_exist():
    text = CliRunner().invoke(app, ["worth", "--help"], env={"COLUMNS": "200"}).output
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.split("## Options")[1].split("\n## ")[0]))
    assert len(named) >= 9 and [name for name in named if name not in text] == []
