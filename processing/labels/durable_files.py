"""Writes files that exist complete or not at all, even if the program is killed or the disk is full."""

import os
from pathlib import Path


def publish(temporary: Path, path: Path) -> None:
    """
    Renames a complete file after its content has reached the disk.

    Args:
        temporary (`Path`): the complete file, in the same folder as `path`.
        path (`Path`): its final name; an existing file is replaced.
    """
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name must reach the disk, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_durably(path: Path, text: str) -> None:
    """
    Writes a text file under a temporary name and publishes it. A failed write leaves no file. Hold a lock if several
    processes may write the file.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)
    except OSError as error:  # the error of a failed write does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
