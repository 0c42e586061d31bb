"""The part of one process among several, and its progress bar."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from tqdm import tqdm

from .sources import ImageSource


LONGEST_WAIT = timedelta(days=7)  # of a process that has finished its images, for the others


def launched_place() -> tuple[tuple[int, int], torch.device | None]:
    """
    The number of this process and of all processes, as `torchrun` or `accelerate launch` started them, and the device
    of this process; `None` for the CPU, and if only one process was started.

    Raises:
        RuntimeError: if accelerate sees another number of processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return (0, 1), None
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # without `cpu`, PartialState sees processes without an accelerator as one process
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu, timeout=LONGEST_WAIT)
    if state.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}; give shard"
        )
    return (state.process_index, state.num_processes), None if state.device.type == "cpu" else state.device


def wait_for_others() -> None:
    """
    Waits until every process that [`launched_place`] counts is here. A launcher ends all processes as soon as one
    exits with an error, so a process with failed images must not exit before the others have finished.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def parse_shard(text: str) -> tuple[int, int]:
    """
    Reads `"0/8"`, the first of eight parts, as `(0, 8)`.

    Raises:
        ValueError: if the text has another form, or is not between `0/n` and `n-1/n`.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import parse_shard

    >>> parse_shard("0/8")
    (0, 8)
    ```
    """
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"the shard is {text!r}; needed is i/n with i from 0 to n - 1, such as 0/8")
    return int(first), int(second)


@contextmanager
def progress_bar(
    images: ImageSource, name: str, process: tuple[int, int] = (0, 1), is_shown: bool = True
) -> Iterator[Callable[[], None]]:
    """
    Shows a bar with rate and time left, one on each machine.

    Args:
        images ([`ImageSource`]): the images.
        name (`str`): what is made of them.
        process (`tuple[int, int]`, *optional*): number of this process and of all processes.
        is_shown (`bool`, *optional*, defaults to `True`): whether to show the bar.

    Yields:
        `Callable`: to be called after each image.
    """
    name = name if process[1] == 1 else f"{name}, process {process[0]} of {process[1]}"
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    with tqdm(total=images.num_images, desc=name, unit="image", disable=not (is_shown and is_first)) as bar:

        def advance() -> None:
            reading = images.progress()
            if reading is not None and reading[0]:  # estimate the total from the files read so far
                files_read, files = reading
                bar.total = max(bar.n + 1, round((bar.n + 1) * files / files_read))
            bar.update()

        yield advance
