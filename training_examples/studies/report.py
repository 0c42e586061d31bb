"""Makes the tables and figures of the studies from the results of experts.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scenes.language import TYPES

from .design import STUDIES, Condition, Study, expert_order, number_of_experts


@dataclass(frozen=True)
class Metric:
    """A metric: `head` is its title in tables, `title` that in figures, and `path` its place in a result."""

    head: str
    title: str
    path: tuple[str, str]
    scale: float = 100
    digits: int = 1

    def of(self, result: dict[str, Any], condition: Condition) -> float | None:
        part, name = self.path
        values = result["training"] if part == "training" else result["evaluations"][condition.name][part]
        return self.scale * values[name] if name in values else None


METRICS = {
    "all": Metric("all", "all questions, % correct", ("answers", "all")),
    **{kind: Metric(kind, f"{kind}, % correct", ("answers", kind)) for kind in TYPES},
    "cider": Metric("CIDEr", "captions, CIDEr", ("captions", "cider")),
    "exact_attributes": Metric("attributes", "captions, exact attributes, %", ("captions", "exact_attributes")),
    "trained_share": Metric("trained, %", "trained weights, %", ("training", "trained_share")),
    "seconds_per_step": Metric("s a step", "computing time of a step, s", ("training", "seconds_per_step"), 1, 2),
    "memory": Metric("MB", "memory of the training, MB", ("training", "memory"), 1, 0),
}
Rows = dict[tuple[str, Any], dict[str, list[float]]]  # (series, label) -> metric -> a value for each seed


def load_results(output_dir: Path) -> dict[str, dict[str, Any]]:
    results = {path.stem: json.loads(path.read_text()) for path in sorted((output_dir / "runs").glob("*.json"))}
    if not results:
        raise SystemExit(f"{output_dir / 'runs'} has no results; run this script without --report first")
    settings = {json.dumps(result["settings"]) for result in results.values()}
    if len(settings) > 1:
        raise SystemExit(f"results in {output_dir / 'runs'} were made with different settings: {'; '.join(settings)}")
    return results


def collect(study: Study, results: dict[str, dict[str, Any]], seeds: int) -> tuple[Rows, list[str]]:
    """The values of all cells, and the names of missing results."""
    rows: Rows = {}
    missing = []
    for seed in range(seeds):
        for cell in study.cells(seed):
            row = rows.setdefault((cell.series, cell.label), {name: [] for name in METRICS})
            name = f"{cell.run.name}-seed{seed}"
            result = results.get(name)
            if result is None:
                missing.append(name)
            elif cell.condition.name not in result["evaluations"]:
                missing.append(f"{name} under {cell.condition.name}")
            else:
                for key, metric in METRICS.items():
                    value = metric.of(result, cell.condition)
                    if value is not None:
                        row[key].append(value)
    return rows, list(dict.fromkeys(missing))


def spread(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(study: Study, rows: Rows) -> str:
    """A Markdown table with mean ± standard deviation over the seeds."""
    several = any(series for series, _ in rows)
    head = [*["", study.axis][not several :], "seeds", *(METRICS[name].head for name in study.columns)]
    lines = [head, ["---"] * len(head)]
    for (series, label), row in rows.items():
        cells = [series, "" if label is None else str(label)][not several :]
        cells.append(str(len(row["all"])))
        for name in study.columns:
            values, digits = row[name], METRICS[name].digits
            text = f"{np.mean(values):.{digits}f}" if values else "–"
            cells.append(f"{text} ± {spread(values):.{digits}f}" if len(values) > 1 else text)
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLORS = ("#0072B2", "#D55E00", "#009E73")  # from Okabe and Ito's palette, which suits color blindness
MARKERS = ("o", "s", "^")


def figure(study: Study, rows: Rows, path: Path) -> None:
    """
    Draws six panels. White marks are single seeds, full marks their mean, bars the standard deviation. Labels are on
    the horizontal axis if they are numbers, otherwise on the vertical axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for _, label in rows if label is not None))
    series = list(dict.fromkeys(name for name, label in rows if label is not None))
    numeric = all(isinstance(label, int) for label in labels)
    places = labels if numeric else range(len(labels))
    apart = 0.02 * max(places) if numeric else 0.28  # distance between series

    def points(at: list[float], values: list[float]) -> tuple[list[float], list[float]]:
        return (at, values) if numeric else (values, at)

    drawing = Figure(figsize=(9, 5.2 if numeric else 2.4 + 0.4 * len(labels)), layout="constrained")
    panels = drawing.subplots(2, 3, sharex=numeric)
    for number, (axis, name) in enumerate(zip(panels.flat, study.panels)):
        for (each, label), row in rows.items():
            if label is None and row[name]:
                line = axis.axhline if numeric else axis.axvline
                line(float(np.mean(row[name])), color="0.35", linestyle="--", linewidth=1.2, label=each)
        for each, color, marker in zip(series, COLORS, MARKERS):
            shift = apart * (series.index(each) - (len(series) - 1) / 2)
            found = [(at + shift, rows[each, label][name]) for at, label in zip(places, labels)]
            found = [(at, values) for at, values in found if values]
            at, means = [at for at, _ in found], [float(np.mean(values)) for _, values in found]
            axis.errorbar(
                *points(at, means),
                **{"yerr" if numeric else "xerr": [spread(values) for _, values in found]},
                **{"color": color, "marker": marker, "markersize": 6, "capsize": 3, "label": each},
                linestyle="-" if numeric else "none",
                linewidth=1.2,
            )
            seeds = [(place, value) for place, values in found for value in values]
            axis.plot(
                *points(*map(list, zip(*seeds))) if seeds else ([], []),
                **{"color": color, "marker": marker, "markersize": 3, "linestyle": "none"},
                markerfacecolor="white",
                markeredgewidth=0.8,
                zorder=3,
            )
        axis.set_title(METRICS[name].title, fontsize=10)
        axis.grid(axis="y" if numeric else "x", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if numeric:
            axis.set_xticks(labels)
            axis.set_xlabel(study.axis if number >= 3 else "")
        else:
            axis.set_yticks(places, labels if number % 3 == 0 else [""] * len(labels))
            axis.set_ylim(len(labels) - 0.5, -0.5)
            axis.margins(x=0.1)
            if METRICS[name].path[0] == "training":
                axis.set_xlim(0, 1.08 * axis.dataLim.x1)
    handles, names = panels[0, 0].get_legend_handles_labels()
    if len(names) > 1:
        drawing.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    drawing.suptitle(study.title)
    drawing.set_dpi(130)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(48).save(path, optimize=True)


INTRODUCTION = """These results come from {runs} runs of

```bash
export PYTHONPATH=training_examples
python -m studies.experts --backbones runs/scenes/backbones --suite runs/scenes/experts \\
    --labels runs/scenes/labels --data_dir runs/scenes-data --output_dir runs/study \\
    --train_rows {train_rows} --epochs {epochs:g} --batch_size {batch_size} --texts_per_image {texts_per_image} \\
    --learning_rate {learning_rate:g} --eval_rows {eval_rows} --seeds {seeds}{start_argument}
python -m studies.experts --output_dir runs/study --report docs/study --seeds {seeds}
```

Each model was initialised from {start}, trained on {train_rows:,} scenes {times}, and
evaluated with all questions about {eval_rows} other scenes ({device}). Numbers are mean ± standard deviation over the
seeds. In the figures, full marks are means, bars are standard deviations, and white marks are single seeds.

| column | meaning |
| --- | --- |
| all … yes/no | correct answers in %, in total and by type of question; "relation" is left, right, in front, behind |
| CIDEr | of the captions, times 100, generated without beams |
| attributes | described objects that match an object of the image in all attributes, % |
| s a step | computing time of a training step |
| MB | growth of memory in training |"""


def report(output_dir: Path, folder: Path, seeds: int) -> None:
    """Writes results.md, and a figure of each study with results."""
    results = load_results(output_dir)
    settings = next(iter(results.values()))["settings"]
    folder.mkdir(parents=True, exist_ok=True)
    start_argument = "" if settings["start"] == "the backbones" else " --start runs/scenes/stage-1"
    times = "once" if settings["epochs"] == 1 else f"{settings['epochs']:g} times"
    numbers = {**settings, "runs": len(results), "seeds": seeds, "start_argument": start_argument, "times": times}
    parts = ["# Results of the study", INTRODUCTION.format(**numbers)]
    if settings["label_store"] != "experts":
        parts.append("**This is a trial run: true labels replace those of the experts.**")
    for name, study in STUDIES.items():
        rows, missing = collect(study, results, seeds)
        parts += [f"## {study.title}", study.text]
        if study.cells is number_of_experts:
            parts.append("\n".join(f"- seed {seed}: {', '.join(expert_order(seed))}" for seed in range(seeds)))
        if any(row["all"] for row in rows.values()):
            figure(study, rows, folder / f"{name}.png")
            parts += [f"![{study.title}]({name}.png)", table(study, rows)]
        if missing:
            parts.append(f"Missing: {', '.join(missing)}.")
    (folder / "results.md").write_text("\n\n".join(parts) + "\n")
