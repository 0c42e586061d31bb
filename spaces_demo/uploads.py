"""The folder of uploads: which of its files may be opened, and how long they stay."""

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
from PIL import Image


# Set before gradio starts, which puts uploads there. The folder is deleted when the app ends.
UPLOADS = os.path.realpath(tempfile.mkdtemp(prefix="prismer-space-"))
os.environ["GRADIO_TEMP_DIR"] = UPLOADS
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

KEPT_SECONDS = 120.0  # an upload that neither a session nor a queued request names
MAX_KEPT = 1024**3  # bytes of all uploads together
SMALLEST = 64 * 1024  # what an empty file counts as, so that their number is limited as well


def find_upload(path: Any, name: str) -> str:
    """
    The real path of a file that was uploaded. Nothing outside the folder is touched, and nothing is opened.

    Raises:
        Refused: if `path` is anything else. The message is the same whether the file exists or not.
    """
    try:
        inside = Path(os.path.abspath(path)).is_relative_to(UPLOADS)
        real = os.path.realpath(path) if inside else ""
        if Path(real).is_relative_to(UPLOADS) and stat.S_ISREG(os.lstat(real).st_mode):
            return real
    except (OSError, TypeError, ValueError):
        pass
    raise Refused(
        f"{name}: this is not an uploaded file, or no longer. Please upload it (again), as POST /gradio_api/upload."
    )


def keep(picture: Image.Image) -> str:
    """Writes a picture into the folder, so that the page can show it; the path."""
    folder = Path(UPLOADS) / uuid.uuid4().hex
    folder.mkdir()
    picture.save(folder / "picture.png")
    return str(folder / "picture.png")


def is_full() -> bool:
    """Whether the uploads take so much space together that no more can be taken."""
    files = (os.path.join(place, name) for place, _, names in os.walk(UPLOADS) for name in names)
    total = 0
    for file in files:
        try:
            total += max(SMALLEST, os.lstat(file).st_size)
        except OSError:  # swept meanwhile
            continue
    return total > MAX_KEPT


def sweep(folder: str | Path, seconds: float = KEPT_SECONDS, spare: Collection[str] = ()) -> None:
    """Deletes files that were written longer ago than this, unless they are to be spared, and empty folders."""
    limit = time.time() - seconds
    for file in sorted(Path(folder).rglob("*"), reverse=True):  # what is deepest comes first
        try:
            if file.stat(follow_symlinks=False).st_mtime >= limit or str(file) in spare:
                continue
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        except OSError:  # another's, or not empty
            continue
