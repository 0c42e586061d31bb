"""
Loads SMART-101 and data sets with its layout: `<id>/puzzle_<id>.csv` and `<id>/img/`.

    rows = load_smart("SMART101-Data", scheme="IS", part="test")

| scheme | train | validation | test |
| --- | --- | --- | --- |
| IS, instances | the first 80 % of each puzzle | the next 5 % | the last 15 % |
| AS, answers | 95 % of the instances with other answers | the other 5 % | instances with one answer, held out |
| PS, puzzles | 80 % of the training puzzles | 5 % of the validation puzzles | 15 % of the test puzzles |
| FS, few shots | as PS, and the first instances of each other puzzle | as PS, without those | as PS, without those |

PS has no sequences. In AS, sequences and operators are split as in IS, because most of their answers are unique.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .answers import answer_value
from .puzzles import Puzzle, find_puzzles


LETTERS = "ABCDE"
SCHEMES = ("IS", "AS", "PS", "FS")
COLUMNS = ("Question", "image", *LETTERS, "Answer")
FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("string"),
        "image": datasets.Image(),
        "puzzle": datasets.Value("int32"),
        "kind": datasets.Value("string"),
        "text": datasets.Value("string"),
        "suffix": datasets.Value("string"),
        "options": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int32"),
        "value": datasets.List(datasets.Value("int32")),
        "option_values": datasets.List(datasets.List(datasets.Value("int32"))),
    }
)


def load_smart(
    folder: str | Path,
    scheme: str = "IS",
    part: str = "train",
    shots: int = 100,
    only: Sequence[str] = (),
    max_instances: int | None = None,
) -> datasets.Dataset:
    """
    Loads a part of a split. It may be empty.

    | column | type | meaning |
    | --- | --- | --- |
    | `image_id` | str | folder and file name, such as `19/puzzle_19_1.png` |
    | `image` | `datasets.Image` | the image |
    | `puzzle`, `kind` | int, str | the number of the puzzle, and the skill it takes |
    | `text`, `suffix` | str | the question; the text of the right option |
    | `options`, `answer` | list of str, int | five options, the letters if the file has none; which one is right |
    | `value` | list of int | the value of the right option (answers.py): one integer, or a sequence padded to ten |
    | `option_values` | list of lists | the values of the options |

    Args:
        folder (`str` or `Path`): the folder with the folders of the puzzles, `SMART101-Data` for the published ones.
        scheme (`str`): `"IS"`, `"AS"`, `"PS"` or `"FS"`.
        part (`str`): `"train"`, `"validation"` or `"test"`.
        shots (`int`): training instances of each puzzle that FS holds out.
        only (`Sequence[str]`): numbers or kinds of puzzles to load, by default all.
        max_instances (`int`, *optional*): load the first instances of each puzzle only.

    Raises:
        FileNotFoundError: if the folder has no puzzles, or a file is missing.
        ValueError: if an argument or a row is wrong; the message names the file and the row.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; accepted are {', '.join(SCHEMES)}")
    if part not in ("train", "validation", "test"):
        raise ValueError(f"part is {part!r}; accepted are train, validation and test")
    folder = Path(folder)
    known = find_puzzles(folder)
    numbers = sorted(int(path.name) for path in folder.glob("*/") if path.name.isdecimal())
    if not numbers:
        raise FileNotFoundError(f"{folder} has no folders of puzzles (1, 2, …); give the folder SMART101-Data")
    if unknown := [number for number in numbers if number not in known]:
        raise ValueError(f"{folder} has a folder {unknown[0]}; the kind of this puzzle is missing in puzzles.csv")
    puzzles = [known[number] for number in numbers]
    if only:
        names = [*sorted({puzzle.kind for puzzle in puzzles}), *(str(puzzle.number) for puzzle in puzzles)]
        if unknown_names := [name for name in only if name not in names]:
            raise ValueError(f"{folder} has no puzzle or kind {unknown_names[0]!r}; accepted are {', '.join(names)}")
        puzzles = [puzzle for puzzle in puzzles if str(puzzle.number) in only or puzzle.kind in only]
    rows: list[dict[str, Any]] = []
    for puzzle in puzzles:
        instances = read_puzzle(folder, puzzle)[:max_instances]
        rows += [instances[index] for index in split(puzzle, [row["value"] for row in instances], scheme, part, shots)]
    columns = {name: [row[name] for row in rows] for name in FEATURES}  # from_list refuses an empty list
    return datasets.Dataset.from_dict(columns, features=FEATURES)


# ---- files ----


def find_table(folder: Path) -> Path:
    """The CSV file of a puzzle. It may have the number of another one: folder 62 has `puzzle_63.csv`."""
    path = folder / f"puzzle_{folder.name}.csv"
    if path.is_file():
        return path
    others = sorted(folder.glob("puzzle_*.csv"))
    if len(others) != 1:
        raise FileNotFoundError(f"{folder} has {len(others)} files puzzle_*.csv; needed is {path.name}")
    return others[0]


def read_puzzle(folder: Path, puzzle: Puzzle) -> list[dict[str, Any]]:
    """All instances of a puzzle, in the order of its file."""
    path = find_table(folder / str(puzzle.number))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} lacks the column {missing[0]!r}; needed are {', '.join(COLUMNS)}")
        rows = []
        for row in reader:
            try:
                rows.append(read_instance(row, path.parent, puzzle))
            except ValueError as problem:
                raise ValueError(f"{path}, line {reader.line_num}: {problem}") from problem
    return rows


def read_instance(row: dict[str, str | None], folder: Path, puzzle: Puzzle) -> dict[str, Any]:
    cells = {name: (row[name] or "").strip() for name in COLUMNS}
    options = [cells[letter] for letter in LETTERS] if cells["A"] else list(LETTERS)
    answer = cells["Answer"]
    if len(answer) != 1 or answer not in LETTERS:
        raise ValueError(f"the answer is {answer!r}; it must be one of {', '.join(LETTERS)}")
    image = folder / "img" / cells["image"]
    if not image.is_file():
        raise ValueError(f"there is no image {image}")
    values = [puzzle.padded(answer_value(option, puzzle.answers)) for option in options]
    right = LETTERS.index(answer)
    return {
        "image_id": f"{folder.name}/{image.name}",
        "image": str(image),
        "puzzle": puzzle.number,
        "kind": puzzle.kind,
        "text": cells["Question"],
        "suffix": options[right],
        "options": options,
        "answer": right,
        "value": values[right],
        "option_values": values,
    }


# ---- splits ----


def split(puzzle: Puzzle, values: list[list[int]], scheme: str, part: str, shots: int) -> list[int]:
    """The instances of a puzzle that are in a part. `values` has the right value of each instance."""
    places = list(range(len(values)))
    if scheme == "AS" and not puzzle.is_sequence and puzzle.answers != "operator":
        return _hold_out(places, [value for (value,) in values], part)
    if scheme in ("PS", "FS"):
        if scheme == "PS" and puzzle.is_sequence:
            return []
        if part == "train" and puzzle.part != "train":
            return places[:shots] if scheme == "FS" else []
        if puzzle.part != part:
            return []
        if scheme == "FS" and part != "train":
            places = places[shots:]
    return _slice(places, part, 80, 85)


def _slice(places: list[int], part: str, first: int, second: int) -> list[int]:
    """A part of instances in their order. `first` and `second` are the ends of training and validation in percent."""
    ends = [0, len(places) * first // 100, len(places) * second // 100, len(places)]
    index = ("train", "validation", "test").index(part)
    return places[ends[index] : ends[index + 1]]


def _hold_out(places: list[int], values: list[int], part: str) -> list[int]:
    held_out = held_out_answer(values)
    if part == "test":
        return [place for place in places if values[place] == held_out]
    return _slice([place for place in places if values[place] != held_out], part, 95, 100)


def held_out_answer(values: list[int]) -> int:
    """
    The answer of median frequency: of the answers with more than 1 % of the instances, the largest one that is at most
    as frequent as the median of them. As in the published code, the two largest answers count as one.
    """
    counts = np.bincount(np.maximum(values, 0), minlength=2)
    counts = np.append(counts[:-2], counts[-2:].sum())
    frequent = np.flatnonzero(counts > 0.01 * len(values))
    return int(frequent[counts[frequent] <= np.median(counts[frequent])][-1])
