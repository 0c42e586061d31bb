"""Measures time, floating-point operations, memory and the machine, for all programs of this folder."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary


# optimize_for_cpu uses this operator, and torch's counter does not know it. `None` in a build of torch without oneDNN.
ONEDNN_LINEAR = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


# ---- time ----


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The time of one run of `work`, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


@dataclass
class Timing:
    """The times of repeated runs in seconds. `first` is the warm-up run before them, which does not count."""

    first: float
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """Median (shortest – longest)."""
        return spread_text(self.seconds)


def time_repeatedly(
    work: Callable[[], Any],
    repeats: int,
    device: torch.device,
    at_least: float = 0.0,
    between: Callable[[], Any] = lambda: None,
) -> Timing:
    """
    Times `repeats` runs after a warm-up run. Short work is repeated until all runs together have taken `at_least`
    seconds. `between` is called before and after each run that counts.
    """
    timing = Timing(seconds(work, device), [])
    between()
    while len(timing.seconds) < repeats or (sum(timing.seconds) < at_least and len(timing.seconds) < 1000):
        timing.seconds.append(seconds(work, device))
        between()
    return timing


def spread_text(times: list[float]) -> str:
    """Median (shortest – longest), with at least three significant digits."""
    median = statistics.median(times)
    digits = 3 if median < 1 else 2 if median < 10 else 1
    if median < 0.1:
        digits = 5 if median < 0.01 else 4
    return f"{median:.{digits}f} ({min(times):.{digits}f} – {max(times):.{digits}f})"


def matrix_product_gflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The speed of a product of two square matrices in GFLOP/s: the median of five runs."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / time_repeatedly(lambda: a @ b, 5, device).median / 1e9


def onednn_product_gflops(size: int) -> float:
    """The same for float32 on a CPU by oneDNN (`@` uses MKL there). 0 in a build of torch without oneDNN."""
    if ONEDNN_LINEAR is None:
        return 0.0
    a, b = torch.randn(size, size), torch.randn(size, size)
    timing = time_repeatedly(lambda: ONEDNN_LINEAR(a, b, None, "none", [], ""), 5, torch.device("cpu"))
    return 2 * size**3 / timing.median / 1e9


# ---- floating-point operations ----


def _attention(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _linear(states, weight, *args, **kwargs) -> int:
    return 2 * math.prod(states) * weight[0]


# torch counts attention on CUDA only, and no linear layers of oneDNN at all
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
if ONEDNN_LINEAR is not None:
    _ON_CPU[ONEDNN_LINEAR] = _linear


def flop_counter() -> FlopCounterMode:
    """
    Counts the operations of matrix products, convolutions and attention. A multiplication with an addition counts as
    two.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    # Do not count by module: the hooks for that fail on a view of a parameter that was made without gradients.
    counter.mod_tracker = nullcontext()
    counter.mod_tracker.parents = {"Global"}
    return counter


def count_flops(work: Callable[[], Any]) -> int:
    """Counts the operations of `work`, run eagerly, because counters cannot see inside compiled code."""
    with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
        work()
    return counter.get_total_flops()


# ---- memory ----


def peak_memory(device: torch.device) -> int:
    """
    The largest number of bytes that this process has held so far: allocated by torch on CUDA, else resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, this does not include the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


class HeldBytes(TorchDispatchMode):
    """
    Counts the bytes of all tensors that operations return, until nothing refers to them any more.

    Attributes:
        now (`int`): number of bytes that are held; starts with `held_before`.
        peak (`int`): the largest number of bytes that were held.
    """

    def __init__(self, held_before: int = 0):
        super().__init__()
        self.now = self.peak = held_before
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for storage in storages((args, kwargs)):  # weights, and the tensors that a view refers to
            self._known[storage] = None
        for storage in storages(outputs):
            if storage not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._let_go, storage.nbytes())
        return outputs

    def _let_go(self, size: int) -> None:
        self.now -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


# ---- the command line, the machine, processes, and what is written ----


def positive(text: str) -> int:
    """The type of arguments that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more is needed")
    return int(text)


def machine_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything besides the program that a time depends on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def machine_text(machine: dict[str, Any]) -> str:
    device = machine["cpu"] if machine["device"] == "CPU" else machine["device"]
    load = "" if machine["load_before"] is None else f"; {machine['load_before']} processes were running before"
    return (
        f"{device}, {machine['cores']} cores, {threads_text(machine)}, {machine['dtype']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}{load}"
    )


def machine_title(network: str, machine: dict[str, Any]) -> str:
    """The title of a figure."""
    return f"{network}, {machine['device']}, {threads_text(machine)}, {machine['dtype']}"


def threads_text(machine: dict[str, Any]) -> str:
    return f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)


def _cpu_name() -> str:
    """The name of the model, with its numbers: hypervisors give several models the same name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def in_own_process(function: Callable, *args, first: Callable[[], Any] | None = None) -> Any:
    """Runs `first()` and `function(*args)` in a new process, which shares no memory, caches or threads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=first) as pool:
        return pool.submit(function, *args).result()


def size_text(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(folder: Path, result: Any, text: str) -> None:
    """Writes `result.json` and `table.md`, each complete or not at all, and prints the text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("result.json", json.dumps(result, indent=2)), ("table.md", text)):
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        temporary.write_text(content + "\n")
        temporary.replace(folder / name)
    print(text)
