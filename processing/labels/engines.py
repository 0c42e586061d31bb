"""The engines that label many images: this process, or the machines of a Ray cluster."""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from .encoding import label_features
from .labelling import Labeller
from .sources import ImageSource


# the largest number of pieces of work for a Ray cluster
MAX_PARTS = 20_000


def label_locally(source: ImageSource, labeller: Labeller, batch_size: int, num_threads: int) -> Iterator[dict]:
    """
    Labels images in this process, in their order.

    Args:
        source ([`ImageSource`]): the images.
        labeller ([`Labeller`]): opens, sees and encodes them.
        batch_size (`int`): images that the experts get at a time.
        num_threads (`int`): threads that open images and encode labels while the experts run.

    Returns:
        `Iterator[dict]`: rows for [`LabelWriter.write_row`].
    """
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from labeller.rows(source, batch_size, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def label_on_ray(
    source: ImageSource,
    labeller: Labeller,
    batch_size: int,
    num_workers: int,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
) -> Iterator[pa.Table]:
    """
    Labels images with Ray Data, by actors that keep their experts loaded. If an actor dies, another one takes its
    place and repeats its piece of work. Each image's labels come to this process once, in any order.

    The cluster is the one that `ray.init` has connected to, or that of `RAY_ADDRESS`, or a new one on this machine.
    Actors open the images themselves: files must have the same paths, or URLs, on all machines.

    Args:
        source, labeller, batch_size: as for [`label_locally`]. A piece of work is eight batches, or a tar.
        num_workers (`int`): number of actors.
        cpus_per_worker (`float`, *optional*, defaults to 1):
            Cores that an actor takes; it opens images in as many threads.
        gpus_per_worker (`float`, *optional*, defaults to 0): GPUs that an actor takes; 0.25 puts four on a GPU.

    Returns:
        `Iterator[pa.Table]`: tables for [`LabelWriter.write_table`].

    Raises:
        ImportError: if Ray is not installed.
    """
    # an environment variable, because the cluster's processes read it, too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError as error:
        raise ImportError(
            "the engine 'ray' needs Ray Data: pip install 'modeling-prismer[ray]', or use the engine 'local'"
        ) from error

    images_per_part = max(8 * batch_size, (source.num_images or 0) // MAX_PARTS)
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    parts = [ray.put(part) for part in source.parts(images_per_part)]
    if not parts:
        return
    context = DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        labels = ray.data.range(len(parts), override_num_blocks=len(parts)).map_batches(
            _LabelParts,
            fn_constructor_kwargs={
                "parts": parts,
                "labeller": labeller,
                "batch_size": batch_size,
                "num_threads": max(1, int(cpus_per_worker)),
            },
            batch_size=1,
            compute=ActorPoolStrategy(size=num_workers),
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker,
        )
        yield from labels.iter_batches(batch_size=None, batch_format="pyarrow")
    finally:
        context.enable_progress_bars = bars


class _LabelParts:
    """Turns numbers of parts into tables of labels. It lives in Ray's actors and keeps its experts loaded."""

    def __init__(self, parts: list[Any], labeller: Labeller, batch_size: int, num_threads: int):
        self.parts = parts
        self.labeller = labeller
        self.batch_size = batch_size
        self.pool = ThreadPoolExecutor(num_threads)
        self.schema = label_features(labeller.descriptions).arrow_schema

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        import ray

        for number in batch["id"]:
            rows = self.labeller.rows(ray.get(self.parts[number]), self.batch_size, self.pool)
            while group := list(itertools.islice(rows, self.batch_size)):
                yield pa.Table.from_pylist(group, self.schema)
