"""The seconds and the memory that a model needs."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch


T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """
    Args:
        seconds (`float`): of the whole measurement. On a CPU the computing time of all threads, so that other programs
            do not count.
        megabytes (`float`): growth of memory at its peak, with a batch of samples.
    """

    seconds: float
    megabytes: float


def measure_cost(work: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """
    Runs `work`, and returns its result with its cost. On a CPU, memory that was freed before and is used again does
    not count.
    """
    before = _reset_peak(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, Cost(clock() - start, max(0.0, peak_memory() - before))


def _reset_peak(device: torch.device) -> float:
    """Makes the present memory the peak, and returns it in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux alone has this
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> float:
    """The peak memory in MB, of the GPU if there is one, otherwise of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss includes memory of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
