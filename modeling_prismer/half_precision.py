"""A warning about training in half precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)


class HalfPrecisionMixin(nn.Module):
    """
    Lets a model warn once if it trains weights in half precision, as happens after loading a float16 checkpoint.

    The weights are examined when training begins and after their type may have changed, not at every step.
    """

    _precision_is_known = False
    _has_warned_of_half_precision = False

    def train(self, mode: bool = True) -> Any:
        if mode and not self.training:
            self._precision_is_known = False
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:  # `to`, `half`, `float` and the like
        self._precision_is_known = False
        return super()._apply(fn, recurse)

    def warn_of_half_precision(self) -> None:
        """To be called at each training step."""
        if self._precision_is_known or self._has_warned_of_half_precision or torch.compiler.is_compiling():
            return
        self._precision_is_known = True
        trained = {parameter.dtype for parameter in self.parameters() if parameter.requires_grad}
        if trained.isdisjoint((torch.float16, torch.bfloat16)):
            return
        self._has_warned_of_half_precision = True
        if torch.float16 in trained:
            problem = "float16 weights are trained: AdamW divides by values that are 0 in float16, which gives NaN"
        else:
            problem = "bfloat16 weights are trained: they have 3 significant digits and lose small updates"
        logger.warning(
            f"{problem}. Load the model with from_pretrained(…, dtype=torch.float32). To save time and memory, train "
            "it under autocast, TrainingArguments(bf16=True). (Not meant for FSDP and DeepSpeed, if they keep a "
            "float32 copy of the weights.)"
        )
