"""Runs of the command line that test_cli_engines.py starts in new processes."""

import os
import signal
import sys
from pathlib import Path


def ask(folder: Path, arguments: list[str]):
    from modeling_prismer.cli import app

    sys.argv = ["prismer", *arguments]
    try:
        app()
    except SystemExit as end:
        assert not end.code


def killed_by_its_process(folder: Path, arguments: list[str]):
    """Dies after five results."""
    from modeling_prismer.command_line.results import ResultFiles

    write, left = ResultFiles.write, [5]

    def write_and_die(self, line):
        write(self, line)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    ResultFiles.write = write_and_die
    ask(folder, arguments)


def killed_by_its_worker(folder: Path, arguments: list[str]):
    """Dies in the fourth batch."""
    from modeling_prismer.command_line.workers import Generating

    see, batches = Generating.see_opened, []

    def see_or_die(self, images):
        batches.append(images)
        if len(batches) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return see(self, images)

    Generating.see_opened = see_or_die
    ask(folder, arguments)
