"""Draws words on boards, with the font that Pillow contains (Aileron)."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont


FONT_SIZE = 96
STROKE = 2  # makes the regular font bold
MARGIN = 0.55  # left and right, in heights of a capital letter
BOARD_HEIGHT = 2.0  # in heights of a capital letter


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)


@lru_cache
def _letters() -> tuple[float, float]:
    """Top and bottom of a capital letter, in pixels from the anchor at the line's top."""
    _, top, _, bottom = _font().getbbox("H", stroke_width=STROKE)
    return top, bottom


@lru_cache(maxsize=1024)
def text_width(text: str) -> float:
    """The width of a text, in heights of a capital letter."""
    top, bottom = _letters()
    left, _, right, _ = _font().getbbox(text, stroke_width=STROKE)
    return (right - left) / (bottom - top)


def board_size(text: str, letter_height: float) -> tuple[float, float]:
    """Width and height of the board for a text with capital letters of this height."""
    return (text_width(text) + 2 * MARGIN) * letter_height, BOARD_HEIGHT * letter_height


def text_box(text: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the letters, in widths and heights of the board from its top left corner."""
    width, height = board_size(text, 1.0)
    _, cap_top, _, cap_bottom = _font().getbbox("H", stroke_width=STROKE)
    _, top, _, bottom = _font().getbbox(text, stroke_width=STROKE)
    scale = 1 / (cap_bottom - cap_top)
    first = (height - 1) / 2  # top of the capitals
    return (
        MARGIN / width,
        (first + (top - cap_top) * scale) / height,
        1 - MARGIN / width,
        (first + (bottom - cap_top) * scale) / height,
    )


def board_texture(text: str, height: int) -> np.ndarray:
    """The ink on a board of this height in pixels: float32 (height, width) in 0..1."""
    cap_top, cap_bottom = _letters()
    left = _font().getbbox(text, stroke_width=STROKE)[0]
    letter = cap_bottom - cap_top
    width, tall = board_size(text, letter)
    board = Image.new("L", (round(width), round(tall)), 0)
    place = (MARGIN * letter - left, (BOARD_HEIGHT - 1) / 2 * letter - cap_top)
    ImageDraw.Draw(board).text(place, text, fill=255, font=_font(), stroke_width=STROKE, stroke_fill=255)
    board = board.resize((max(1, round(width / tall * height)), height), Image.Resampling.BOX)
    return np.asarray(board, np.float32) / 255
