"""How the images of a vision encoder are prepared: size, mean, standard deviation and filter."""

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)


# Of encoders whose folder has no image processor. All others were trained with the values of ImageNet.
_NORMALISATION = {
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


def read_encoder_settings(source: Any, config: Any = None) -> dict[str, Any]:
    """
    Settings of [`PrismerImageProcessor`] for one vision encoder. The whole image is resized to the encoder's square,
    without a crop, since the experts' maps must lie over the image.

    Args:
        source (`str`, `PreTrainedModel`, `PreTrainedConfig`, `ImageProcessingMixin` or `dict`, *optional*):
            The encoder as a Hub id, a folder, a model or a configuration, its image processor, or the settings
            themselves.
        config (`PreTrainedConfig`, *optional*): the encoder's configuration. Its image size has priority.

    Returns:
        `dict`: `size`, `image_mean`, `image_std` and `resample`. For a Prismer's encoder, which reads the experts'
        maps, also `expert_size`, `max_instances` and `max_words`.

    Raises:
        TypeError: if the source is none of these.
        ValueError: if no size is found.
    """
    if isinstance(source, Mapping):
        side = source.get("size")
        return {**source, "size": {"height": side, "width": side}} if isinstance(side, int) else dict(source)
    if isinstance(source, PreTrainedModel):
        config = config or source.config
        source = source.name_or_path
    elif isinstance(source, PreTrainedConfig):
        config, source = config or source, None
    if not isinstance(source, str | ImageProcessingMixin | None):
        raise TypeError(
            f"vision has a {type(source).__name__}; accepted are ids and folders of vision encoders, models, "
            "configurations, image processors, and dicts of settings"
        )
    image_processor: Any = _load(source) if isinstance(source, str) else source
    if hasattr(image_processor, "data_config"):  # of timm
        data = image_processor.data_config
        resample = getattr(Image.Resampling, data["interpolation"].upper())
        return _settings(data["input_size"][-1], data["mean"], data["std"], resample)
    side = _side_of_encoder(config) or _side_of_processor(image_processor)
    if side is None:
        raise ValueError(f"the size of the images for the vision encoder {source!r} is unknown: it has no settings")
    family = str(getattr(config, "model_type", ""))
    mean, std = next(
        (values for name, values in _NORMALISATION.items() if family.startswith(name)),
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )
    settings = _settings(
        side,
        getattr(image_processor, "image_mean", None) or mean,
        getattr(image_processor, "image_std", None) or std,
        getattr(image_processor, "resample", None) or Image.Resampling.BICUBIC,
    )
    if family == "prismer_vision_model":
        settings["expert_size"] = getattr(image_processor, "expert_size", side)
        for name in ("max_instances", "max_words"):
            if hasattr(image_processor, name):
                settings[name] = getattr(image_processor, name)
    return settings


def find_checkpoint(source: str) -> str:
    """The folder of a Prismer that the package ships, for its name; other ids and folders as they are."""
    try:  # without the package, in a saved folder alone (trust_remote_code), there is none
        from modeling_prismer.pretrained import find_checkpoint as find
    except ImportError:
        return source
    return find(source)


def _load(source: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(find_checkpoint(source)) if source else None
    except (OSError, ValueError):  # a folder with the model alone
        return None


def _settings(side: int, mean: Any, std: Any, resample: Any) -> dict[str, Any]:
    return {
        "size": {"height": side, "width": side},
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": int(resample),
    }


def _side_of_encoder(config: Any) -> int | None:
    """Side in pixels of the images that the network takes, which PrismerLM asks in the same way."""
    config = getattr(config, "vision_config", config)
    num_patches = getattr(config, "num_patches", None)
    if isinstance(num_patches, int):  # of a SigLIP 2 for images of any shape
        return math.isqrt(num_patches) * config.patch_size
    size = getattr(config, "image_size", None)
    return size if isinstance(size, int) else None


def _side_of_processor(image_processor: Any) -> int | None:
    for size in (getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None)):
        if size:
            size = dict(size)
            side = next((size[key] for key in ("height", "shortest_edge", "longest_edge") if size.get(key)), None)
            if side:
                return side
    return None
