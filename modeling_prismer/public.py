"""The public names of `modeling_prismer`. Importing this file registers Prismer with the Auto classes."""

# ruff: noqa: F401
from .auto import PrismerImageProcessor, PrismerLMProcessor, PrismerProcessor, register_for_auto_class
from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig
from .configuration_prismer_lm import PrismerExpertsConfig, PrismerLMConfig
from .cpu_inference import optimize_for_cpu
from .expert_spec import ExpertSpec
from .memory import keep_freed_memory
from .modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerModel,
    PrismerPreTrainedModel,
    PrismerTextModel,
    PrismerVisionModel,
)
from .modeling_prismer_lm import PrismerLMForConditionalGeneration, PrismerLMModel, PrismerLMPreTrainedModel
from .pretrained import pretrained_path, sample_image
from .processing.data_collator import DataCollatorForPrismer
from .processing.data_collator_lm import DataCollatorForPrismerLM
from .processing.tasks import TASKS, Task, register_task
