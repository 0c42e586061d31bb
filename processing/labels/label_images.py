"""Runs experts over many images and keeps their labels."""

import copy
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from tqdm import tqdm

from ..experts.base import Expert
from ..experts.suite import ExpertSuite
from ..image_loading import MAX_IMAGE_PIXELS
from .engines import label_locally, label_on_ray
from .labelling import Labeller
from .manifest import make_manifest
from .shards import LabelWriter, set_aside_damaged
from .sources import ImageSource, open_source


ENGINES = ("local", "ray")
# failed images that a report names
MAX_ERRORS = 100


@dataclass
class LabelReport:
    """
    The result of [`label_images`].

    Attributes:
        images (`int`): number of images that this process labelled, failed ones included.
        failed (`int`): number of those that have an `error`.
        seconds (`float`): duration of the run.
        bytes (`int`): size of the shards written.
        expert_seconds (`dict[str, float]`):
            How long each expert ran, without loading; known for the engine `"local"` only.
        errors (`dict[str, str]`):
            The errors of the first 100 failed images, by key. `LabelStore(folder).errors` has all of them.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import CannyEdges
    >>> from modeling_prismer.processing.labels import label_images

    >>> report = label_images("modeling_prismer/assets", [CannyEdges()], "my_labels", progress=False)
    >>> report.images, report.failed, list(report.expert_seconds)
    (2, 0, ['edge'])
    ```
    """

    images: int
    failed: int
    seconds: float
    bytes: int
    expert_seconds: dict[str, float]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def label_images(
    source: Any,
    suite: ExpertSuite | Iterable[Expert] | str,
    output: str | Path,
    engine: str = "local",
    *,
    batch_size: int = 32,
    num_workers: int | None = None,
    shard: tuple[int, int] | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    root: str | Path | None = None,
    map_size: int | None = None,
    on_expert_error: str = "record",
    max_image_pixels: int | None = MAX_IMAGE_PIXELS,
    allow_other_versions: bool = False,
    rows_per_shard: int = 1024,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    progress: bool = True,
    repair: bool = False,
) -> LabelReport:
    """
    Runs experts over images and writes their labels into a store: a folder of Parquet files, one row an image, that
    [`LabelStore`] and `datasets.load_dataset` read.

    Call it again to continue after any interruption, `kill -9` and a full disk included: images that have a row are
    left out. Images that cannot be opened get a row with their `error` and no labels.

    Several processes share the images: those that `torchrun` or `accelerate launch` started, found by
    `accelerate.PartialState`, or those that `shard` names. They write into one store and never wait for each other.

    Args:
        source: images: a folder, files, a glob, tars, a data set, …; see [`open_source`].
        suite ([`ExpertSuite`], `list[Expert]` or `str`): the experts, or the name of a suite.
        output (`str` or `Path`): the store. It is made if it does not exist, and continued if it does.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"` runs the experts in this process, `"ray"` on a Ray cluster; see [`label_on_ray`].
        batch_size (`int`, *optional*, defaults to 32):
            Number of images that the experts get together; an expert splits them by its own `batch_size`.
        num_workers (`int`, *optional*):
            `"local"`: threads that open images and encode labels, by default one for each core, at most 8. `"ray"`:
            number of actors, by default 1.
        shard (`tuple[int, int]`, *optional*):
            The part of the images to label; `(0, n)` is the first of n. By default as launched, else all.
        image_column, key_column, root (*optional*): see [`open_source`].
        map_size (`int`, *optional*):
            Reduce every map to this many pixels square, by nearest neighbour. With the image processor's
            `expert_size`, the network sees the same as without, and the store is much smaller. By default maps have
            the size of their image.
        on_expert_error (`str`, *optional*, defaults to `"record"`):
            If an expert fails on an image, `"record"` leaves its label out and stores the `error`, unless it fails on
            100 images in a row; `"raise"` ends the run.
        max_image_pixels (`int`, *optional*, defaults to 178,956,970): larger images count as damaged.
        allow_other_versions (`bool`, *optional*, defaults to `False`):
            Continue a store that was begun with other versions of the libraries.
        rows_per_shard (`int`, *optional*, defaults to 1024):
            Images in a file of the store. An interruption costs the labels of the unfinished file.
        cpus_per_worker, gpus_per_worker (`float`, *optional*, defaults to 1 and 0):
            Cores and GPUs of each actor of `"ray"`. With a share of a GPU its experts run there.
        progress (`bool`, *optional*, defaults to `True`): show a bar with rate and time left.
        repair (`bool`, *optional*, defaults to `False`):
            First read the whole store and set its unreadable shards aside, see [`set_aside_damaged`]. Their images
            are labelled again.

    Returns:
        [`LabelReport`]

    Raises:
        FileNotFoundError, ValueError, TypeError: about the source, see [`open_source`], or the settings.
        ValueError: if the store was made with other experts, settings or versions; it names each difference.
        DamagedShardError: if a shard of the store cannot be read and `repair` is `False`.
        OSError: if a shard cannot be written, for example because the disk is full. Finished shards are kept.
        ExpertError: see `on_expert_error`.
        StoreInUseError: if another run writes into the store.
        ImportError: if `engine` is `"ray"` and Ray is not installed.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import LabelStore, label_images

    >>> report = label_images("modeling_prismer/assets", "offline", "my_labels", progress=False)
    >>> LabelStore("my_labels")["shape.png"]["ocr"]["words"]
    ['▲']
    ```
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; accepted are {', '.join(map(repr, ENGINES))}")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 1),
        ("map_size", map_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; at least {least} is needed")
    if isinstance(suite, str):
        suite = ExpertSuite.from_name(suite)
    elif not isinstance(suite, ExpertSuite):
        suite = ExpertSuite(suite)
    if not suite:
        raise ValueError("there are no experts to run: the suite is empty")
    images = open_source(source, image_column, key_column, root)
    process = _place_among_processes(suite) if shard is None else (int(shard[0]), int(shard[1]))
    if engine == "ray" and gpus_per_worker and _is_on_cpu(suite):
        # on the actors' GPUs; this process may have none, so the copy has nothing loaded that would move there
        suite = copy.deepcopy(suite).to("cuda")
    manifest = make_manifest(suite, suite.descriptions, {"map_size": map_size, "max_image_pixels": max_image_pixels})
    labeller = Labeller(suite, map_size, on_expert_error, max_image_pixels)
    writer = LabelWriter(
        output, manifest, process, rows_per_shard=rows_per_shard, allow_other_versions=allow_other_versions
    )

    start, failed = time.perf_counter(), 0
    errors: dict[str, str] = {}
    seconds_before = {name: expert.seconds for name, expert in suite.items()}
    with writer:
        if repair:
            set_aside_damaged(output)
        # shared before: the shares must not depend on what other processes have finished meanwhile
        images = images.share(*process).without(writer.done)
        with _bar(images, process, progress) as bar:
            if engine == "local":
                num_workers = num_workers or min(8, os.cpu_count() or 1)
                for row in label_locally(images, labeller, batch_size, num_workers):
                    if row["error"] is not None:
                        failed += 1
                        if len(errors) < MAX_ERRORS:
                            errors[row["key"]] = row["error"]
                    writer.write_row(row)
                    _advance(bar, images, 1)
            else:
                tables = label_on_ray(images, labeller, batch_size, num_workers or 1, cpus_per_worker, gpus_per_worker)
                for table in tables:
                    wrong = table.filter(pc.is_valid(table["error"])).select(["key", "error"])
                    failed += len(wrong)
                    for row in wrong.slice(0, MAX_ERRORS - len(errors)).to_pylist():
                        errors[row["key"]] = row["error"]
                    writer.write_table(table)
                    _advance(bar, images, len(table))
    return LabelReport(
        images=writer.rows_written,
        failed=failed,
        seconds=time.perf_counter() - start,
        bytes=writer.bytes_written,
        expert_seconds={name: expert.seconds - seconds_before[name] for name, expert in suite.items()},
        errors=errors,
    )


def _place_among_processes(suite: ExpertSuite) -> tuple[int, int]:
    """(number of this process, of all processes), as launched; the experts go to the process's own device."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return 0, 1
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # left to itself it takes processes without an accelerator for one process
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if state.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}; give shard"
        )
    if state.device.type != "cpu" and _is_on_cpu(suite):
        suite.to(state.device)
    return state.process_index, state.num_processes


def _is_on_cpu(suite: ExpertSuite) -> bool:
    return all(expert.device.type == "cpu" for expert in suite.values())


def _bar(images: ImageSource, process: tuple[int, int], progress: bool) -> tqdm:
    name = "labels" if process[1] == 1 else f"labels, process {process[0]} of {process[1]}"
    # one bar is enough for the processes of a machine
    is_shown = progress and int(os.environ.get("LOCAL_RANK", "0")) == 0
    return tqdm(total=images.num_images, desc=name, unit="image", disable=not is_shown)


def _advance(bar: tqdm, images: ImageSource, number: int) -> None:
    reading = images.progress()
    if reading is not None and reading[0]:  # estimated from the files so far
        files_read, files = reading
        bar.total = max(bar.n + number, round((bar.n + number) * files / files_read))
    bar.update(number)


def parse_shard(text: str) -> tuple[int, int]:
    """
    `"0/8"`, the first of eight parts, as `(0, 8)`.

    Raises:
        ValueError: if the text has another form, or is not between `0/n` and `n-1/n`.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import parse_shard

    >>> parse_shard("0/8")
    (0, 8)
    ```
    """
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"the shard is {text!r}; needed is i/n with i from 0 to n - 1, such as 0/8")
    return int(first), int(second)
