"""Opens images from any source as upright RGB images with 8 bits per channel."""

import base64
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension

from .image_fetching import fetch_url


# Pillow's own limit; it treats larger files as decompression bombs
MAX_IMAGE_PIXELS = 178_956_970
MAX_BYTES = 100_000_000

ACCEPTED_IMAGES = (
    "accepted are a path, an http(s) URL, a data: URI, the bytes of an image file, a PIL image, and a NumPy array or "
    "torch tensor of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels"
)
_ACCEPTED_FILES = "accepted are the formats that Pillow reads, such as PNG, JPEG, WebP, GIF, TIFF and BMP"
_ACCEPTED_VALUES = (
    "accepted are uint8, uint16, bool, integers from 0 to 65535, and floats from 0 to 1 or from 0 to 255"
)


def load_image(
    image: Any,
    max_pixels: int | None = MAX_IMAGE_PIXELS,
    input_data_format: str | ChannelDimension | None = None,
    timeout: float | None = 30.0,
    name: str | None = None,
    max_bytes: int | None = MAX_BYTES,
    allow_private: bool | None = None,
) -> Image.Image:
    """
    Opens one image.

    The EXIF orientation is applied. Transparent pixels become white. An animation gives its first frame, and a PIL
    image its current frame. Values of other types than 8 bit are scaled: 16-bit values by 255/65535, and floats by 255
    if none is above 1. Wider integers and floats above 1 are read as 0 to 255, or as 0 to 65535 if an integer is above
    255. An upright PIL image in mode RGB is returned as it is.

    URLs are not trusted. The download ends at `timeout` and `max_bytes`, follows at most five redirects, and connects
    to public addresses only. Loopback, private, link-local, reserved and multicast addresses are refused, in any
    notation and also behind a name or a redirect.

    Args:
        image (`str`, `os.PathLike`, `bytes`, `dict`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A path, an `http(s)://` URL, a `data:` URI, the bytes of an image file, a `{"bytes": …, "path": …}` as
            `datasets` stores images, a PIL image in any mode, or an array of shape (H, W), (H, W, C) or (C, H, W)
            with C of 1, 3 or 4.
        max_pixels (`int`, *optional*, defaults to 178,956,970):
            The largest accepted number of pixels. It is checked before the file is decoded. With `None`, only Pillow's
            own limit holds, `PIL.Image.MAX_IMAGE_PIXELS`.
        input_data_format (`str` or `ChannelDimension`, *optional*):
            `"channels_first"` or `"channels_last"` for arrays. By default it is inferred. If both ends fit, three
            channels are preferred to one or four, then the last axis for arrays and the first one for tensors.
        timeout (`float`, *optional*, defaults to 30.0):
            The time limit for a URL in seconds, from the first connection to the last byte. `None` sets no limit.
        name (`str`, *optional*):
            The name of the image in error messages, by default its path or a description.
        max_bytes (`int`, *optional*, defaults to 100,000,000):
            The largest accepted number of bytes of a URL or a `data:` URI. `None` sets no limit.
        allow_private (`bool`, *optional*):
            Whether a URL may lead to an address that is not public, such as 127.0.0.1 or 10.0.0.1. By default, the
            environment variable `PRISMER_ALLOW_PRIVATE_URLS=1` allows it.

    Returns:
        `PIL.Image.Image`: an image in mode RGB.

    Raises:
        FileNotFoundError: if the path does not exist.
        OSError: if a URL cannot be fetched or is refused, and always when offline (`HF_HUB_OFFLINE`).
        ValueError: if the image is empty, damaged, not an image, too large, or has an unknown shape or values.
        TypeError: if the argument has another type.

    Example:

    ```python
    >>> from modeling_prismer.processing import load_image

    >>> image = load_image("modeling_prismer/assets/shape.png")
    >>> image.mode, image.size
    ('RGB', (64, 64))
    ```
    """
    if isinstance(image, Mapping):  # a row of `datasets` with Image(decode=False)
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | os.PathLike | bytes):
        name = name or ("image file" if isinstance(image, bytes) else _shorten(os.fspath(image)))
        with _open(image, name, max_pixels, timeout, max_bytes, allow_private) as opened:
            return _to_rgb(_decode(opened, name, max_pixels), name)
    if isinstance(image, Image.Image):
        name = name or getattr(image, "filename", None) or f"PIL image ({image.mode}, {image.width}×{image.height})"
        return _to_rgb(_decode(image, name, max_pixels), name)
    if isinstance(image, np.ndarray | torch.Tensor):
        name = name or f"{'tensor' if isinstance(image, torch.Tensor) else 'array'} of shape {tuple(image.shape)}"
        return _to_rgb(_from_array(image, name, input_data_format), name)
    raise TypeError(f"{name or 'image'} is a {type(image).__name__}; {ACCEPTED_IMAGES}")


def load_images(images: Any, **kwargs: Any) -> list[Image.Image]:
    """
    Opens one or many images of any sizes.

    Args:
        images:
            An input of [`load_image`], a list or tuple of them, which may be nested, or an array or tensor with a
            batch dimension in front, (B, H, W, C) or (B, C, H, W).
        kwargs:
            Passed on to [`load_image`].

    Returns:
        `list[PIL.Image.Image]`: images in mode RGB, flattened in the given order.

    Raises:
        ValueError: if there is no image, and as [`load_image`], with the file or the position in the batch.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing import load_images

    >>> batch = np.zeros((2, 32, 48, 3), np.uint8)
    >>> [image.size for image in load_images(["modeling_prismer/assets/shape.png", batch])]
    [(64, 64), (48, 32), (48, 32)]
    ```
    """
    images = list(_flatten(images))
    if not images:
        raise ValueError("images is empty; at least one image is needed")
    opened = []
    for i, image in enumerate(images):
        names_itself = len(images) == 1 or isinstance(image, str | os.PathLike) or getattr(image, "filename", None)
        opened.append(load_image(image, **{"name": None if names_itself else f"images[{i}]", **kwargs}))
    return opened


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4):
        for image in images:
            yield from _flatten(image)
    else:
        yield images


def _shorten(name: str, length: int = 120) -> str:
    return name if len(name) <= length else f"{name[:length]}…"


def _open(
    source: str | os.PathLike | bytes,
    name: str,
    max_pixels: int | None,
    timeout: float | None,
    max_bytes: int | None,
    allow_private: bool | None,
) -> Image.Image:
    """Opens an image file and reads its header."""
    file: io.BytesIO | str | os.PathLike
    start = str(source)[:8].lower() if isinstance(source, str) else ""
    if isinstance(source, bytes):
        file, size = io.BytesIO(source), len(source)
    elif start.startswith(("http://", "https://")):
        file = fetch_url(str(source), name, timeout, max_bytes, allow_private)
        size = file.getbuffer().nbytes
    elif start.startswith("data:"):
        content = _decode_data_uri(str(source), name, max_bytes)
        file, size = io.BytesIO(content), len(content)
    elif not os.path.exists(source):
        raise FileNotFoundError(f"there is no file '{name}'; {ACCEPTED_IMAGES}")
    elif os.path.isdir(source):
        raise ValueError(f"'{name}' is a folder, not an image file; {ACCEPTED_IMAGES}")
    elif not os.path.isfile(source):  # a pipe or a device never ends
        raise ValueError(f"'{name}' is not a regular file; {ACCEPTED_IMAGES}")
    else:
        file, size = source, os.path.getsize(source)

    if size == 0:
        raise ValueError(f"'{name}' is empty (0 bytes); {_ACCEPTED_FILES}")
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"'{name}' is not an image, or damaged at its beginning; {_ACCEPTED_FILES}") from error
    except Image.DecompressionBombError as error:
        limit = f"{max_pixels:,}" if max_pixels else "PIL.Image.MAX_IMAGE_PIXELS"
        raise ValueError(
            f"'{name}' is refused as too large ({error}); the limit is max_pixels={limit}, and Pillow refuses images "
            "of more than twice PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    if image.format == "EPS":  # a program, which Pillow would run with Ghostscript
        image.close()
        raise ValueError(f"'{name}' is PostScript, which is not opened; {_ACCEPTED_FILES}")
    return image


def _decode_data_uri(uri: str, name: str, max_bytes: int | None) -> bytes:
    head, _, body = uri.partition(",")
    if not head.lower().endswith(";base64"):
        raise ValueError(f"'{name}' is not base64; a data: URI looks like 'data:image/png;base64,…'")
    if max_bytes is not None and len(body) * 3 // 4 > max_bytes:
        raise ValueError(f"'{name}' has more than max_bytes={max_bytes:,} bytes; raise the limit if you trust it")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ValueError(f"'{name}' holds damaged base64: {error}") from error


def _decode(image: Image.Image, name: str, max_pixels: int | None) -> Image.Image:
    """Decodes the pixels, unless there are too many, and applies the EXIF orientation."""
    if image.width == 0 or image.height == 0:
        raise ValueError(f"'{name}' has no pixels: it is {image.width}×{image.height}")
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(
            f"'{name}' has {image.width}×{image.height} pixels; the limit is max_pixels={max_pixels:,}. Make it "
            "smaller, or raise the limit if you trust the file"
        )
    try:
        image.load()
    except Exception as error:  # each decoder raises errors of its own
        raise ValueError(f"'{name}' is truncated or damaged: {error}") from error
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF data does not make an image unusable
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip the values to 0..255
        return Image.fromarray(_to_8_bit(np.asarray(image), name)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_array(
    image: np.ndarray | torch.Tensor, name: str, input_data_format: str | ChannelDimension | None
) -> Image.Image:
    if image.ndim not in (2, 3):
        raise ValueError(f"{name} has {image.ndim} dimensions; {ACCEPTED_IMAGES}")
    if 0 in image.shape:
        raise ValueError(f"{name} has no pixels: its shape is {tuple(image.shape)}")
    if image.ndim == 3 and _channel_axis(image, name, input_data_format) == 0:
        image = image.permute(1, 2, 0) if isinstance(image, torch.Tensor) else image.transpose(1, 2, 0)
    if isinstance(image, torch.Tensor):
        if image.dtype == torch.bfloat16:
            image = image.float()
        image = image.numpy(force=True)
    image = _to_8_bit(image, name)  # (H, W) or (H, W, C)
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2:] == (1,) else image))


def _channel_axis(
    image: np.ndarray | torch.Tensor, name: str, input_data_format: str | ChannelDimension | None
) -> int:
    first, last = image.shape[0], image.shape[-1]
    if input_data_format is not None:
        axis = 0 if ChannelDimension(input_data_format) == ChannelDimension.FIRST else -1
    elif (first == 3) != (last == 3):
        axis = 0 if first == 3 else -1
    elif (first in (1, 3, 4)) != (last in (1, 3, 4)):
        axis = 0 if first in (1, 3, 4) else -1
    else:
        axis = 0 if isinstance(image, torch.Tensor) else -1
    if image.shape[axis] not in (1, 3, 4):
        where = "" if input_data_format is None else f" with input_data_format={str(input_data_format)!r}"
        raise ValueError(f"{name} has shape {tuple(image.shape)}{where}; {ACCEPTED_IMAGES}")
    return axis


def _to_8_bit(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    kind = values.dtype.kind
    low, high = (values.min(), values.max()) if kind in "iuf" else (np.nan, np.nan)
    # this form of the condition also refuses NaN
    if not (low >= 0 and high <= (255 if kind == "f" else 65535)):
        raise ValueError(f"{name} has {values.dtype} values from {low} to {high}; {_ACCEPTED_VALUES}")
    if kind == "f":
        scale = 255.0 if high <= 1 else 1.0
    else:
        scale = 255 / 65535 if high > 255 or (kind == "u" and values.dtype.itemsize == 2) else 1.0
    return np.rint(values.astype(np.float32) * np.float32(scale)).astype(np.uint8)


__all__ = ["MAX_IMAGE_PIXELS", "load_image", "load_images"]
