"""The engine that runs the experts on a Ray cluster."""

import copy
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..experts.suite import ExpertSuite
from .encoding import label_features
from .engines import LabelEngine, is_on_cpu
from .labelling import Labeller
from .sources import ImageSource


# the largest number of parts that a run is split into
MAX_PARTS = 20_000


@dataclass
class RayEngine(LabelEngine):
    """
    Runs the experts with Ray Data, in actors that keep them loaded. If an actor dies, another one takes its place and
    repeats its part of the images. Each image's labels arrive once, in any order.

    The cluster is the one that `ray.init` has connected to, or that of `RAY_ADDRESS`, or a new one on this machine.
    Actors open the images themselves, so files must have the same paths or URLs on all machines.

    Args:
        num_workers (`int`, *optional*, defaults to 1): number of actors.
        cpus_per_worker (`float`, *optional*, defaults to 1):
            Number of cores per actor; it opens images in as many threads.
        gpus_per_worker (`float`, *optional*, defaults to 0):
            Number of GPUs per actor; 0.25 puts four actors on a GPU. The experts then run on the GPU.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import RayEngine

    >>> engine = RayEngine(num_workers=8, gpus_per_worker=0.25)  # two GPUs: label_images(…, engine=engine)
    ```
    """

    name = "ray"
    description = "a Ray cluster; workers are actors"
    requires = ("ray",)
    extra = "ray"

    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def place_suite(self, suite: ExpertSuite) -> ExpertSuite:
        # a copy, because this process may have no GPU; a copy has no loaded models
        return copy.deepcopy(suite).to("cuda") if self.gpus_per_worker and is_on_cpu(suite) else suite

    def run(self, source: ImageSource, labeller: Labeller, batch_size: int) -> Iterator[dict[str, Any]]:
        # set as an environment variable, because the processes of the cluster read it too
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        # a part is eight batches, or a tar
        images_per_part = max(8 * batch_size, (source.num_images or 0) // MAX_PARTS)
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
                    "num_threads": max(1, int(self.cpus_per_worker)),
                },
                batch_size=1,
                compute=ActorPoolStrategy(size=self.num_workers or 1),
                num_cpus=self.cpus_per_worker,
                num_gpus=self.gpus_per_worker,
            )
            for table in labels.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from table.to_pylist()
        finally:
            context.enable_progress_bars = bars


class _LabelParts:
    """Turns numbers of parts into tables of labels. It lives in Ray's actors and keeps its experts loaded."""

    def __init__(self, parts: list[Any], labeller: Labeller, batch_size: int, num_threads: int):
        self.parts = parts
        self.labeller = labeller
        self.batch_size = batch_size
        self.pool = ThreadPoolExecutor(num_threads)
        self.schema = label_features(labeller.specs).arrow_schema

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        import ray

        for number in batch["id"]:
            rows = self.labeller.rows(ray.get(self.parts[number]), self.batch_size, self.pool)
            while group := list(itertools.islice(rows, self.batch_size)):
                yield pa.Table.from_pylist(group, self.schema)
