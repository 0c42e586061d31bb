"""The engine that runs a worker on a Ray cluster."""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .engines import LabelEngine
from .sources import ImageSource
from .worker import ImageWorker


if TYPE_CHECKING:
    import pyarrow as pa

# the largest number of parts that a run is split into
MAX_PARTS = 20_000


@dataclass
class RayEngine(LabelEngine):
    """
    Runs the models with Ray Data, in actors that keep them loaded. If an actor dies, another one takes its place and
    repeats its part of the images. Each image's row arrives once, in any order.

    The cluster is the one that `ray.init` has connected to, or that of `RAY_ADDRESS`, or a new one on this machine.
    Actors open the images themselves, so files must have the same paths or URLs on all machines.

    Args:
        num_workers (`int`, *optional*, defaults to 1): number of actors.
        cpus_per_worker (`float`, *optional*, defaults to 1):
            Number of cores per actor; it opens images in as many threads.
        gpus_per_worker (`float`, *optional*, defaults to 0):
            Number of GPUs per actor; 0.25 puts four actors on a GPU. The models then run on the GPU.

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

    @property
    def device(self) -> str | None:
        return "cuda" if self.gpus_per_worker else None

    def run(self, source: ImageSource, worker: ImageWorker, batch_size: int) -> Iterator[dict[str, Any]]:
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
            rows = ray.data.range(len(parts), override_num_blocks=len(parts)).map_batches(
                _RunParts,
                fn_constructor_kwargs={
                    "parts": parts,
                    "worker": worker,
                    "batch_size": batch_size,
                    "num_threads": max(1, int(self.cpus_per_worker)),
                },
                batch_size=1,
                compute=ActorPoolStrategy(size=self.num_workers or 1),
                num_cpus=self.cpus_per_worker,
                num_gpus=self.gpus_per_worker,
            )
            for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from table.to_pylist()
        finally:
            context.enable_progress_bars = bars


class _RunParts:
    """Turns numbers of parts into tables of rows. It lives in Ray's actors and keeps its models loaded."""

    def __init__(self, parts: list[Any], worker: ImageWorker, batch_size: int, num_threads: int):
        self.parts = parts
        self.worker = worker
        self.batch_size = batch_size
        self.pool = ThreadPoolExecutor(num_threads)
        self.schema = worker.schema

    def __call__(self, batch: dict[str, Any]) -> Iterator["pa.Table"]:
        import pyarrow as pa
        import ray

        for number in batch["id"]:
            rows = self.worker.rows(ray.get(self.parts[number]), self.batch_size, self.pool)
            while group := list(itertools.islice(rows, self.batch_size)):
                yield pa.Table.from_pylist(group, self.schema)
