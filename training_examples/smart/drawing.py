"""A canvas for puzzles: shapes, lines and text in twice the final resolution."""

import math
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont


SIZE = 224  # of an image, and the unit of all coordinates
DETAIL = 2
INK = (40, 40, 40)
COLORS = {
    "red": (214, 48, 49),
    "blue": (52, 101, 214),
    "green": (46, 160, 67),
    "orange": (245, 149, 32),
    "purple": (140, 72, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond")

Color = tuple[int, int, int]
Point = tuple[float, float]


@cache
def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * DETAIL)


def regular(corners: int, turn: float = -90, inner: float | None = None) -> list[Point]:
    """A polygon with corners on a circle of radius 1. With `inner`, a star with that inner radius."""
    points = []
    for index in range(corners):
        for radius, shift in ((1.0, 0.0), (inner, 0.5)) if inner else ((1.0, 0.0),):
            angle = math.radians(turn + 360 * (index + shift) / corners)
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


OUTLINES = {
    "square": [(0.82 * x, 0.82 * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "triangle": regular(3),
    "star": regular(5, inner=0.45),
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
}


class Canvas:
    """A white image that is drawn in coordinates from 0 to 224."""

    def __init__(self, background: Color = (255, 255, 255)):
        self.image = Image.new("RGB", (SIZE * DETAIL, SIZE * DETAIL), background)
        self.draw = ImageDraw.Draw(self.image)

    def finish(self) -> Image.Image:
        return self.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)

    def polygon(self, points: Sequence[Point], fill: Color | None = None, outline: Color = INK, width: float = 1):
        scaled = [(DETAIL * x, DETAIL * y) for x, y in points]
        self.draw.polygon(scaled, fill=fill, outline=outline, width=round(DETAIL * width))

    def box(self, left: float, top: float, right: float, bottom: float, fill: Color | None = None, width: float = 1.5):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill, INK, width)

    def circle(self, x: float, y: float, radius: float, fill: Color | None = None, width: float = 1):
        box = [DETAIL * edge for edge in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, fill=fill, outline=INK, width=round(DETAIL * width))

    def shape(self, name: str, x: float, y: float, radius: float, fill: Color):
        if name == "circle":
            self.circle(x, y, 0.88 * radius, fill)
        else:
            self.polygon([(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[name]], fill)

    def line(self, points: Sequence[Point], fill: Color = INK, width: float = 1.5):
        scaled = [(DETAIL * x, DETAIL * y) for x, y in points]
        self.draw.line(scaled, fill=fill, width=round(DETAIL * width), joint="curve")

    def text(self, x: float, y: float, text: str, size: int, fill: Color = INK):
        """Text around a point."""
        self.draw.text((DETAIL * x, DETAIL * y), text, fill=fill, font=font(size), anchor="mm")
