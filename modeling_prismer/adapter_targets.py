"""
The modules that peft adapts if a configuration names none, as in `LoraConfig()`.

peft has one table for each method, from `model_type` to names of modules, and no function that adds to them. peft
itself is not imported here.
"""

import re
import sys

from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig


# Queries and values of all attention, in the encoder, the resampler and the decoder with its cross-attention.
QUERY_AND_VALUE = ["q_proj", "v_proj"]
# Every projection of attention and MLP.
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

# By the method's name in peft's tables. Every other method adapts queries and values.
ADAPTER_TARGETS = {
    "ADALORA": ALL_PROJECTIONS,  # it removes the ranks that are not needed
    "BEFT": ["v_proj"],  # the biases of the values
    "IA3": ["k_proj", "v_proj", "fc2"],
    "IA3_FEEDFORWARD": ["fc2"],
    "LNTUNING": r".*layer_?norm[12]?",
    "OSF": ALL_PROJECTIONS,
}
# FRoD decomposes modules of one name together, so they need the same width. Encoder and decoder may differ in theirs.
_FROD_TARGETS = r".*text_model\..*\.(q_proj|v_proj)"
# PrismerLM: the language model alone, by the names of its families. A vision encoder of its own stays as it is.
_LANGUAGE_MODEL_NAMES = {"BEFT": "v_proj", "LNTUNING": r"\w*norm\w*|ln_\w+"}
_LANGUAGE_MODEL_QUERIES_AND_VALUES = "q_proj|v_proj|qkv_proj|c_attn|query_key_value"


def register_adapter_targets() -> None:
    """
    Adds Prismer's model types to peft's tables if peft is imported. Existing entries stay.

    Every new model calls it, so that the order of the imports does not matter.
    """
    tables = sys.modules.get("peft.utils.constants")
    if tables is None:
        return
    for name, table in vars(tables).items():
        match = re.fullmatch(r"TRANSFORMERS_MODELS_TO_(\w+?)(_TARGET)?_MODULES_MAPPING", name)
        if match is None:
            continue
        for config_class in (PrismerConfig, PrismerVisionConfig, PrismerTextConfig):
            targets = ADAPTER_TARGETS.get(match[1], QUERY_AND_VALUE)
            if match[1] == "FROD" and config_class is PrismerConfig:
                targets = _FROD_TARGETS
            table.setdefault(config_class.model_type, targets)
        if not match[1].startswith("IA3"):  # it takes no regular expression
            names = _LANGUAGE_MODEL_NAMES.get(match[1], _LANGUAGE_MODEL_QUERIES_AND_VALUES)
            table.setdefault("prismer_lm", rf".*language_model\.(?!.*(vision|visual)).*\.({names})")
