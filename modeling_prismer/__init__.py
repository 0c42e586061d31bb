"""Prismer for transformers: a vision-language model that looks through frozen experts (arXiv 2303.02506)."""

from .auto import PrismerImageProcessor, PrismerProcessor, register_for_auto_class
from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig
from .cpu_inference import optimize_for_cpu
from .memory import keep_freed_memory
from .modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerModel,
    PrismerPreTrainedModel,
    PrismerTextModel,
    PrismerVisionModel,
)
from .pretrained import pretrained_path, sample_image
from .processing.data_collator import DataCollatorForPrismer


__version__ = "0.1.0"

__all__ = [
    "DataCollatorForPrismer",
    "PrismerConfig",
    "PrismerForConditionalGeneration",
    "PrismerImageProcessor",
    "PrismerModel",
    "PrismerPreTrainedModel",
    "PrismerProcessor",
    "PrismerTextConfig",
    "PrismerTextModel",
    "PrismerVisionConfig",
    "PrismerVisionModel",
    "keep_freed_memory",
    "optimize_for_cpu",
    "pretrained_path",
    "register_for_auto_class",
    "sample_image",
]
