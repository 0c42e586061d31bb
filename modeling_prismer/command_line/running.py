"""Runs a command over its images: engine, results, progress and summary."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import check_files, start
from .console import err, failed, printable, warn


if TYPE_CHECKING:
    from .results import ResultFiles
    from .workers import ResultWorker

MAX_ERRORS = 10  # that are printed; all are in the results

ImagesHelp = "Files, folders, globs in quotes, URLs, webdataset tars, Parquet files, saved data sets; - reads a list."
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="Write a JSON object for each image into this file (results.jsonl), or into files in this folder. "
        "What is there already is skipped.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON object for each image.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Number of images that run together.")]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Run images again that failed in an earlier run with this --output.")
]
ColumnOption = Annotated[
    str | None, typer.Option(help="The images' column in a data set, or their type in tars (jpg).")
]
KeyOption = Annotated[str | None, typer.Option(help="The column that names each image of a data set.")]
EngineOption = Annotated[
    str,
    typer.Option(help="Where the models run: local, ray, or an engine of your own.", rich_help_panel="Many images"),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Number of workers.", rich_help_panel="Many images")
]
GpusOption = Annotated[
    float | None,
    typer.Option(min=0, help="GPUs per worker of the engine ray; 0.25 shares one GPU.", rich_help_panel="Many images"),
]
ShardOption = Annotated[
    str | None,
    typer.Option(help="Run one part of the images; 0/8 is the first of eight.", rich_help_panel="Many images"),
]


@dataclass
class Options:
    """Options of a command that runs over images."""

    output: Path | None = None
    as_json: bool = False
    batch_size: int = 8
    retry_failed: bool = False
    image_column: str | None = None
    key_column: str | None = None
    engine: str = "local"
    num_workers: int | None = None
    gpus_per_worker: float | None = None
    shard: str | None = None

    @property
    def has_scores(self) -> bool:
        """Whether the results are written as JSON, with scores."""
        return self.as_json or self.output is not None


def run_over_images(
    images: Sequence[str],
    options: Options,
    make_worker: Callable[[str, bool], "ResultWorker"],
    say: Callable[[dict[str, Any], bool], str],
    model: str | None,
    device: str,
) -> None:
    """
    Runs a worker over images. Prints the results, or writes them into a file.

    Args:
        images (`Sequence[str]`): arguments of the command.
        options ([`Options`]): its options.
        make_worker (`Callable`): returns the worker for a device, and for one image alone or several.
        say (`Callable`): returns the lines that are printed for the results of an image, alone or one of several.
        model, device: those of the command.

    Raises:
        typer.Exit: with code 1 if an image failed.
    """
    check_files(images)
    start(model, device)
    from modeling_prismer.processing.many_images import (
        LabelEngine,
        launched_place,
        parse_shard,
        progress_bar,
        wait_for_others,
    )

    from .arguments import find_device
    from .images import open_images

    engine_options = {"num_workers": options.num_workers, "gpus_per_worker": options.gpus_per_worker}
    engine = LabelEngine.from_name(
        options.engine, **{name: value for name, value in engine_options.items() if value is not None}
    )
    process, own_device = launched_place() if options.shard is None else (parse_shard(options.shard), None)
    source = open_images(images, options.image_column, options.key_column)
    is_one = source.num_images == 1
    if device == "auto" and own_device is not None:
        device = str(own_device)
    worker = make_worker(engine.device or find_device(device), is_one)
    summary = Summary(is_one, options.output)
    with _results(options, worker, process) as results:
        source = source.share(*process)
        if results is not None:
            source = source.without(results.done)
            summary.failed_before = results.failed_before
        is_shown = not is_one and sys.stderr.isatty()
        with progress_bar(source, "images", process, is_shown) as advance:
            for row in engine.run(source, worker, options.batch_size):
                if results is not None:
                    results.write(row["json"])
                if results is None or options.as_json:
                    text = row["json"] if options.as_json else say(json.loads(row["json"]), is_one)
                    if row["error"] is None or options.as_json:
                        _print(text)
                summary.add(row)
                advance()
    if options.shard is None:
        wait_for_others()
    summary.end()


@contextmanager
def _results(options: Options, worker: "ResultWorker", process: tuple[int, int]) -> "Iterator[ResultFiles | None]":
    if options.output is None:
        if options.retry_failed:
            raise ValueError("--retry-failed needs --output")
        yield None
        return
    from .results import ResultFiles

    with ResultFiles(options.output, worker.same, process, options.retry_failed) as results:
        yield results


def _print(text: str) -> None:
    """Prints above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Summary:
    """Counts images and prints what failed."""

    def __init__(self, is_one: bool, output: Path | None):
        self.is_one, self.output = is_one, output
        self.start = time.perf_counter()
        self.images = self.failed = self.failed_before = self.unfamiliar = 0

    def add(self, row: dict[str, Any]) -> None:
        self.images += 1
        if row["error"] is not None:
            self.failed += 1
            if not self.is_one and self.failed <= MAX_ERRORS:
                err.print(
                    f"failed: {printable(row['key'])}: {printable(row['error'])}", style="yellow", soft_wrap=True
                )
            elif self.is_one:
                self.error = row["error"]
        elif '"familiar": false' in row["json"]:
            self.unfamiliar += not json.loads(row["json"]).get("familiar", True)

    def end(self) -> None:
        if self.unfamiliar:
            what = "this image is" if self.is_one else f"{self.unfamiliar} of {self.images} images are"
            warn(
                f"{what} unlike those that the checkpoint was trained on, so the output may be meaningless. The model "
                "card describes the images of its training. `prismer convert --help` shows how to get a checkpoint "
                "for photographs."
            )
        if self.is_one and self.failed:
            raise failed(self.error)
        if not self.is_one or self.output is not None:
            self._print_counts()
        if self.output is not None:
            print(self.output)
        if self.failed or self.failed_before:
            raise typer.Exit(1)

    def _print_counts(self) -> None:
        seconds = time.perf_counter() - self.start
        text = f"{self.images} images in {seconds:.1f} s, {self.failed} of them failed"
        if self.failed > MAX_ERRORS:
            text += f" ({MAX_ERRORS} are listed above)"
        if self.failed_before:
            text += f"; {self.failed_before} failed in earlier runs, --retry-failed runs them again"
        err.print(text, soft_wrap=True)
