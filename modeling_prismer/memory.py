"""What a process does with the memory that it has freed."""

import ctypes


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """
    Has this process keep the main memory that it frees, and use it again, for as long as it runs.

    Without this the C library gives large blocks back to the system at once. A network on a CPU asks for the same
    again at its next layer, and waits until the system has made every page of it zero. It costs that the process
    holds as much as it ever needed at a time, plus what no later block fits into.

    Does nothing but on Linux with glibc. The recipes and the benchmarks call it on a CPU; docs/speed.md says what it
    gains.

    Returns:
        `bool`: whether it is so now.

    Example:

    ```python
    >>> from modeling_prismer import keep_freed_memory

    >>> isinstance(keep_freed_memory(), bool)  # once, before the model is loaded
    True
    ```
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018, for its AttributeError: other libraries' mallopt differ
        return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))
    except (OSError, TypeError, AttributeError):  # Windows has no library None
        return False
