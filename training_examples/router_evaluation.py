"""
Compares all experts, none, the best fixed subsets and a router at several budgets, on the results of `prismer worth`.
Scores are looked up there, so they are exact; times are those of `prismer worth`, and measured from image to answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comparison.report import write_interval
from comparison.scores import Interval, Score, interval
from modeling_prismer.expert_worth import pareto_front
from modeling_prismer.processing.expert_router import ExpertRouter, best_rows


@dataclass
class Samples:
    """
    What `prismer worth` has written, and the features of the images.

    Attributes:
        image_ids, texts (`list[str]`): of each sample.
        scores (`torch.FloatTensor` of shape `(samples, subsets)`): of each sample with each subset.
        subsets (`list[list[str]]`): the subsets.
        seconds (`list[float]`): of the experts of each subset.
        features (`torch.FloatTensor` of shape `(samples, width)`, *optional*): of the image of each sample.
    """

    image_ids: list[str]
    texts: list[str]
    scores: torch.Tensor
    subsets: list[list[str]]
    seconds: list[float]
    features: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, rows: np.ndarray) -> "Samples":
        return replace(
            self,
            image_ids=[self.image_ids[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            scores=self.scores[rows],
            features=None if self.features is None else self.features[rows],
        )


@dataclass(frozen=True)
class Setting:
    """
    A choice of experts, and what it achieves on the questions of `--eval_worth`, each asked alone.

    Attributes:
        name (`str`): such as `all`, `ocr,detection` or `auto, 20 ms`.
        score (`tuple[float, float, float]`): the mean score and its interval of 95 %, which is `None` for one image.
        loss (`tuple[float, float, float]`): the mean score with all experts minus this one, and its interval.
        expert_ms (`float`): mean time of the experts, by the times of `prismer worth`.
        total_ms (`float`, *optional*): measured time of everything, from the image to the answer.
    """

    name: str
    score: tuple[float, float | None, float | None]
    loss: tuple[float, float | None, float | None]
    expert_ms: float
    total_ms: float | None = None


def with_interval(values: np.ndarray, groups: Sequence[str]) -> tuple[float, float | None, float | None]:
    """The mean of values `(samples,)` and a bootstrap interval of 95 % over groups."""
    own = interval(Score.of_samples("score", values, groups, unit=1))
    return own.value, own.low, own.high


def evaluate(router: ExpertRouter, samples: Samples, budgets: Sequence[float]) -> list[Setting]:
    """All experts, none, the best fixed subsets, and the router at several budgets."""
    number = len(samples)
    predicted = router.predict(samples.texts, samples.features if router.config.image_size else None)
    seconds = np.array(samples.seconds)
    choices = {"all": np.full(number, len(samples.subsets) - 1), "none": np.zeros(number, dtype=int)}
    for row in pareto_front(samples.seconds[:-1], samples.scores[:, :-1].mean(0).tolist()):  # without all
        choices.setdefault(",".join(samples.subsets[row]) or "none", np.full(number, row))
    for budget in (None, *budgets):
        name = "auto" if budget is None else f"auto, {budget:g} ms"
        choices[name] = best_rows(predicted, router.config.seconds, router.config.price_for(budget)).numpy()
    scores = samples.scores.numpy()
    whole = scores[:, -1]
    settings = []
    for name, rows in choices.items():
        own = scores[np.arange(number), rows]
        settings.append(
            Setting(
                name,
                with_interval(own, samples.image_ids),
                with_interval(whole - own, samples.image_ids),
                1000 * float(seconds[rows].mean()),
            )
        )
    return settings


@torch.inference_mode()
def time_setting(
    setting: Setting, samples: Samples, images: dict[str, Any], processor: Any, network: Any, batch_size: int = 8
) -> Setting:
    """Asks each question alone, from the image to the answer, and measures the computing time of this process."""
    kwargs: dict[str, Any] = {}
    if setting.name.startswith("auto"):
        budget = setting.name.removeprefix("auto").strip(", ms")
        kwargs = {"experts": "auto", "budget_ms": float(budget) if budget else None}
    elif setting.name != "all":
        kwargs = {"experts": [name for name in setting.name.split(",") if name != "none"]}
    seconds = []
    for start in range(0, len(samples), batch_size):
        rows = range(start, min(start + batch_size, len(samples)))
        before = time.process_time()
        inputs = processor(
            [images[samples.image_ids[row]] for row in rows], [samples.texts[row] for row in rows], **kwargs
        ).to(network.device)
        network.generate(**inputs, num_beams=1, max_new_tokens=8)
        seconds.append((time.process_time() - before) / len(rows))
    return replace(setting, total_ms=1000 * float(np.mean(seconds[1:] or seconds)))  # the first batch loads experts


def in_percent(found: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in found]


def table(settings: Sequence[Setting]) -> str:
    lines = [
        "| experts | score × 100 | loss to all | experts, ms | everything, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for own in settings:
        score, loss = (write_interval(Interval(*in_percent(found))) for found in (own.score, own.loss))
        total = "–" if own.total_ms is None else f"{own.total_ms:.0f}"
        lines.append(f"| {own.name} | {score} | {loss} | {own.expert_ms:.1f} | {total} |")
    return "\n".join(lines)


def draw(settings: Sequence[Setting], samples: Samples, title: str, path: Path) -> None:
    """Draws accuracy against the time of the experts."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.8), layout="constrained")
    axis = drawing.add_subplot()
    axis.plot(
        [1000 * own for own in samples.seconds],
        (100 * samples.scores.mean(0)).tolist(),
        **{"marker": "o", "linestyle": "none", "color": "0.75", "markersize": 4, "label": "fixed subsets"},
    )
    for is_auto, color, label in ((False, "#0072B2", "best fixed subsets"), (True, "#D55E00", "chosen by the router")):
        found = sorted(
            (own for own in settings if own.name.startswith("auto") == is_auto and own.name != "all"),
            key=lambda own: own.expert_ms,
        )
        values = [100 * own.score[0] for own in found]
        axis.plot([own.expert_ms for own in found], values, marker="o", color=color, label=label)
    whole = next(own for own in settings if own.name == "all")
    axis.axhline(100 * whole.score[0], color="0.4", linestyle="--", linewidth=1)
    axis.plot([whole.expert_ms], [100 * whole.score[0]], "D", color="black", label="all experts")
    axis.set_xlabel("mean time of the experts for a question, ms")
    axis.set_ylabel("score × 100")
    axis.set_title(title)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    drawing.savefig(path, dpi=130)
