"""Runs experts over many images and stores their labels."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..experts.base import Expert
from ..experts.suite import ExpertSuite
from ..image_loading import MAX_IMAGE_PIXELS
from ..many_images.engines import LabelEngine, is_on_cpu
from ..many_images.processes import launched_place, progress_bar
from .labelling import Labeller
from .manifest import make_manifest
from .shards import LabelWriter, count_failed, set_aside_damaged
from .sources import open_source


# the largest number of failed images that a report names
MAX_ERRORS = 100


@dataclass
class LabelReport:
    """
    The result of [`label_images`].

    Attributes:
        images (`int`): number of images that this process labelled, including failed ones.
        failed (`int`): number of these that have an `error`.
        seconds (`float`): duration of the run.
        bytes (`int`): size of the shards written.
        expert_seconds (`dict[str, float]`):
            Seconds that each expert ran in this process, without loading. The engine `"ray"` leaves them at 0.
        errors (`dict[str, str]`):
            The errors of the first 100 failed images, by key. `LabelStore(folder).errors` has all of them.
        failed_before (`int`): number of images with an `error` that were in the store before this run.

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
    failed_before: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def label_images(
    source: Any,
    suite: ExpertSuite | Iterable[Expert] | str,
    output: str | Path,
    engine: str | LabelEngine = "local",
    *,
    batch_size: int = 32,
    shard: tuple[int, int] | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    root: str | Path | None = None,
    map_size: int | None = None,
    on_expert_error: str = "record",
    max_image_pixels: int | None = MAX_IMAGE_PIXELS,
    allow_other_versions: bool = False,
    rows_per_shard: int = 1024,
    progress: bool = True,
    repair: bool = False,
    **engine_options: Any,
) -> LabelReport:
    """
    Runs experts over images and writes their labels into a store: a folder of Parquet files with one row per image.
    [`LabelStore`] and `datasets.load_dataset` read it.

    Call it again to continue after any interruption, including `kill -9` and a full disk. Images that have a row are
    skipped. An image that cannot be opened gets a row with its `error` and no labels.

    Several processes can share the images: those started by `torchrun` or `accelerate launch`, which
    `accelerate.PartialState` finds, or those that `shard` names. They write into one store and never wait for each
    other.

    Args:
        source: images: a folder, files, a glob, tars, a data set, …; see [`open_source`].
        suite ([`ExpertSuite`], `list[Expert]` or `str`): the experts, or the name of a suite.
        output (`str` or `Path`): the store. It is made if it does not exist, and continued if it does.
        engine (`str` or [`LabelEngine`], *optional*, defaults to `"local"`):
            Where the experts run: `"local"` in this process, `"ray"` on a Ray cluster, or an engine of your own.
        batch_size (`int`, *optional*, defaults to 32):
            Number of images that the experts get together. An expert splits them by its own `batch_size`.
        shard (`tuple[int, int]`, *optional*):
            The part of the images to label; `(0, n)` is the first of n. By default the share of this process if
            several were launched, else all images.
        image_column, key_column, root (*optional*): see [`open_source`].
        map_size (`int`, *optional*):
            Reduce every map to this many pixels square, by nearest neighbour. With the image processor's
            `expert_size`, the network sees the same maps as without, and the store is much smaller. By default a map
            has the size of its image.
        on_expert_error (`str`, *optional*, defaults to `"record"`):
            If an expert fails on an image, `"record"` leaves its label out and stores the `error`, unless it fails on
            100 images in a row; `"raise"` ends the run.
        max_image_pixels (`int`, *optional*, defaults to 178,956,970): larger images count as damaged.
        allow_other_versions (`bool`, *optional*, defaults to `False`):
            Continue a store that was begun with other versions of the libraries.
        rows_per_shard (`int`, *optional*, defaults to 1024):
            Number of images in a file of the store. An interruption loses the labels of the unfinished file.
        progress (`bool`, *optional*, defaults to `True`): show a bar with rate and time left.
        repair (`bool`, *optional*, defaults to `False`):
            First read the whole store and set its unreadable shards aside, see [`set_aside_damaged`]. Their images
            are labelled again.
        engine_options:
            Options of the engine. All engines have `num_workers`: for `"local"` the number of threads that open images
            and encode labels (by default one per core, at most 8), for `"ray"` the number of actors (by default 1).
            `"ray"` has `cpus_per_worker` (default 1) and `gpus_per_worker` (default 0; 0.25 puts four actors on a GPU,
            where their experts run) as well.

    Returns:
        [`LabelReport`]

    Raises:
        FileNotFoundError, ValueError, TypeError: for a source that [`open_source`] refuses, or a wrong setting.
        ValueError: if the store was made with other experts, settings or versions; it names each difference.
        DamagedShardError: if a shard of the store cannot be read and `repair` is `False`.
        OSError: if a shard cannot be written, for example because the disk is full. Finished shards are kept.
        ExpertError: see `on_expert_error`.
        StoreInUseError: if another run writes into the store.
        ImportError: if a library that the engine requires is not installed.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import LabelStore, label_images

    >>> report = label_images("modeling_prismer/assets", "offline", "my_labels", progress=False)
    >>> LabelStore("my_labels")["shape.png"]["ocr"]["words"]
    ['▲']
    ```
    """
    if isinstance(engine, str):
        engine = LabelEngine.from_name(engine, **engine_options)
    elif engine_options:
        raise ValueError(f"engine is a {type(engine).__name__}; give it {', '.join(engine_options)} when you make it")
    for name, value in (("batch_size", batch_size), ("map_size", map_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is needed")
    if isinstance(suite, str):
        suite = ExpertSuite.from_name(suite)
    elif not isinstance(suite, ExpertSuite):
        suite = ExpertSuite(suite)
    if not suite:
        raise ValueError("there are no experts to run: the suite is empty")
    images = open_source(source, image_column, key_column, root)
    if shard is None:
        process, device = launched_place()
        if device is not None and is_on_cpu(suite):
            suite.to(device)
    else:
        process = (int(shard[0]), int(shard[1]))
    suite = engine.place_suite(suite)
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
        failed_before = count_failed(output)
        # first share, then leave out: the shares must not depend on what other processes have finished meanwhile
        images = images.share(*process).without(writer.done)
        with progress_bar(images, "labels", process, progress) as advance:
            for row in engine.run(images, labeller, batch_size):
                if row["error"] is not None:
                    failed += 1
                    if len(errors) < MAX_ERRORS:
                        errors[row["key"]] = row["error"]
                writer.write_row(row)
                advance()
    return LabelReport(
        images=writer.rows_written,
        failed=failed,
        seconds=time.perf_counter() - start,
        bytes=writer.bytes_written,
        expert_seconds={name: expert.seconds - seconds_before[name] for name, expert in suite.items()},
        errors=errors,
        failed_before=failed_before,
    )
