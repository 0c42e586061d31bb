"""The report of a comparison: a table in Markdown, a figure, and a JSON file."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import write_json, write_text

from .scores import Interval, Score, difference, interval
from .trials import Trial


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's palette
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Described:
    """A model: its parameters in all, those that are trained with frozen backbones, and its experts."""

    name: str
    path: str
    kind: str
    parameters: int
    trained: int
    experts: list[str]
    expert_bytes: int


@dataclass(frozen=True)
class Result:
    """
    What a model reached in a trial, or why it has no scores.

    Args:
        model ([`Described`]): the model.
        trial (`str`): the title of the trial.
        scores (`list[Score]`): the scores, the most important one first.
        said (`list`): what the model said for each sample.
        seconds, megabytes (`float`): of an image; of the growth of memory at its peak, by an image of a batch.
        reason (`str`, *optional*): why the model cannot do the task.
        settings (`dict`): the arguments that change the result.
    """

    model: Described
    trial: str
    scores: list[Score] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)
    seconds: float | None = None
    megabytes: float | None = None
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        content = asdict(self)
        for score, own in zip(self.scores, content["scores"]):
            own["parts"] = score.parts.tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    @classmethod
    def load(cls, path: Path) -> "Result":
        content = json.loads(path.read_text())
        scores = [Score(**{**own, "parts": np.array(own["parts"])}) for own in content["scores"]]
        return cls(**{**content, "model": Described(**content["model"]), "scores": scores})


@dataclass(frozen=True)
class Cell:
    """A score with its interval, and its difference to the first model that has it."""

    value: Interval
    difference: Interval | None = None


Cells = dict[str, dict[str, Cell]]  # model -> score -> cell


def compare(results: Sequence[Result], seed: int) -> Cells:
    """The scores of the models in one trial. Differences are to the first model that can do the task."""
    first: dict[str, Score] = {}
    cells: Cells = {}
    for result in results:
        cells[result.model.name] = {}
        for score in result.scores:
            other = first.setdefault(score.name, score)
            change = None if other is score else difference(score, other, seed)
            cells[result.model.name][score.name] = Cell(interval(score, seed), change)
    return cells


def write_report(trials: Sequence[Trial], results: Sequence[Result], folder: Path, seed: int) -> None:
    """
    Writes `table.md`, `scores.png` and `results.json`.

    Args:
        trials (`list[Trial]`): the trials, in order.
        results (`list[Result]`): of all models, in order.
    """
    by_trial: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_trial[result.trial].append(result)
    found = {title: compare(by_trial[title], seed) for title in dict.fromkeys(trial.title for trial in trials)}
    models = list({result.model.name: result.model for result in results}.values())
    parts = [models_table(models)]
    for title, cells in found.items():
        parts += [f"### {title}", scores_table(by_trial[title], cells)]
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    write_json(
        folder / "results.json",
        {
            "models": [asdict(model) for model in models],
            "trials": {
                title: [
                    {
                        "model": result.model.name,
                        "scores": {name: asdict(cell) for name, cell in cells[result.model.name].items()},
                        "seconds_per_image": result.seconds,
                        "megabytes_per_image": result.megabytes,
                        "reason": result.reason,
                        "settings": result.settings,
                    }
                    for result in by_trial[title]
                ]
                for title, cells in found.items()
            },
        },
    )
    draw(trials, found, [model.name for model in models], folder / "scores.png")


# ---- tables ----


def models_table(models: Sequence[Described]) -> str:
    head = ["model", "kind", "parameters, M", "trained, M", "experts", "experts' weights, MB"]
    rows = [
        [
            model.name,
            model.kind,
            f"{model.parameters / 1e6:.1f}",
            f"{model.trained / 1e6:.1f}",
            ", ".join(model.experts) or "–",
            f"{model.expert_bytes / 1e6:.1f}" if model.experts else "–",
        ]
        for model in models
    ]
    return markdown(head, rows)


def scores_table(results: Sequence[Result], cells: Cells) -> str:
    names = list(dict.fromkeys(score.name for result in results for score in result.scores))
    rows = []
    for result in results:
        own = cells[result.model.name]
        row = [result.model.name, *(write_cell(own[name]) if name in own else "–" for name in names)]
        rows.append([*row, _number(result.seconds, 3), _number(result.megabytes, 1)])
    table = markdown(["model", *names, "s an image", "MB an image"], rows)
    reasons = [f"{result.model.name}: {result.reason}." for result in results if result.reason is not None]
    return "\n\n".join([table, *reasons])


def write_cell(cell: Cell) -> str:
    """`71.2 [69.0, 73.1]`, and below it the difference."""
    text = write_interval(cell.value)
    return text if cell.difference is None else f"{text}<br>Δ {write_interval(cell.difference, signed=True)}"


def write_interval(found: Interval, signed: bool = False) -> str:
    def write(value: float) -> str:
        return f"{value:+.1f}".replace("-", "−") if signed else f"{value:.1f}"

    if found.low is None or found.high is None:
        return write(found.value)
    return f"{write(found.value)} [{write(found.low)}, {write(found.high)}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- the figure ----


def draw(trials: Sequence[Trial], found: dict[str, Cells], models: Sequence[str], path: Path) -> None:
    """
    A panel for each task with its most important score and the 95 % intervals. A task with several conditions, such as
    numbers of shots, has a line for each model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_task: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_task[trial.task].append(trial)
    columns = min(3, len(by_task))
    rows = math.ceil(len(by_task) / columns)
    height = max(2.4, 0.8 + 0.34 * len(models))
    drawing = Figure(figsize=(3.6 * columns + 1.6, height * rows + 0.5), layout="constrained")
    panels = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for place, (task, own) in enumerate(by_task.items()):
        panel = panels[place]
        scores = [name for trial in own for cells in found[trial.title].values() for name in cells]
        panel.set_title(task.replace("_", " "), fontsize=10)
        if not scores:
            panel.text(0.5, 0.5, "no model can do this", ha="center", va="center", transform=panel.transAxes)
            panel.set_axis_off()
        elif len(own) > 1:
            _draw_lines(panel, own, found, models, scores[0])
        else:
            _draw_points(panel, found[own[0].title], models, scores[0])
            if place % columns:  # the names are at the left
                panel.set_yticklabels([])
    for panel in panels[len(by_task) :]:
        panel.set_axis_off()
    FigureCanvasAgg(drawing)
    temporary = path.with_name(f".{path.name}")
    drawing.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)


def _draw_points(panel: Any, cells: Cells, models: Sequence[str], score: str) -> None:
    for place, model in enumerate(models):
        if score in cells.get(model, {}):
            _error_bar(panel, place, cells[model][score].value, place, is_vertical=False)
        elif model in cells:
            panel.text(
                0.02, place, "cannot", transform=panel.get_yaxis_transform(), va="center", color="0.4", fontsize=8
            )
    panel.set_yticks(range(len(models)), models, fontsize=8)
    panel.set_ylim(len(models) - 0.4, -0.6)
    panel.set_xlabel(score, fontsize=9)
    panel.grid(axis="x", alpha=0.3)


def _draw_lines(
    panel: Any, trials: Sequence[Trial], found: dict[str, Cells], models: Sequence[str], score: str
) -> None:
    places = list(range(len(trials)))
    for number, model in enumerate(models):
        cells = [found[trial.title].get(model, {}).get(score) for trial in trials]
        known = [(place + 0.06 * number, cell.value) for place, cell in zip(places, cells) if cell is not None]
        color = COLORS[number % len(COLORS)]
        panel.plot([at for at, _ in known], [value.value for _, value in known], color=color, linewidth=1)
        for at, value in known:
            _error_bar(panel, number, value, at, is_vertical=True, label=model if (at, value) == known[0] else None)
    panel.set_xticks(places, [str(trial.condition) for trial in trials], fontsize=8)
    panel.set_xlabel(trials[0].condition_name, fontsize=9)
    panel.set_ylabel(score, fontsize=9)
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=7, frameon=False)


def _error_bar(
    panel: Any, number: int, value: Interval, at: float, is_vertical: bool, label: str | None = None
) -> None:
    low, high = (value.value if end is None else end for end in (value.low, value.high))
    error = [[max(0.0, value.value - low)], [max(0.0, high - value.value)]]
    places = ([at], [value.value]) if is_vertical else ([value.value], [at])
    panel.errorbar(
        *places,
        **{"yerr" if is_vertical else "xerr": error},
        color=COLORS[number % len(COLORS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        capsize=2,
        label=label,
    )
