"""Registers Prismer with the Auto classes of transformers; importing `modeling_prismer` does it."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS

from .adapter_targets import register_adapter_targets
from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig
from .modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerModel,
    PrismerTextModel,
    PrismerVisionModel,
)
from .processing.image_processing_prismer import PrismerImageProcessor, PrismerImageProcessorTorchvision
from .processing.processing_prismer import PrismerProcessor


for config_class in (PrismerConfig, PrismerVisionConfig, PrismerTextConfig):
    AutoConfig.register(config_class.model_type, config_class)
AutoModel.register(PrismerConfig, PrismerModel)
AutoModel.register(PrismerVisionConfig, PrismerVisionModel)
AutoModel.register(PrismerTextConfig, PrismerTextModel)
AutoModelForImageTextToText.register(PrismerConfig, PrismerForConditionalGeneration)
# Ours prepares pictures with PIL unless told otherwise: that is what the published checkpoints were trained on.
DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS.append(PrismerImageProcessor.__name__)
AutoImageProcessor.register(
    PrismerConfig,
    image_processor_classes={"pil": PrismerImageProcessor, "torchvision": PrismerImageProcessorTorchvision},
)
AutoProcessor.register(PrismerConfig, PrismerProcessor)
register_adapter_targets()
