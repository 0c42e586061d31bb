"""The comparison of PrismerLM's answers with those of its language model alone."""

import json
import subprocess
import sys
from pathlib import Path


def test_both_fusions_are_compared_with_the_model_alone(tmp_path):
    program = Path(__file__).parents[2] / "benchmarks" / "lm_answers.py"
    arguments = ["--layers", "4", "--repeats", "1", "--new_tokens", "2", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(program), *arguments], check=True, capture_output=True)
    fusions = json.loads((tmp_path / "result.json").read_text())["fusions"]
    assert {name: found["required"] for name, found in fusions.items()} == {"prefix": 1.1, "cross_attention": 1.25}
    for found in fusions.values():
        assert found["ratio"] == found["prismer_lm"][0] / found["alone"][0]
    table = (tmp_path / "table.md").read_text()
    assert "| prefix |" in table and "| cross-attention |" in table
