"""Scores, their bootstrap intervals, and paired differences of two models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap


RESAMPLES = 2000
Sums = Sequence[np.ndarray]  # the sum of each part over the drawn groups


def _mean(sums: Sums) -> np.ndarray:
    return sums[0] / sums[1]


def _f1(sums: Sums) -> np.ndarray:
    true_positive, said, right = sums  # right answers "yes", answers "yes", questions whose answer is "yes"
    return 2 * true_positive / np.maximum(said + right, 1)


def _bleu(sums: Sums) -> np.ndarray:
    *counts, length, reference_length = sums
    order = len(counts) // 2
    precisions = [found / np.maximum(said, 1) for found, said in zip(counts[:order], counts[order:])]
    with np.errstate(divide="ignore"):
        mean = np.exp(sum(np.log(precision) for precision in precisions) / order)
        return mean * np.exp(np.minimum(0, 1 - reference_length / np.maximum(length, 1e-9)))


FORMULAS: dict[str, Callable[[Sums], np.ndarray]] = {"mean": _mean, "f1": _f1, "bleu": _bleu}


@dataclass(frozen=True)
class Score:
    """
    A score that is a formula of sums over images, such as hits / questions.

    Args:
        name (`str`): its name.
        parts (`np.ndarray` of shape `(groups, parts)`): what each group adds to the sums of the formula.
        formula (`str`): one of `FORMULAS`: `"mean"` of (sum, number), `"f1"` of (right yes, said yes, true yes),
            `"bleu"` of (right n-grams for each n, n-grams for each n, length, reference length).
        unit (`float`): the score is printed times this.
    """

    name: str
    parts: np.ndarray
    formula: str = "mean"
    unit: float = 100

    @classmethod
    def of_samples(
        cls, name: str, values: Any, groups: Sequence[str], formula: str = "mean", unit: float = 100
    ) -> "Score":
        """
        A score from values of samples. Samples of the same group, such as the questions about an image, are drawn
        together by the bootstrap.

        Args:
            values (`np.ndarray`): `(samples,)` of which the mean is taken, or `(samples, parts)` of the formula.
            groups (`list[str]`): the group of each sample.
        """
        values = np.asarray(values, dtype=float)
        if formula == "mean" and values.ndim == 1:
            values = np.stack([values, np.ones(len(values))], axis=1)
        if not len(values) or len(values) != len(groups):
            raise ValueError(f"{name}: {len(values)} values for {len(groups)} samples; as many are needed, and one")
        _, places = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        parts = np.zeros((places.max() + 1, values.shape[1]))
        np.add.at(parts, places, values)
        return cls(name, parts, formula, unit)

    @property
    def value(self) -> float:
        return self.unit * float(FORMULAS[self.formula](self.parts.sum(axis=0)))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, which is `None` for a single image."""

    value: float
    low: float | None
    high: float | None


def interval(score: Score, seed: int = 0) -> Interval:
    """The score with the 95 % interval of a bootstrap over groups."""
    return _bootstrap(score.value, (score,), lambda value: value, seed)


def difference(score: Score, other: Score, seed: int = 0) -> Interval:
    """
    `score` minus `other`, with the interval of a bootstrap that draws the same groups for both.

    Raises:
        ValueError: if they are not the same score of the same groups.
    """
    if score.parts.shape != other.parts.shape or (score.name, score.formula) != (other.name, other.formula):
        raise ValueError(
            f"{score.name} of {len(score.parts)} groups and {other.name} of {len(other.parts)}: a paired difference "
            "needs the same score of the same images; measure both models again"
        )
    return _bootstrap(score.value - other.value, (score, other), np.subtract, seed)


def _bootstrap(value: float, scores: tuple[Score, ...], combine: Callable[..., np.ndarray], seed: int) -> Interval:
    number = scores[0].parts.shape[1]

    def statistic(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        sums = [column.sum(axis=axis) for column in columns]
        formulas = (FORMULAS[score.formula] for score in scores)
        each = [formula(sums[i * number : (i + 1) * number]) for i, formula in enumerate(formulas)]
        return scores[0].unit * combine(*each)

    if len(scores[0].parts) < 2:
        return Interval(value, None, None)
    columns = [column for score in scores for column in score.parts.T]
    found = bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(columns[0])),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))
