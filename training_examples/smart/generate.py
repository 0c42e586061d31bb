"""
Writes puzzles of our own in the layout of SMART-101.

    export PYTHONPATH=training_examples
    python -m smart.generate --preview 30 preview.png
    python -m smart.generate --output_dir runs/smart/data --instances 2000 --num_proc 2

The first command draws a sheet of puzzles with their questions and answers. The second writes 2,000 instances of each
of the ten puzzles: `<id>/puzzle_<id>.csv`, `<id>/img/`, and `puzzles.csv` with the kinds of the puzzles. An instance
depends on the seed, the puzzle and its number alone.
"""

import argparse
import csv
import textwrap
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .own_puzzles import LETTERS, OWN_PUZZLES, Instance
from .puzzles import TABLE, Puzzle


COLUMNS = ("id", "Question", "image", *LETTERS, "Answer")
SHEET_WIDTH, SHEET_TEXT = 5, 92  # puzzles in a row of the sheet, and pixels below each


def make_instance(puzzle: Puzzle, index: int, seed: int = 0) -> Instance:
    return OWN_PUZZLES[puzzle](np.random.default_rng([seed, puzzle.number, index]))


def write_puzzle(puzzle: Puzzle, folder: Path, instances: int, seed: int) -> None:
    images = folder / str(puzzle.number) / "img"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(instances):
        made = make_instance(puzzle, index, seed)
        name = f"puzzle_{puzzle.number}_{index + 1}.png"
        made.image.save(images / name)
        rows.append((index + 1, made.question, name, *made.options, LETTERS[made.answer]))
    write_table(images.parent / f"puzzle_{puzzle.number}.csv", [COLUMNS, *rows])


def write_table(path: Path, rows: list[tuple]) -> None:
    temporary = path.with_name(f".{path.name}.unfinished")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    temporary.replace(path)


def write_puzzles(folder: Path, instances: int, seed: int = 0, num_proc: int = 1) -> None:
    """Writes all puzzles. The table of puzzles comes last, so a folder with it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(write_puzzle, folder=folder, instances=instances, seed=seed)
    if num_proc > 1:
        with get_context("spawn").Pool(num_proc) as pool:
            pool.map(write, OWN_PUZZLES, chunksize=1)
    else:
        for puzzle in OWN_PUZZLES:
            write(puzzle)
    rows = [(puzzle.number, puzzle.kind, puzzle.answers, puzzle.part) for puzzle in OWN_PUZZLES]
    write_table(folder / TABLE, [("id", "kind", "answers", "part"), *rows])


def draw_sheet(number: int, seed: int = 0) -> Image.Image:
    """A sheet of puzzles with questions, options and the letters of the right answers."""
    size = make_instance(next(iter(OWN_PUZZLES)), 0, seed).image.width
    width, height = size + 16, size + SHEET_TEXT
    sheet = Image.new("RGB", (SHEET_WIDTH * width, -(-number // SHEET_WIDTH) * height), (238, 238, 238))
    draw = ImageDraw.Draw(sheet)
    for place in range(number):
        puzzle = list(OWN_PUZZLES)[place % len(OWN_PUZZLES)]
        made = make_instance(puzzle, place // len(OWN_PUZZLES), seed)
        left, top = width * (place % SHEET_WIDTH) + 8, height * (place // SHEET_WIDTH) + 6
        sheet.paste(made.image, (left, top))
        options = "" if not made.options[0] else ", ".join(made.options)
        lines = [*textwrap.wrap(made.question, 42), *textwrap.wrap(options, 42)]
        lines.append(f"{puzzle.number} {puzzle.kind}: {LETTERS[made.answer]}")
        draw.multiline_text((left, top + size + 3), "\n".join(lines), (0, 0, 0), ImageFont.load_default(11), spacing=3)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes puzzles of our own in the layout of SMART-101.")
    parser.add_argument("--output_dir", type=Path, help="Write the data set to this folder.")
    parser.add_argument("--instances", type=int, default=2000, help="Instances of each puzzle.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_proc", type=int, default=1, help="Number of processes.")
    parser.add_argument("--preview", nargs=2, metavar=("NUMBER", "FILE"), help="Draw a sheet of puzzles.")
    args = parser.parse_args()
    if args.preview is None and args.output_dir is None:
        parser.error("nothing to do: give --preview or --output_dir")
    if args.preview:
        draw_sheet(int(args.preview[0]), args.seed).save(args.preview[1])
    if args.output_dir:
        write_puzzles(args.output_dir, args.instances, args.seed, args.num_proc)


if __name__ == "__main__":
    main()
