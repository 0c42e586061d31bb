"""What the commands share: their options, their errors, and checks of arguments that need no torch."""

import difflib
import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from typer.core import TyperCommand


# what users and files contain is never read as markup
out = Console(markup=False, highlight=False, emoji=False)
err = Console(stderr=True, markup=False, highlight=False, emoji=False)

CHECKPOINT = "A folder, a Hub id or the name of a shipped checkpoint"
ModelOption = Annotated[str | None, typer.Option(help=f"{CHECKPOINT}.", show_default="prismer-scenes")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
DtypeOption = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    typer.Option(help="The network's precision; auto: float32 on a CPU, else as the checkpoint was saved."),
]

# Device types of torch and its extensions. Whether a device is available is only known once torch is imported.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mlu", "musa", "npu")


# ---- errors ----


class Command(TyperCommand):
    """A command that prints errors caused by bad input as one line, and exits with code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of the output has gone
            raise
        except (ValueError, OSError, ImportError, StrictDataclassError) as error:
            raise failed(in_options(str(error), self.params)) from error
        except RuntimeError as error:
            from modeling_prismer.processing.experts import ExpertError

            if type(error).__name__ == "OutOfMemoryError":
                raise failed(f"{first_line(error)}. A smaller --batch-size or --dtype bfloat16 needs less") from error
            if not isinstance(error, ExpertError):
                raise
            raise failed(in_options(str(error), self.params)) from error


def failed(message: str) -> typer.Exit:
    err.print(f"error: {printable(message)}", style="bold red", soft_wrap=True)
    return typer.Exit(1)


def warn(message: str) -> None:
    err.print(f"warning: {printable(message)}", style="yellow", soft_wrap=True)


def in_options(message: str, params: Sequence[Any]) -> str:
    """A message of the library in the words of a command line: `overwrite=True` becomes `--overwrite`."""
    for param in params:
        option = next((name for name in param.opts if name.startswith("--")), None)
        if option is None or param.name is None:
            continue
        # a name with an underscore is no ordinary word; one that is part of a path or quoted is the user's
        value = "(=True)?" if "_" in param.name else "=True"
        message = re.sub(rf"(?<![\w./'\"-]){param.name}{value}(?![\w./'\"=-])", option, message)
    return message


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """The text without control characters, which could change what a terminal shows."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


# ---- arguments ----


def start(model: str | None = None, device: str = "cpu") -> None:
    """Checks arguments without torch. Then imports the package."""
    if model is not None:
        check_model(model)
    check_device_name(device)
    import modeling_prismer.public  # noqa: F401  registers the Auto classes


def check_device_name(device: str) -> None:
    name, _, index = device.partition(":")
    if device != "auto" and (name not in _DEVICES or (":" in device and not index.isdecimal())):
        raise ValueError(
            f"--device is {device!r}; accepted are auto, {', '.join(_DEVICES)}, and a number as in cuda:1"
        )


def find_device(device: str) -> str:
    """The device to use. Raises if it is not available."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {error}") from error
    return device


def checkpoint_path(model: str | None) -> str:
    """The folder of a shipped checkpoint; a folder or a Hub id is returned unchanged."""
    from modeling_prismer.pretrained import find_checkpoint, pretrained_path

    return pretrained_path() if model is None else find_checkpoint(model)


def check_model(model: str) -> Path:
    """
    Returns the folder of a model's configuration, which is fetched if the model is on the Hub.

    Raises:
        ValueError: if there is no such model; the message lists the shipped ones.
    """
    path = Path(checkpoint_path(model))
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"model: the folder {model!r} has no config.json; it is not a saved model")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        if "/" not in model.strip("/"):
            raise ValueError("a Hub id has the form owner/name")
        return Path(snapshot_download(model, allow_patterns=["config.json", "adapter_config.json"]))
    except (ValueError, OSError) as error:
        from modeling_prismer.pretrained import shipped_checkpoints

        shipped = shipped_checkpoints()
        alike = difflib.get_close_matches(model, shipped, n=1)
        raise ValueError(
            f"model {model!r} is neither a folder, nor one of the shipped checkpoints ({', '.join(shipped)}), nor "
            f"found on the Hub: {first_line(error)}" + (f". Did you mean {alike[0]}?" if alike else "")
        ) from error


def model_type(model: str | None) -> str:
    """The `model_type` in the configuration of a checkpoint; of an adapter that of its base model."""
    folder = check_model(checkpoint_path(model))
    try:
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the configuration in {folder} is damaged: {error!r}") from error
    return model_type(base)


def check_files(images: Sequence[str]) -> None:
    """Raises if the only image of a command does not exist. One of several images is allowed to fail."""
    if len(images) != 1 or is_url(images[0]) or images[0] == "-" or "://" in images[0]:
        return
    (image,) = images
    if not exists(image) and not (glob.has_magic(image) and glob.glob(image, recursive=True)):
        raise FileNotFoundError(f"IMAGES: there is no file {image!r}; files, folders, globs and URLs are accepted")


def is_url(image: str) -> bool:
    return image.lower().startswith(("http://", "https://", "data:"))


def exists(path: str) -> bool:
    """Whether there is such a file or folder; a text that cannot be a path is none."""
    try:
        return os.path.exists(path)
    except (OSError, ValueError):
        return False
