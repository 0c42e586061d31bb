"""From pictures and text to the tensors that Prismer reads."""

from .augmentation import JointAugmentation
from .data_collator import DataCollatorForPrismer
from .image_loading import load_image, load_images
from .image_processing_prismer import PrismerImageProcessor, PrismerImageProcessorTorchvision
from .processing_prismer import PrismerProcessor, clean_caption, clean_question
