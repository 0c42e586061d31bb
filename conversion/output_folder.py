"""The output folder of a conversion. It is checked before the work starts, and written completely or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modeling_prismer.configuration_prismer import PrismerConfig


def check_output_dir(output_dir: str | Path, overwrite: bool) -> Path:
    """
    Returns the folder's full path.

    Raises:
        FileExistsError: if it is a file, if it is not empty and `overwrite` is not set, or if it has anything but a
            Prismer model.
    """
    output_dir = Path(output_dir).expanduser().resolve()
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"{output_dir} is a file; a folder is needed")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return output_dir
    if not overwrite:
        raise FileExistsError(
            f"{output_dir} is not empty; choose another folder, or pass overwrite=True to replace it"
        )
    try:
        is_prismer = PrismerConfig.get_config_dict(output_dir, local_files_only=True)[0]["model_type"] == "prismer"
    except (OSError, KeyError):
        is_prismer = False
    if not is_prismer:  # all of it would be deleted
        raise FileExistsError(f"{output_dir} has no Prismer model; other folders are not overwritten")
    return output_dir


@contextmanager
def written_whole(output_dir: Path) -> Iterator[Path]:
    """Yields a folder next to `output_dir`, which replaces `output_dir` when it is complete."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as scratch:
        complete, replaced = Path(scratch, "complete"), Path(scratch, "replaced")
        complete.mkdir()
        yield complete
        if output_dir.exists():
            os.rename(output_dir, replaced)
        try:
            os.rename(complete, output_dir)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, output_dir)
            raise


@contextmanager
def file_written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a file that replaces `path` when it is complete."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        complete = Path(scratch, path.name)
        yield complete
        os.replace(complete, path)
