"""The folder of uploads: it decides which files may be opened, and when they are deleted."""

import atexit
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

from checks import Refused
from images import open_image
from PIL import Image


# gradio writes uploads to this folder; set it before gradio starts. The folder is deleted when the app ends.
UPLOADS = os.path.realpath(tempfile.mkdtemp(prefix="prismer-space-"))
os.environ["GRADIO_TEMP_DIR"] = UPLOADS
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

KEPT_SECONDS = 120.0  # for an upload that neither a session nor a queued request needs
MAX_KEPT = 1024**3  # bytes of all uploads together
SMALLEST = 64 * 1024  # bytes that a smaller file counts as, which limits the number of files as well


def find_upload(path: Any, name: str) -> str:
    """
    Returns the real path of an uploaded file. It opens no file, and does not access anything outside the folder.

    Raises:
        Refused: if `path` is not an uploaded file. The message is the same whether the file exists or not.
    """
    try:
        inside = Path(os.path.abspath(path)).is_relative_to(UPLOADS)
        real = os.path.realpath(path) if inside else ""
        if Path(real).is_relative_to(UPLOADS) and stat.S_ISREG(os.lstat(real).st_mode):
            return real
    except (OSError, TypeError, ValueError):
        pass
    raise Refused(
        f"{name}: this is not an uploaded file, or it was deleted. Please upload it (POST /gradio_api/upload)."
    )


def open_upload(payload: Any) -> Image.Image | None:
    """
    Opens the image of an image component, for events with `preprocess=False`. gradio itself would open it without
    limits, and would answer a broken one with a traceback.

    Raises:
        Refused: if the file was not uploaded, or as [`open_image`] raises it.
    """
    path = payload.get("path") if isinstance(payload, dict) else None
    return None if not path else open_image(find_upload(path, "image"))


def keep(image: Image.Image) -> str:
    """Writes an image to the folder, so that the page can show it, and returns the path."""
    folder = Path(UPLOADS) / uuid.uuid4().hex
    folder.mkdir()
    image.save(folder / "image.png")
    return str(folder / "image.png")


def is_full() -> bool:
    """Returns whether the uploads have reached their limit of space."""
    files = (os.path.join(place, name) for place, _, names in os.walk(UPLOADS) for name in names)
    total = 0
    for file in files:
        try:
            total += max(SMALLEST, os.lstat(file).st_size)
        except OSError:  # deleted in the meantime
            continue
    return total > MAX_KEPT


def sweep(folder: str | Path, seconds: float = KEPT_SECONDS, spare: Collection[str] = ()) -> None:
    """Deletes empty folders, and files that are older than `seconds` and not in `spare`."""
    limit = time.time() - seconds
    for file in sorted(Path(folder).rglob("*"), reverse=True):  # files before their folders
        try:
            if file.stat(follow_symlinks=False).st_mtime >= limit or str(file) in spare:
                continue
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        except OSError:  # a foreign file, or a folder with files
            continue
