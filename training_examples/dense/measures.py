"""
The measures of dense tasks, as published for PASCAL-Context and NYUD-v2, and Δm, the mean gain over single tasks.

| measure | task | better |
| --- | --- | --- |
| [`MeanIoU`] | semantic, parts | more |
| [`MaxF`] | saliency | more |
| [`MeanAngle`] | normals | less |
| [`Rmse`] | depth | less |

odsF, the measure of edges, is left out: it matches thinned edges one to one, as the program of BSDS500 does, and no
maintained library has that. [`MaxF`] compares edges pixel by pixel, which is another and stricter measure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from sklearn.metrics import confusion_matrix


IGNORED = 255  # the class of pixels that are not measured


class Measure(Protocol):
    """Collects images one by one. `lower_is_better` tells how to compare two results."""

    lower_is_better: bool

    def add(self, predicted: np.ndarray, true: np.ndarray) -> None: ...

    def result(self) -> float: ...


class MeanIoU:
    """
    The mean over classes of intersection over union, pooled over all pixels. Classes that neither the truth nor a
    prediction has are left out.

    Args:
        num_classes (`int`): number of classes. Pixels of the class 255 are not measured.
    """

    lower_is_better = False

    def __init__(self, num_classes: int):
        self.labels = np.arange(num_classes)
        self.counts = np.zeros((num_classes, num_classes), np.int64)

    def add(self, predicted: np.ndarray, true: np.ndarray) -> None:
        """
        Args:
            predicted (`np.ndarray` of shape `(height, width)`): classes from 0.
            true (`np.ndarray` of shape `(height, width)`): classes from 0, or 255.

        Raises:
            ValueError: if the shapes differ, or if there is another class.
        """
        _check_shapes(predicted, true)
        measured, last = true != IGNORED, len(self.labels) - 1
        for name, classes, accepted in (
            ("predicted", predicted[measured], f"0 to {last}"),
            ("true", true[measured], f"0 to {last}, and {IGNORED}"),
        ):
            if unknown := np.setdiff1d(classes, self.labels).tolist():
                raise ValueError(f"{name} has the class {unknown[0]}; accepted are {accepted}")
        if measured.any():
            self.counts += confusion_matrix(true[measured], predicted[measured], labels=self.labels)

    def result(self) -> float:
        hits = np.diag(self.counts)
        union = self.counts.sum(axis=0) + self.counts.sum(axis=1) - hits
        return float((hits[union > 0] / union[union > 0]).mean()) if union.any() else float("nan")


class MaxF:
    """
    The best F score over 19 thresholds, 0.05 to 0.95, with precision and recall pooled over all pixels. β² is 0.3, as
    is usual for saliency: precision counts more.
    """

    lower_is_better = False
    thresholds = np.linspace(0.05, 0.95, 19)

    def __init__(self, beta_squared: float = 0.3):
        self.beta_squared = beta_squared
        self.hits = np.zeros(len(self.thresholds))
        self.found = np.zeros(len(self.thresholds))
        self.wanted = 0

    def add(self, predicted: np.ndarray, true: np.ndarray) -> None:
        """`predicted` are probabilities and `true` is 0, 1 or 255 (not measured), `(height, width)`."""
        _check_shapes(predicted, true)
        measured = true != IGNORED
        predicted, true = predicted[measured], true[measured] > 0
        above = predicted[None] >= self.thresholds[:, None] - 1e-9
        self.hits += (above & true).sum(axis=1)
        self.found += above.sum(axis=1)
        self.wanted += int(true.sum())

    def result(self) -> float:
        if not self.wanted:
            return float("nan")
        precision = self.hits / np.maximum(self.found, 1)
        recall = self.hits / self.wanted
        below = np.maximum(self.beta_squared * precision + recall, 1e-12)
        return float(((1 + self.beta_squared) * precision * recall / below).max())


class MeanAngle:
    """The mean angle between normals in degrees, over all pixels whose true normal is known (not zero)."""

    lower_is_better = True

    def __init__(self):
        self.sum, self.number = 0.0, 0

    def add(self, predicted: np.ndarray, true: np.ndarray) -> None:
        """`predicted` and `true` are vectors of any length, `(height, width, 3)`."""
        _check_shapes(predicted, true)
        lengths = np.linalg.norm(true, axis=-1)
        known = lengths > 1e-6
        true = true[known].astype(np.float64) / lengths[known, None]
        predicted = predicted[known].astype(np.float64)
        predicted /= np.maximum(np.linalg.norm(predicted, axis=-1, keepdims=True), 1e-12)
        cosine = np.clip((predicted * true).sum(axis=-1), -1, 1)
        self.sum += float(np.degrees(np.arccos(cosine)).sum())
        self.number += int(known.sum())

    def result(self) -> float:
        return self.sum / self.number if self.number else float("nan")


class Rmse:
    """The root mean square error over all pixels whose true value is known (finite; for depth, above `least`)."""

    lower_is_better = True

    def __init__(self, least: float | None = None):
        self.least = least
        self.sum, self.number = 0.0, 0

    def add(self, predicted: np.ndarray, true: np.ndarray) -> None:
        """`predicted` and `true` are values, `(height, width)`."""
        _check_shapes(predicted, true)
        known = np.isfinite(true)
        if self.least is not None:
            known &= true > self.least
        self.sum += float(((predicted[known].astype(np.float64) - true[known]) ** 2).sum())
        self.number += int(known.sum())

    def result(self) -> float:
        return (self.sum / self.number) ** 0.5 if self.number else float("nan")


@dataclass(frozen=True)
class Result:
    """A measured value, and whether less of it is better."""

    value: float
    lower_is_better: bool


def delta_m(multi_task: Mapping[str, Result], single_task: Mapping[str, Result]) -> float:
    """
    Δm in percent: the mean over tasks of the relative gain of a multi-task model over single-task models, signed so
    that more is better.

    Raises:
        ValueError: if the models were not measured on the same tasks.
    """
    if multi_task.keys() != single_task.keys() or not multi_task:
        raise ValueError(
            f"the multi-task model has the tasks {', '.join(multi_task) or 'none'}, the single-task models "
            f"{', '.join(single_task) or 'none'}; the same ones are needed"
        )
    gains = []
    for task, own in multi_task.items():
        gain = (own.value - single_task[task].value) / single_task[task].value
        gains.append(-gain if own.lower_is_better else gain)
    return 100 * float(np.mean(gains))


def _check_shapes(predicted: np.ndarray, true: np.ndarray) -> None:
    if predicted.shape != true.shape:
        raise ValueError(f"a predicted map has the shape {predicted.shape}; the true one has {true.shape}")
