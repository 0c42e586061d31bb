"""`prismer worth`: what each expert of a checkpoint is worth, and what it costs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .arguments import CHECKPOINT, DeviceOption, DtypeOption, ExpertsOption, LanguageOption, find_device, start
from .console import Command


if TYPE_CHECKING:
    from .checkpoints import Reader

commands = typer.Typer()


def _of_data(*names: str, **kwargs: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Data", **kwargs)


@commands.command(cls=Command)
def worth(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=f"{CHECKPOINT}.")],
    data: Annotated[
        list[str], _of_data("--data", help="Images with questions, captions or classes, as in the recipes.")
    ],
    output: Annotated[Path, typer.Option("--out", help="The folder to write. It is continued if it exists.")],
    budget_seconds: Annotated[
        float | None, typer.Option(min=0, help="Name the best experts that need at most this time for each image.")
    ] = None,
    task: Annotated[
        str | None, _of_data(help="vqa, caption, classification or your own.", show_default="that of the checkpoint")
    ] = None,
    type_column: Annotated[str | None, _of_data(help="The column with the type of each question.")] = None,
    split: Annotated[str | None, _of_data(help="The split, such as 'validation[:200]'.")] = None,
    image_folder: Annotated[
        list[str] | None, _of_data(help="The folder of the images of a list: one for all, or one for each --data.")
    ] = None,
    image_column: Annotated[str | None, _of_data(help="The column of the images.")] = None,
    text_column: Annotated[
        str | None, _of_data("--question-column", "--caption-column", help="The column of the questions or captions.")
    ] = None,
    answer_column: Annotated[str | None, _of_data(help="The column of the answers.")] = None,
    class_column: Annotated[str | None, _of_data(help="The column of the classes.")] = None,
    key_column: Annotated[str | None, _of_data(help="The column that names each image of a data set.")] = None,
    split_column: Annotated[str | None, _of_data(help="The column with the name of the split.")] = None,
    class_names: Annotated[Path | None, _of_data(help="A file with the name of each class in words.")] = None,
    candidates: Annotated[Path | None, _of_data(help="Rank the answers in this file; else generate.")] = None,
    bad_rows: Annotated[
        Literal["error", "skip"], _of_data(help="Stop at rows that cannot be used, or leave them out.")
    ] = "error",
    max_rows: Annotated[int | None, _of_data(min=1, help="Use this many rows only.")] = None,
    labels: Annotated[
        Path | None, _of_data(help="A store of `prismer label`, in place of running the experts over all images.")
    ] = None,
    experts: ExpertsOption = None,
    permutations: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Estimate Shapley values from this many random orders of the experts.",
            show_default="up to 6 experts: all subsets; more: 20",
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=2, help="Number of bootstrap resamples.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of orders and resamples.")] = 0,
    timed_images: Annotated[int, typer.Option(min=1, help="Number of images on which the experts are timed.")] = 32,
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(help="Measure elapsed time, or computing time of the CPU, if others use the machine too."),
    ] = "wall",
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images that run together.")] = 8,
    num_beams: Annotated[
        int | None,
        typer.Option("--num-beams", "--beams", min=1, help="Number of beams.", show_default="the checkpoint's"),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens of an answer.", show_default="the checkpoint's")
    ] = None,
    language: LanguageOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """
    Measures what each expert is worth, and what it costs.

    prismer worth prismer-scenes --data questions.jsonl --type-column type --out worth

    The experts run once over the images, and the network once for each subset of experts. Run the same command again
    after an interruption: it continues.
    """
    start(model, device)
    from modeling_prismer.expert_worth import SubsetPlan
    from modeling_prismer.processing.data import leave_undecoded, load_rows, read_candidates
    from modeling_prismer.processing.tasks import find_task

    from .checkpoints import Checkpoint
    from .subset_answers import SubsetAnswers, find_labels, first_images, label_bytes, measure_costs
    from .worth_report import draw_figures, make_report, print_report, write_report

    if experts == "auto":
        raise ValueError("--experts auto chooses for each image; worth measures fixed experts: name them")
    reader = Checkpoint(model, find_device(device), dtype, experts, language).load()
    names = [spec.name for spec in reader.specs]
    if not names:
        raise ValueError(f"{reader.checkpoint.name} uses no experts, so there is nothing to measure")
    plan = SubsetPlan.make(names, permutations, seed)
    task = task or _task_of(reader)
    named = zip(find_task(task).columns, (text_column, answer_column))
    text_columns: dict[str, Any] = {f"{role}_column": column for role, column in named if column is not None}
    rows = leave_undecoded(
        load_rows(
            data,
            task,
            split,
            train=False,
            image_folder=image_folder[0] if image_folder and len(image_folder) == 1 else image_folder,
            image_column=image_column,
            class_column=class_column,
            key_column=key_column,
            split_column=split_column,
            class_names=class_names,
            bad_rows=bad_rows,
            max_rows=max_rows,
            kept_columns=[] if type_column is None else [type_column],
            **text_columns,
        )
    )
    if "references" not in rows.column_names:
        raise ValueError(f"the data have no {find_task(task).suffix_column}, which answers are compared with")
    answers = None if candidates is None else read_candidates(candidates)
    if find_task(task).is_ranked and answers is None:
        answers = sorted({name for own in rows.with_format(None)["references"][:] for name in own})
    generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    generation = {name: value for name, value in generation.items() if value is not None}

    output.mkdir(parents=True, exist_ok=True)
    costs = measure_costs(names, reader.suite, first_images(rows, timed_images), batch_size, clock)
    store = find_labels(reader, rows, labels, output / "labels", batch_size)
    costs = {name: replace(cost, label_bytes=label_bytes(store, name)) for name, cost in costs.items()}
    asked = SubsetAnswers(reader, plan, task, store, answers, generation, clock)
    texts, seconds = asked.run(rows, output / "answers.jsonl", batch_size)
    report = make_report(
        reader.checkpoint.name,
        plan,
        task,
        rows,
        texts,
        seconds,
        costs,
        type_column=type_column,
        resamples=resamples,
        seed=seed,
        budget_seconds=budget_seconds,
    )
    write_report(report, output)
    draw_figures(report, output)
    print_report(report)
    print(output)


def _task_of(reader: "Reader") -> str:
    """The task of the data: questions if the checkpoint answers any, else its first task."""
    processor = reader.processor
    tasks = getattr(processor, "tasks", None) or [getattr(processor, "task", "vqa")]
    names = [name.removeprefix("zero_shot_") for name in tasks]
    return "vqa" if "vqa" in names else names[0]
