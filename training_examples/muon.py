"""
Muon for the matrices of a network and AdamW for all other weights, in one optimizer for `Trainer`.

Muon (https://kellerjordan.github.io/posts/muon/) makes the update of a matrix orthogonal. With it, new modules with
random weights learn from fewer samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from timm.optim import muon
from torch import nn

from modeling_prismer.expert_stems import PrismerResamplerLayer
from modeling_prismer.modeling_prismer import PrismerAdaptor


# The learning rate of Muon is that of AdamW times this factor.
FASTER = 3
# The output of an MLP with a squared ReLU grows with the third power of its weights. At full speed, the MLPs of the
# resampler soon add the same large vector to all latents, which drowns the differences between images.
SLOWER = 0.1


class Muon(muon.Muon):
    """
    timm's Muon, computed in float32 on a CPU. timm computes in bfloat16, and a CPU without bfloat16 instructions
    multiplies such matrices more than ten times slower.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if any(parameter.is_cuda for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        exact = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
        with patch.object(muon, "zeropower_via_newtonschulz", exact):
            return super().step(closure)


def muon_with(lr: float, weight_decay: float) -> tuple[Callable[[], Callable], dict[str, float]]:
    """[`muon_for`] as `optimizer_cls_and_kwargs` of a `Trainer`, which calls the factory and passes the model."""
    return (lambda: muon_for), {"lr": lr, "weight_decay": weight_decay}


def muon_for(model: nn.Module, lr: float, weight_decay: float) -> Muon:
    """
    Muon for the weights of all linear layers except the output layer, AdamW for all other trained parameters. The
    adaptors and the resampler's MLPs learn [`SLOWER`].

    Args:
        model (`nn.Module`): parameters that need no gradient are left out.
        lr (`float`): learning rate of AdamW; Muon's is [`FASTER`].
        weight_decay (`float`): of both; what a step subtracts is `lr * weight_decay` times the weight.
    """
    last = model.get_output_embeddings()
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not last}
    squaring = [module for module in model.modules() if isinstance(module, PrismerAdaptor)]
    squaring += [module.mlp for module in model.modules() if isinstance(module, PrismerResamplerLayer)]
    slow = {parameter for module in squaring for parameter in module.parameters()}
    muon = {"use_muon": True, "nesterov": True, "weight_decay": weight_decay / FASTER}
    adamw = {"use_fallback": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    groups = []
    for is_matrix, settings, rate in ((True, muon, FASTER * lr), (False, adamw, lr)):
        for is_slow, factor in ((False, 1.0), (True, SLOWER)):
            parameters = [
                parameter
                for parameter in model.parameters()
                if parameter.requires_grad and (parameter in matrices, parameter in slow) == (is_matrix, is_slow)
            ]
            if parameters:
                groups.append({"params": parameters, "lr": factor * rate, **settings})
    return Muon(groups, ns_coefficients="original")
