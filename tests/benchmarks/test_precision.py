"""Each precision is timed and compared with float32."""

import json
import sys

import precision
import pytest


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr("sys.argv", ["precision.py", *arguments, "--out", str(folder)])
    precision.main()
    return json.loads((folder / "result.json").read_text())


def test_bfloat16_changes_only_the_part_that_uses_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao", None)  # not installed
    result = run(monkeypatch, tmp_path, "--small", "--repeats", "1", "--images", "2")
    changes = {name: variant["change"] for name, variant in result["variants"].items()}
    assert list(changes) == ["float32", "encoder bfloat16", "decoder bfloat16", "bfloat16"]
    assert changes["float32"]["logits_max"] == 0 and changes["float32"]["equal_greedy_tokens"] == 1
    assert all(0 < change["logits_mean"] < 0.1 for name, change in changes.items() if name != "float32")
    assert changes["decoder bfloat16"]["encoded_max"] < changes["encoder bfloat16"]["encoded_max"]
    assert list(result["variants"]["bfloat16"]["times"]) == [
        "encode 1 image",
        "caption 1 image",
        "rank 128 candidates",
    ]
    assert "torchao is not installed (pip install torchao)" in (tmp_path / "table.md").read_text()


def test_int8_changes_the_decoder(monkeypatch, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    result = run(monkeypatch, tmp_path, "--small", "--repeats", "1", "--images", "2", "--only", "int8")
    assert len(result["variants"]) == 3
    assert all(variant["change"]["logits_mean"] > 0 for variant in result["variants"].values())
    assert result["variants"]["decoder int8 dynamic"]["change"]["encoded_max"] == 0
