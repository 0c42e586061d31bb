"""Prismer for transformers: a vision-language model that looks through frozen experts (arXiv 2303.02506)."""

# ruff: noqa: F403, F405
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .installation import check_one_checkout, is_command


__version__ = "0.1.0"

__all__ = [
    "DataCollatorForPrismer",
    "DataCollatorForPrismerLM",
    "ExpertSpec",
    "PrismerConfig",
    "PrismerExpertsConfig",
    "PrismerForConditionalGeneration",
    "PrismerImageProcessor",
    "PrismerLMConfig",
    "PrismerLMForConditionalGeneration",
    "PrismerLMModel",
    "PrismerLMPreTrainedModel",
    "PrismerLMProcessor",
    "PrismerModel",
    "PrismerPreTrainedModel",
    "PrismerProcessor",
    "PrismerTextConfig",
    "PrismerTextModel",
    "PrismerVisionConfig",
    "PrismerVisionModel",
    "TASKS",
    "Task",
    "keep_freed_memory",
    "optimize_for_cpu",
    "pretrained_path",
    "register_for_auto_class",
    "register_task",
    "sample_image",
]

check_one_checkout()

if TYPE_CHECKING or not is_command():
    from .public import *
else:

    def __getattr__(name: str) -> Any:
        """The command line imports the public names when it needs one of them."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".public", __name__), name)
