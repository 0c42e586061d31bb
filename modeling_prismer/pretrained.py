"""The checkpoints and images inside the package."""

from pathlib import Path

from PIL import Image


_CHECKPOINTS = Path(__file__).parent / "checkpoints"
_ASSETS = Path(__file__).parent / "assets"
DEFAULT_CHECKPOINT = "prismer-scenes"


def pretrained_path(name: str = DEFAULT_CHECKPOINT) -> str:
    """
    Returns the folder of a checkpoint that is shipped with the package, for `from_pretrained`.

    Args:
        name (`str`, *optional*, defaults to `"prismer-scenes"`): the checkpoint.

    Raises:
        ValueError: if there is no such checkpoint; the message lists the shipped ones.

    Example:

    ```python
    >>> import os
    >>> from modeling_prismer import pretrained_path

    >>> os.path.basename(pretrained_path("prismer-easy-vqa"))
    'prismer-easy-vqa'
    ```
    """
    shipped = shipped_checkpoints()
    if name not in shipped:
        raise ValueError(f"no checkpoint {name!r} is shipped; accepted are: {', '.join(shipped) or 'none'}")
    return str(_CHECKPOINTS / name)


def shipped_checkpoints() -> list[str]:
    """The names that [`pretrained_path`] accepts."""
    return sorted(path.parent.name for path in _CHECKPOINTS.glob("*/config.json"))


def sample_image(name: str = "scene") -> Image.Image:
    """
    Returns an image that is shipped with the package.

    Args:
        name (`str`, *optional*, defaults to `"scene"`):
            `"scene"`, a rendered scene for `prismer-scenes`, or `"shape"`, a drawing for `prismer-easy-vqa`.

    Raises:
        ValueError: if there is no such image; the message lists the shipped ones.

    Example:

    ```python
    >>> from modeling_prismer import sample_image

    >>> sample_image("shape").size
    (64, 64)
    ```
    """
    shipped = sorted(path.stem for path in _ASSETS.glob("*.png"))
    if name not in shipped:
        raise ValueError(f"no image {name!r} is shipped; accepted are: {', '.join(shipped)}")
    with Image.open(_ASSETS / f"{name}.png") as image:
        return image.convert("RGB")


def find_checkpoint(model: str) -> str:
    """Returns the folder of a shipped checkpoint for its name. A folder or a Hub id is returned unchanged."""
    try:
        return model if Path(model).is_dir() else pretrained_path(model)
    except ValueError:  # not a shipped one
        return model
