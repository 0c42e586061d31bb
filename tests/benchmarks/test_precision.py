"""Each precision is timed and compared with float32."""

import json
import sys

import precision
import pytest
import torch


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr("sys.argv", ["precision.py", *arguments, "--out", str(folder)])
    precision.main()
    return json.loads((folder / "result.json").read_text())


def test_bfloat16_changes_what_it_is_used_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
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


def test_a_trained_checkpoint_answers_as_before(monkeypatch, tmp_path):
    pytest.importorskip("rapidocr", reason="needs the experts of the checkpoint")
    picture = ["--pictures", "modeling_prismer/assets/shape.png"]
    questions = ["--text", "What color is the shape?", "What shape is in the image?"]
    checkpoint = ["--checkpoint", "prismer-easy-vqa", "--only", "float32", "encoder"]
    result = run(monkeypatch, tmp_path, *checkpoint, *picture, *questions)
    change = result["variants"]["encoder bfloat16"]["change"]
    assert change["tokens"] == 4  # teal, triangle, and the end of each
    assert change["equal_greedy_tokens"] == 1 and change["logits_max"] > 0
    assert result["variants"]["float32"]["times"] == {}


def test_a_checkpoint_needs_pictures(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--checkpoint needs --pictures"):
        run(monkeypatch, tmp_path, "--checkpoint", "prismer-easy-vqa")


def test_tokens_are_compared_by_place_without_padding():
    said = [
        {"encoder_outputs": (torch.zeros(2, 3),), "prompt": 1, "generated": torch.tensor(rows)}
        for rows in ([[0, 5, 6, 2], [0, 7, 2, 1]], [[0, 5, 9, 2], [0, 7, 2, 1]])
    ]
    logits = [torch.eye(4), torch.eye(4)[[0, 1, 2, 2]]]
    change = precision.change(*said, logits, pad=1)
    assert change["tokens"] == 5 and change["equal_greedy_tokens"] == pytest.approx(4 / 5)
    assert change["equal_next_tokens"] == 0.75 and change["logits_max"] == 1
    assert change["logits_mean"] == pytest.approx(2 / 16)
