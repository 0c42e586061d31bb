"""Answers by several processes, and by runs that were killed: every image once. test_ray_engine.py has a cluster."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from modeling_prismer import pretrained_path
from tests.training_examples.distributed_launch import launch

from . import ask_runs


COLORS = ("red", "blue")
IMAGES = 16
ASK = ["--question", "what color is the shape?", "--model", pretrained_path("prismer-easy-vqa"), "--experts", "edge"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        image = Image.new("RGB", (64, 64), (240, 244, 250))
        ImageDraw.Draw(image).ellipse((16, 18, 46, 48), fill=COLORS[number % 2])
        image.save(folder / f"{number:02d}.png")
    return folder


def rows_of(folder):
    files = [folder] if folder.is_file() else sorted(folder.glob("results-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def assert_each_image_once(rows, photos):
    assert Counter(row["file"] for row in rows) == Counter(str(path) for path in photos.iterdir())
    for row in rows:
        assert row["text"] == COLORS[int(Path(row["file"]).stem) % 2], row


def command(photos, output):
    return [str(argument) for argument in ["ask", photos, *ASK, "--output", output, "--batch-size", 2]]


def test_a_killed_command_continues(photos, tmp_path):
    output = tmp_path / "results.jsonl"
    done = [0]
    for run in (ask_runs.killed_by_its_process, ask_runs.killed_by_its_worker):
        assert launch(run, tmp_path, command(photos, output)) == [-9]
        done.append(len(rows_of(output)))
        assert done[-2] < done[-1] < IMAGES and "images in " not in (tmp_path / "process_0.log").read_text()
    assert launch(ask_runs.ask, tmp_path, command(photos, output)) == [0]
    assert f"{IMAGES - done[-1]} images in " in (tmp_path / "process_0.log").read_text()
    assert_each_image_once(rows_of(output), photos)


def test_launched_processes_share_the_images(photos, tmp_path):
    assert launch(ask_runs.ask, tmp_path, command(photos, tmp_path / "results"), number=2) == [0, 0]
    files = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "results").glob("results-*")}
    assert files == {f"results-{process:05d}-of-00002-000000.jsonl": IMAGES // 2 for process in range(2)}
    assert_each_image_once(rows_of(tmp_path / "results"), photos)
