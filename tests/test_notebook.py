"""The notebook of examples runs from top to bottom, without Jupyter, and what is stored in it is small."""

import json
from pathlib import Path

import pytest
from transformers.utils import logging

from modeling_prismer.processing.experts import Expert


NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "examples.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_cell_runs_in_order(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Expert, "registry", dict(Expert.registry))
    names = {"__name__": "notebook"}
    for number, cell in enumerate(CELLS, 1):
        exec(compile("".join(cell["source"]), f"code cell {number}", "exec"), names)
    logging.enable_progress_bar()


def test_stored_outputs_are_small_and_name_no_machine():
    stored = NOTEBOOK.read_text()
    assert len(stored) < 500_000
    assert all(cell["outputs"] for cell in CELLS)
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    assert not any(folder in stored for folder in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages"))
