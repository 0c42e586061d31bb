"""Options that several commands have, and checks of arguments before torch is imported."""

import difflib
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import first_line


CHECKPOINT = "A folder, a Hub id or the name of a shipped checkpoint"
ModelOption = Annotated[str | None, typer.Option(help=f"{CHECKPOINT}.", show_default="prismer-scenes")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
DtypeOption = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    typer.Option(help="The network's precision; auto: float32 on a CPU, else as the checkpoint was saved."),
]

SUITE_NAMES = "offline, fast, commercial, published"
ExpertsOption = Annotated[
    str | None,
    typer.Option(
        help=f"Names of the checkpoint's experts (depth,ocr), none, a suite ({SUITE_NAMES}), experts of a suite "
        "(fast:depth), the experts of another checkpoint; for answers also auto: the "
        "checkpoint's router chooses for each image.",
        show_default="all of the checkpoint",
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget-ms",
        min=0,
        help="With --experts auto: the mean time of the experts for an image, in milliseconds.",
        show_default="the time at which almost nothing is lost",
    ),
]
LanguageOption = Annotated[
    str | None,
    typer.Option(help="The language model of a PrismerLM: a folder or a Hub id.", show_default="the one it names"),
]

# Device types of torch and its extensions. Whether a device is available is only known once torch is imported.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mlu", "musa", "npu")
_WEIGHTS = (".safetensors", ".bin", ".onnx")


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


def weight_fingerprint(model: str) -> str:
    """
    A digest of the names, sizes and times of a model's weight files: it changes when the model is trained again at the
    same place. The weights of its experts count, and those of an adapter's base model, but not the checkpoints that a
    training leaves in `checkpoint-…`. Of a model on the Hub it is the commit.

    Raises:
        ValueError: if there is no such model.
    """
    folder = check_model(model)
    if not Path(checkpoint_path(model)).is_dir():
        return folder.name  # of the snapshot
    content: list[list[str | int]] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in _WEIGHTS and not any(part.startswith("checkpoint-") for part in name.parts):
            content.append([name.as_posix(), path.stat().st_size, path.stat().st_mtime_ns])
    if not (folder / "config.json").is_file():  # an adapter
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        content.append([weight_fingerprint(adapter["base_model_name_or_path"])])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


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
