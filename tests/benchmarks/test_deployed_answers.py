"""Deployed forms of a network are compared with float32."""

import json

import deployed_answers


def test_half_precision_is_smaller_and_answers_the_same(monkeypatch, tmp_path, capsys):
    arguments = ("--images", "2", "--only", "bfloat16", "--out", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["deployed_answers.py", *arguments])
    deployed_answers.main()
    result = json.loads((tmp_path / "result.json").read_text())
    forms = result["forms"]
    assert list(forms) == ["float32", "bfloat16"] and result["questions"] > 2
    assert forms["float32"]["logits_change"] == 0 < forms["bfloat16"]["logits_change"] < 0.05
    assert forms["float32"]["right"] == forms["bfloat16"]["right"] == result["questions"]
    assert 1.9 < forms["float32"]["bytes"] / forms["bfloat16"]["bytes"] < 2.1
    assert "| bfloat16 | 5.6 |" in (tmp_path / "table.md").read_text()
