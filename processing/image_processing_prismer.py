"""The image processor of Prismer. It prepares an image and its expert maps together."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging

from .expert_labels import (
    BACKGROUND,
    ExpertFields,
    check_expert_labels,
    grid_side,
    match_expert_labels,
    read_experts,
    read_ids,
    read_items,
    read_values,
    read_vectors,
)
from .image_loading import MAX_IMAGE_PIXELS, load_image, load_images


logger = logging.get_logger(__name__)


class PrismerImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    experts (`list[dict]`, *optional*, defaults to `self.experts`):
        Descriptions of the experts, as in [`PrismerConfig`].
    expert_size (`int`, *optional*, defaults to `self.expert_size`):
        Side of the expert maps in pixels.
    max_instances (`int`, *optional*, defaults to `self.max_instances`):
        Number of instances an image can have.
    max_words (`int`, *optional*, defaults to `self.max_words`):
        Number of words an image can have.
    max_image_pixels (`int`, *optional*, defaults to `self.max_image_pixels`):
        Refuse image files of more pixels than this.
    """

    experts: list[dict[str, Any]] | None
    expert_size: int | None
    max_instances: int | None
    max_words: int | None
    max_image_pixels: int | None


if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor as _Backend
else:
    _Backend = object


class _ImageAndExpertMaps(_Backend):
    """The base class of the two backends, which only differ in how they resize the RGB image."""

    valid_kwargs = PrismerImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    experts: list[dict[str, Any]] = []
    expert_size = 224
    max_instances = 128
    max_words = 128
    max_image_pixels = MAX_IMAGE_PIXELS

    def __init__(self, **kwargs: Unpack[PrismerImageProcessorKwargs]):
        super().__init__(**kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = ["pixel_values"]
        for expert in read_experts(self.experts):
            names += [f"{expert.name}_{suffix}" for suffix in expert.tensor_suffixes]
        return names + ["expert_mask"] if self.experts else names

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens URLs and paths by [`load_image`], within its limits. Images in memory are returned."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(each) for each in image_url_or_urls]
        if isinstance(image_url_or_urls, str):
            return load_image(image_url_or_urls, max_pixels=self.max_image_pixels)
        return super().fetch_images(image_url_or_urls)

    if TYPE_CHECKING:

        def __call__(
            self,
            images: Any,
            expert_labels: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
            **kwargs: Any,
        ) -> BatchFeature: ...

    def preprocess(
        self,
        images: Any,
        expert_labels: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        return_tensors: str | TensorType | None = "pt",
        **kwargs: Unpack[PrismerImageProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepares images and their expert maps for the network, as in evaluation: no augmentation.

        Args:
            images:
                One or many images: paths, URLs, PIL images, arrays, tensors; see [`load_images`]. They are always
                turned upright and converted to RGB.
            expert_labels (`dict` or `list[dict]`, *optional*):
                For each image a dict from an expert's name to its label (or one dict for a single image). `None`, or
                a missing name, means that the image has no label of this expert. Labels have any size, usually that
                of the image. A map is a NumPy array, a torch tensor or a PIL image, of integers:

                - dense: (H, W), (H, W, C) or (C, H, W), values from 0 to 255;
                - features: `{"values": (h, w, C) uint8, "low": (groups,), "high": (groups,)}`; 0 to 255 stand for
                  `low` to `high` of the group of a channel;
                - label: (H, W) or `{"ids": (H, W)}`, class ids;
                - label with `instances`: `{"ids": (H, W), "classes": [class of instance 0, …]}`;
                - label without `num_classes`: `{"ids": (H, W), "features": (n, channels) float}`; the ids are numbers
                  of words (or instances).

                Ids may have any integer type. 255 and negative ids are background. Ids without a meaning become
                background with a warning: classes from `num_classes` on, instances and words that are not listed,
                instances from `max_instances` on and words from `max_words` on.
            return_tensors (`str` or `TensorType`, *optional*, defaults to `"pt"`):
                `"pt"` or `"np"`; `None` means `"np"`.
            kwargs:
                Any attribute of the image processor, for this call only. `device` is the device of the tensors.

        Returns:
            [`BatchFeature`] with `pixel_values` (batch, 3, height, width) float32, and for each expert, with S =
            `expert_size`:

            - `<name>_values` (batch, channels, S, S) float32 in [-1, 1], for dense; 0 where missing;
            - `<name>_values` (batch, channels, S // 16, S // 16) float32, for features; 0 where missing;
            - `<name>_ids` (batch, S, S) uint8, for label; 255 where missing or background;
            - `<name>_classes` (batch, max_instances) int64, for label with instances; 0 beyond the last;
            - `<name>_features` (batch, max_words, channels) float32, for label without `num_classes`; 0 beyond the
              last;
            - `expert_mask` (batch, number of experts) bool: which image has which expert, in the order of `experts`.

        Raises:
            ValueError, TypeError: naming the image or the label, what is wrong and what is accepted.
        """
        return super().preprocess(images, expert_labels, return_tensors=return_tensors, **kwargs)

    def _preprocess_opened(
        self,
        images: list[Image.Image],
        labels: list[dict[str, Any]],
        return_tensors: str | TensorType | None = "pt",
        **kwargs: Unpack[PrismerImageProcessorKwargs],
    ) -> BatchFeature:
        """[`preprocess`] of images from [`load_images`] and labels from [`match_expert_labels`]."""
        return super().preprocess(images, labels, True, return_tensors=return_tensors, **kwargs)

    def _standardize_kwargs(self, experts: list[dict[str, Any]] | None = None, **kwargs: Any) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        experts = experts or []
        read_experts(experts)
        return {"experts": experts, **kwargs}

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs["do_resize"] and not (kwargs["size"].height and kwargs["size"].width):
            raise ValueError(f"size is {dict(kwargs['size'])}; {{'height': …, 'width': …}} is needed")
        for name in ("do_center_crop", "do_pad"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported: the expert maps would no longer lie over the image")
        if kwargs.get("data_format") not in (None, "channels_first"):
            raise ValueError(f"data_format is {kwargs['data_format']!r}; the network reads 'channels_first'")

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        expert_labels: Any = None,
        is_opened: bool = False,
        *,
        experts: list[dict[str, Any]],
        expert_size: int,
        max_instances: int,
        max_words: int,
        max_image_pixels: int | None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        described = read_experts(experts)
        names = [expert.name for expert in described]
        if not is_opened:
            images = load_images(images, max_pixels=max_image_pixels, input_data_format=input_data_format)
            expert_labels = match_expert_labels(expert_labels, len(images), names)
        if len(images) > 1:
            for number, labels in enumerate(expert_labels):
                check_expert_labels(labels, described, f"sample {number}")
        data = {"pixel_values": self._pixel_values(images, device=device, **kwargs)}
        for expert in described:
            own = [labels.get(expert.name) for labels in expert_labels]
            if expert.is_features:
                data.update(_vector_tensors(own, expert, grid_side(expert_size)))
            elif expert.is_dense:
                data.update(_dense_tensors(own, expert, expert_size))
            else:
                max_items = max_instances if expert.instances else max_words
                data.update(_label_tensors(own, expert, expert_size, max_items))
        if names:
            data["expert_mask"] = np.array(
                [[labels.get(name) is not None for name in names] for labels in expert_labels]
            )
        features = BatchFeature(data, tensor_type=return_tensors)
        return features if device is None or return_tensors in (None, "np") else features.to(device)

    def _pixel_values(self, images: list[Image.Image], *_: Any, **kwargs: Any) -> np.ndarray | torch.Tensor:
        """The resized and normalised images, (batch, 3, height, width) float32."""
        raise NotImplementedError


class PrismerImageProcessor(_ImageAndExpertMaps, PilBackend):
    """
    Prepares images and expert maps for Prismer, with Pillow, exactly as in evaluation of the published checkpoints.

    The image is resized by `resample` with antialiasing and normalised. Expert maps are resized to `expert_size` by
    nearest neighbour. Dense maps are then stretched to [-1, 1] over all their channels, `2 * (x - min) / (max - min +
    1e-6) - 1`. Maps of ids are not changed, because the network paints them with its own tables.

    Args:
        experts (`list[dict]`, *optional*, defaults to `[]`):
            Descriptions of the experts, the same list as in [`PrismerConfig`]: dicts with the fields of
            [`ExpertSpec`].
        size (`dict[str, int]`, *optional*, defaults to `{"height": 224, "width": 224}`):
            Size of the image for the network, in pixels.
        expert_size (`int`, *optional*, defaults to 224):
            Side of the expert maps in pixels, at any size of the image.
        max_instances (`int`, *optional*, defaults to 128):
            Number of instances that an image can have; further instances become background.
        max_words (`int`, *optional*, defaults to 128):
            Number of words that an image can have; further words become background.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether to resize the image. Without resizing, all images of a batch must have the same size.
        resample (`PILImageResampling`, *optional*, defaults to `BICUBIC`):
            Filter for the image. Expert maps are always resized by nearest neighbour.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to multiply the image's 8-bit values by `rescale_factor`, 1/255.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`.
        image_mean (`list[float]`, *optional*, defaults to CLIP's):
            Mean of the channels, after `rescale_factor`.
        image_std (`list[float]`, *optional*, defaults to CLIP's):
            Standard deviation of the channels, after `rescale_factor`.
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Part of the interface only: images are always converted to RGB, because the network reads three channels.
        max_image_pixels (`int`, *optional*, defaults to 178,956,970):
            Refuse image files of more pixels than this, before they are decoded.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing import PrismerImageProcessor

    >>> image_processor = PrismerImageProcessor(experts=[{"name": "depth", "kind": "dense", "channels": 1}])
    >>> image, depth = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)
    >>> inputs = image_processor(image, {"depth": depth})
    >>> {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    {'pixel_values': (1, 3, 224, 224), 'depth_values': (1, 1, 224, 224), 'expert_mask': (1, 1)}
    ```
    """

    def _pixel_values(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: Any,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        **kwargs: Any,
    ) -> np.ndarray:
        if do_resize:
            images = [_resize_image(image, size.width, size.height, resample) for image in images]
        _require_one_size([image.size for image in images])
        scale = np.full(3, rescale_factor if do_rescale else 1.0)
        shift = np.zeros(3)
        if do_normalize:
            scale, shift = scale / image_std, -np.divide(image_mean, image_std)
        pixel_values = np.empty((len(images), 3, images[0].height, images[0].width), np.float32)
        for row, image in zip(pixel_values, images):
            pixels = np.asarray(image).transpose(2, 0, 1)
            np.multiply(pixels, scale.astype(np.float32)[:, None, None], out=row)
            row += shift.astype(np.float32)[:, None, None]
        return pixel_values


class PrismerImageProcessorTorchvision(_ImageAndExpertMaps, TorchvisionBackend):
    """
    [`PrismerImageProcessor`] with torchvision for the image, also on a GPU (`device="cuda"` in the call).

    Its antialiased bicubic filter differs from Pillow's by up to one 8-bit step, 0.015 after normalisation. Arguments
    and expert maps are the same as those of [`PrismerImageProcessor`].

    Example:

    ```python
    >>> from modeling_prismer.processing import PrismerImageProcessorTorchvision

    >>> image_processor = PrismerImageProcessorTorchvision(size={"height": 480, "width": 480})
    >>> image_processor(image)["pixel_values"].shape  # with device="cuda" it runs on the GPU
    torch.Size([1, 3, 480, 480])
    ```
    """

    def _pixel_values(
        self, images: list[Image.Image], device: str | torch.device | None = None, **kwargs: Any
    ) -> torch.Tensor:
        tensors = [self.process_image(image, do_convert_rgb=True, device=device) for image in images]
        kwargs["disable_grouping"] = kwargs.get("disable_grouping")
        tensors = self._preprocess(tensors, return_tensors=None, **kwargs)["pixel_values"]
        _require_one_size([tensor.shape[:0:-1] for tensor in tensors])
        return torch.stack(list(tensors))


def _require_one_size(sizes: list[tuple[int, int]]) -> None:
    if len(set(sizes)) > 1:
        several = ", ".join(sorted({f"{width}×{height}" for width, height in sizes}))
        raise ValueError(f"do_resize is False and the images have several sizes ({several}); a batch needs one size")


def _resize_image(image: Image.Image, width: int, height: int, resample: PILImageResampling) -> Image.Image:
    # Pillow resizes one direction after the other. Version 13 starts with the height if that shrinks more, which
    # changes values by up to two 8-bit steps, so the width always comes first here. A very tall image, whose widened
    # version would fill the memory, is the exception.
    width_first = width * image.height <= MAX_IMAGE_PIXELS
    image = image.resize((width, image.height) if width_first else (image.width, height), resample)
    return image.resize((width, height), resample)


def _dense_tensors(labels: list[Any], expert: ExpertFields, size: int) -> dict[str, np.ndarray]:
    values = np.zeros((len(labels), expert.channels, size, size), np.float32)
    for row, label in zip(values, labels):
        if label is None:
            continue
        channels = [_resize_map(channel, size) for channel in read_values(label, expert)]
        low, high = np.float32(min(c.min() for c in channels) / 255), np.float32(max(c.max() for c in channels) / 255)
        # an 8-bit map has 256 values: stretch those, then look up each pixel's
        stretched = 2 * (np.arange(256, dtype=np.float32) / 255 - low) / (high - low + np.float32(1e-6)) - 1
        for out, channel in zip(row, channels):
            np.take(stretched, channel, out=out)
    return {f"{expert.name}_values": values}


def _vector_tensors(labels: list[Any], expert: ExpertFields, side: int) -> dict[str, np.ndarray]:
    values = np.zeros((len(labels), expert.channels, side, side), np.float32)
    for row, label in zip(values, labels):
        if label is not None:
            vectors = torch.from_numpy(np.ascontiguousarray(read_vectors(label, expert)))[None]
            row[:] = torch.nn.functional.interpolate(vectors, size=(side, side), mode="bilinear", antialias=True)[0]
    return {f"{expert.name}_values": values}


def _label_tensors(labels: list[Any], expert: ExpertFields, size: int, max_items: int) -> dict[str, np.ndarray]:
    name = expert.name
    ids = np.full((len(labels), size, size), BACKGROUND, np.uint8)
    tensors: dict[str, np.ndarray] = {f"{name}_ids": ids}
    items: np.ndarray | None = None
    if "classes" in expert.tensor_suffixes:
        tensors[f"{name}_classes"] = items = np.zeros((len(labels), max_items), np.int64)
    elif "features" in expert.tensor_suffixes:
        tensors[f"{name}_features"] = items = np.zeros((len(labels), max_items, expert.channels), np.float32)

    for row, label in enumerate(labels):
        if label is None:
            continue
        ids[row] = _resize_map(read_ids(label, expert), size)
        values = read_items(label, expert)
        if items is None or values is None:
            _clear_ids(ids[row], expert.num_classes or 0, f"{name} label has ids that are not among its classes")
            continue
        _clear_ids(ids[row], len(values), f"{name} label has ids without an entry in '{expert.tensor_suffixes[1]}'")
        if len(values) > max_items:
            setting = "max_instances" if expert.instances else "max_words"
            logger.warning_once(
                f"An image has more than {max_items} entries of the expert '{name}': the first {max_items} are kept, "
                f"the rest becomes background ({setting}={max_items})."
            )
            ids[row][ids[row] >= max_items] = BACKGROUND
        items[row, : len(values)] = values[:max_items]
    return tensors


def _clear_ids(ids: np.ndarray, number: int, reason: str) -> None:
    """Turns ids without a meaning, those from `number` on, into background."""
    beyond = (ids >= min(number, BACKGROUND)) & (ids != BACKGROUND)
    if beyond.any():
        logger.warning_once(f"{reason}: they become background.")
        ids[beyond] = BACKGROUND


def _resize_map(values: np.ndarray, size: int) -> np.ndarray:
    """Resizes (H, W) uint8 to (size, size) by Pillow's nearest neighbour."""
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST))


__all__ = ["PrismerImageProcessor", "PrismerImageProcessorTorchvision"]
