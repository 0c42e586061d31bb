"""The profile names operators with their shapes, those that take the most first."""

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


def test_shares_are_of_all_operators():
    operators = [
        {"name": "aten::addmm", "shapes": [[3], [2, 4], [4, 3]], "calls": 5, "seconds": 0.6},
        {"name": "aten::mul", "shapes": [[2, 4]], "calls": 2, "seconds": 0.3},
        {"name": "aten::addmm", "shapes": [[7], [2, 4], [4, 7]], "calls": 1, "seconds": 0.1},
    ]
    table = profile_rows.row_table({"seconds": 1.5, "operators": operators}, top=2)
    assert "| `aten::addmm` | 3, 2×4, 4×3 | 5 | 600.00 | 60.0% | 60% |" in table
    assert "| `aten::mul` | 2×4 | 2 | 300.00 | 30.0% | 90% |" in table and "4×7" not in table
    assert "`aten::addmm` 70.0%, `aten::mul` 30.0%. Operators took 1 s; the profiled run took 1.5 s" in table
