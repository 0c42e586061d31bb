"""Files that are there complete or not at all, whatever ends the program or fills the disk."""

import os
from pathlib import Path


def publish(temporary: Path, path: Path) -> None:
    """
    Gives a complete file its name, once its content is on the disk.

    Args:
        temporary (`Path`): the file under its temporary name, in the folder of `path`.
        path (`Path`): the name; a file that has it is replaced.
    """
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name has to reach the disk, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_durably(path: Path, text: str) -> None:
    """
    Writes a text file under a temporary name, then publishes it. A failed write leaves nothing. Hold a lock if several
    processes may write the file.
    """
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)
    except OSError as error:  # a failed write does not say which file it is about
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
