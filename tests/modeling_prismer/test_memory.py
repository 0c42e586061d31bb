"""The memory that a process has freed."""

import platform
import subprocess
import sys

import pytest

from modeling_prismer.memory import keep_freed_memory


RESIDENT_AFTER_FREEING = """
import sys
import torch
from modeling_prismer import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
blocks = [torch.ones(8_000_000) for _ in range(8)]  # 32 MB each
del blocks
status = open("/proc/self/status").read().splitlines()
print(next(line for line in status if line.startswith("VmRSS:")).split()[1])
"""


def resident(*arguments: str) -> int:
    """In MB, of a process that has taken and freed 256 MB."""
    command = [sys.executable, "-c", RESIDENT_AFTER_FREEING, *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) // 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_freed_memory_is_kept():
    assert resident("keep") > resident() + 200


def test_nothing_is_done_without_glibc(monkeypatch):
    class OtherLibrary:  # without gnu_get_libc_version
        def mallopt(self, *arguments):
            raise AssertionError("another library's mallopt")

    monkeypatch.setattr("ctypes.CDLL", lambda name: OtherLibrary())
    assert keep_freed_memory() is False
