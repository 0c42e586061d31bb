"""`prismer check` and `env`."""

from typing import Annotated

import typer
from rich.table import Table

from .arguments import DeviceOption, check_device_name, find_device, start
from .console import Command, out, printable


commands = typer.Typer()


@commands.command(cls=Command)
def check(
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Tests this installation: runs a small network on a device and compares its outputs with recorded ones."""
    start(device=device)
    import torch
    from transformers import logging

    from modeling_prismer.self_check import SelfCheck

    logging.disable_progress_bar()
    device = find_device(device)
    _print_environment(device)
    self_check = SelfCheck(device, getattr(torch, dtype, dtype))
    table = Table("check", "holds", "result", "seconds", title=f"{dtype} on {device}")
    failed = []
    for result in self_check.run():
        holds = {True: "yes", False: "NO", None: "not available"}[result.holds]
        table.add_row(result.name, holds, printable(result.detail), f"{result.seconds:.1f}")
        if result.holds is False:
            failed.append(result.name)
    out.print(table)
    if failed:
        raise ValueError(f"{len(failed)} of the checks failed: {', '.join(failed)}")


@commands.command(cls=Command)
def env(device: DeviceOption = "auto") -> None:
    """Prints versions, devices and settings, as a bug report needs them. Runs no network."""
    check_device_name(device)
    _print_environment(device)


def _print_environment(device: str) -> None:
    from modeling_prismer.environment import environment

    for name, value in environment(device).items():
        print(f"{name}: {printable(value)}")
