"""Pictures from visitors: opened within bounds, and shown without a file."""

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
LONG_SIDE = 1024  # more would only cost time: no expert looks closer
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others have decoders that run programs, such as EPS


def open_picture(source: str | Path | bytes) -> Image.Image:
    """
    A picture of at most `LONG_SIDE` pixels a side, upright and RGB.

    Raises:
        Refused: if it is too large, or no picture.
    """
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if size > MAX_BYTES:
        raise Refused(f"This file has {size / 1024**2:.0f} MB; up to {MAX_BYTES // 1024**2} MB are taken.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
            width, height = opened.size  # from the header: nothing is decoded yet
        if width * height <= MAX_PIXELS:
            picture = load_image(source if isinstance(source, bytes) else str(source), max_pixels=MAX_PIXELS)
    except Exception:  # every decoder fails in its own way
        raise Refused("This file is no picture, or damaged. PNG, JPEG, WebP, GIF, BMP and TIFF are taken.") from None
    if width * height > MAX_PIXELS:
        raise Refused(
            f"This picture has {width}×{height} pixels; up to {MAX_PIXELS // 1_000_000} million are taken. "
            "Please make it smaller."
        )
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return picture


def data_uri(picture: Image.Image, quality: int = 88) -> str:
    """The picture itself as an address, so that nothing has to be written to be shown."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def from_base64(text: Any) -> Image.Image:
    """
    Raises:
        Refused: as [`open_picture`] does.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise Refused("This link is damaged: its picture cannot be read.") from None
    return open_picture(content)


def escape(text: str) -> str:
    return html.escape(str(text), quote=True)
