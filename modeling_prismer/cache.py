"""The cache of generation: the image's keys and values that it holds, and its name in the installed transformers."""

from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.deprecation import deprecate_kwarg


# transformers 5.24 renamed `past_key_values` to `cache`. In 5.23, `generate` and peft use the old name, so that it
# gives no warning there.
CACHE_NAME = (
    "cache" if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__ else "past_key_values"
)
accept_past_key_values = deprecate_kwarg(
    "past_key_values", "5.40.0" if CACHE_NAME == "cache" else "5.23.0", new_name="cache"
)


class ImageLayerMixin:
    """
    Gives a layer of a cache the image: the cross-attention's keys and values, one row for each image.

    The rows of text that see one image (beams, candidates, questions) share its row. Methods that reorder, repeat or
    crop the text therefore leave the image as it is; `reset` removes it.
    """

    encoder_hidden_states: torch.Tensor | None = None  # the states that the keys and values were projected from
    cross_keys_values: tuple[torch.Tensor, torch.Tensor] | None = None

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.encoder_hidden_states = self.cross_keys_values = None


class ImageDynamicLayer(ImageLayerMixin, DynamicLayer):
    """A layer of a [`~transformers.DynamicCache`] that also holds the image."""


class ImageStaticLayer(ImageLayerMixin, StaticLayer):
    """A layer of a [`~transformers.StaticCache`] that also holds the image."""


_IMAGE_LAYERS: dict[type, Any] = {DynamicLayer: ImageDynamicLayer, StaticLayer: ImageStaticLayer}


def image_layer(cache: Cache, index: int) -> Any:
    """The layer `index` of a cache, as one that also holds the image. It takes the place of the layer before."""
    layer = cache.layers[index]
    if isinstance(layer, ImageLayerMixin):
        return layer
    layer_class = type(layer)
    if layer_class not in _IMAGE_LAYERS:  # such as that of a quantised cache
        _IMAGE_LAYERS[layer_class] = type(f"Image{layer_class.__name__}", (ImageLayerMixin, layer_class), {})
    new_layer = _IMAGE_LAYERS[layer_class].__new__(_IMAGE_LAYERS[layer_class])
    new_layer.__dict__.update(layer.__dict__)
    cache.layers[index] = new_layer
    return new_layer


def repeat_cache(cache: Cache, repeats: int, config: PreTrainedConfig) -> DynamicCache:
    """A copy of a prompt's cache with every row repeated; the image is shared."""
    repeated = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        repeated.update(
            layer.keys.repeat_interleave(repeats, dim=0), layer.values.repeat_interleave(repeats, dim=0), index
        )
        if isinstance(layer, ImageLayerMixin):
            image_layer(repeated, index).cross_keys_values = layer.cross_keys_values
    return repeated


def name_cache_for_peft(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    Names the cache as peft before 0.22 expects it in the inputs of a generation step. Prompt learning would not find
    it by its name since transformers 5.24, and would prepend the virtual tokens at every step.
    """
    if "cache" in inputs and Version(version("peft")) < Version("0.22"):
        inputs["past_key_values"] = inputs.pop("cache")
    return inputs
