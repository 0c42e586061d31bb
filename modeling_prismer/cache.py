"""The cache of generation: its name in the installed transformers, and copies of it for many candidates."""

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.deprecation import deprecate_kwarg


# transformers 5.24 renamed `past_key_values` to `cache`. This keeps 5.23 working, whose `generate` and peft pass and
# expect the old name; without a warning there, as it is the right one.
CACHE_NAME = (
    "cache" if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__ else "past_key_values"
)
accept_past_key_values = deprecate_kwarg(
    "past_key_values", "5.40.0" if CACHE_NAME == "cache" else "5.23.0", new_name="cache"
)


def repeat_cache(cache: Cache, repeats: int, config: PreTrainedConfig) -> DynamicCache:
    """A copy of a prompt's cache with every row repeated; the image's keys and values are shared."""
    repeated = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        repeated.update(
            layer.keys.repeat_interleave(repeats, dim=0), layer.values.repeat_interleave(repeats, dim=0), index
        )
    repeated.encoded = getattr(cache, "encoded", None)
    repeated.cross_keys_values = getattr(cache, "cross_keys_values", {})
    return repeated
