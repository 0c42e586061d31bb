"""The benchmark runs, on a tiny network here, and compares with every recorded row."""

import json

from benchmarks import benchmark


def test_every_recorded_row_is_measured():
    result = benchmark.run(small=True, repeats=1)
    assert set(result["rows"]) == set(json.loads(benchmark.REFERENCE.read_text())["rows"])
    assert all(seconds > 0 for seconds in result["rows"].values())
    assert result["peak_memory_gb"] > 0


def test_table_divides_in_units_of_the_matrix_product():
    rows = {name: 10.0 for name in json.loads(benchmark.REFERENCE.read_text())["rows"]}
    common = {"device": "cpu", "threads": 2, "torch": "2", "repeats": 1, "peak_memory_gb": 1.0}
    result = {"network": "prismer_base", "gemm_gflops": [10, 30], "rows": rows, **common}
    assert "| encode 1 image | 10.000 | 200 | 330 | 1.65× |" in benchmark.table(result)


def test_a_tiny_network_is_not_compared():
    result = benchmark.run(small=True, repeats=1)
    assert "×" not in benchmark.table(result)
