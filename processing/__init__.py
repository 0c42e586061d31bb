"""From images and text to the tensors that Prismer reads."""

from .augmentation import JointAugmentation
from .data_collator import DataCollatorForPrismer
from .data_collator_lm import DataCollatorForPrismerLM
from .image_loading import load_image, load_images
from .image_processing_prismer import PrismerImageProcessor, PrismerImageProcessorTorchvision
from .processing_prismer import PrismerProcessor
from .processing_prismer_lm import PrismerLMProcessor
from .tasks import Task, clean_caption, clean_question, register_task
