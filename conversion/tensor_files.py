"""Finds a published file, locally or on the Hub, and reads its tensors without unpickling anything else."""

import errno
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


CHECKPOINT_NAME = "pytorch_model.bin"
SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")


def find_checkpoint(checkpoint: str | Path, revision: str | None = None) -> Path:
    """
    Returns the local path of a checkpoint, and downloads it if necessary.

    Args:
        checkpoint (`str` or `Path`):
            A file; a folder with a `pytorch_model.bin`; or a path on the Hub: `owner/name`, `owner/name/folder` or
            `owner/name/folder/file.bin`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: if there is no such file, locally or on the Hub.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    if path.is_file():
        return path
    name = str(checkpoint)
    owner, _, rest = name.partition("/")
    repository, _, filename = rest.partition("/")
    is_path = isinstance(checkpoint, Path) or path.is_absolute() or owner in ("", ".", "..", "~")
    if is_path or not repository or Path(checkpoint).is_dir() or (not filename and name.endswith(SUFFIXES)):
        raise FileNotFoundError(
            f"no checkpoint at {path}; a file, a folder with a {CHECKPOINT_NAME}, or a path on the Hub "
            "(owner/name, owner/name/folder, owner/name/folder/file) is needed"
        )
    if not filename.endswith(SUFFIXES):
        filename = f"{filename.rstrip('/')}/{CHECKPOINT_NAME}".lstrip("/")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", filename, revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = (
            "the Hub cannot be reached (or HF_HUB_OFFLINE is set), and it is not in the local cache"
            if isinstance(error, LocalEntryNotFoundError)
            else str(error).strip().splitlines()[0]
        )
        raise FileNotFoundError(
            f"{name} is not a local file or folder, and {filename} of {owner}/{repository} is not available from the "
            f"Hub: {reason}"
        ) from error


def load_tensors(path: str | Path, mmap: bool = False) -> Any:
    """
    Reads a `.safetensors` file or a file of `torch.save`, with tensors and plain containers of them.

    Args:
        path (`str` or `Path`): the file.
        mmap (`bool`, *optional*, defaults to `False`): whether to map the file instead of reading it, if possible.

    Raises:
        ValueError: if the file is damaged, or has anything but tensors and plain containers.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        mmap = mmap and zipfile.is_zipfile(path)  # files of torch before version 1.6 are not
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # torch's own message advises to switch the protection off, which is unsafe for a file from a stranger
        first = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        raise ValueError(
            f"{path} was refused: it is damaged, not a file of torch.save, or a pickle of more than tensors, which "
            f"could run code on this machine. {first.strip()}".strip()
        ) from None
    except (RuntimeError, EOFError, OSError, safetensors.SafetensorError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # no permission, for example
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} could not be read; it may be incomplete: {reason}") from error


def load_state_dict(path: str | Path, mmap: bool = False) -> dict[str, torch.Tensor]:
    """
    Returns the tensors of a checkpoint by name. Arguments and errors are those of [`load_tensors`].
    """
    state = load_tensors(path, mmap=mmap)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds {type(state).__name__}; a state dict, {{name: tensor}}, is needed")
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} is not a plain state dict, {{name: tensor}}: {', '.join(map(repr, others[:5]))} "
            f"{'is not a tensor' if len(others) == 1 else 'are not tensors'}"
        )
    return dict(state)
