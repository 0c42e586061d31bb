"""Versions, devices and settings. This file works in an installation in which torch does not."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path


PACKAGES = (
    *("modeling-prismer", "torch", "torchvision", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("accelerate", "peft", "datasets", "kornia", "timm", "onnxruntime", "rapidocr", "ray", "gradio", "numpy"),
    *("pillow", "triton", "typer"),
)
# settings that change where files come from or where a network runs; never tokens
VARIABLES = (
    *("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE"),
    *("ACCELERATE_USE_CPU", "PRISMER_ALLOW_PRIVATE_URLS"),
)


def environment(device: str = "cpu") -> dict[str, str]:
    """
    The versions, devices and settings that a bug report needs.

    Args:
        device (`str`, *optional*, defaults to `"cpu"`): the device that is used; it is only reported.

    Example:

    ```python
    >>> from modeling_prismer.environment import environment

    >>> environment()["modeling-prismer"]
    '0.1.0'
    ```
    """
    found = {
        "python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
        "package": str(Path(__file__).resolve().parent),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found.update(_hardware())
    found.update({name: os.environ[name] for name in VARIABLES if name in os.environ})
    return {**found, "device": device}


def _hardware() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # a broken installation is what the report is about
        return {"torch build": f"cannot be imported: {type(error).__name__}: {error}"}
    found = {
        "torch build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count())}
        found["GPUs"] = f"{torch.cuda.device_count()} × {', '.join(sorted(names))}"
    return found
