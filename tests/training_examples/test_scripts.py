"""Recipes start as files from any folder, other scripts as modules."""

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
