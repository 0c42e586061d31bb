"""`prismer ask`, `caption` and `classify`."""

import os
from typing import Annotated, Any

import typer
from rich.table import Table

from .arguments import (
    BudgetOption,
    DeviceOption,
    DtypeOption,
    ExpertsOption,
    LanguageOption,
    ModelOption,
    exists,
    is_url,
)
from .console import Command, out, printable
from .running import (
    BatchOption,
    ColumnOption,
    EngineOption,
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

BeamsOption = Annotated[
    int | None,
    typer.Option(
        "--num-beams",
        "--beams",
        min=1,
        help="Number of beams.",
        show_default="the checkpoint's, in its generation_config.json",
    ),
]
ImageSuffixes = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm", ".pgm"),
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".parquet"),
)


@commands.command(cls=Command)
def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES... QUESTIONS", help=f"{ImagesHelp} Then questions, each in quotes."),
    ],
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", help="A question about each image; repeat it for more. All arguments are then images."
        ),
    ] = None,
    model: ModelOption = None,
    language: LanguageOption = None,
    experts: ExpertsOption = None,
    budget_ms: BudgetOption = None,
    num_beams: BeamsOption = None,
    batch_size: BatchOption = 8,
    as_json: JsonOption = False,
    output: OutputOption = None,
    retry_failed: RetryOption = False,
    image_column: ColumnOption = None,
    key_column: KeyOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "local",
    num_workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    shard: ShardOption = None,
) -> None:
    """
    Answers questions about images. Prints each answer on its own line.

    prismer ask photo.jpg "What is on the table?" "How many cups are there?"
    """
    images, questions = (arguments, question) if question else split_arguments(arguments)
    if not questions:
        raise ValueError("there is no question; put it in quotes after the images: 'What color is it?'")
    if not all(each.strip() for each in questions):
        raise ValueError("a question is empty; put it in quotes: 'What color is it?'")

    def make_worker(device: str, is_one: bool) -> Any:
        from .checkpoints import Checkpoint
        from .workers import Generating

        checkpoint = Checkpoint(model, device, dtype, experts, language, budget_ms)
        return Generating(checkpoint, "vqa", questions, num_beams, options.has_scores)

    def say(row: dict[str, Any], is_one: bool) -> str:
        if "answers" not in row:
            return _line(row["file"], row["text"], is_one)
        pairs = zip(questions, row["answers"] or [])
        return "\n".join(
            printable(answer["text"]) if is_one else _line(f"{row['file']}: {asked}", answer["text"], False)
            for asked, answer in pairs
        )

    options = Options(
        *(output, as_json, batch_size, retry_failed, image_column, key_column),
        *(engine, num_workers, gpus_per_worker, shard),
    )
    run_over_images(images, options, make_worker, say, model, device)


@commands.command(cls=Command)
def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help=ImagesHelp)],
    model: ModelOption = None,
    language: LanguageOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="The beginning of the caption; for a PrismerLM the whole request.")
    ] = None,
    experts: ExpertsOption = None,
    budget_ms: BudgetOption = None,
    num_beams: BeamsOption = None,
    batch_size: BatchOption = 8,
    as_json: JsonOption = False,
    output: OutputOption = None,
    retry_failed: RetryOption = False,
    image_column: ColumnOption = None,
    key_column: KeyOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "local",
    num_workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    shard: ShardOption = None,
) -> None:
    """
    Describes images in a sentence.

    prismer caption photos --output captions.jsonl
    """

    def make_worker(device: str, is_one: bool) -> Any:
        from .checkpoints import Checkpoint
        from .workers import Generating

        checkpoint = Checkpoint(model, device, dtype, experts, language, budget_ms)
        return Generating(checkpoint, "caption", [prompt], num_beams, options.has_scores)

    def say(row: dict[str, Any], is_one: bool) -> str:
        return _line(row["file"], row["text"], is_one)

    options = Options(
        *(output, as_json, batch_size, retry_failed, image_column, key_column),
        *(engine, num_workers, gpus_per_worker, shard),
    )
    run_over_images(images, options, make_worker, say, model, device)


@commands.command(cls=Command)
def classify(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES... LABELS", help=f"{ImagesHelp} Then the labels to choose from."),
    ],
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="A label to choose from; several times for more. All arguments are images."),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="The question that the labels answer. Only checkpoints for questions need it.")
    ] = None,
    model: ModelOption = None,
    language: LanguageOption = None,
    experts: ExpertsOption = None,
    budget_ms: BudgetOption = None,
    batch_size: BatchOption = 8,
    as_json: JsonOption = False,
    output: OutputOption = None,
    retry_failed: RetryOption = False,
    image_column: ColumnOption = None,
    key_column: KeyOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "local",
    num_workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    shard: ShardOption = None,
) -> None:
    """
    Ranks your own labels for images, best first.

    prismer classify photo.jpg cat dog
    """
    images, labels = (arguments, label) if label else split_arguments(arguments, may_be_words=True)
    if not labels or not all(each.strip() for each in labels):
        raise ValueError("there is no label, or an empty one; put the labels after the images: cat dog")

    def make_worker(device: str, is_one: bool) -> Any:
        from .checkpoints import Checkpoint
        from .workers import Classifying

        return Classifying(Checkpoint(model, device, dtype, experts, language, budget_ms), labels, question)

    def say(row: dict[str, Any], is_one: bool) -> str:
        if not is_one or row["error"] is not None:
            return _line(row["file"], row["text"], is_one)
        table = Table("label", "mean log-probability")
        for each in row["labels"]:
            table.add_row(printable(each["label"]), f"{each['score']:.3f}")
        with out.capture() as captured:
            out.print(table)
        return captured.get().rstrip("\n")

    options = Options(
        *(output, as_json, batch_size, retry_failed, image_column, key_column),
        *(engine, num_workers, gpus_per_worker, shard),
    )
    run_over_images(images, options, make_worker, say, model, device)


def _line(file: str, text: str | None, is_one: bool) -> str:
    return printable(text or "") if is_one else printable(f"{file}: {text}").replace("\n", " ")


def split_arguments(arguments: list[str], may_be_words: bool = False) -> tuple[list[str], list[str]]:
    """
    Splits arguments into images, which come first, and texts.

    Args:
        arguments (`list[str]`): the first one is an image.
        may_be_words (`bool`, *optional*, defaults to `False`):
            Whether a text can be a single word, such as a label, which may also be the name of a folder.

    Raises:
        ValueError: if an argument can be a label or a folder, or if an image comes after a text.
    """
    number = 1
    while number < len(arguments) and _is_image(arguments[number], may_be_words):
        number += 1
    images, texts = arguments[:number], arguments[number:]
    for text in texts:
        if _is_image(text, may_be_words):
            raise ValueError(f"{text!r} comes after {texts[0]!r}, which is no image; name all images first")
    return images, texts


def _is_image(argument: str, may_be_word: bool) -> bool:
    if argument == "-" or is_url(argument) or argument.lower().endswith(ImageSuffixes):
        return True
    is_path = os.sep in argument
    if exists(argument):
        if may_be_word and not is_path:
            raise ValueError(
                f"{argument!r} can be a label or the file of this name; write ./{argument} for the file, or --label "
                f"{argument} for the label"
            )
        return True
    looks_like_one = " " not in argument and not argument.endswith("?")
    return looks_like_one and ("*" in argument or (is_path and not may_be_word))
