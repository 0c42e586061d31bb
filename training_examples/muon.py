"""
Muon for the matrices of a network and AdamW for the rest, as one optimizer for `Trainer`.

Muon (https://kellerjordan.github.io/posts/muon/) makes the update of a matrix orthogonal. What is new in a network,
and starts from nothing, learns from fewer samples with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


FASTER = 3


class MuonAndAdamW(torch.optim.Optimizer):
    """
    Args:
        matrices, others (`list[nn.Parameter]`): what Muon changes, and what AdamW does.
        lr (`float`): of AdamW; Muon has [`FASTER`] times as much, its updates being scaled to the size of AdamW's.
        weight_decay (`float`): of both.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__([*matrices, *others], {"lr": lr})
        self.parts = [
            torch.optim.Muon(matrices, FASTER * lr, weight_decay / FASTER, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, weight_decay=weight_decay),
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
    """Muon for the weights of a model's linear layers but the last, AdamW for all else that is trained."""
    last = model.get_output_embeddings()
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not last and module.weight.requires_grad
    ]
    ids = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in ids]
    return MuonAndAdamW(matrices, others, lr, weight_decay)
