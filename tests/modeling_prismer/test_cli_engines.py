"""Captions and answers by several processes and on a Ray cluster: every image once, even if a process is killed."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from modeling_prismer import pretrained_path


REPOSITORY = Path(__file__).resolve().parents[2]
COLORS = ("red", "blue")
IMAGES = 40
ASK = ["--question", "what color is the shape?", "--model", pretrained_path("prismer-easy-vqa"), "--experts", "edge"]

# Imports everything once, and forks for each run of the command line. A worker dies once, at its fourth batch; the
# process of the command dies after a number of results. The last line has the exit codes of all runs.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import modeling_prismer.public
from modeling_prismer.cli import app
from modeling_prismer.command_line import results, workers

MARK, runs = sys.argv[1], json.loads(sys.argv[2])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Fragile(workers.Generating):
    batches = 0

    def see_opened(self, images):
        self.batches += 1
        if self.batches == 4 and not Path(MARK).exists():
            Path(MARK).touch()
            die()
        return super().see_opened(images)


def run(die_after, arguments):
    write, left = results.ResultFiles.write, [die_after]

    def write_and_die(self, line):
        write(self, line)
        left[0] -= 1
        if left[0] == 0:
            die()

    results.ResultFiles.write = write_and_die
    workers.Generating = Fragile
    if "ray" in arguments:
        import ray

        settings = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 * 2**20}
        ray.init(num_cpus=2, _temp_dir=os.environ["RAY_FOLDER"], **settings)
    sys.argv[1:] = arguments
    app()


codes = []
for die_after, arguments in runs:
    child = os.fork()
    if child == 0:
        run(die_after, arguments)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        image = Image.new("RGB", (64, 64), (240, 244, 250))
        ImageDraw.Draw(image).ellipse((16, 18, 46, 48), fill=COLORS[number % 2])
        image.save(folder / f"{number:02d}.png")
    return folder


def start(arguments, folder, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder), **kwargs}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,  # on a loaded machine
    )


def rows_of(folder):
    files = [folder] if folder.is_file() else sorted(folder.glob("results-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def assert_each_image_once(rows, photos):
    assert Counter(row["file"] for row in rows) == Counter(str(path) for path in photos.iterdir())
    for row in rows:
        assert row["text"] == COLORS[int(Path(row["file"]).stem) % 2], row


def run_program(tmp_path, runs, **environment):
    """The exit codes of runs of the command line, and their output."""
    (tmp_path / "program.py").write_text(PROGRAM)
    runs = [(die_after, [str(argument) for argument in arguments]) for die_after, arguments in runs]
    finished = start([tmp_path / "program.py", tmp_path / "mark", json.dumps(runs)], tmp_path, **environment)
    assert finished.returncode == 0, finished.stdout
    return json.loads(finished.stdout.splitlines()[-1]), finished.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_a_killed_command_continues(photos, tmp_path):
    output = tmp_path / "results.jsonl"
    command = ["ask", photos, *ASK, "--output", output, "--batch-size", "4"]
    codes, printed = run_program(tmp_path, [(5, command), (0, command), (0, command)])
    assert codes == [KILLED, KILLED, 0], printed  # by its process, by its worker, not at all
    assert (tmp_path / "mark").exists() and f"{IMAGES} images in " not in printed
    assert_each_image_once(rows_of(output), photos)


def test_accelerate_launch_shares_the_images(photos, tmp_path):
    launch = "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = ["-m", "accelerate.commands.accelerate_cli", *launch.split(), "--main_process_port", "0"]
    ask = ["-m", "modeling_prismer", "ask", photos, *ASK, "--output", tmp_path / "results"]
    finished = start([*command, *ask], tmp_path, ACCELERATE_USE_CPU="true")
    assert finished.returncode == 0, finished.stdout
    files = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "results").glob("results-*")}
    assert files == {f"results-{process:05d}-of-00002-000000.jsonl": IMAGES // 2 for process in range(2)}
    assert_each_image_once(rows_of(tmp_path / "results"), photos)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_survives_the_death_of_worker_and_driver(photos, tmp_path):
    output = tmp_path / "results"
    short = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets need a short path
    command = ["ask", photos, *ASK, "--output", output, "--engine", "ray", "--batch-size", "2"]
    try:
        settings = {"RAY_FOLDER": short, "RAY_USAGE_STATS_ENABLED": "0"}
        codes, printed = run_program(tmp_path, [(20, command), (0, command)], **settings)
    finally:
        shutil.rmtree(short, ignore_errors=True)
    assert codes == [KILLED, 0] and (tmp_path / "mark").exists(), printed
    assert f"{IMAGES - 20} images in " in printed
    assert_each_image_once(rows_of(output), photos)
