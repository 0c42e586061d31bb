"""PrismerLM in the tables that the common tests look into: a model of the library stands there by itself."""

from transformers.models.auto import modeling_auto

from ... import test_modeling_common


modeling_auto.MODEL_MAPPING_NAMES["prismer_lm"] = "PrismerLMModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["prismer_lm"] = "PrismerLMForConditionalGeneration"


def set_config_for_less_flaky_test(config, set_part=test_modeling_common.set_config_for_less_flaky_test):
    """The library's own expects a single vision encoder."""
    encoders = getattr(config, "vision_config", None)
    for part in [config.text_config, *encoders] if isinstance(encoders, list) else [config]:
        set_part(part)


test_modeling_common.set_config_for_less_flaky_test = set_config_for_less_flaky_test
