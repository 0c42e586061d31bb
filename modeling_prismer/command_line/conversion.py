"""`prismer convert` and `export`: from the published checkpoints to this package, and from this package to ONNX."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .common import CHECKPOINT, Command, out, start


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
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{CHECKPOINT}.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators; else what torch recommends.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the content of OUT.")] = False,
) -> None:
    """Writes a model as ONNX, for onnxruntime: encoder.onnx, decoder.onnx, the processor."""
    start(model=model)
    from modeling_prismer import PrismerForConditionalGeneration
    from modeling_prismer.conversion import export_onnx
    from modeling_prismer.conversion.output_folder import check_output_dir

    from .checkpoints import Checkpoint, PrismerReader

    check_output_dir(output, overwrite)
    reader = Checkpoint(model).load()
    if not isinstance(reader, PrismerReader):
        raise ValueError(f"model {model!r} is a PrismerLM; only a Prismer can be exported")
    network = PrismerForConditionalGeneration.from_pretrained(reader.checkpoint.path, dtype=reader.dtype)
    print(export_onnx(network, reader.processor, output, opset_version=opset, overwrite=overwrite))
