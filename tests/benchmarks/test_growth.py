"""Operations and memory of a tiny network grow as they must, and what grows faster is found."""

import json

import growth
import pytest
from growth import CURVES, read_curve, sentence
from PIL import Image


BATCH = next(curve for curve in CURVES if curve.name == "batch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["growth.py", "--small", "--repeats", "1", "--out", str(folder)])
        growth.main()
    return folder


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_nothing_grows_faster_than_it_must(folder, curve):
    entry = json.loads((folder / "result.json").read_text())["curves"][curve.name]
    assert [point["x"] for point in entry["points"]] == list(curve.small_points)
    for name in ("flops", "memory"):  # the same on a busy machine
        assert entry["reading"][name]["as_it_must"], (name, entry["reading"][name])


def test_all_curves_are_drawn_and_described(folder):
    with Image.open(folder / "growth.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
    text = (folder / "table.md").read_text()
    assert all(f"**{curve.name}**: from {curve.small_points[0]}" in text for curve in CURVES)


def made_up_points(cost):
    """Seconds, operations and bytes are the same function of x."""
    return [
        {"x": x, "first": 0.0, "seconds": [cost(x), 2 * cost(x)], "flops": cost(x), "memory": cost(x)}
        for x in BATCH.points
    ]


def test_linear_growth_is_as_it_must_be():
    points = made_up_points(lambda x: 3 + 2 * x)
    reading = read_curve(BATCH, points)
    assert reading["seconds"]["factors"] == pytest.approx([3, 2])
    assert reading["seconds"]["predicted"] == pytest.approx(35) and reading["seconds"]["as_it_must"]
    text = sentence(BATCH, points, reading)
    assert "from 5 to 35 s" in text and "each image 2e+03 ms" in text
    assert text.endswith("Nothing grows faster than it must.")


def test_the_largest_point_is_predicted_from_the_others_alone():
    points = made_up_points(lambda x: 3 + 2 * x if x < 16 else 70)
    reading = read_curve(BATCH, points)
    assert reading["seconds"]["predicted"] == pytest.approx(35) and reading["seconds"]["above"] == pytest.approx(1)


def test_quadratic_growth_is_found():
    points = made_up_points(lambda x: 3 + 2 * x + 0.2 * x * x)
    text = sentence(BATCH, points, read_curve(BATCH, points))
    assert "**Above that: time by" in text and "operations by" in text and "memory by" in text
