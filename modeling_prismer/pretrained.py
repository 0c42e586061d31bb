"""The checkpoints that are shipped inside the package."""

from pathlib import Path


_CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_CHECKPOINT = "prismer-scenes"


def pretrained_path(name: str = DEFAULT_CHECKPOINT) -> str:
    """
    The folder of a checkpoint that is shipped with the package, for `from_pretrained`.

    Args:
        name (`str`, *optional*, defaults to `"prismer-scenes"`): the checkpoint.

    Raises:
        ValueError: if there is none of that name; the message lists those there are.

    Example:

    ```python
    >>> import os
    >>> from modeling_prismer import pretrained_path

    >>> os.path.basename(pretrained_path("prismer-easy-vqa"))
    'prismer-easy-vqa'
    ```
    """
    shipped = sorted(path.parent.name for path in _CHECKPOINTS.glob("*/config.json"))
    if name not in shipped:
        raise ValueError(f"no checkpoint {name!r} is shipped; there are: {', '.join(shipped) or 'none'}")
    return str(_CHECKPOINTS / name)


def find_checkpoint(model: str) -> str:
    """A folder of the user's as it is; that of a shipped checkpoint for its name; else as it is, an id of the Hub."""
    try:
        return model if Path(model).is_dir() else pretrained_path(model)
    except ValueError:  # none that is shipped
        return model
