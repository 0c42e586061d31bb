"""All engines give the same labels, and every image is labelled exactly once, even if a run is killed."""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from modeling_prismer.cli import app
from modeling_prismer.processing.experts import CannyEdges, DexiNedEdges, ExpertSuite
from modeling_prismer.processing.labels import LabelEngine, LabelStore, RayEngine, label_images

from . import label_experts
from .label_experts import EdgeThatKills, Halves, Rows, write_images


REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = 200


def suite(edges=None):
    return ExpertSuite([edges or CannyEdges(), Halves(), Rows()])


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


def assert_each_image_once(folder, keys):
    stored = Counter(key for path in folder.glob("labels-*.parquet") for key in pq.read_table(path)["key"].to_pylist())
    assert stored == Counter(keys)


def assert_same_labels(store, expected):
    assert sorted(store) == sorted(expected) and store.errors == expected.errors
    for key in expected:
        np.testing.assert_equal(store[key], expected[key])


# ---- several processes ----


def test_shares_of_several_processes_make_one_store(photos, local, tmp_path):
    for process in range(3):
        label_images(photos[0], suite(), tmp_path, shard=(process, 3), batch_size=5 + process, progress=False)
    names = sorted(path.name for path in tmp_path.glob("labels-*"))
    assert names == [f"labels-0000{process}-of-00003-000000.parquet" for process in range(3)]
    assert_each_image_once(tmp_path, photos[1])
    assert_same_labels(LabelStore(tmp_path), local)


# The program imports everything once and forks. Its last line tells whether all children ended as expected.
PROGRAM = """
import os, signal, socket, sys
import pyarrow.parquet as pq
from modeling_prismer.processing.labels import durable_files, label_images, shards
from tests.processing.label_experts import EdgeThatKills
from tests.processing.test_label_store_engines import MOMENTS, suite

photos, folder = sys.argv[1:]

def fork(function, *arguments):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function, calls):
    left = [calls]
    def wrapped(*arguments, **settings):
        result = function(*arguments, **settings)
        left[0] -= 1
        return result if left[0] else die()
    return wrapped

def die_at(moment):
    if moment == "manifest":
        durable_files.os.replace = die
    elif moment == "group":
        pq.ParquetWriter.write_table = after(pq.ParquetWriter.write_table, 3)
    elif moment == "before its name":
        publish = shards.publish
        shards.publish = lambda temporary, path: die() if "000002" in path.name else publish(temporary, path)
    elif moment == "after its name":
        shards.publish = after(shards.publish, 2)
    edges = EdgeThatKills(fatal=120 if moment == "expert" else 0)
    label_images(photos, suite(edges), f"{folder}/{moment}", rows_per_shard=40, progress=False)

def join_in(rank, port):
    # the environment that torchrun and accelerate launch set
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    report = label_images(photos, suite(), f"{folder}/launched", progress=False)
    assert report.images == 100, report

for moment in MOMENTS:
    assert status(fork(die_at, moment)) == -signal.SIGKILL, moment
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
children = [fork(join_in, rank, port) for rank in range(2)]
assert [status(child) for child in children] == [0, 0]
print("all as it should be")
"""
# moment at which a run is killed: the least number of stored labels
MOMENTS = {"manifest": 0, "group": 40, "before its name": 80, "after its name": 80, "expert": 40}


@pytest.fixture(scope="module")
def outputs(photos, tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("forks processes")
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "program.py").write_text(PROGRAM)
    finished = subprocess.run(
        [sys.executable, folder / "program.py", photos[0], folder],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=180,
    )
    assert "all as it should be" in finished.stdout, finished.stdout
    return folder


def test_launched_processes_share_the_images(photos, local, outputs):
    names = sorted(path.name for path in (outputs / "launched").glob("labels-*"))
    assert names == [f"labels-0000{process}-of-00002-000000.parquet" for process in range(2)]
    assert_each_image_once(outputs / "launched", photos[1])
    assert_same_labels(LabelStore(outputs / "launched"), local)


# The first process has the damaged image, ends first, and exits with code 1. The second one labels its images later.
SLOW_SECOND = """
import os, sys, time
from pathlib import Path
from modeling_prismer.cli import app
from modeling_prismer.processing.experts import CannyEdges

run, folder = CannyEdges.run, Path(sys.argv[sys.argv.index("--out") + 1])

def run_after_the_first(self, images):
    if self.num_images == 0:
        while not list(folder.glob("labels-00000-of-00002-*.parquet")):
            time.sleep(0.05)
        time.sleep(3)
    return run(self, images)

if os.environ["RANK"] == "1":
    CannyEdges.run = run_after_the_first
app()
"""


def test_accelerate_launch_shares_the_images(photos, tmp_path):
    ExpertSuite([CannyEdges()]).save_pretrained(tmp_path / "suite")
    (tmp_path / "program.py").write_text(SLOW_SECOND)
    launch = "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    label = ["label", str(photos[0]), "--experts", str(tmp_path / "suite"), "--out", str(tmp_path / "launched")]
    finished = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch.split(), "--main_process_port", "0"]
        + [str(tmp_path / "program.py"), *label],
        cwd=REPOSITORY,
        env={
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
            "PYTHONPATH": str(REPOSITORY),
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert finished.returncode == 1, finished.stdout
    assert f"{IMAGES // 2} images labelled, 1 of them damaged" in finished.stdout
    # each process wrote its own half under its own number
    rows = {path.name: pq.read_metadata(path).num_rows for path in (tmp_path / "launched").glob("labels-*")}
    assert rows == {f"labels-0000{process}-of-00002-000000.parquet": IMAGES // 2 for process in range(2)}
    assert finished.stdout.count(f"{IMAGES // 2} images labelled") == 2
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


# ---- Ray ----


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes ~/.ray
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_ray_labels_each_image_once_if_an_actor_is_killed(ray, photos, local, tmp_path):
    mark = tmp_path / "an actor was killed"
    edges = EdgeThatKills(fatal=40, mark=str(mark))
    edges.seen = -IMAGES  # does not kill this process
    label_images(photos[0], suite(edges), tmp_path / "labels", shard=(1, 4), progress=False)
    edges = EdgeThatKills(fatal=40, mark=str(mark))
    report = label_images(
        photos[0], suite(edges), tmp_path / "labels", engine="ray", num_workers=1, batch_size=16, progress=False
    )
    assert mark.exists()
    assert report.images == IMAGES * 3 // 4
    assert_each_image_once(tmp_path / "labels", photos[1])
    assert_same_labels(LabelStore(tmp_path / "labels"), local)


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
