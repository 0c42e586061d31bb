"""All engines give the same labels, and every image is labelled exactly once, even if a run is killed."""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from modeling_prismer.cli import app
from modeling_prismer.processing.experts import CannyEdges, DexiNedEdges, ExpertSuite
from modeling_prismer.processing.labels import LabelEngine, LabelStore, RayEngine, label_images
from tests.training_examples.distributed_launch import launch

from . import label_runs
from .label_experts import EdgeThatKills, write_images
from .label_runs import assert_each_image_once, assert_same_labels, suite


REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = 200


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    keys = write_images(folder, IMAGES - 1)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    return folder, sorted([*keys, "broken.jpg"])


@pytest.fixture(scope="module")
def local(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("local")
    label_images(photos[0], suite(), output, num_workers=2, progress=False)
    return LabelStore(output)


# ---- several processes ----


def test_shares_of_several_processes_make_one_store(photos, local, tmp_path):
    for process in range(3):
        label_images(photos[0], suite(), tmp_path, shard=(process, 3), batch_size=5 + process, progress=False)
    names = sorted(path.name for path in tmp_path.glob("labels-*"))
    assert names == [f"labels-0000{process}-of-00003-000000.parquet" for process in range(3)]
    assert_each_image_once(tmp_path, photos[1])
    assert_same_labels(LabelStore(tmp_path), local)


# moment at which a run is killed: the least number of stored labels
MOMENTS = {"manifest": 0, "group": 40, "before its name": 80, "after its name": 80, "expert": 40}


@pytest.fixture(scope="module")
def outputs(photos, tmp_path_factory):
    """The stores of killed runs."""
    if not hasattr(os, "fork"):
        pytest.skip("forks processes")
    folder = tmp_path_factory.mktemp("outputs")
    for moment in MOMENTS:
        assert launch(label_runs.label_and_die, folder, photos[0], moment) == [-9], moment
    return folder


def test_accelerate_launch_shares_the_images(photos, tmp_path):
    """The first process has the damaged image and finishes first. It must not exit before the second."""
    ExpertSuite([CannyEdges()]).save_pretrained(tmp_path / "suite")
    label = ["label", photos[0], "--experts", tmp_path / "suite", "--out", tmp_path / "launched"]
    assert launch(label_runs.with_accelerate, tmp_path, [str(argument) for argument in label]) == [0]
    printed = (tmp_path / "process_0.log").read_text()
    assert (tmp_path / "failed.txt").read_text() == "{0: 1}", printed  # exit codes
    assert f"{IMAGES // 2} images labelled, 1 of them damaged" in printed
    # each process wrote its own half under its own number
    rows = {path.name: pq.read_metadata(path).num_rows for path in (tmp_path / "launched").glob("labels-*")}
    assert rows == {f"labels-0000{process}-of-00002-000000.parquet": IMAGES // 2 for process in range(2)}
    assert printed.count(f"{IMAGES // 2} images labelled") == 2
    assert_each_image_once(tmp_path / "launched", photos[1])
    label_images(photos[0], [CannyEdges()], tmp_path / "local", progress=False)
    assert_same_labels(LabelStore(tmp_path / "launched"), LabelStore(tmp_path / "local"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_without_loss_or_duplicates(photos, local, outputs, moment):
    output = outputs / moment
    rows = sum(pq.read_metadata(path).num_rows for path in output.glob("labels-*.parquet"))
    assert MOMENTS[moment] <= rows < IMAGES
    edges = EdgeThatKills(fatal=120 if moment == "expert" else 0)
    edges.seen = -IMAGES  # the same expert, but this run is not killed
    report = label_images(photos[0], suite(edges), output, rows_per_shard=40, progress=False)
    assert report.images == IMAGES - rows
    assert_each_image_once(output, photos[1])
    assert_same_labels(LabelStore(output), local)
    assert not [path.name for path in output.iterdir() if path.name.endswith(".unfinished")]


# ---- Ray: see test_ray_engine.py as well ----


def test_experts_of_ray_actors_run_on_their_gpu(photos, tmp_path, monkeypatch):
    seen = []

    def run(self, images, labeller, batch_size):
        seen.append(labeller.suite)
        return []

    monkeypatch.setattr(RayEngine, "run", run)
    own = ExpertSuite([DexiNedEdges(pretrained=False)])
    for gpus in (0.25, 0):
        label_images(photos[0], own, tmp_path / str(gpus), engine="ray", gpus_per_worker=gpus, progress=False)
    assert [str(suite["edge"].device) for suite in seen] == ["cuda", "cpu"]
    stored = [LabelStore(tmp_path / str(gpus)).manifest["experts"]["edge"]["dtype"] for gpus in (0.25, 0)]
    assert stored == ["float16", "float32"]
    assert own["edge"].device.type == "cpu"


def test_missing_ray_tells_what_to_install(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"'ray' needs ray: pip install 'modeling-prismer\[ray\]'"):
        label_images(photos[0], suite(), tmp_path / "labels", engine="ray", progress=False)
    assert not (tmp_path / "labels").exists()


# ---- an engine of your own ----


@pytest.fixture
def backwards(monkeypatch):
    monkeypatch.setattr(LabelEngine, "registry", dict(LabelEngine.registry))

    @dataclass
    class Backwards(LabelEngine):
        name, description = "backwards", "this process, last image first"
        most: int | None = None

        def run(self, source, labeller, batch_size):
            for key, image in itertools.islice(reversed(list(source)), self.most):
                yield labeller.encode(key, *labeller.see([labeller.open(key, image)])[0])

    return Backwards


def test_own_engine_labels_by_its_name(photos, local, backwards, tmp_path):
    label_images(photos[0], suite(), tmp_path, engine="backwards", most=5, progress=False)
    assert list(LabelStore(tmp_path)) == list(local)[:-6:-1]
    report = label_images(photos[0], suite(), tmp_path, engine=backwards(), progress=False)
    assert report.images == IMAGES - 5
    assert_same_labels(LabelStore(tmp_path), local)


def test_command_line_and_errors_list_own_engine(photos, backwards, tmp_path):
    ExpertSuite([CannyEdges()]).save_pretrained(tmp_path / "suite")
    command = ["label", str(photos[0]), "--experts", str(tmp_path / "suite"), "--out", str(tmp_path / "labels")]
    listed = CliRunner().invoke(app, ["label", "--list-engines"])
    assert listed.exit_code == 0 and "backwards" in listed.output
    assert CliRunner().invoke(app, [*command, "--engine", "backwards"]).exit_code == 1  # one image is damaged
    assert len(LabelStore(tmp_path / "labels")) == IMAGES
    assert "accepted are 'local', 'ray', 'backwards'" in CliRunner().invoke(app, [*command, "--engine", "x"]).stderr


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("local", {"gpus_per_worker": 1}, "engine 'local' has no option 'gpus_per_worker'; its options are num_work"),
        ("local", {"num_workers": 0}, "num_workers is 0; at least 1 is needed"),
        (RayEngine(), {"num_workers": 2}, "engine is a RayEngine; give it num_workers when you make it"),
    ],
)
def test_wrong_options_of_an_engine_are_named(photos, tmp_path, engine, options, message):
    with pytest.raises(ValueError, match=message):
        label_images(photos[0], suite(), tmp_path, engine=engine, **options)


def test_guide_lists_every_engine():
    guide = (REPOSITORY / "docs" / "label_store.md").read_text()
    for name, engine in LabelEngine.registry.items():
        if engine.__module__.startswith("modeling_prismer."):
            assert f"| `{name}` | {engine.description} | {', '.join(engine.option_names())} |" in guide
