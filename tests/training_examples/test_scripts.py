"""Scripts start as a user starts them: recipes as files from any folder, the others as modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parents[2] / "training_examples"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")


@pytest.mark.parametrize(
    "script", [[*LAUNCHER, SCRIPTS / "run_peft.py"], ["-m", "studies.experts"]], ids=["launched_file", "module"]
)
def test_script_starts_in_any_folder(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if "studies.experts" in script:
        environment["PYTHONPATH"] = str(SCRIPTS)
    command = [sys.executable, *script, "--help"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "usage: " in finished.stdout


def test_no_script_edits_the_search_path():
    sources = {path.name: path.read_text() for path in SCRIPTS.rglob("*.py")}
    assert {"run_vqa.py", "run_scenes.py", "experts.py"} <= set(sources)
    assert [name for name, source in sources.items() if "sys.path" in source or "sys.meta_path" in source] == []
