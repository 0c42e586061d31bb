"""A server's time is divided into stages that add up to it."""

import json
import time

import pytest
import torch


pytest.importorskip("datasets", reason="the label store needs it")

import throughput  # noqa: E402
from PIL import Image  # noqa: E402
from throughput import NETWORK, STAGES, Stopwatch  # noqa: E402


def test_all_pictures_are_captioned_and_the_stages_add_up(monkeypatch, tmp_path):
    arguments = ["--small", "--images", "3", "--batch_sizes", "1", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["throughput.py", *arguments])
    throughput.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["batch_sizes"]) == ["1", "2"]
    for entry in result["batch_sizes"].values():
        assert set(entry["stages"]) == set(STAGES) and min(entry["stages"].values()) > 0
        assert sum(entry["stages"].values()) == pytest.approx(entry["seconds"], rel=0.05)
        assert 0 < throughput.outside_the_network(entry) < 1
    with Image.open(tmp_path / "throughput.png") as picture:
        assert picture.format == "PNG"


def test_the_table_counts_what_is_not_the_network():
    stages = dict.fromkeys(STAGES, 1.0) | dict.fromkeys(NETWORK, 2.5)
    machine = {"device": "CPU", "cpu": "a CPU", "cores": 2, "threads": 2, "dtype": "float32"}
    machine |= {"torch": "2", "transformers": "5", "python": "3", "load_before": 0.0}
    entry = {"seconds": 10.0, "stages": stages}
    table = throughput.table({"network": "tiny", "machine": machine, "images": 40, "batch_sizes": {4: entry}})
    assert "| 4 | 4 | 250 | 25.0% | 25.0% | 10.0% |" in table and "| 50.0% |" in table


def test_a_stage_within_another_stops_its_clock():
    watch = Stopwatch(torch.device("cpu"))
    with watch.stage("generate"):
        time.sleep(0.01)
        with watch.stage("decoder"):
            time.sleep(0.1)
    assert 0.01 <= watch.seconds["generate"] < 0.1 <= watch.seconds["decoder"]
