"""Recipes start as files from any folder, other scripts as modules."""

import os
import runpy
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.training_examples.distributed_launch import launch


SCRIPTS = Path(__file__).parents[2] / "training_examples"


def print_help(folder, script):
    """Does what `python script --help` does in a folder, in a process that has imported the libraries."""
    os.chdir(folder)
    for name, module in list(sys.modules.items()):  # those of the tests
        if str(SCRIPTS) in str(getattr(module, "__file__", None)):
            del sys.modules[name]
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    here = [path for path in sys.path if path.startswith((sys.base_prefix, *installed))]
    sys.argv = [str(script), "--help"]
    sys.path[:] = [str(SCRIPTS), *here]  # the folder of a script, or PYTHONPATH
    try:
        if isinstance(script, Path):
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code


@pytest.mark.parametrize("script", [SCRIPTS / "run_peft.py", "studies.claims"], ids=["file", "module"])
def test_script_starts_in_any_folder(script, tmp_path):
    assert launch(print_help, tmp_path, script) == [0]
    assert "usage: " in (tmp_path / "process_0.log").read_text()
