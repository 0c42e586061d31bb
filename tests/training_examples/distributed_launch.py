"""Starts functions in new processes, like `torchrun`. Common imports are done once, in the fork server."""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest


processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["accelerate", "datasets", "evaluate", "kornia", "modeling_prismer.public"]
    + ["torch.distributed.fsdp", "transformers"]
)


def launch(function, folder: Path, *args, number: int = 1, timeout: int = 240) -> list[int]:
    """
    Runs `function(folder, *args)` in `number` processes, which communicate by gloo if there are several.

    Returns:
        The exit codes: 0, or -9 for a killed process. If a process raises an error or runs longer than `timeout`
        seconds, the test fails with the output of all processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"process_{rank}.log" for rank in range(number)]
    workers = [
        processes.Process(target=_run, args=(function, folder, args, rank, number, port, log, timeout))
        for rank, log in enumerate(logs)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + timeout
    while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
        if any(worker.exitcode for worker in workers):  # the others would wait for it forever
            end = min(end, time.monotonic() + 3)
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.join()
    codes = [worker.exitcode for worker in workers]
    if any(code not in (0, -9) for code in codes) or time.monotonic() >= end:
        pytest.fail(
            "\n\n".join(
                f"process {rank} ended with {code}\n{log.read_text()[-3000:]}"
                for rank, (code, log) in enumerate(zip(codes, logs))
            ),
            pytrace=False,
        )
    return codes


def _run(function, folder, args, rank, number, port, log, timeout):
    os.setsid()  # so that the workers of its data loader can be killed with it
    signal.alarm(timeout + 10)  # in case the parent process is gone
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if number > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["ACCELERATE_USE_CPU"] = "true"
    multiprocessing.set_start_method("fork", force=True)  # for the workers of the data loader, as in a normal program
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # Trainer collects garbage often; the imported modules are none
    try:
        function(folder, *args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # does not wait for processes that wait for this one
