"""The 101 published puzzles, and those of a folder of one's own."""

import csv
from dataclasses import dataclass
from pathlib import Path

from .answers import READERS, SEQUENCES


PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Puzzle:
    """
    A puzzle, of which a data set has many instances.

    Args:
        number (`int`): the number, the name of its folder.
        kind (`str`): the skill it takes, such as `"counting"`.
        answers (`str`): how its answers are read; see answers.py.
        part (`str`): the part in splits by puzzle (PS, FS): `"train"`, `"validation"` or `"test"`.
        fill (`int`): the value after the end of a sequence.
        by_letter (`bool`): whether O_acc compares the value with the letter of the right option, A = 0.
    """

    number: int
    kind: str
    answers: str = "value"
    part: str = "train"
    fill: int = 26
    by_letter: bool = False

    @property
    def is_sequence(self) -> bool:
        return self.answers in SEQUENCES

    @property
    def length(self) -> int:
        """Number of integers in a padded value."""
        return 10 if self.is_sequence else 1

    def padded(self, value: list[int]) -> list[int]:
        return value + [self.fill] * (self.length - len(value))


KINDS = {
    "counting": (2, 3, 4, 5, 8, 13, 14, 23, 24, 29, 33, 34, 36, 41, 42, 45, 50, 52, 53, 57, 60, 79, 80, 89, 97, 99),
    "algebra": (7, 9, 10, 12, 15, 27, 28, 47, 49, 61, 63, 72, 76, 85, 101),
    "math": (6, 11, 30, 31, 38, 43, 46, 58, 59, 67, 71, 88, 90, 98),
    "path": (1, 16, 19, 32, 35, 37, 39, 48, 54, 65, 66, 73),
    "spatial": (17, 44, 55, 68, 69, 70, 75, 95, 96),
    "logic": (40, 56, 62, 64, 74, 81, 87, 91, 100),
    "measure": (20, 21, 22, 25, 26, 92, 93, 94),
    "pattern": (77, 78, 83, 84, 86),
    "order": (18, 51, 82),
}
ANSWERS = {1: "icon", 25: "clock", 58: "operator", 16: "numbers", 18: "numbers", 63: "numbers", 35: "letters"}
ANSWERS |= {39: "word", 100: "word"}
FILLS = {18: 5, 35: 5}
BY_LETTER = (32, 44, 51, 66, 68, 69, 82, 84, 95, 98)
VALIDATION = (7, 43, 64)
TEST = (61, 62, 65, 66, 67, *range(69, 78), *range(94, 100), 101)
PUBLISHED = {
    number: Puzzle(
        number,
        kind,
        ANSWERS.get(number, "value"),
        "validation" if number in VALIDATION else "test" if number in TEST else "train",
        FILLS.get(number, 26),
        number in BY_LETTER,
    )
    for kind, numbers in KINDS.items()
    for number in numbers
}
TABLE = "puzzles.csv"


def find_puzzles(folder: Path) -> dict[int, Puzzle]:
    """
    The puzzles of a data set by number: those of its `puzzles.csv` (columns id, kind, answers, part), or those of
    SMART-101.

    Raises:
        ValueError: if a row of the table is wrong.
    """
    if not (folder / TABLE).is_file():
        return PUBLISHED
    puzzles = {}
    with (folder / TABLE).open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            number, kind, answers, part = (str(row.get(name)) for name in ("id", "kind", "answers", "part"))
            if not number.isdecimal() or answers not in READERS or part not in PARTS:
                raise ValueError(
                    f"{folder / TABLE} has the row {', '.join((number, kind, answers, part))}; needed are a number in "
                    f"'id', 'kind', one of {', '.join(READERS)} in 'answers', and one of {', '.join(PARTS)} in 'part'"
                )
            puzzles[int(number)] = Puzzle(int(number), kind, answers, part)
    return puzzles
