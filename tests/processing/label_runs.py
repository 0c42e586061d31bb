"""Runs of labelling that tests start in new processes, and the checks of their stores."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from modeling_prismer.processing.experts import CannyEdges, ExpertSuite
from modeling_prismer.processing.labels import durable_files, label_images, shards

from .label_experts import EdgeThatKills, Halves, Rows


def suite(edges=None):
    return ExpertSuite([edges or CannyEdges(), Halves(), Rows()])


def assert_each_image_once(folder, keys):
    stored = Counter(key for path in folder.glob("labels-*.parquet") for key in pq.read_table(path)["key"].to_pylist())
    assert stored == Counter(keys)


def assert_same_labels(store, expected):
    assert sorted(store) == sorted(expected) and store.errors == expected.errors
    for key in expected:
        np.testing.assert_equal(store[key], expected[key])


# ---- killed runs ----


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def after(function, calls):
    """The function, which kills its process after a number of calls."""
    left = [calls]

    def wrapped(*arguments, **settings):
        result = function(*arguments, **settings)
        left[0] -= 1
        return result if left[0] else die()

    return wrapped


def label_and_die(folder: Path, photos: Path, moment: str):
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
    label_images(photos, suite(edges), folder / moment, rows_per_shard=40, progress=False)


# ---- accelerate launch ----


def with_accelerate(folder: Path, arguments: list[str]):
    """
    Labels with the command line and `accelerate launch` in two processes, which are forked to save the imports. Writes
    the exit codes of the processes that failed.
    """
    import torch.distributed.run
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parse = torch.distributed.run.config_from_args

    def forked(args):
        config = parse(args)[0]
        config.start_method = "fork"
        return config, label, [arguments]

    torch.distributed.run.config_from_args = forked
    os.environ["ACCELERATE_USE_CPU"] = "true"
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    failed = {}
    try:
        launch_command(launch_command_parser().parse_args([*options.split(), "--main_process_port", "0", "label"]))
    except ChildFailedError as error:
        failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
    (folder / "failed.txt").write_text(str(failed))


def label(arguments: list[str]):
    """The command line. The second process starts to label after the first has finished."""
    import sys

    from modeling_prismer.cli import app

    run, folder = CannyEdges.run, Path(arguments[arguments.index("--out") + 1])

    def run_after_the_first(self, images):
        if self.num_images == 0:
            while not list(folder.glob("labels-00000-of-00002-*.parquet")):
                time.sleep(0.05)
            time.sleep(1)  # the first process would exit meanwhile, and the launcher would end this one
        return run(self, images)

    if os.environ["RANK"] == "1":
        CannyEdges.run = run_after_the_first
    sys.argv = ["prismer", *arguments]
    app()
