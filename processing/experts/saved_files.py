"""
The description of a saved model may only name files of its own checkpoint and models on the Hub.

A checkpoint may come from a stranger. Its description must not be able to open any other file of this machine, or to
copy it into the next checkpoint.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id


def find_saved(value: Any, folder: Path, root: Path, setting: str) -> Path | None:
    """
    The file or folder that a saved description names.

    Args:
        value: the value of the setting in the description.
        folder (`Path`): the folder of the description's files.
        root (`Path`): the checkpoint's folder; no file outside it is opened.
        setting (`str`): the name of the setting, for error messages.

    Returns:
        `Path`: the path inside `folder`, or `None` if `value` is the id of a model on the Hub.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str) and _is_relative(value) and os.path.lexists(folder / value):
        require_inside(folder / value, root, setting)
        return folder / value
    require_hub_id(value, setting)
    return None


def _is_relative(value: str) -> bool:
    """Whether a path only leads downwards, by the rules of every system."""
    windows = PureWindowsPath(value)
    if windows.drive or windows.root or "\0" in value or PurePosixPath(value).is_absolute():
        return False
    return bool(windows.parts) and ".." not in windows.parts


def require_inside(path: Path, root: Path, setting: str) -> None:
    """Raises a `ValueError` if a file, or a file in a folder, is outside `root` after links are followed."""
    roots = [root.resolve()]
    if roots[0].parent.name == "snapshots" and roots[0].parents[1].name.startswith("models--"):
        roots.append(roots[0].parents[1] / "blobs")  # files in the Hub's cache are links to this folder
    top = path.resolve()
    files = [top]
    for parent, folders, names in os.walk(top):
        linked = [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
        if linked:
            raise ValueError(f"{setting} is '{path}', in which '{linked[0]}' is a link to a folder; copy it instead")
        files += [Path(parent, name) for name in names]
    for file in files:
        if not any(file.resolve().is_relative_to(inside) for inside in roots):
            raise ValueError(
                f"{setting} is '{path}', of which '{file}' lies outside {root}. A saved description may only name "
                "files inside its checkpoint; copy the file there, or set the path in your own code"
            )
        if file != top and not file.is_file():
            raise ValueError(f"{setting} is '{path}', in which '{file}' is not a regular file")


def require_hub_id(value: Any, setting: str) -> None:
    """Raises a `ValueError` if a value is not the id of a model on the Hub, or if it is also a local path."""
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(
            f"{setting} is {value!r}, which is neither a file inside the checkpoint nor the id of a model on the Hub. "
            "A saved description may name nothing else; set another path in your own code"
        ) from error
    if os.path.lexists(value):
        raise ValueError(
            f"{setting} is {value!r}, meant as the id of a model on the Hub, but there is a local file or folder of "
            "that name, which would be opened instead. Run from another folder, or set the path in your own code"
        )


def copy_into(path: Path, folder: Path, name: str, convert: Callable[[Path, Path], Any] | None = None) -> None:
    """
    Copies a file or folder to `folder / name`. The complete copy replaces an older one.

    Args:
        path (`Path`): the file or folder.
        folder (`Path`): created if it does not exist.
        name (`str`): the name of the copy.
        convert (`Callable`, *optional*): called with `path` and the new file's path instead of copying.
    """
    target = folder / name
    if target.exists() and target.samefile(path):
        return
    if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"'{path}' cannot be copied into '{folder}', which lies inside it; save to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as temporary:
        copied = Path(temporary, name)
        if convert is not None:
            convert(path, copied)
        elif path.is_dir():
            shutil.copytree(path, copied)
        else:
            shutil.copy2(path, copied)
        if target.exists():
            target.rename(Path(temporary, f"old-{name}"))
        copied.rename(target)
