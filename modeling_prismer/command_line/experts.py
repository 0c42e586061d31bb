"""`prismer experts`, `label` and `features`: what runs experts alone."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .arguments import SUITE_NAMES, DeviceOption, ExpertsOption, ModelOption, find_device, start
from .console import Command, err, out, printable
from .running import (
    BatchOption,
    ColumnOption,
    GpusOption,
    ImagesHelp,
    JsonOption,
    KeyOption,
    Options,
    OutputOption,
    RetryOption,
    ShardOption,
    WorkersOption,
    run_over_images,
)


commands = typer.Typer()
MAX_DAMAGED = 10  # images that are printed


@commands.command(cls=Command)
def experts(
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGES", help=ImagesHelp)] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", "--panels", help="Draw a panel of each image into this folder.")
    ] = None,
    model: ModelOption = None,
    experts: ExpertsOption = None,
    batch_size: BatchOption = 8,
    as_json: JsonOption = False,
    output: OutputOption = None,
    retry_failed: RetryOption = False,
    image_column: ColumnOption = None,
    key_column: KeyOption = None,
    device: DeviceOption = "auto",
    num_workers: WorkersOption = None,
    shard: ShardOption = None,
    listed: Annotated[
        str | None,
        typer.Option("--list", metavar="SUITE", help="List the models, licences and sizes of a suite, and exit."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="With --list: the table in Markdown.")] = False,
) -> None:
    """
    Draws the output of each expert for images, or writes it in words.

    prismer experts photo.jpg --out panels
    """
    if listed is not None:
        return _list_suite(listed, as_markdown)
    if as_markdown:
        raise ValueError("--markdown belongs to --list SUITE")
    if not images:
        raise ValueError("no images are given; prismer experts photo.jpg --out panels")
    if folder is None and not as_json and output is None:
        raise ValueError("nothing is written: --out FOLDER draws panels, --json and --output write words")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; a folder is needed")

    def make_worker(device: str, is_one: bool) -> Any:
        from .checkpoints import Checkpoint
        from .workers import Drawing

        return Drawing(Checkpoint(model, device, experts=experts), folder, is_one)

    def say(row: dict[str, Any], is_one: bool) -> str:
        if is_one:
            err.print(f"{', '.join(row['experts'])} in {row['seconds']:.1f} s")
        return printable(row["panel"] or "")

    options = Options(
        *(output, as_json, batch_size, retry_failed, image_column, key_column), num_workers=num_workers, shard=shard
    )
    run_over_images(images, options, make_worker, say, model, device)


def _list_suite(suite: str, as_markdown: bool) -> None:
    from modeling_prismer.processing.experts import suite_markdown

    markdown = suite_markdown(suite)
    if as_markdown:
        print(markdown)
        return
    header, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    table = Table(*header)
    for row in rows:
        table.add_row(*(Text(cell.replace("`", "")) for cell in row))
    out.print(table)


def _list_engines(wanted: bool) -> None:
    if wanted:
        from modeling_prismer.processing.labels import LabelEngine

        table = Table("engine", "where the models run", "options", "installed")
        for name, engine in LabelEngine.registry.items():
            installed = "yes" if engine.is_installed() else f"no: {engine.how_to_install()}"
            table.add_row(name, engine.description, ", ".join(engine.option_names()), installed)
        out.print(table)
        raise typer.Exit()


@commands.command(cls=Command)
def label(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="Images, webdataset tars or Parquet files: a folder, a file, a glob in quotes; or a saved data set.",
        ),
    ],
    output: Annotated[Path, typer.Option("--out", help="The label store, a folder. It is continued if it exists.")],
    experts: Annotated[
        str,
        typer.Option(help=f"A suite ({SUITE_NAMES}), the experts of a checkpoint, or some of these (fast:depth)."),
    ] = "offline",
    engine: Annotated[str, typer.Option(help="Where the experts run; --list-engines lists the names.")] = "local",
    list_engines: Annotated[
        bool,
        typer.Option("--list-engines", callback=_list_engines, is_eager=True, help="List the engines and exit."),
    ] = False,
    shard: Annotated[str | None, typer.Option(help="Label one part of the images; 0/8 is the first of eight.")] = None,
    map_size: Annotated[
        int | None,
        typer.Option(min=1, help="Reduce maps to this many pixels square; the network reads 224."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images that an expert gets at once.")] = 32,
    num_workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Number of workers of the engine.")
    ] = None,
    image_column: ColumnOption = None,
    key_column: KeyOption = None,
    allow_other_versions: Annotated[
        bool,
        typer.Option("--allow-other-versions", help="Continue a store that other versions of the libraries began."),
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set unreadable files of the store aside and label their images again.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Label images that failed before again.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a JSON object for each damaged image of the store, with its file and error."),
    ] = None,
    gpus_per_worker: GpusOption = None,
    device: DeviceOption = "auto",
) -> None:
    """
    Runs experts over many images once and stores their labels.

    Run the same command again after an interruption or a full disk: it labels the images that are left. The exit code
    is 1 if an image of the store is damaged or an expert failed on it.
    """
    start(device=device)
    from modeling_prismer.processing.labels import (
        LabelStore,
        forget_failed,
        label_images,
        parse_shard,
        set_aside_damaged,
    )
    from modeling_prismer.processing.many_images import wait_for_others

    from .checkpoints import read_suite

    part = None if shard is None else parse_shard(shard)
    options: dict[str, Any] = {"num_workers": num_workers, "gpus_per_worker": gpus_per_worker}
    suite = read_suite(experts, default="offline")
    if retry_failed:
        if repair:
            set_aside_damaged(output)
        forget_failed(output)
    done = label_images(
        images,
        suite.to(find_device(device)),
        output,
        engine,
        batch_size=batch_size,
        shard=part,
        image_column=image_column,
        key_column=key_column,
        map_size=map_size,
        allow_other_versions=allow_other_versions,
        repair=repair,
        **{name: value for name, value in options.items() if value is not None},
    )
    for key, error in list(done.errors.items())[:MAX_DAMAGED]:
        err.print(f"damaged: {printable(key)}: {printable(error)}", style="yellow", soft_wrap=True)
    if report is not None:
        _write_report(report, LabelStore(output).errors)
    elif done.failed > MAX_DAMAGED:
        err.print(f"and {done.failed - MAX_DAMAGED} more; --report damaged.jsonl lists all", soft_wrap=True)
    rate = f"{done.images_per_second:.1f} images/s, {done.bytes / max(1, done.images) / 1000:.1f} kB each"
    summary = f"{done.images} images labelled, {done.failed} of them damaged"
    if done.failed_before:
        summary += f" and {done.failed_before} before, --retry-failed labels them again"
    err.print(f"{summary}; {rate}", soft_wrap=True)
    print(output)
    if part is None:
        wait_for_others()
    if done.failed or done.failed_before:
        raise typer.Exit(1)


def _write_report(path: Path, errors: dict[str, str]) -> None:
    from modeling_prismer.processing.labels.durable_files import write_durably

    lines = (json.dumps({"file": key, "error": error}, ensure_ascii=False) for key, error in sorted(errors.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(f"{line}\n" for line in lines))


@commands.command(cls=Command)
def features(
    names: Annotated[Path, typer.Argument(metavar="NAMES", help="A text file with one class name on each line.")],
    output: Annotated[Path, typer.Option("--out", help="The table to write, a safetensors file.")],
    expert: Annotated[str, typer.Option(help="The label expert that has these classes.")] = "segmentation",
    pca: Annotated[
        Path | None,
        typer.Option(
            help="The analysis of the features: clip_pca.pkl as published, or safetensors. Fitted by default."
        ),
    ] = None,
    text_encoder: Annotated[str, typer.Option(help="CLIP: a folder or a Hub id.")] = "openai/clip-vit-large-patch14",
    background: Annotated[str, typer.Option(help="The name of the background.")] = "background",
) -> None:
    """Makes the features of an expert's classes from the names of the classes."""
    classes = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not classes:
        raise ValueError(f"{names} names no class; one name on each line is needed")
    start()
    from modeling_prismer.conversion import convert_clip_pca, save_class_features
    from modeling_prismer.processing.experts import ClipTextFeatures

    if pca is None:
        pca = output.with_name(f"{output.stem}_pca.safetensors")
        ClipTextFeatures.fit_pca(classes, pca, model_name=text_encoder)
        err.print(f"the analysis, for other tables and for words: {pca}", soft_wrap=True)
    elif pca.suffix == ".pkl":  # as published
        pca = convert_clip_pca(pca, output.with_name(f"{output.stem}_pca.safetensors"))
    text_features = ClipTextFeatures(pca=str(pca), model_name=text_encoder)
    save_class_features({expert: classes}, text_features, output, background)
    print(output)
