"""The cache of generation: the image's keys and values that it holds, and its name in the installed transformers."""

from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg


logger = logging.get_logger(__name__)

# transformers 5.24 renamed `past_key_values` to `cache`. This keeps 5.23 working, whose `generate` and peft pass and
# expect the old name; without a warning there, as it is the right one.
CACHE_NAME = (
    "cache" if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__ else "past_key_values"
)
accept_past_key_values = deprecate_kwarg(
    "past_key_values", "5.40.0" if CACHE_NAME == "cache" else "5.23.0", new_name="cache"
)


class ImageCacheMixin:
    """
    Gives a cache the image: the cross-attention's keys and values of each layer, one row for each image.

    The rows of text that see one image (beams, candidates, questions) share its row. Methods that reorder, repeat or
    crop the text therefore leave the image as it is; `reset` removes it.
    """

    encoder_hidden_states: torch.Tensor | None = None  # the states that the keys and values were projected from
    cross_keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.cross_keys_values = {}

    def set_image(self, encoder_hidden_states: torch.Tensor) -> None:
        """The next forward pass projects these states, unless the cache holds them already."""
        if self.encoder_hidden_states is not encoder_hidden_states:
            self.encoder_hidden_states = encoder_hidden_states
            self.cross_keys_values = {}  # each layer adds its own, because its weights may be elsewhere until it runs

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.encoder_hidden_states = None
        self.cross_keys_values = {}


class PrismerDynamicCache(ImageCacheMixin, DynamicCache):
    """A [`~transformers.DynamicCache`] that also holds the image."""


class PrismerStaticCache(ImageCacheMixin, StaticCache):
    """A [`~transformers.StaticCache`] that also holds the image."""


class PrismerQuantizedCache(ImageCacheMixin, QuantizedCache):
    """A [`~transformers.QuantizedCache`] that also holds the image."""


_IMAGE_CACHES: dict[type[Cache], type[ImageCacheMixin]] = {
    DynamicCache: PrismerDynamicCache,
    StaticCache: PrismerStaticCache,
    QuantizedCache: PrismerQuantizedCache,
}


def as_image_cache(cache: Cache, encoder_hidden_states: torch.Tensor | None) -> Cache:
    """
    `cache`, or a view of it that also holds an image: `encoder_hidden_states`, else the image that it holds already.
    Both share the keys and values of the text. A class from elsewhere is returned as it is; it holds no image.
    """
    if not isinstance(cache, ImageCacheMixin):
        if encoder_hidden_states is None and not torch.compiler.is_compiling():
            length = cache.get_seq_length()
            if isinstance(length, int) and length > 0:  # that of a static cache is a tensor
                logger.warning_once(
                    "The given cache holds no image, so the text goes on without one. Continue with the `cache` of "
                    "the last output, or give `encoder_outputs` again."
                )
        if type(cache) not in _IMAGE_CACHES:
            return cache
        view_class = _IMAGE_CACHES[type(cache)]
        view = view_class.__new__(view_class)
        view.__dict__.update(cache.__dict__, cross_keys_values={})
        cache = view
    if encoder_hidden_states is not None:
        cache.set_image(encoder_hidden_states)
    return cache


def repeat_cache(cache: Cache, repeats: int, config: PreTrainedConfig) -> PrismerDynamicCache:
    """A copy of a prompt's cache with every row repeated; the image is shared."""
    repeated = PrismerDynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        repeated.update(
            layer.keys.repeat_interleave(repeats, dim=0), layer.values.repeat_interleave(repeats, dim=0), index
        )
    if isinstance(cache, ImageCacheMixin):
        repeated.encoder_hidden_states, repeated.cross_keys_values = (
            cache.encoder_hidden_states,
            cache.cross_keys_values,
        )
    return repeated


def name_cache_for_peft(inputs: dict[str, Any]) -> dict[str, Any]:
    """
    Names the cache as peft before 0.22 expects it in the inputs of a generation step. Prompt learning would not find
    it by its name since transformers 5.24, and would prepend the virtual tokens at every step.
    """
    if "cache" in inputs and Version(version("peft")) < Version("0.22"):
        inputs["past_key_values"] = inputs.pop("cache")
    return inputs
