"""
Muon for the matrices of a network and AdamW for the rest, as one optimizer for `Trainer`.

Muon (https://kellerjordan.github.io/posts/muon/) makes the update of a matrix orthogonal. What is new in a network,
and starts from nothing, learns from fewer samples with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modeling_prismer.expert_stems import PrismerResampler
from modeling_prismer.modeling_prismer import PrismerAdaptor


FASTER = 3
# Of what has a squared ReLU, whose output grows with the third power of the weights: at full speed, what the
# resampler's MLP adds to all latents alike soon drowns what differs between pictures.
SLOWER = 0.1


class MuonAndAdamW(torch.optim.Optimizer):
    """
    Args:
        matrices, others (`dict[float, list[nn.Parameter]]`): what Muon changes, and what AdamW does, by the factor of
            their learning rate.
        lr (`float`): of AdamW; Muon has [`FASTER`] times as much, its updates being scaled to the size of AdamW's.
        weight_decay (`float`): of both.
    """

    def __init__(
        self,
        matrices: dict[float, list[nn.Parameter]],
        others: dict[float, list[nn.Parameter]],
        lr: float,
        weight_decay: float,
    ):
        super().__init__(
            [each for part in (matrices, others) for group in part.values() for each in group], {"lr": lr}
        )

        def groups(part: dict[float, list[nn.Parameter]], lr: float) -> list[dict[str, Any]]:
            return [{"params": group, "lr": factor * lr} for factor, group in part.items()]

        self.parts = [
            torch.optim.Muon(
                groups(matrices, FASTER * lr), weight_decay=weight_decay / FASTER, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(groups(others, lr), weight_decay=weight_decay),
        ]
        self._share_groups()

    def _share_groups(self) -> None:  # a scheduler changes the parts' own groups
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Returns what `closure` does, which is called first, with gradients, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def muon_with(lr: float, weight_decay: float) -> tuple[Callable[[], Callable], dict[str, float]]:
    """[`muon_for`] as `optimizer_cls_and_kwargs` of a `Trainer`, which calls a factory for what takes the model."""
    return (lambda: muon_for), {"lr": lr, "weight_decay": weight_decay}


def muon_for(model: nn.Module, lr: float, weight_decay: float) -> MuonAndAdamW:
    """
    Muon for the weights of a model's linear layers but the last, AdamW for all else that is trained; the resampler and
    the adaptors at [`SLOWER`] times the speed.
    """
    last = model.get_output_embeddings()
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not last}
    squaring = [module for module in model.modules() if isinstance(module, (PrismerAdaptor, PrismerResampler))]
    slow = {parameter for module in squaring for parameter in module.parameters()}
    parts: list[dict[float, list[nn.Parameter]]] = [{}, {}]
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = parts[0 if parameter in matrices else 1]
            part.setdefault(SLOWER if parameter in slow else 1.0, []).append(parameter)
    return MuonAndAdamW(*parts, lr, weight_decay)
