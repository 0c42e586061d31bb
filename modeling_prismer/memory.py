"""Keeps freed memory in the process, for faster inference on a CPU."""

import ctypes


# from malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """
    Makes this process keep and reuse the main memory that it frees, until it ends.

    By default, the C library returns large blocks to the system immediately. On a CPU, the next layer of a network
    requests the same memory again, and waits while the system sets all its pages to zero. After this call, the process
    keeps its peak amount of memory, and some more due to fragmentation.

    This works on Linux with glibc; elsewhere it does nothing. The recipes and the benchmarks call it on a CPU;
    docs/speed.md shows the gain.

    Returns:
        `bool`: whether the process now keeps freed memory.

    Example:

    ```python
    >>> from modeling_prismer import keep_freed_memory

    >>> isinstance(keep_freed_memory(), bool)  # once, before the model is loaded
    True
    ```
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018, raises AttributeError if the library is not glibc
        return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))
    except (OSError, TypeError, AttributeError):  # CDLL(None) fails on Windows
        return False
