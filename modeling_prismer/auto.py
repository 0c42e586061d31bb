"""
Registers the models with the Auto classes of transformers. `import modeling_prismer` imports this file.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS

from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig
from .configuration_prismer_lm import PrismerExpertsConfig, PrismerLMConfig
from .modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerModel,
    PrismerTextModel,
    PrismerVisionModel,
)
from .modeling_prismer_lm import PrismerLMForConditionalGeneration, PrismerLMModel
from .processing.image_processing_prismer import PrismerImageProcessor, PrismerImageProcessorTorchvision
from .processing.processing_prismer import PrismerProcessor
from .processing.processing_prismer_lm import PrismerLMProcessor


for config_class in (PrismerConfig, PrismerVisionConfig, PrismerTextConfig, PrismerExpertsConfig, PrismerLMConfig):
    AutoConfig.register(config_class.model_type, config_class)
AutoModel.register(PrismerConfig, PrismerModel)
AutoModel.register(PrismerVisionConfig, PrismerVisionModel)
AutoModel.register(PrismerTextConfig, PrismerTextModel)
AutoModelForImageTextToText.register(PrismerConfig, PrismerForConditionalGeneration)
AutoModel.register(PrismerLMConfig, PrismerLMModel)
AutoModelForImageTextToText.register(PrismerLMConfig, PrismerLMForConditionalGeneration)
# peft looks here for the model of an adapter with task_type="CAUSAL_LM"
AutoModelForCausalLM.register(PrismerConfig, PrismerForConditionalGeneration)
AutoModelForCausalLM.register(PrismerLMConfig, PrismerLMForConditionalGeneration)
# PIL is the default backend, because the published checkpoints were trained with it.
DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS.append(PrismerImageProcessor.__name__)
AutoImageProcessor.register(
    PrismerConfig,
    image_processor_classes={"pil": PrismerImageProcessor, "torchvision": PrismerImageProcessorTorchvision},
)
AutoProcessor.register(PrismerConfig, PrismerProcessor)
AutoProcessor.register(PrismerLMConfig, PrismerLMProcessor)


def register_for_auto_class() -> None:
    """
    Makes `save_pretrained` and `push_to_hub` save the code next to the model, the configuration and the processor.

    The saved folder or Hub repository then loads without this package:
    `AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)`. The same holds for `AutoConfig`,
    `AutoModel`, `AutoProcessor` and `pipeline`. Only live experts need the package.

    Example:

    ```python
    >>> from modeling_prismer import register_for_auto_class

    >>> register_for_auto_class()
    >>> model.save_pretrained("my-prismer")  # or model.push_to_hub("me/my-prismer")
    >>> files = processor.save_pretrained("my-prismer")
    ```
    """
    for config_or_processor in (
        *(PrismerConfig, PrismerVisionConfig, PrismerTextConfig, PrismerExpertsConfig, PrismerLMConfig),
        *(PrismerImageProcessor, PrismerImageProcessorTorchvision, PrismerProcessor, PrismerLMProcessor),
    ):
        config_or_processor.register_for_auto_class()
    for model_class in (PrismerForConditionalGeneration, PrismerLMForConditionalGeneration):
        model_class.register_for_auto_class("AutoModelForImageTextToText")
    for model_class in (PrismerModel, PrismerVisionModel, PrismerTextModel, PrismerLMModel):
        model_class.register_for_auto_class("AutoModel")
