"""Where the network runs: ZeroGPU's decorator on Spaces that have it, else nothing."""

from collections.abc import Callable


try:
    import spaces  # before torch: it decides when CUDA starts
except ImportError:
    spaces = None


def on_gpu(function: Callable) -> Callable:
    """The function, run with a GPU where the Space lends one for each call."""
    return function if spaces is None else spaces.GPU(function)
