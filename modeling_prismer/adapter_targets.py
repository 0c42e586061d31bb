"""
Which modules peft adapts where a configuration names none, as in `LoraConfig()`.

peft keeps a table for each method, from `model_type` to names of modules, and no door for models from outside: the
entries are put in when peft is imported, whether that is before this package or long after a model has been made.
peft itself is not imported here.
"""

import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .configuration_prismer import PrismerConfig, PrismerTextConfig, PrismerVisionConfig


_TABLES = "peft.utils.constants"

# Attention's queries and values, in the encoder, the resampler and the decoder, whose cross-attention has them too.
QUERY_AND_VALUE = ["q_proj", "v_proj"]
# Every projection of attention and MLP.
ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

# By the method's name in peft's tables; every other method has queries and values.
ADAPTER_TARGETS = {
    "ADALORA": ALL_PROJECTIONS,  # it takes ranks away where they are not needed
    "BEFT": ["v_proj"],  # the biases of the values
    "IA3": ["k_proj", "v_proj", "fc2"],
    "IA3_FEEDFORWARD": ["fc2"],
    "LNTUNING": r".*layer_?norm[12]?",
    "OSF": ALL_PROJECTIONS,
}
# FRoD decomposes modules of one name together, so they need one width; encoder and decoder may differ in theirs.
_FROD_TARGETS = r".*text_model\..*\.(q_proj|v_proj)"


def add_adapter_targets(tables: ModuleType) -> None:
    """Puts Prismer's model types in the tables of `peft.utils.constants`; what is in them already stays."""
    for name, table in vars(tables).items():
        match = re.fullmatch(r"TRANSFORMERS_MODELS_TO_(\w+?)(_TARGET)?_MODULES_MAPPING", name)
        if match is None:
            continue
        for config_class in (PrismerConfig, PrismerVisionConfig, PrismerTextConfig):
            targets = ADAPTER_TARGETS.get(match[1], QUERY_AND_VALUE)
            if match[1] == "FROD" and config_class is PrismerConfig:
                targets = _FROD_TARGETS
            table.setdefault(config_class.model_type, targets)


class _WhenImported(MetaPathFinder):
    """Finds peft's tables as Python would, and has the entries put in after they are loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_add(module: ModuleType) -> None:
                load(module)
                add_adapter_targets(module)

            spec.loader.exec_module = load_and_add  # type: ignore[method-assign]
        return spec


def register_adapter_targets() -> None:
    """Has the entries put in peft's tables: now if peft is imported, else as soon as it is."""
    if _TABLES in sys.modules:
        add_adapter_targets(sys.modules[_TABLES])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
