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
    table = Table("expert", "Shapley value", "alone", "without", "CUR, %", title="What each expert is worth")
    for name, own in whole.experts.items():
        table.add_row(name, *(_percent(each) for each in (own.shapley, own.alone, own.without, own.cur)))
    out.print(table)
    out.print(
        f"with all {_percent(whole.with_all)}, with none {_percent(whole.with_none)}, information gap "
        f"{_percent(whole.information_gap)}",
        soft_wrap=True,
    )
    table = Table("expert", "s/image", "memory, MB", "label, kB", title="What each expert costs")
    for name, cost in report.costs.items():
        memory = "–" if cost.memory_bytes is None else f"{cost.memory_bytes / 1e6:.0f}"
        table.add_row(name, _seconds(cost.seconds), memory, f"{cost.label_bytes / 1e3:.1f}")
    out.print(table)
    if len(report.types) > 1:
        title = "Shapley values by type; in parentheses if the interval contains 0"
        table = Table("type", "texts", "none", "all", *whole.experts, title=title)
        for name, each in report.types.items():
            scores = (f"{100 * own.value:.1f}" for own in (each.with_none, each.with_all))
            table.add_row(name, str(each.samples), *scores, *(_marked(own.shapley) for own in each.experts.values()))
        out.print(table)
    table = Table("experts", report.score, "s/image", title="The best subsets for their time")
    for subset in report.front:
        table.add_row(subset.name, _percent(subset.score), _seconds(subset.seconds))
    out.print(table)
    if report.budget is not None:
        out.print(
            f"within {report.budget_seconds:g} s for each image: --experts {report.budget.name} "
            f"({_percent(report.budget.score)} in {_seconds(report.budget.seconds)} s)",
            soft_wrap=True,
        )


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * each for each in (estimate.value, estimate.low, estimate.high))
    return "–" if math.isnan(value) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _marked(estimate: Estimate) -> str:
    text = f"{100 * estimate.value:.1f}"
    return f"({text})" if estimate.low <= 0 <= estimate.high else text


def _seconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds:.3g}"


# ---- figures ----

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of Okabe and Ito


def draw_figures(report: Report, folder: Path) -> None:
    """Draws `worth_by_type.png` and, if times are known, `score_by_seconds.png`."""
    _save(_worth_by_type(report), folder / "worth_by_type.png")
    _save(_score_by_seconds(report), folder / "score_by_seconds.png")


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    figure.savefig(temporary, format="png", dpi=130)
    publish(temporary, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    return figure, axis


def _worth_by_type(report: Report) -> Any:
    """A group of bars for each type, a bar for each expert."""
    names, experts = list(report.types), list(report.costs)
    figure, axis = _figure(2.5 + max(4.0, 0.22 * len(names) * (len(experts) + 1)), 4.2)
    width = 0.85 / len(experts)
    for number, expert in enumerate(experts):
        found = [report.types[name].experts[expert].shapley for name in names]
        values = [100 * own.value for own in found]
        bounds = [[100 * (own.value - own.low) for own in found], [100 * (own.high - own.value) for own in found]]
        places = [place + (number - (len(experts) - 1) / 2) * width for place in range(len(names))]
        axis.bar(places, values, width, color=COLORS[number % len(COLORS)], label=expert)
        axis.errorbar(places, values, yerr=np.maximum(bounds, 0), fmt="none", ecolor="0.25", elinewidth=0.8)
    axis.axhline(0, color="0.25", linewidth=0.8)
    axis.set_xticks(range(len(names)), names)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", color="0.9")
    axis.set_ylabel(f"Shapley value, {report.score} × 100")
    axis.set_title(f"{report.checkpoint}: worth of each expert, with 95 % intervals")
    axis.legend(frameon=False, ncols=2)
    return figure


def _score_by_seconds(report: Report) -> Any:
    """Each subset as a point, and the front of the best for their time."""
    figure, axis = _figure(8, 4.8)
    others = [each for each in report.subsets if not each.is_on_front and not math.isnan(each.seconds)]
    axis.plot(*_points(others), "o", color="0.7", markersize=5, label="other subsets of experts")
    seconds, scores = _points(report.front)
    bounds = [[100 * (each.score.value - each.score.low) for each in report.front]]
    bounds.append([100 * (each.score.high - each.score.value) for each in report.front])
    axis.step(seconds, scores, where="post", color=COLORS[0], linewidth=1.2)
    axis.errorbar(
        *(seconds, scores, np.maximum(bounds, 0)),
        **{"fmt": "o", "color": COLORS[0], "capsize": 3, "label": "best for their time, 95 % intervals"},
    )
    space = 0.03 * (report.front[-1].seconds - report.front[0].seconds)  # for a name
    for subset, following in zip(report.front, [*report.front[1:], None]):
        if following is not None and following.seconds - subset.seconds < space:
            continue
        place = (subset.seconds, 100 * subset.score.value)
        name = subset.name.replace(",", ", ")
        axis.annotate(name, place, xytext=(6, -11), textcoords="offset points", fontsize=8)
    whole = report.subsets[-1]
    if not math.isnan(whole.seconds):
        axis.plot(*_points([whole]), "D", color=COLORS[1], markersize=7, label="all experts")
    axis.grid(color="0.9")
    axis.set_xlabel("seconds for each image, experts and network")
    axis.set_ylabel(f"{report.score} × 100")
    axis.set_title(f"{report.checkpoint}: score against time")
    axis.legend(frameon=False, loc="lower right")
    return figure


def _points(subsets: list[SubsetResult]) -> tuple[list[float], list[float]]:
    return [subset.seconds for subset in subsets], [100 * subset.score.value for subset in subsets]
