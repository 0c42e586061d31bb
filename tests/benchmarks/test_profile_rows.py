"""The profile lists the operators of a row, slowest first."""

import json

import profile_rows


def test_operators_of_a_row_are_listed(monkeypatch, tmp_path):
    arguments = ["--small", "--one_process", "--only", "encode 1", "--top", "4", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["profile_rows.py", *arguments])
    profile_rows.main()
    row = json.loads((tmp_path / "result.json").read_text())["rows"]["encode 1 image"]
    times = [operator["seconds"] for operator in row["operators"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) <= row["seconds"]
    names = {operator["name"] for operator in row["operators"]}
    assert {"mkldnn::_linear_pointwise", "aten::native_layer_norm"} <= names
    table = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| `")]
    assert len(table) == 4
