"""Our own puzzles: images that are solved from their pixels, options that do not tell the answer, and the layout."""

import csv
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from smart.drawing import COLORS, INK, SIZE, Canvas
from smart.generate import draw_sheet, make_instance, write_puzzles
from smart.own_puzzles import FIGURES, LETTERS, OWN_PUZZLES, draw_numbers, draw_orders, mirrored, turned
from smart.rows import load_smart


PUZZLES = {puzzle.number: puzzle for puzzle in OWN_PUZZLES}


def instances(number, count=12):
    return [make_instance(PUZZLES[number], index) for index in range(count)]


def is_color(pixels, color, tolerance=30):
    return np.abs(pixels.astype(int) - color).max(axis=-1) < tolerance


def nearest_color(pixel):
    names = list(COLORS)
    distances = [np.abs(np.array(COLORS[name]) - pixel).max() for name in names]
    return names[int(np.argmin(distances))] if min(distances) < 30 else None


def steps_in_labyrinth(pixels):
    """The least number of steps from the blue circle to the star."""
    cell, edge, side = 40, 12, 5
    centre = [(edge + cell * (i % side) + 20, edge + cell * (i // side) + 20) for i in range(side * side)]
    wall = is_color(pixels, INK)

    def cell_of(color):
        y, x = np.argwhere(is_color(pixels, COLORS[color])).mean(axis=0)
        return int((y - edge) // cell) * side + int((x - edge) // cell)

    def is_open(first, second):
        (x0, y0), (x1, y1) = centre[first], centre[second]
        return not wall[(y0 + y1) // 2, (x0 + x1) // 2]

    start = cell_of("blue")
    steps, reached = {start: 0}, [start]
    for place in reached:
        near = [place + 1] * (place % side < side - 1) + [place - 1] * (place % side > 0)
        near += [other for other in (place - side, place + side) if 0 <= other < side * side]
        for other in near:
            if other not in steps and is_open(place, other):
                steps[other] = steps[place] + 1
                reached.append(other)
    return steps[cell_of("orange")]


def test_labyrinths_are_solved_from_pixels():
    for made in instances(203):
        assert made.options[made.answer] == str(steps_in_labyrinth(np.asarray(made.image)))
        assert len({int(option) % 2 for option in made.options}) == 1  # the chess board excludes no option


def test_rulers_are_read_from_pixels():
    for made in instances(207):
        pixels = np.asarray(made.image)
        ruler = int(np.argwhere(is_color(pixels, (247, 236, 200), 8))[:, 0].min())
        colored = [nearest_color(pixel) is not None for pixel in pixels[ruler - 17]]
        assert made.options[made.answer] == f"{round(sum(colored) / 18)} cm"


def test_clocks_are_read_from_pixels():
    for made in instances(208):
        pixels = np.asarray(made.image)
        y, x = np.argwhere(is_color(pixels, COLORS["red"])).mean(axis=0)
        long_hand = np.argwhere(is_color(pixels, COLORS["blue"]))
        middle_y, middle_x = long_hand[:, 0].max() + 4, long_hand[:, 1].mean()
        shown = round(math.degrees(math.atan2(x - middle_x, middle_y - y)) / 30) % 12
        later = next(int(word) for word in made.question.split() if word.isdecimal())
        half = "AM" if "morning" in made.question else "PM"
        assert made.options[made.answer] == f"{shown + later}:00 {half}"


def test_squares_have_one_solution():
    for made in instances(210):
        pixels = np.asarray(made.image)
        grid = [[nearest_color(pixels[4 + 31 * r + 5, 34 + 31 * c + 6]) for c in range(5)] for r in range(5)]
        ink = is_color(pixels, INK, 60)  # a cell has its borders, and the marked cell the question mark
        ((row, column),) = (
            (r, c)
            for r, c in product(range(5), range(5))
            if grid[r][c] is None and ink[8 + 31 * r : 31 * r + 31, 40 + 31 * c : 60 + 31 * c].any()
        )
        seen = {grid[row][c] for c in range(5)} | {grid[r][column] for r in range(5)}
        (missing,) = set(COLORS) - seen
        assert nearest_color(pixels[189, round(SIZE * (made.answer + 0.5) / 5)]) == missing


def number_in(pixels, box):
    """The number in the middle of a circle: the one whose ink lies on the most white."""
    rows, columns = box
    overlaps = []
    for number in range(1, 6):
        canvas = Canvas()
        canvas.text((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2, str(number), 19)
        ink = 255 - np.asarray(canvas.finish())[box].min(axis=-1).astype(float)
        white = pixels[box].min(axis=-1).astype(float)
        middle = np.hypot(*np.indices(ink.shape) - np.array(ink.shape)[:, None, None] / 2) < 12
        overlaps.append(np.corrcoef(ink[middle], white[middle])[0, 1])
    return int(np.argmax(overlaps)) + 1


def test_circles_are_sorted_from_pixels():
    for made in instances(209, 6):
        pixels = np.asarray(made.image)
        circles, count = ndimage.label(ndimage.binary_fill_holes(pixels.min(axis=-1) < 200))
        assert count == 5
        boxes = sorted(ndimage.find_objects(circles), key=lambda box: box[0].stop - box[0].start)
        order = "-".join(str(number_in(pixels, box)) for box in boxes)
        first = min(("smallest", "largest"), key=lambda word: f"{made.question} {word}".index(word))
        rising = first == "smallest"
        assert made.options[made.answer] == (order if rising else order[::-1])
        assert len(set(made.options)) == 5


def cells_in(is_filled, cell):
    """The squares of a figure, of `cell` pixels each."""
    filled = np.argwhere(ndimage.binary_fill_holes(is_filled))
    (top, left), (bottom, right) = filled.min(axis=0), filled.max(axis=0)
    shape = round((bottom - top) / cell), round((right - left) / cell)
    centres = {(r, c): (round(top + cell * (r + 0.5)), round(left + cell * (c + 0.5))) for r, c in np.ndindex(shape)}
    return frozenset(place for place, centre in centres.items() if is_filled[centre])


def test_turned_figures_are_found_from_pixels():
    for made in instances(206):
        is_filled = np.asarray(made.image).min(axis=-1) < 200
        figure = cells_in(is_filled[:112], 21)
        columns = [slice(round(SIZE * index / 5), round(SIZE * (index + 1) / 5)) for index in range(5)]
        options = [cells_in(is_filled[124:204, column], 10) for column in columns]
        assert len(figure) == 5 and all(len(option) == 5 for option in options)
        turns = [turned(figure, times) for times in range(4)]
        assert [index for index, option in enumerate(options) if option in turns] == [made.answer]


def test_turned_figures_differ_from_mirror_images():
    ell = frozenset([(0, 0), (1, 0), (2, 0), (2, 1)])
    assert turned(ell, 1) == {(0, 0), (0, 1), (0, 2), (1, 0)}  # clockwise
    assert mirrored(ell) == {(0, 1), (1, 1), (2, 1), (2, 0)}
    for figure in FIGURES:
        assert len(figure) == 5
        assert turned(figure, 4) == turned(figure, 0)
        assert mirrored(figure) not in [turned(figure, times) for times in range(4)]
    shapes = {min(sorted(turned(figure, times)) for times in range(4)).__repr__() for figure in FIGURES}
    assert len(shapes) == len(FIGURES)


@pytest.mark.parametrize("number", sorted(PUZZLES))
def test_options_and_question_do_not_tell_the_answer(number):
    made = instances(number, 300 if number != 209 else 100)
    expected = len(made) / 5
    places = Counter(one.answer for one in made)
    assert all(abs(places[place] - expected) < 4.5 * math.sqrt(0.8 * expected) for place in range(5))
    assert all(one.options == [""] * 5 or len(set(one.options)) == 5 for one in made)
    questions = Counter(one.question for one in made)
    for question, count in questions.most_common(1):  # with the same question, answers differ
        if count >= 10:
            texts = Counter(one.options[one.answer] or LETTERS[one.answer] for one in made if one.question == question)
            assert texts.most_common(1)[0][1] <= 0.6 * count


def test_numbers_are_likely_ones():
    random = np.random.default_rng(0)
    drawn = [draw_numbers(random, 1, 13) for _ in range(200)]
    assert all(own == sorted(set(own)) and 1 <= own[0] and own[-1] <= 13 and own[-1] - own[0] <= 6 for own in drawn)
    assert len({tuple(own) for own in drawn}) > 50
    assert all(number % 2 == 0 for number in draw_numbers(random, 2, 15, step=2))
    orders = draw_orders(random)
    assert len({tuple(order) for order in orders}) == 5 and all(sorted(order) == [1, 2, 3, 4, 5] for order in orders)


def test_instance_depends_on_seed_and_number_alone():
    for puzzle in OWN_PUZZLES:
        first, again, other = make_instance(puzzle, 3), make_instance(puzzle, 3), make_instance(puzzle, 3, seed=1)
        assert first.image.tobytes() == again.image.tobytes() and first.options == again.options
        assert first.image.tobytes() != other.image.tobytes()
        assert first.image.size == (SIZE, SIZE)


def test_written_puzzles_load(tmp_path):
    write_puzzles(tmp_path, instances=2)
    with (tmp_path / "208" / "puzzle_208.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    made = make_instance(PUZZLES[208], 1)
    assert [rows[1][letter] for letter in LETTERS] == made.options and rows[1]["Answer"] == LETTERS[made.answer]
    loaded = load_smart(tmp_path, part="test")
    assert len(loaded) == 10 and set(loaded["kind"]) == {puzzle.kind for puzzle in OWN_PUZZLES}
    assert len(set(loaded["kind"])) == 8
    clock = loaded.filter(lambda row: row["puzzle"] == 208)[0]
    assert clock["suffix"] == made.options[made.answer] and clock["image"].tobytes() == made.image.tobytes()
    assert load_smart(tmp_path, "FS", "test", shots=0)["puzzle"] == [203, 208]
    assert not list(tmp_path.rglob(".*"))


def test_sheet_has_a_place_for_each_puzzle():
    sheet = draw_sheet(10)
    assert sheet.size == (5 * 240, 2 * 316)
    first = make_instance(PUZZLES[201], 0).image
    assert np.array_equal(np.asarray(sheet.crop((8, 6, 232, 230))), np.asarray(first))
    assert isinstance(sheet, Image.Image)
