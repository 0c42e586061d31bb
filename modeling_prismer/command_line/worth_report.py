"""The results of `prismer worth`: scores, JSON, tables and figures."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from rich import box
from rich.table import Table

from modeling_prismer.expert_worth import (
    ALL_TYPES,
    Estimate,
    ExpertCost,
    SubsetPlan,
    TypeWorth,
    best_within,
    measure_worth_by_type,
    pareto_front,
    seconds_of,
)
from modeling_prismer.processing.labels.durable_files import publish, write_durably
from modeling_prismer.processing.metrics import load_metric

from .console import out


# ---- scores: texts and references of samples -> a score for each sample ----


def score_answers(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    from modeling_prismer.processing.metrics.vqa_accuracy.vqa_accuracy import soft_accuracy

    return [soft_accuracy(text, own) for text, own in zip(texts, references)]


def score_captions(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    metrics = load_metric("caption_metrics")
    scores = metrics.compute(
        predictions=texts, references=references, metrics=["cider"], tokenizer="regex", per_caption=True
    )
    return scores["cider_per_caption"]


def score_exactly(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    return [float(text.lower() in [name.lower() for name in own]) for text, own in zip(texts, references)]


Score = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
SCORES: dict[str, tuple[str, Score]] = {
    "vqa": ("VQA accuracy", score_answers),
    "caption": ("CIDEr", score_captions),
}
EXACT: tuple[str, Score] = ("exact match", score_exactly)  # of classes, and of tasks of a user's own


# ---- the report ----


@dataclass(frozen=True)
class SubsetResult:
    """
    What a subset of experts achieves.

    Attributes:
        experts (`list[str]`): the experts.
        score ([`Estimate`]): the mean score of all samples.
        network_seconds (`float`): of the network for each image, with all texts about it.
        seconds (`float`): of experts and network for each image.
        is_on_front (`bool`): whether no other subset is as fast and better.
    """

    experts: list[str]
    score: Estimate
    network_seconds: float
    seconds: float
    is_on_front: bool

    @property
    def name(self) -> str:
        return ",".join(self.experts) or "none"  # as --experts takes it


@dataclass(frozen=True)
class Report:
    """All results. `samples` has the score of each sample with each subset, as columns."""

    checkpoint: str
    task: str
    score: str
    images: int
    texts: int
    orders: int | None
    costs: dict[str, ExpertCost]
    types: dict[str, TypeWorth]
    subsets: list[SubsetResult]
    budget_seconds: float | None
    budget: SubsetResult | None
    samples: pa.Table

    @property
    def front(self) -> list[SubsetResult]:
        """The subsets that are the best for their time, the fastest first."""
        return sorted((subset for subset in self.subsets if subset.is_on_front), key=lambda subset: subset.seconds)


def make_report(
    checkpoint: str,
    plan: SubsetPlan,
    task: str,
    rows: Dataset,
    texts: list[list[str]],
    seconds: list[float],
    costs: dict[str, ExpertCost],
    type_column: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    budget_seconds: float | None = None,
) -> Report:
    """
    Scores the texts of each subset.

    Args:
        checkpoint, task (`str`): names.
        plan ([`SubsetPlan`]): the subsets.
        rows (`Dataset`): the data, with `image_id` and `references`.
        texts (`list[list[str]]`): for each subset a text for each row.
        seconds (`list[float]`): for each subset those of the network, for each image.
        costs (`dict[str, ExpertCost]`): of each expert.
        type_column (`str`, *optional*): the column of rows with their type.
        resamples, seed (`int`): see [`measure_worth`].
        budget_seconds (`float`, *optional*): for each image.
    """
    columns = rows.with_format(None)
    image_ids, references = columns["image_id"][:], columns["references"][:]
    types = None if type_column is None else [str(name) for name in columns[type_column][:]]
    name, score = SCORES.get(task, EXACT)
    scores = np.array([score(own, references) for own in texts])  # (subsets, samples)
    found = measure_worth_by_type(plan, scores, types, image_ids, resamples, seed)
    totals = [seconds_of(subset, costs) + own for subset, own in zip(plan.subsets, seconds)]
    means = [estimate.value for estimate in found[ALL_TYPES].subsets]
    front = pareto_front(totals, means)
    subsets = [
        SubsetResult(plan.ordered(subset), found[ALL_TYPES].subsets[row], seconds[row], totals[row], row in front)
        for row, subset in enumerate(plan.subsets)
    ]
    samples = {"image_id": image_ids}
    samples |= {"text": columns["text"][:]} if "text" in columns.column_names else {}
    samples |= {} if types is None else {"type": types}
    samples |= {plan.name_of(subset): own for subset, own in zip(plan.subsets, scores)}
    return Report(
        checkpoint=checkpoint,
        task=task,
        score=name,
        images=len(set(image_ids)),
        texts=len(rows),
        orders=None if plan.orders is None else len(plan.orders),
        costs=costs,
        types=found,
        subsets=subsets,
        budget_seconds=budget_seconds,
        budget=None if budget_seconds is None else subsets[best_within(totals, means, budget_seconds)],
        samples=pa.table(samples),
    )


def write_report(report: Report, folder: Path) -> None:
    """Writes `worth.json`, and the scores of all samples as `samples.parquet`."""
    content = {name: value for name, value in vars(report).items() if name != "samples"}
    content = {name: _plain(value) for name, value in content.items()}
    write_durably(folder / "worth.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    temporary = folder / ".samples.parquet.unfinished"
    pq.write_table(report.samples, temporary)
    publish(temporary, folder / "samples.parquet")


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, and `None` for what is not a number, which JSON lacks."""
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---- tables ----


def print_report(report: Report) -> None:
    """Prints tables of what each expert is worth and costs, of all types, and of the best subsets for their time."""
    whole = report.types[ALL_TYPES]
    how = "all subsets" if report.orders is None else f"{report.orders} random orders"
    out.print(
        f"{report.checkpoint}: {report.score} × 100 on {report.texts} texts about {report.images} images, {how}. In "
        "brackets: 95 % intervals.",
        soft_wrap=True,
    )
    table = _table("expert", "Shapley value", "CUR, %", "alone", "without", title="What each expert is worth")
    for name, own in whole.experts.items():
        scores = (_points(each) for each in (own.alone, own.without))
        table.add_row(name, _interval(own.shapley), _interval(own.cur), *scores)
    out.print(table)
    out.print(
        f"with all {_interval(whole.with_all)}, with none {_interval(whole.with_none)}, information gap "
        f"{_interval(whole.information_gap)}",
        soft_wrap=True,
    )
    table = _table("expert", "s/image", "with", "memory, MB", "label, kB", title="What each expert costs")
    for name, cost in report.costs.items():
        memory = "–" if cost.memory_bytes is None else f"{cost.memory_bytes / 1e6:.0f}"
        table.add_row(name, _seconds(cost.seconds), ", ".join(cost.needs), memory, f"{cost.label_bytes / 1e3:.1f}")
    out.print(table)
    if len(report.types) > 1:
        title = "Shapley values by type; in parentheses if the interval contains 0"
        table = _table("type", "none", "all", *whole.experts, title=title)
        for name, each in report.types.items():
            scores = (_points(own) for own in (each.with_none, each.with_all))
            table.add_row(name, *scores, *(_marked(own.shapley) for own in each.experts.values()))
        out.print(table)
    table = _table("experts", report.score, "s/image", title="The best subsets for their time")
    for subset in report.front:
        table.add_row(subset.name, _interval(subset.score), _seconds(subset.seconds))
    out.print(table)
    if report.budget is not None:
        out.print(
            f"within {report.budget_seconds:g} s for each image: --experts {report.budget.name} "
            f"({_interval(report.budget.score)} in {_seconds(report.budget.seconds)} s)",
            soft_wrap=True,
        )


def _table(*columns: str, title: str) -> Table:
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    return Table(*columns, title=f"\n{title}", title_justify="left", **style)


def _interval(estimate: Estimate) -> str:
    value, low, high = (100 * each for each in (estimate.value, estimate.low, estimate.high))
    return "–" if math.isnan(value) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f}"


def _marked(estimate: Estimate) -> str:
    return f"({_points(estimate)})" if estimate.low <= 0 <= estimate.high else _points(estimate)


def _seconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds:.3g}"


# ---- figures ----

COLORS = ("#0072B2", "#D55E00")  # of Okabe and Ito


def draw_figures(report: Report, folder: Path) -> None:
    """Draws `worth_by_type.png` and `score_by_seconds.png`."""
    _save(_worth_by_type(report), folder / "worth_by_type.png")
    _save(_score_by_seconds(report), folder / "score_by_seconds.png")


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    figure.savefig(temporary, format="png", dpi=130)
    publish(temporary, path)


def _style(axis: Any, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)


def _bounds(estimates: Sequence[Estimate]) -> Any:
    """The lengths of error bars below and above, (2, estimates)."""
    bounds = [(100 * (each.value - each.low), 100 * (each.high - each.value)) for each in estimates]
    return np.maximum(bounds, 0).T if bounds else None


def _worth_by_type(report: Report) -> Any:
    """A panel for each type, with the Shapley value of each expert and its interval."""
    from matplotlib.figure import Figure

    names, experts = list(report.types), list(report.costs)
    columns = min(len(names), 5)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 1.0 + rows * (0.7 + 0.26 * len(experts))), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in panels.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(panels.flat, names):
        found = [report.types[name].experts[expert].shapley for expert in experts]
        values = [100 * own.value for own in found]
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.errorbar(values, range(len(experts)), xerr=_bounds(found), fmt="o", color=COLORS[0], capsize=2)
        axis.set_title(f"{name}, {report.types[name].samples} texts", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.1)
        _style(axis, "x")
    panels[0, 0].set_yticks(range(len(experts)), experts)
    panels[0, 0].set_ylim(len(experts) - 0.5, -0.5)
    figure.suptitle(f"{report.checkpoint}: worth of each expert (Shapley value, {report.score} × 100)", fontsize=11)
    return figure


def _score_by_seconds(report: Report) -> Any:
    """Each subset as a point, and the front of the best for their time, with a list of their experts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axis = figure.add_subplot()
    others = [each for each in report.subsets if not each.is_on_front and not math.isnan(each.seconds)]
    axis.plot(*_places(others), "o", color="0.7", markersize=5, label="other subsets of experts")
    seconds, scores = _places(report.front)
    axis.step(seconds, scores, where="post", color=COLORS[0], linewidth=1.2)
    bounds = _bounds([each.score for each in report.front])
    marks: dict[str, Any] = {"fmt": "o", "color": COLORS[0], "capsize": 3, "label": "best for their time"}
    axis.errorbar(seconds, scores, yerr=bounds, **marks)
    listed = []
    for number, subset in enumerate(report.front, 1):
        place = (subset.seconds, 100 * subset.score.value)
        axis.annotate(str(number), place, xytext=(5, 5), textcoords="offset points", fontsize=8)
        listed.append(f"{number}  {subset.name.replace(',', ', ')}")
    whole = report.subsets[-1]
    if not math.isnan(whole.seconds):
        axis.plot(*_places([whole]), "D", color=COLORS[1], markersize=7, label="all experts")
    axis.text(1.02, 1.0, "\n".join(listed), transform=axis.transAxes, verticalalignment="top", fontsize=8)
    axis.set_xlabel("seconds for each image, experts and network")
    axis.set_ylabel(f"{report.score} × 100, with 95 % intervals")
    axis.set_title(f"{report.checkpoint}: score against time")
    axis.legend(frameon=False, loc="lower right")
    _style(axis, "both")
    return figure


def _places(subsets: list[SubsetResult]) -> tuple[list[float], list[float]]:
    return [subset.seconds for subset in subsets], [100 * subset.score.value for subset in subsets]
