"""The base class of experts that run a model of transformers through its Auto classes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from .base import Expert


MAX_ASPECT = 8  # the largest ratio of long to short side that a network gets; longer images are compressed to it
HALF = (torch.float16, torch.bfloat16)
LAYERS_IN_HALF = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)


@dataclass(frozen=True)
class KnownModel:
    """
    Licence and size of a model's weights, and the settings of the image processor that this package uses with it.

    Attributes:
        license (`str`): as the model's page on the Hub names it.
        size_in_bytes (`int`): of the weights that are loaded, in single precision.
        image_processor (`dict`): settings that differ from the model's own.
    """

    license: str
    size_in_bytes: int
    image_processor: dict[str, Any] = field(default_factory=dict)


class PretrainedExpert(Expert):
    """
    An expert that runs a model of transformers with its image processor, from the Hub or a folder.

    Every image is prepared alone, and images with tensors of the same shape run together, so that an image's label
    does not depend on the other images of its batch. On CUDA, linear and convolutional layers run in half precision
    by autocast, and the rest in single precision, unless a `dtype` is set.

    Args:
        model_id (`str`, *optional*):
            Hub id, or a folder with the model and its image processor, which is saved with the suite.
        image_processor (`dict`, *optional*):
            Settings of the image processor that differ from the model's own. By default those in `known_models` for
            a model that is listed there, and none for other models.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from modeling_prismer.processing.experts import PretrainedExpert

    >>> class Saliency(PretrainedExpert):
    ...     name, kind, channels = "saliency", "dense", 1
    ...     auto_model = "AutoModelForDepthEstimation"  # any Auto class of transformers
    ...     model_id = "me/saliency"  # loaded when it first runs
    ...
    ...     def run(self, images):
    ...         labels = [None] * len(images)
    ...         for numbers, outputs in self.outputs(images):
    ...             for number, values in zip(numbers, outputs.predicted_depth):
    ...                 map = Image.fromarray(values.clamp(0, 1).mul(255).byte().cpu().numpy())
    ...                 labels[number] = np.asarray(map.resize(images[number].size))
    ...         return labels

    >>> Saliency().description
    {'name': 'saliency', 'kind': 'dense', 'channels': 1}
    ```
    """

    auto_model: ClassVar[str]
    known_models: ClassVar[dict[str, KnownModel]] = {}

    file_settings = ("model_id",)
    half_on_cuda = True
    source = "transformers"

    def __init__(self, model_id: str | None = None, image_processor: dict[str, Any] | None = None):
        self.model_id = str(type(self).model_id if model_id is None else model_id)
        known = self.known_models.get(self.model_id)
        if image_processor is None:
            image_processor = known.image_processor if known else {}
        self.image_processor = dict(image_processor)
        self.license = known.license if known else "not stated"
        self.size_in_bytes = known.size_in_bytes if known else _size_of(self.model_id)
        self._config: Any = None

    def load_model(self) -> torch.nn.Module:
        import transformers

        auto_model = getattr(transformers, self.auto_model)
        model = auto_model.from_pretrained(self.model_id, dtype=torch.float32)
        self._config = model.config
        # OneFormer's would open a file of names, wherever a checkpoint says
        no_file = {"class_info_file": None} if model.config.model_type == "oneformer" else {}
        image_processor = transformers.AutoImageProcessor.from_pretrained(self.model_id, **no_file)
        accepted = {*image_processor.valid_kwargs.__annotations__} - {"class_info_file", "repo_path"}
        # as arguments of from_pretrained, they could also change the source and allow its code to run
        if unknown := sorted(set(self.image_processor) - set(accepted)):
            raise ValueError(
                f"image_processor of the expert '{self.name}' has {', '.join(unknown)}; "
                f"{type(image_processor).__name__} has {', '.join(sorted(accepted))}"
            )
        self._image_processor = image_processor
        if self.image_processor:
            self._image_processor = type(image_processor).from_dict(image_processor.to_dict(), **self.image_processor)
        return model

    def place_model(self) -> None:
        place(self.model, self.device, self.running_dtype)

    @property
    def model_config(self) -> Any:
        """The model's configuration. It comes from the Hub or its cache if the model is not loaded."""
        if self._config is None:
            from transformers import AutoConfig

            self.check_hub_ids()
            self._config = AutoConfig.from_pretrained(self.model_id)
        return self._config

    def outputs(self, images: list[Image.Image]) -> Iterator[tuple[list[int], Any]]:
        """
        Runs the model.

        Args:
            images (`list[PIL.Image.Image]`): RGB, of any sizes.

        Yields:
            `tuple`: the numbers of the images that ran together, and the model's output for them.
        """
        for indices, inputs in self.prepared(images):
            yield indices, self.forward(inputs)

    def prepared(self, images: list[Image.Image]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """
        Prepares images for the model.

        Args:
            images (`list[PIL.Image.Image]`): RGB, of any sizes.

        Yields:
            `tuple`: the numbers of the images that run together, and their tensors, such as `pixel_values`.
        """
        groups: dict[Any, list[tuple[int, dict[str, torch.Tensor]]]] = {}
        for index, image in enumerate(images):
            prepared = self._image_processor(images=within_aspect(image), return_tensors="pt")
            inputs = {name: prepared[name] for name in ("pixel_values", "pixel_mask") if name in prepared}
            shapes = tuple(tensor.shape for tensor in inputs.values())
            groups.setdefault(shapes, []).append((index, inputs))
        for members in groups.values():
            inputs = {name: torch.cat([own[name] for _, own in members]).to(self.device) for name in members[0][1]}
            yield [index for index, _ in members], inputs

    def forward(self, inputs: dict[str, Any]) -> Any:
        """The model's output for prepared inputs."""
        with autocast(self.device, self.running_dtype):
            return self.model(**inputs)


def place(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a model. In half precision, only the layers with nearly all of the weights take that dtype."""
    model.to(device=device, dtype=torch.float32 if dtype in HALF else dtype)
    if dtype in HALF:
        # some models combine the other layers, norms and embeddings, with values that they create in float32
        for module in model.modules():
            if isinstance(module, LAYERS_IN_HALF):
                module.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model runs that [`place`] has moved."""
    return torch.autocast(device.type, dtype=dtype if dtype in HALF else None, enabled=dtype in HALF)


class ClassNames:
    """Adds `num_classes` and `class_names`, from the model's `id2label`."""

    model_config: Any

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in order; `"N/A"` for numbers that the model does not use."""
        names = {int(index): str(name) for index, name in self.model_config.id2label.items()}
        return [names.get(index, "N/A") for index in range(max(names) + 1)]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def within_aspect(image: Image.Image, most: int = MAX_ASPECT) -> Image.Image:
    """The image with its long side reduced to at most `most` times the short one. Networks cannot read thin strips."""
    width, height = image.size
    size = (min(width, most * height), min(height, most * width))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def resize_bilinear(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes (channels, height, width) float to (channels, size[1], size[0]); antialiased if it becomes smaller."""
    if maps.shape[-2:] == (size[1], size[0]):
        return maps
    return torch.nn.functional.interpolate(
        maps[None], size=(size[1], size[0]), mode="bilinear", align_corners=False, antialias=True
    )[0]


def _size_of(model_id: str) -> int:
    """Size in bytes of the weights in a folder; 0 if it is not a folder."""
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        return 0
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)
