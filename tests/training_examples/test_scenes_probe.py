"""probe.py reads attributes and numbers of objects from tokens, if the tokens know them."""

import numpy as np
import pytest
from PIL import Image


datasets = pytest.importorskip("datasets")
pytest.importorskip("sklearn")

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path  # noqa: E402
from scenes import probe  # noqa: E402
from scenes.scene import COLORS, MATERIALS, SHAPES, SIZES  # noqa: E402
from scenes.scenes import Scenes  # noqa: E402


SIDE = 4


def made_up(number, seed):
    """Scenes of two to four objects, and tokens. Those of one site know colors and numbers, the others nothing."""
    random = np.random.default_rng(seed)
    rows, tokens = [], {site: random.normal(size=(number, SIDE, SIDE, 12)) for site in probe.SITES}
    for row in range(number):
        places = random.permutation(SIDE * SIDE)[: random.integers(2, 5)]
        objects = []
        for place in places:
            y, x = divmod(int(place), SIDE)
            values = {"color": COLORS, "shape": SHAPES, "material": MATERIALS, "size": SIZES}
            thing = {name: str(random.choice(values[name])) for name in values}
            objects.append({**thing, "box": [10 * x, 10 * y, 10 * x + 10, 10 * y + 10]})
            tokens["with experts"][row, y, x] += 20 * np.eye(12)[COLORS.index(thing["color"])]
        tokens["with experts"][row, ..., 11] = len(objects)
        rows.append({"image": Image.new("RGB", (40, 40)), "facts": {"objects": objects}})
    return tokens, datasets.Dataset.from_list(rows)


def test_probe_finds_what_the_tokens_know():
    results = probe.probe(made_up(120, 0), made_up(40, 1))
    assert results["color"]["with experts"] > 0.97 and results["number of objects"]["with experts"] > 0.9
    assert results["color"]["image alone"] < 0.3 and results["shape"]["with experts"] < 0.35
    assert set(results) == {*probe.ATTRIBUTES, "number of objects", "number of a shape"}


def test_tokens_of_an_object_are_those_in_its_box():
    tokens = np.arange(SIDE * SIDE, dtype=float).reshape(1, SIDE, SIDE, 1)
    thing = {"color": "red", "shape": "ball", "material": "matte", "size": "small", "box": [12, 5, 28, 18]}
    rows = datasets.Dataset.from_list([{"image": Image.new("RGB", (40, 40)), "facts": {"objects": [thing]}}])
    features, attributes = probe.of_objects(tokens, rows)
    assert features.tolist() == [[np.mean([1, 2, 5, 6])]] and attributes["color"].tolist() == ["red"]
    assert probe.counts_of(rows)["ball"].tolist() == [1] and probe.counts_of(rows)["cube"].tolist() == [0]


def test_sites_of_the_shipped_checkpoint_differ(tmp_path):
    builder = Scenes(cache_dir=str(tmp_path), train=0, validation=0, test=2)
    builder.download_and_prepare()
    rows = builder.as_dataset()["test"]
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path()).eval()
    tokens = probe.encode(model, PrismerProcessor.from_pretrained(pretrained_path()), rows)
    assert {site: array.shape for site, array in tokens.items()} == dict.fromkeys(probe.SITES, (2, 8, 8, 192))
    assert not np.allclose(tokens["image alone"], tokens["with experts"])
    assert not np.allclose(tokens["stems"][0], tokens["stems"][1])
