"""Operations and memory of a tiny network grow as expected."""

import json

import growth
import pytest
from growth import CURVES, read_curve, sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["growth.py", "--small", "--repeats", "1", "--out", str(folder)])
        growth.main()
    return folder


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_nothing_grows_faster_than_expected(folder, curve):
    entry = json.loads((folder / "result.json").read_text())["curves"][curve.name]
    assert [point["x"] for point in entry["points"]] == list(curve.small_points)
    for name in ("flops", "memory"):  # do not depend on the load of the machine
        assert entry["reading"][name]["as_expected"], (name, entry["reading"][name])


def test_quadratic_growth_is_reported():
    batch = next(curve for curve in CURVES if curve.name == "batch")
    costs = {x: 3 + 2 * x + 0.2 * x * x for x in batch.points}
    points = [
        {"x": x, "first": 0.0, "seconds": [cost, 2 * cost], "flops": cost, "memory": cost} for x, cost in costs.items()
    ]
    text = sentence(batch, points, read_curve(batch, points))
    assert "**Above that: time by" in text and "operations by" in text and "memory by" in text
