"""The stages of a server add up to its time."""

import json

import pytest


pytest.importorskip("datasets", reason="the label store needs it")

import throughput  # noqa: E402
from PIL import Image  # noqa: E402
from throughput import STAGES  # noqa: E402


def test_all_images_are_captioned_and_the_stages_add_up(monkeypatch, tmp_path):
    arguments = ["--small", "--images", "3", "--batch_sizes", "1", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["throughput.py", *arguments])
    throughput.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["batch_sizes"]) == ["1", "2"]
    for entry in result["batch_sizes"].values():
        assert set(entry["stages"]) == set(STAGES) and min(entry["stages"].values()) > 0
        assert sum(entry["stages"].values()) == pytest.approx(entry["seconds"], rel=0.05)
        assert 0 < throughput.outside_the_network(entry) < 1
    with Image.open(tmp_path / "throughput.png") as image:
        assert image.format == "PNG"
