"""Labels and answers on a Ray cluster: every image once, even if an actor is killed or a run was interrupted."""

import importlib.util
import json
import shutil
import tempfile
from collections import Counter

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from modeling_prismer import pretrained_path
from modeling_prismer.cli import app
from modeling_prismer.processing.labels import LabelStore, label_images

from . import label_experts
from .label_experts import EdgeThatKills, write_images
from .label_runs import assert_each_image_once, assert_same_labels, suite


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
IMAGES = 80


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes ~/.ray
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_worker_niceness", "0")  # on a busy machine the default of 15 makes them wait for minutes
    import ray

    # Ray's processes cannot import the modules of the tests
    ray.cloudpickle.register_pickle_by_value(label_experts)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _temp_dir=(folder := tempfile.mkdtemp(prefix="ray-")),  # its sockets need a short path
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    patch.undo()


def test_labels_come_once_if_an_actor_is_killed(ray, tmp_path):
    folder, output = tmp_path / "photos", tmp_path / "labels"
    keys = write_images(folder, IMAGES - 1)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    mark = tmp_path / "an actor was killed"
    edges = EdgeThatKills(fatal=20, mark=str(mark))
    edges.seen = -IMAGES  # does not kill this process
    label_images(folder, suite(edges), output, shard=(1, 4), progress=False)
    edges = EdgeThatKills(fatal=20, mark=str(mark))
    # two parts, of 40 and 20 images; the actor dies in the fourth batch of the first
    report = label_images(folder, suite(edges), output, engine="ray", num_workers=1, batch_size=5, progress=False)
    assert mark.exists()
    assert report.images == IMAGES * 3 // 4
    assert_each_image_once(output, [*keys, "broken.jpg"])
    label_images(folder, suite(), tmp_path / "local", progress=False)
    assert_same_labels(LabelStore(output), LabelStore(tmp_path / "local"))


def test_command_continues_on_ray_what_another_began(ray, tmp_path):
    (tmp_path / "photos").mkdir()
    colors = {str(tmp_path / f"photos/{number}.png"): ("red", "blue")[number % 2] for number in range(8)}
    for path, color in colors.items():
        image = Image.new("RGB", (64, 64), (240, 244, 250))
        ImageDraw.Draw(image).ellipse((16, 18, 46, 48), fill=color)
        image.save(path)
    ask = ["ask", tmp_path / "photos", "--question", "what color is the shape?", "--batch-size", 2]
    ask += ["--model", pretrained_path("prismer-easy-vqa"), "--experts", "edge", "--output", tmp_path / "results"]
    ask = [str(argument) for argument in ask]
    assert CliRunner().invoke(app, [*ask, "--shard", "1/4"]).exit_code == 0
    result = CliRunner().invoke(app, [*ask, "--engine", "ray"])
    assert result.exit_code == 0 and "6 images in " in result.stderr, result.output
    files = sorted((tmp_path / "results").glob("results-*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert Counter(row["file"] for row in rows) == Counter(colors.keys())
    assert {row["file"]: row["text"] for row in rows} == colors
