"""Prismer in the tables that the common tests look into: a model of the library stands there by itself."""

from transformers.models.auto import modeling_auto, processing_auto


modeling_auto.MODEL_MAPPING_NAMES["prismer"] = "PrismerModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["prismer"] = "PrismerForConditionalGeneration"
processing_auto.PROCESSOR_MAPPING_NAMES["prismer"] = "PrismerProcessor"
