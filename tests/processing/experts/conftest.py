"""Pictures and experts that several tests use; the OCR models are loaded once."""

import pytest
from PIL import Image, ImageDraw, ImageFont

from modeling_prismer.processing.experts import RapidOcrText


LINES = ["Hello brave world", "STOP at 25"]


def draw_page(angle=0, size=(420, 300)):
    """A white page with two lines of text in its middle, turned counter-clockwise."""
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for row, line in enumerate(LINES):
        draw.text((size[0] / 2, size[1] / 2 - 30 + 60 * row), line, "black", ImageFont.load_default(30), anchor="mm")
    return page.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")


@pytest.fixture
def page():
    return draw_page()


@pytest.fixture(scope="session")
def ocr():
    expert = RapidOcrText(num_threads=1)
    expert.load()
    return expert


@pytest.fixture
def square():
    """A white square, columns 20 to 43 and rows 10 to 39, on black."""
    image = Image.new("RGB", (64, 48))
    ImageDraw.Draw(image).rectangle((20, 10, 43, 39), fill="white")
    return image
