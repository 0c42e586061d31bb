"""Images of visitors: opened within limits, and shown without a file."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from checks import Refused
from PIL import Image

from modeling_prismer.processing import load_image


MAX_BYTES = 10 * 1024**2
MAX_PIXELS = 25_000_000
LONG_SIDE = 1024  # pixels; no expert reads more, so more would only cost time
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # the decoders of some others, such as EPS, run programs


def open_image(source: str | Path | bytes) -> Image.Image:
    """
    Opens an image: upright, RGB, and at most `LONG_SIDE` pixels on each side.

    Raises:
        Refused: if the file is too large or not an image.
    """
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if size > MAX_BYTES:
        raise Refused(f"This file has {size / 1024**2:.0f} MB; the limit is {MAX_BYTES // 1024**2} MB.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
            width, height = opened.size  # from the header: nothing is decoded yet
        if width * height <= MAX_PIXELS:
            image = load_image(source if isinstance(source, bytes) else str(source), max_pixels=MAX_PIXELS)
    except Exception:  # every decoder fails in its own way
        raise Refused("This file is not an image, or damaged. Accepted: PNG, JPEG, WebP, GIF, BMP, TIFF.") from None
    if width * height > MAX_PIXELS:
        raise Refused(
            f"This image has {width}×{height} pixels; the limit is {MAX_PIXELS // 1_000_000} million. "
            "Please make it smaller."
        )
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return image


def shown_size(path: str | Path) -> tuple[int, int]:
    """Returns width and height of an image file as a browser shows it: upright, in full size."""
    with Image.open(path, formats=FORMATS) as opened:
        width, height = opened.size
        is_turned = opened.getexif().get(ORIENTATION, 1) >= 5
    return (height, width) if is_turned else (width, height)


def data_uri(image: Image.Image, quality: int = 88) -> str:
    """Returns the image as a `data:` URI, so that it can be shown without a file."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def from_base64(text: Any) -> Image.Image:
    """
    Opens an image in base64.

    Raises:
        Refused: as [`open_image`] does.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise Refused("This link is damaged: its image cannot be read.") from None
    return open_image(content)


def escape(text: str) -> str:
    return html.escape(str(text), quote=True)
