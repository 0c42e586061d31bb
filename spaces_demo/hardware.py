"""The decorator of ZeroGPU, on Spaces that have it."""

from collections.abc import Callable


try:
    import spaces  # before torch, because it decides when CUDA starts
except ImportError:
    spaces = None


def on_gpu(function: Callable) -> Callable:
    """Makes each call of the function borrow a GPU, if the Space runs on ZeroGPU."""
    return function if spaces is None else spaces.GPU(function)
