"""
S_acc and O_acc of SMART-101.

S_acc is the share of instances whose value is exact. O_acc is the share whose option is right. If a reasoner predicts
values, its option is the one with the nearest value. A reasoner that ranks options names its option itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from comparison import scores

from .answers import answer_value
from .puzzles import Puzzle


@dataclass(frozen=True)
class Score:
    """
    Both measures on some instances.

    Args:
        number (`int`): the number of instances.
        s_acc, o_acc (`float`): the shares, from 0 to 1.
        s_interval, o_interval (`tuple[float, float]`): their 95 % intervals, by a bootstrap over instances.
    """

    number: int
    s_acc: float
    s_interval: tuple[float, float]
    o_acc: float
    o_interval: tuple[float, float]


def read_values(texts: Sequence[str], rows: datasets.Dataset, puzzles: dict[int, Puzzle]) -> list[list[int] | None]:
    """The padded values of a reasoner's texts; `None` for a text without one."""
    values: list[list[int] | None] = []
    for text, number in zip(texts, rows["puzzle"][:], strict=True):
        try:
            values.append(puzzles[number].padded(answer_value(text, puzzles[number].answers)))
        except ValueError:
            values.append(None)
    return values


def option_is_right(
    predicted: list[int] | None, value: list[int], option_values: list[list[int]], answer: int, puzzle: Puzzle
) -> bool:
    """
    Whether a predicted value leads to the right option. For sequences it must be equal. For the published puzzles with
    `by_letter`, it must be the number of the right option. For all others the nearest option counts, the first of
    equally near ones.
    """
    if predicted is None:
        return False
    if puzzle.is_sequence:
        return predicted == value
    if puzzle.by_letter:
        return predicted == [answer]
    distances = [abs(option - predicted[0]) for (option,) in option_values]
    return distances.index(min(distances)) == answer


def find_hits(
    predicted: Sequence[list[int] | None],
    rows: datasets.Dataset,
    puzzles: dict[int, Puzzle],
    chosen: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Which instances are solved, for S_acc, and which have the right option, for O_acc: `(len(rows),)` bool each.

    Args:
        predicted (`Sequence[list[int]]`): the values that the reasoner predicts, or `None`.
        rows (`Dataset`): rows of [`load_smart`].
        puzzles (`dict`): the puzzles by number.
        chosen (`Sequence[int]`, *optional*): the options of a reasoner that chooses among them.

    Raises:
        ValueError: if there are not as many predictions as rows.
    """
    columns = [rows[name][:] for name in ("value", "option_values", "answer", "puzzle")]
    if len(predicted) != len(rows) or (chosen is not None and len(chosen) != len(rows)):
        raise ValueError(f"there are {len(rows)} rows, and {len(predicted)} predicted values; each row needs one")
    solved = np.array([own == value for own, value in zip(predicted, columns[0])], dtype=bool)
    if chosen is not None:
        return solved, np.asarray(chosen) == np.asarray(columns[2])
    right = [option_is_right(own, *cells, puzzles[number]) for own, *cells, number in zip(predicted, *columns)]
    return solved, np.array(right, dtype=bool)


def interval(hits: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the share of hits, by a bootstrap. A single instance tells nothing: 0 to 1."""
    found = scores.interval(scores.Score.of_samples("share", hits, range(len(hits)), unit=1))
    return (0.0, 1.0) if found.low is None or found.high is None else (found.low, found.high)


def score(solved: np.ndarray, right: np.ndarray) -> Score:
    return Score(len(solved), float(solved.mean()), interval(solved), float(right.mean()), interval(right))


def score_groups(solved: np.ndarray, right: np.ndarray, rows: datasets.Dataset) -> dict[str, Score]:
    """The scores of all instances (`"all"`), of each kind (`"counting"`) and of each puzzle (`"19"`)."""
    found = {"all": score(solved, right)}
    for column in ("kind", "puzzle"):
        groups = np.array([str(group) for group in rows[column][:]])
        names = sorted(set(groups), key=lambda name: (len(name), name) if name.isdecimal() else (0, name))
        found |= {name: score(solved[groups == name], right[groups == name]) for name in names}
    return found
