"""
`prismer convert`, `verify`, `convert-labels` and `export`: from the published files to this package, and to ONNX.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .arguments import CHECKPOINT, DeviceOption, checkpoint_path, find_device, start
from .console import Command, err, failed, out, printable, warn


if TYPE_CHECKING:
    from PIL import Image


commands = typer.Typer()


def _list_published(wanted: bool) -> None:
    if wanted:
        from modeling_prismer.conversion.published import PUBLISHED_CHECKPOINTS, REPOSITORY

        table = Table("--variant", "task", "image size", "experts", title=f"published in {REPOSITORY}")
        for each in PUBLISHED_CHECKPOINTS.values():
            experts = "six" if each.has_experts else "none"
            table.add_row(each.name, each.task, str(each.image_size), experts)
        out.print(table)
        raise typer.Exit()


@commands.command(cls=Command)
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="The repository shikunl/prismer, a folder of it, or any pytorch_model.bin.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    variant: Annotated[
        str | None,
        typer.Option(
            help="A published checkpoint, such as vqa_prismer_base, or the network of your own: prismer_base, …",
            show_default="the name in CHECKPOINT, else prismer_base",
        ),
    ] = None,
    list_published: Annotated[
        bool,
        typer.Option("--list", callback=_list_published, is_eager=True, help="List the published checkpoints."),
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the image.", show_default="that of the checkpoint")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="caption, zero_shot_caption, vqa or classification.", show_default="that of a published checkpoint"
        ),
    ] = None,
    feature_tables: Annotated[
        Path | None, typer.Option(help="Folder of the published feature tables (.pt or .safetensors).")
    ] = None,
    without_feature_tables: Annotated[
        bool, typer.Option("--without-feature-tables", help="Convert a published checkpoint without its tables.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A RoBERTa tokenizer: a folder or a Hub id.", show_default="that of the checkpoint's size"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the content of OUT.")] = False,
) -> None:
    """
    Turns a published checkpoint into a folder for `from_pretrained`.

    prismer convert shikunl/prismer --variant vqa_prismer_base --feature-tables dataset OUT
    """
    start()
    from modeling_prismer.configuration_prismer import VARIANTS
    from modeling_prismer.conversion import convert_original_checkpoint, convert_published
    from modeling_prismer.conversion.published import REPOSITORY, published_name

    if variant is None:
        variant = published_name(checkpoint)
        if variant is None and checkpoint.rstrip("/") == REPOSITORY:
            raise ValueError(
                f"{REPOSITORY} has twelve checkpoints; name one, such as --variant vqa_prismer_base. "
                "`prismer convert --list` describes them"
            )
    if variant is None or variant in VARIANTS:
        convert_original_checkpoint(
            checkpoint,
            variant or "prismer_base",
            output_dir=output,
            image_size=image_size,
            task=task,
            feature_tables=feature_tables,
            tokenizer=tokenizer,
            overwrite=overwrite,
        )
    else:
        convert_published(
            variant,
            output,
            feature_tables,
            source=checkpoint,
            without_feature_tables=without_feature_tables,
            image_size=image_size,
            task=task,
            tokenizer=tokenizer,
            overwrite=overwrite,
        )
    print(output)


@commands.command(cls=Command)
def verify(
    model: Annotated[str, typer.Argument(metavar="OUT", help=f"The converted folder. {CHECKPOINT}.")],
    images: Annotated[str, typer.Option(help="A folder of images like those of the training, at least 4.")],
    max_images: Annotated[int, typer.Option(min=1, help="Images to use, evenly chosen.")] = 16,
    question: Annotated[
        str | None, typer.Option(help="The question, for a checkpoint that needs one.", show_default="What is in it?")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """
    Checks a converted checkpoint with its experts on your images, and prints what is wrong and the likely cause.

    The BatchNorms of the network know what the maps of each expert looked like in the training. Maps that look
    different are named: inverted, swapped channels, not normalised, classes in another order. Then read the texts.
    """
    start(model=model, device=device)
    from modeling_prismer.conversion import verify_model

    from .checkpoints import Checkpoint, load_prismer

    opened = _open_some(images, max_images)
    network, processor = load_prismer(Checkpoint(model, find_device(device), dtype="float32"), "verified")
    options: dict[str, Any] = {} if question is None else {"question": question}
    found = verify_model(network, processor, opened, **options)
    table = Table("check", "holds", "result", title=f"{model} on {len(opened)} images")
    for check in found.checks:
        holds = {True: "yes", False: "NO", None: "not checked"}[check.holds]
        table.add_row(check.name, holds, printable(check.detail))
    out.print(table)
    for name, text in found.texts.items():
        out.print(printable(f"{name}: {text}"), soft_wrap=True)
    if found.problems:
        raise failed(f"{len(found.problems)} checks failed: {', '.join(check.name for check in found.problems)}")


def _open_some(images: str, number: int) -> "dict[str, Image.Image]":
    """Some of the images, evenly chosen and opened, by name. Damaged images are left out with a warning."""
    from modeling_prismer.processing.image_loading import load_image

    from .images import open_images

    source = open_images([images])
    source = source.share(0, max(1, (source.num_images or 0) // number))
    opened: dict[str, Image.Image] = {}
    for name, image in source:
        try:
            if isinstance(image, Exception):
                raise image
            opened[name] = load_image(image)
        except (ValueError, OSError) as error:
            warn(f"{name} is left out: {error}")
        if len(opened) == number:
            break
    return opened


@commands.command(cls=Command)
def convert_labels(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Published labels, or a label store.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The store or the folder to write.")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the images, whose paths become the keys.", show_default="paths of the labels"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint whose experts the labels belong to.", show_default="the published experts"),
    ] = None,
    folder: Annotated[
        list[str] | None, typer.Option(help="Another folder for an expert, such as segmentation=seg_ade.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of threads that read files.")] = None,
) -> None:
    """
    Reads labels in the published layout into a label store, or writes a store in the published layout.

    SOURCE decides which. Run the command again after an interruption: it reads what is left.
    """
    start(model=model)
    from modeling_prismer import PrismerConfig
    from modeling_prismer.processing.labels import convert_published_labels
    from modeling_prismer.processing.many_images.sources import IMAGE_SUFFIXES, path_as_key, walk_files

    folders = dict(name.partition("=")[::2] for name in folder or ())
    if unnamed := [name for name, place in folders.items() if not place]:
        raise ValueError(f"--folder is {unnamed[0]!r}; EXPERT=FOLDER is needed, such as segmentation=seg_ade")
    keys = None
    if images is not None:
        files = (file for file in walk_files(images) if Path(file).suffix.lower() in IMAGE_SUFFIXES)
        keys = [path_as_key(file, images) for file in files]
        if not keys:
            raise FileNotFoundError(f"--images {images} has no images")
    experts = None if model is None else PrismerConfig.from_pretrained(checkpoint_path(model)).experts
    done = convert_published_labels(source, output, experts, folders, keys=keys, num_workers=workers)
    for key, error in list(done.errors.items())[:10]:
        warn(f"{key}: {error}")
    rate = f"{done.images_per_second:,.0f} images/s"
    err.print(f"{done.images} images converted, {done.failed} of them damaged; {rate}", soft_wrap=True)
    print(output)


@commands.command(cls=Command)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{CHECKPOINT}.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators; else what torch recommends.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the content of OUT.")] = False,
) -> None:
    """Writes a model as ONNX, for onnxruntime: encoder.onnx, decoder.onnx, the processor."""
    start(model=model)
    from modeling_prismer.conversion import export_onnx
    from modeling_prismer.conversion.output_folder import check_output_dir

    from .checkpoints import Checkpoint, load_prismer

    check_output_dir(output, overwrite)
    network, processor = load_prismer(Checkpoint(model), "exported")
    print(export_onnx(network, processor, output, opset_version=opset, overwrite=overwrite))
