"""Reads the published analysis of CLIP's text embeddings from its pickle without running any of its code."""

import io
import math
import pickle
import pickletools
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from .output_folder import file_written_whole


MAX_BYTES = 1 << 24  # the published file has half a megabyte
# The names in the pickle of a PCA: scikit-learn's class, and the functions by which NumPy rebuilds arrays.
ADMITTED = {
    ("sklearn.decomposition._pca", "PCA"),
    ("sklearn.decomposition.pca", "PCA"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
}
# Not needed: objects that other code has registered, and buffers that are created before their bytes are read.
REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}


class _Inert:
    """Replaces an object of a pickle. It only keeps the arguments and the state of the object."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no principal component analysis needs")
        return type(name, (_Inert,), {})


def read_clip_pca(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a principal component analysis that scikit-learn pickled, such as the published `clip_pca.pkl`.

    No code of the file runs, and scikit-learn is not needed. All objects are replaced by inert ones, and names other
    than those of the analysis and of NumPy's arrays are refused.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        `dict[str, torch.Tensor]`: `mean` (embedding,) and `components` (channels, embedding) in float32. The features
        of a text are `(embedding - mean) @ components.T`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, has other contents, or an analysis that also scales (`whiten`).

    Example:

    ```python
    >>> import pickle

    >>> import numpy as np
    >>> from modeling_prismer.conversion import read_clip_pca
    >>> from sklearn.decomposition import PCA

    >>> _ = open("clip_pca.pkl", "wb").write(pickle.dumps(PCA(4).fit(np.random.rand(50, 8)), protocol=4))
    >>> {name: tuple(tensor.shape) for name, tensor in read_clip_pca("clip_pca.pkl").items()}
    {'mean': (8,), 'components': (4, 8)}
    ```
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; an analysis has at most {MAX_BYTES:,}")
    try:
        analysis = _unpickle(path.read_bytes())
        mean, components = _array(analysis, "mean_", 1), _array(analysis, "components_", 2)
        if mean.shape[0] != components.shape[1]:
            raise ValueError(f"its mean has {mean.shape[0]} numbers, its components have {components.shape[1]}")
        if analysis.get("whiten") is not False:
            raise ValueError(f"it has whiten={analysis.get('whiten')!r}; False is needed")
    except Exception as error:  # a hostile file can fail in any way
        reason = textwrap.shorten(str(error) or type(error).__name__, 200)
        raise ValueError(
            f"{path} was refused, and nothing in it was run: {reason}. The pickle of a PCA of scikit-learn is needed"
        ) from None
    return {"mean": torch.from_numpy(mean), "components": torch.from_numpy(components)}


def convert_clip_pca(path: str | Path, output: str | Path) -> Path:
    """
    Writes the analysis of [`read_clip_pca`] to a safetensors file for [`ClipTextFeatures`].

    Args:
        path (`str` or `Path`): the pickle.
        output (`str` or `Path`): the safetensors file to write; its folder is created if it does not exist.

    Returns:
        `Path`: the written file.

    Example:

    ```python
    >>> import pickle

    >>> import numpy as np
    >>> from modeling_prismer.conversion import convert_clip_pca
    >>> from sklearn.decomposition import PCA

    >>> _ = open("clip_pca.pkl", "wb").write(pickle.dumps(PCA(4).fit(np.random.rand(50, 8)), protocol=4))
    >>> convert_clip_pca("clip_pca.pkl", "clip_pca.safetensors").name
    'clip_pca.safetensors'
    ```
    """
    analysis = read_clip_pca(path)
    with file_written_whole(output) as file:
        save_file(analysis, file)
    return Path(output).expanduser()


def _unpickle(data: bytes) -> dict[str, Any]:
    """Returns the attributes of the pickled analysis."""
    for opcode, argument, _ in pickletools.genops(data):  # it also checks that no bytes are missing
        if opcode.name in REFUSED_OPCODES or (opcode.name.endswith("PUT") and int(argument or 0) > len(data)):
            raise ValueError(f"it has the instruction {opcode.name}, which no principal component analysis needs")
    analysis = _InertUnpickler(io.BytesIO(data)).load()
    if type(analysis).__name__ != "PCA" or not isinstance(getattr(analysis, "state", None), dict):
        raise ValueError(f"it has a {type(analysis).__name__}")
    return analysis.state


def _array(analysis: dict[str, Any], name: str, ndim: int) -> np.ndarray:
    """Returns a pickled array of numbers as float32."""
    array = analysis.get(name)
    if type(array).__name__ != "_reconstruct" or not isinstance(array, _Inert):
        raise ValueError(f"its {name} is not an array")
    _, shape, dtype, is_fortran, data = array.state
    kind, order = dtype.arguments[0], dtype.state[1]
    if kind not in ("f4", "f8") or order not in ("<", ">", "="):
        raise ValueError(f"its {name} has the type {order}{kind}; f4 or f8 is needed")
    sizes_fit = len(shape) == ndim and all(type(size) is int and size > 0 for size in shape)
    if not isinstance(data, bytes) or not sizes_fit or math.prod(shape) * int(kind[1]) != len(data):
        raise ValueError(
            f"its {name} has the shape {shape}; {ndim} dimensions with a number for each entry are needed"
        )
    numbers = np.frombuffer(data, np.dtype(f"{order}{kind}")).reshape(shape, order="F" if is_fortran is True else "C")
    with np.errstate(over="ignore"):
        numbers = np.array(numbers, np.float32, order="C")
    if not np.isfinite(numbers).all():
        raise ValueError(f"its {name} has numbers that are not finite")
    return numbers
