"""
Ten puzzles of our own.

Each function draws an instance. It first draws the five options, all in the same way, then which of them is right, and
then an image with this answer. So the options do not tell the answer, and the question does not depend on it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .drawing import COLORS, INK, SHAPES, SIZE, Canvas, Color
from .puzzles import Puzzle


LETTERS = "ABCDE"
BY_LETTER = [""] * 5  # empty options mean the letters
GRAY = (225, 225, 225)
PALE = (247, 236, 200)


@dataclass
class Instance:
    """
    An instance of a puzzle.

    Args:
        question (`str`): the question.
        image (`Image`): the image, 224×224.
        options (`list[str]`): five options, empty if the letters in the image are the options.
        answer (`int`): which of them is right.
    """

    question: str
    image: Image.Image
    options: list[str]
    answer: int


def draw_numbers(random: np.random.Generator, low: int, high: int, step: int = 1) -> list[int]:
    """Five of seven neighbouring numbers from `low` to `high`, in ascending order."""
    known = np.arange(low, high + 1, step)
    first = random.integers(max(1, len(known) - 6))
    return sorted(random.choice(known[first : first + 7], 5, replace=False).tolist())


def one_of(random: np.random.Generator, values):
    return values[random.integers(len(values))]


def scatter(random: np.random.Generator, number: int, side: int, margin: float) -> list[tuple[float, float]]:
    """Centres in different cells of a grid with `side` cells a side, somewhat moved."""
    cell = SIZE / side
    cells = random.permutation(side * side)[:number]
    moved = random.uniform(margin, cell - margin, (number, 2))
    return [(cell * (index % side) + dx, cell * (index // side) + dy) for index, (dx, dy) in zip(cells, moved)]


def draw_choices(canvas: Canvas, y: float, draw: Callable[[int, float, float], None]):
    """The five options as drawings above their letters, at the bottom."""
    for index, letter in enumerate(LETTERS):
        x = SIZE * (index + 0.5) / 5
        draw(index, x, y)
        canvas.text(x, SIZE - 10, letter, 15)


# ---- counting ----


def count_shapes(random: np.random.Generator) -> Instance:
    options = draw_numbers(random, 1, 13)
    answer = int(random.integers(5))
    shape, color = one_of(random, SHAPES), one_of(random, list(COLORS))
    others = [(one, color) for one in SHAPES if one != shape] + [(shape, other) for other in COLORS if other != color]
    shown = [(shape, color)] * options[answer]
    shown += [one_of(random, others) for _ in range(random.integers(3, 24 - options[answer]))]
    canvas = Canvas()
    for (name, fill), (x, y) in zip(shown, scatter(random, len(shown), 5, 19)):
        canvas.shape(name, x, y, random.uniform(14, 18), COLORS[fill])
    asked = [
        f"How many {color} {shape}s are there?",
        f"How many {shape}s in the picture are {color}?",
        f"Lisa collects all {shape}s that are {color}. How many does she find?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), [str(number) for number in options], answer)


# ---- path ----


def trace_lines(random: np.random.Generator) -> Instance:
    answer = int(random.integers(5))
    columns = [SIZE * (index + 0.5) / 5 for index in range(5)]
    middle, ends = random.permutation(5), random.permutation(5)
    colors = [(214, 48, 49), (52, 101, 214), (46, 160, 67)]
    canvas = Canvas()
    for index in random.permutation(5):
        stops = [(columns[index], 26.0), (columns[middle[index]], 105.0), (columns[ends[index]], 184.0)]
        points = []
        for (x0, y0), (x1, y1) in zip(stops, stops[1:]):
            for part in np.linspace(0, 1, 25):
                points.append((x0 + (x1 - x0) * (1 - math.cos(math.pi * part)) / 2, y0 + (y1 - y0) * part))
        canvas.line(points, (255, 255, 255), 6)  # the line below ends at a gap
        canvas.line(points, one_of(random, colors), 3)
    for index, letter in enumerate(LETTERS):
        canvas.text(columns[index], 13, letter, 16)
        x = columns[ends[index]]
        if index == answer:
            canvas.shape("star", x, 202, 17, COLORS["orange"])
        else:
            canvas.box(x - 9, 191, x + 9, 209, GRAY)
    asked = [
        "Which line leads to the star?",
        "Five children hold the ends of five ropes. Who pulls the star?",
        "At which letter does the path to the star begin?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), BY_LETTER, answer)


def random_maze(random: np.random.Generator, side: int, extra: int) -> set[frozenset[int]]:
    """Pairs of neighbouring cells that are connected: a random tree, and `extra` more."""
    pairs = [(cell, cell + 1) for cell in range(side * side) if (cell + 1) % side]
    pairs += [(cell, cell + side) for cell in range(side * (side - 1))]
    groups, doors, closed = list(range(side * side)), set(), []
    for index in random.permutation(len(pairs)):
        first, second = pairs[index]
        if groups[first] == groups[second]:
            closed.append(pairs[index])
            continue
        doors.add(frozenset(pairs[index]))
        groups = [groups[first] if group == groups[second] else group for group in groups]
    return doors | {frozenset(pair) for pair in closed[:extra]}


def steps_from(start: int, doors: set[frozenset[int]], number: int) -> list[int]:
    """The least number of steps from a cell to each cell."""
    steps, reached = {start: 0}, [start]
    for cell in reached:
        for door in doors:
            if cell in door:
                (other,) = door - {cell}
                if other not in steps:
                    steps[other] = steps[cell] + 1
                    reached.append(other)
    return [steps[cell] for cell in range(number)]


def count_steps(random: np.random.Generator) -> Instance:
    # The colours of a chess board tell whether the number is odd, so that all options are odd, or all are even.
    options = draw_numbers(random, 2 + random.integers(2), 15, step=2)
    answer, side = int(random.integers(5)), 5
    while True:
        doors, start = random_maze(random, side, extra=2), random.integers(side * side)
        ends = [cell for cell, steps in enumerate(steps_from(start, doors, side * side)) if steps == options[answer]]
        if ends:
            break
    end = one_of(random, ends)
    canvas, cell, edge = Canvas(), 40, 12
    centre = [(edge + cell * (index % side + 0.5), edge + cell * (index // side + 0.5)) for index in range(side**2)]
    for index in range(side * side):
        x, y = centre[index]
        canvas.circle(x, y, 1.5, INK)
        if index % side < side - 1 and frozenset((index, index + 1)) not in doors:
            canvas.line([(x + cell / 2, y - cell / 2), (x + cell / 2, y + cell / 2)], width=3.5)
        if index < side * (side - 1) and frozenset((index, index + side)) not in doors:
            canvas.line([(x - cell / 2, y + cell / 2), (x + cell / 2, y + cell / 2)], width=3.5)
    canvas.box(edge, edge, edge + cell * side, edge + cell * side, width=3.5)
    canvas.shape("circle", *centre[start], 14, COLORS["blue"])
    canvas.shape("star", *centre[end], 16, COLORS["orange"])
    asked = [
        "The blue ball rolls from square to square, but not through walls. How many steps is it to the star?",
        "What is the least number of steps from the blue circle to the star, if walls cannot be crossed?",
        "In this labyrinth, how many steps does the ball need at least to reach the star?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), [str(number) for number in options], answer)


# ---- math ----


def complete_pyramid(random: np.random.Generator) -> Instance:
    place = random.integers(6)  # 0 to 2 at the bottom, 3 and 4 in the middle, 5 at the top
    options = draw_numbers(random, *((1, 9) if place < 3 else (3, 17) if place < 5 else (6, 30)))
    answer = int(random.integers(5))
    while True:
        bottom = random.integers(1, 10, 3)
        numbers = [*bottom, bottom[0] + bottom[1], bottom[1] + bottom[2], bottom[0] + 2 * bottom[1] + bottom[2]]
        if numbers[place] == options[answer]:
            break
    canvas, width, height = Canvas(), 66, 56
    color = tuple(int(value) for value in random.integers(205, 256, 3))
    for index, (row, column) in enumerate([(2, 0), (2, 1), (2, 2), (1, 0.5), (1, 1.5), (0, 1)]):
        left, top = 13 + width * column, 28 + height * row
        canvas.box(left, top, left + width, top + height, (255, 255, 255) if index == place else color, 2)
        shown = "?" if index == place else str(numbers[index])
        canvas.text(left + width / 2, top + height / 2, shown, 34)
    asked = [
        "Each number is the sum of the two numbers below it. Which number is missing?",
        "Two neighbours in a row are added to get the number above. What belongs in place of the ?",
        "Which number is hidden, if each box has the sum of the two boxes under it?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), [str(number) for number in options], answer)


# ---- pattern ----


def continue_pattern(random: np.random.Generator) -> Instance:
    answer, period = int(random.integers(5)), random.integers(2, 4)
    known = [(shape, color) for shape in SHAPES for color in COLORS]
    choices = [known[index] for index in random.permutation(len(known))[:3]]
    # Two more options mix the shapes and colours of the first three, so that the right one is not the only likely one.
    mixed = [(shape, color) for shape, _ in choices for _, color in choices if (shape, color) not in choices]
    choices += [mixed[index] for index in random.permutation(len(mixed))[:2]] if len(mixed) > 1 else []
    while len(choices) < 5:
        other = one_of(random, known)
        if other not in choices:
            choices.append(other)
    choices = [choices[index] for index in random.permutation(5)]
    others = [index for index in random.permutation(5) if index != answer]
    unit = [answer, *others[: period - 1]]
    unit = [unit[index] for index in random.permutation(period)]
    start = random.integers(period)
    row = [unit[(start + place) % period] for place in range(7)]
    hidden = one_of(random, [place for place, index in enumerate(row) if index == answer])
    canvas = Canvas()
    for place, index in enumerate(row):
        x, y = SIZE * (place + 0.5) / 7, 60
        if place == hidden:
            canvas.text(x, y, "?", 28)
        else:
            shape, color = choices[index]
            canvas.shape(shape, x, y, 14.5, COLORS[color])
    canvas.line([(8, 112), (SIZE - 8, 112)], GRAY, 2)
    draw_choices(canvas, 170, lambda index, x, y: canvas.shape(choices[index][0], x, y, 18, COLORS[choices[index][1]]))
    asked = [
        "The row repeats a pattern. Which figure is missing?",
        "Which of the figures belongs in place of the question mark?",
        "Tim lays figures in a pattern that repeats. Which one did he lose?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), BY_LETTER, answer)


# ---- spatial ----


Cells = frozenset[tuple[int, int]]
# Figures of five squares that a turn does not make from their mirror images.
FIGURES = [
    frozenset(cells)
    for cells in (
        ((0, 1), (0, 2), (1, 0), (1, 1), (2, 1)),
        ((0, 0), (1, 0), (2, 0), (3, 0), (3, 1)),
        ((0, 1), (1, 1), (2, 0), (2, 1), (3, 0)),
        ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)),
        ((0, 1), (1, 0), (1, 1), (2, 1), (3, 1)),
        ((0, 0), (0, 1), (1, 1), (2, 1), (2, 2)),
    )
]


def turned(cells: Cells, times: int) -> Cells:
    for _ in range(times):
        cells = frozenset((column, -row) for row, column in cells)
    top, left = min(row for row, _ in cells), min(column for _, column in cells)
    return frozenset((row - top, column - left) for row, column in cells)


def mirrored(cells: Cells) -> Cells:
    return turned(frozenset((row, -column) for row, column in cells), 0)


def draw_figure(canvas: Canvas, cells: Cells, x: float, y: float, cell: float, fill: Color):
    height, width = max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1
    for row, column in cells:
        left, top = x + cell * (column - width / 2), y + cell * (row - height / 2)
        canvas.box(left, top, left + cell, top + cell, fill)


def find_turned(random: np.random.Generator) -> Instance:
    answer = int(random.integers(5))
    figure, other, third = (FIGURES[index] for index in random.permutation(len(FIGURES))[:3])
    if random.integers(2):
        figure = mirrored(figure)
    choices = [mirrored(figure), mirrored(figure), other, mirrored(other) if random.integers(2) else third]
    turns = random.permutation(4)[:2]  # of the two mirror images
    choices = [turned(cells, turns[i] if i < 2 else random.integers(4)) for i, cells in enumerate(choices)]
    choices = [choices[index] for index in random.permutation(4)]
    choices.insert(answer, turned(figure, random.integers(1, 4)))
    canvas, fill = Canvas(), COLORS[one_of(random, list(COLORS))]
    draw_figure(canvas, turned(figure, 0), SIZE / 2, 58, 21, fill)
    canvas.line([(8, 118), (SIZE - 8, 118)], GRAY, 2)
    draw_choices(canvas, 166, lambda index, x, y: draw_figure(canvas, choices[index], x, y, 10, fill))
    asked = [
        "Which figure is the one at the top, only turned?",
        "The figure at the top is turned, but not flipped. Which one can it become?",
        "Which of the small figures can be turned so that it looks like the large one?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), BY_LETTER, answer)


# ---- measure ----


def read_ruler(random: np.random.Generator) -> Instance:
    options, units = draw_numbers(random, 1, 10), 11
    answer = int(random.integers(5))
    length = options[answer]
    start = random.integers(units - length + 1)
    canvas, left, unit, top = Canvas(), 13, 18, random.integers(120, 160)
    thing, color = one_of(random, ["pencil", "stick", "ribbon", "straw"]), one_of(random, list(COLORS))
    canvas.box(left - 9, top, left + unit * units + 9, top + 44, PALE, 2)
    for index in range(units + 1):
        x = left + unit * index
        canvas.line([(x, top), (x, top + 14)], width=2)
        canvas.text(x, top + 28, str(index), 13)
    begin, end = left + unit * start, left + unit * (start + length)
    canvas.box(begin, top - 26, end, top - 8, COLORS[color], 2)
    asked = [
        f"How long is the {color} {thing}?",
        f"Mia lays a {thing} on the ruler. How long is it?",
        f"A {thing} is measured in centimetres. What is its length?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), [f"{number} cm" for number in options], answer)


def read_clock(random: np.random.Generator) -> Instance:
    half = one_of(random, ["AM", "PM"])
    options = draw_numbers(random, *((5, 11) if half == "AM" else (4, 10)))
    answer, hours = int(random.integers(5)), random.integers(1, 4)
    canvas, radius = Canvas(), random.uniform(80, 106)
    x, y = random.uniform(radius + 3, SIZE - radius - 3, 2)
    canvas.circle(x, y, radius, tuple(int(value) for value in random.integers(215, 256, 3)), 4)
    for hour in range(1, 13):
        angle = math.radians(30 * hour - 90)
        canvas.text(x + 0.82 * radius * math.cos(angle), y + 0.82 * radius * math.sin(angle), str(hour), 20)
    angle, length = math.radians(30 * (options[answer] - hours) - 90), random.uniform(0.4, 0.5) * radius
    canvas.line([(x, y), (x + length * math.cos(angle), y + length * math.sin(angle))], COLORS["red"], 7)
    canvas.line([(x, y), (x, y - random.uniform(0.6, 0.7) * radius)], COLORS["blue"], 4)
    canvas.circle(x, y, 5, INK)
    time, plural = "in the morning" if half == "AM" else "in the afternoon", "s" if hours > 1 else ""
    asked = [
        f"The clock shows when a train leaves {time}. The trip takes {hours} hour{plural}. When does it arrive?",
        f"Paul looks at the clock {time}. His bus comes {hours} hour{plural} later. When does it come?",
        f"A game begins {hours} hour{plural} after the time on the clock, {time}. When does it begin?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), [f"{hour}:00 {half}" for hour in options], answer)


# ---- order ----


def draw_orders(random: np.random.Generator) -> list[list[int]]:
    """Five orders of the numbers 1 to 5. Each is another one of them with two numbers exchanged."""
    orders = [random.permutation(5).tolist()]
    while len(orders) < 5:
        order = list(one_of(random, orders))
        first, second = random.permutation(5)[:2]
        order[first], order[second] = order[second], order[first]
        if order not in orders:
            orders.append(order)
    return [[number + 1 for number in orders[index]] for index in random.permutation(5)]


def sort_by_size(random: np.random.Generator) -> Instance:
    options, answer = draw_orders(random), int(random.integers(5))
    is_rising = random.integers(2)
    sizes = (17, 24, 32, 41, 51) if is_rising else (51, 41, 32, 24, 17)
    radius = {number: size + random.uniform(-1.5, 1.5) for number, size in zip(options[answer], sizes)}
    canvas, fill = Canvas(), COLORS[one_of(random, list(COLORS))]
    while True:
        places = random.uniform(0, 1, (5, 2))
        at = {
            number: (
                radius[number] + (SIZE - 2 * radius[number]) * x,
                radius[number] + (SIZE - 2 * radius[number]) * y,
            )
            for number, (x, y) in zip(range(1, 6), places)
        }
        gaps = [math.dist(at[i], at[j]) - radius[i] - radius[j] for i in range(1, 6) for j in range(1, i)]
        if min(gaps) > 1:
            break
    for number, (x, y) in at.items():
        canvas.circle(x, y, radius[number] - 1, fill, 1.5)
        canvas.text(x, y, str(number), 19, (255, 255, 255))
    first, last = ("smallest", "largest") if is_rising else ("largest", "smallest")
    asked = [
        f"Put the circles in order from the {first} to the {last}.",
        f"What is the order of the circles, if the {first} comes first and the {last} comes last?",
        f"Anna sorts the balls. She begins with the {first} one. In which order does she take them?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), ["-".join(map(str, order)) for order in options], answer)


# ---- logic ----


def complete_square(random: np.random.Generator) -> Instance:
    answer, side = int(random.integers(5)), 5
    rows, columns, names = (random.permutation(side) for _ in range(3))
    square = [[int(names[(row + column) % side]) for column in columns] for row in rows]
    row, column = next((r, c) for r in random.permutation(side) for c in range(side) if square[r][c] == answer)
    # Each of the other four colours stays visible in the row or in the column, but often not in both.
    in_row = [(row, c) for c in range(side) if c != column]
    in_column = {square[r][column]: (r, column) for r in range(side) if r != row}
    hidden = {one_of(random, [place, in_column[square[place[0]][place[1]]]]) for place in in_row}
    hidden = set(sorted(hidden)[: random.integers(2, 5)])
    away = [(r, c) for r in range(side) for c in range(side) if r != row and c != column]
    hidden |= {away[index] for index in random.permutation(len(away))[: random.integers(2, 7)]}
    colors = [list(COLORS.values())[index] for index in random.permutation(5)]
    canvas, cell, left = Canvas(), 31, 34.5
    for r in range(side):
        for c in range(side):
            x, y = left + cell * c, 4 + cell * r
            is_blank = (r, c) in hidden or (r, c) == (row, column)
            canvas.box(x, y, x + cell, y + cell, (255, 255, 255) if is_blank else colors[square[r][c]])
    canvas.text(left + cell * (column + 0.5), 4 + cell * (row + 0.5), "?", 24)
    draw_choices(canvas, 189, lambda index, x, y: canvas.circle(x, y, 11, colors[index]))
    asked = [
        "Each row and each column has all five colors. Which color belongs in the square with the question mark?",
        "No color occurs twice in a row or in a column. What is the color of the marked square?",
        "Ben paints each row and each column with five different colors. Which one is right for the ?",
    ]
    return Instance(one_of(random, asked), canvas.finish(), BY_LETTER, answer)


OWN_PUZZLES: dict[Puzzle, Callable[[np.random.Generator], Instance]] = {
    Puzzle(201, "counting"): count_shapes,
    Puzzle(202, "path"): trace_lines,
    Puzzle(203, "path", part="test"): count_steps,
    Puzzle(204, "math"): complete_pyramid,
    Puzzle(205, "pattern"): continue_pattern,
    Puzzle(206, "spatial", part="validation"): find_turned,
    Puzzle(207, "measure"): read_ruler,
    Puzzle(208, "measure", "clock", part="test"): read_clock,
    Puzzle(209, "order", "numbers"): sort_by_size,
    Puzzle(210, "logic"): complete_square,
}
