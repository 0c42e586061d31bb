"""
Routed adaptors: at some layers a shared adaptor and a mixture of small ones, of which a router chooses a few for each
token. The design is that of PRISM (arXiv 2606.03444), with adaptors in place of whole MLPs.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN

from .layers import PrismerLayerNorm


LOGIT_DROPOUT = 0.1  # of the router's scores, in training: it learns more than one way


@dataclass
class Routes:
    """
    The choice of a router.

    Args:
        probabilities (`torch.FloatTensor` of shape `(batch_size, num_tokens, num_adaptors)`): softmax of its scores.
        gates (`torch.FloatTensor` of the same shape): weights of the chosen adaptors, 0 for all others, of sum 1.
    """

    probabilities: torch.Tensor
    gates: torch.Tensor

    def balance(self, present: torch.Tensor | None = None) -> torch.Tensor:
        """
        The balance loss: the number of adaptors times the sum of load times mean probability. It is 1 if all adaptors
        serve equally many tokens, and at most the number of adaptors. `present` `(batch_size,)` selects samples.
        """
        probabilities, gates = self.probabilities, self.gates
        if present is not None:
            probabilities, gates = probabilities[present], gates[present]
        chosen = (gates > 0).float()
        load = chosen.flatten(0, 1).sum(dim=0) / chosen.sum().clamp(min=1)
        return probabilities.shape[-1] * (load * probabilities.flatten(0, 1).mean(dim=0)).sum()


class PrismerRouter(nn.Module):
    """
    Chooses adaptors for each token from `x + σ(W x) · (FiLM(x, c) − x)`, where x is the token and c a condition: the
    teacher that is imitated, or the image. FiLM starts as the identity, so that the condition has no effect at first.
    In training, the scores have learned noise, and a tenth of them is dropped.
    """

    def __init__(self, width: int, num_adaptors: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.film = nn.Linear(width, 2 * width)
        self.film_gate = nn.Linear(width, width)
        self.scores = nn.Linear(width, num_adaptors)
        self.noise = nn.Linear(width, num_adaptors)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> Routes:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, num_tokens, width)`): normalised tokens.
            condition (`torch.FloatTensor` of shape `(batch_size, width)`)
        """
        scale, shift = self.film(condition)[:, None].chunk(2, dim=-1)
        change = scale * hidden_states + shift  # FiLM(x, c) − x
        hidden_states = hidden_states + self.film_gate(hidden_states).sigmoid() * change
        scores = self.scores(hidden_states).float()
        if self.training:
            scores = scores + torch.randn_like(scores) * F.softplus(self.noise(hidden_states).float())
            scores = scores.masked_fill(torch.rand_like(scores) < LOGIT_DROPOUT, torch.finfo(scores.dtype).min)
        best, chosen = scores.topk(self.top_k, dim=-1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(dim=-1))
        return Routes(scores.softmax(dim=-1), gates)


class PrismerRoutedAdaptors(nn.Module):
    """
    A shared adaptor and a mixture of routed ones, in parallel, with a residual connection: each is `up(gelu(down(x)))`
    of the normalised tokens. They start as the identity.

    The routed adaptors are computed together, as one wide layer whose units a gate of 0 switches off: for adaptors
    this small it is faster than gathering tokens, and a token's result never depends on others.
    """

    def __init__(self, width: int, adaptor_size: int, num_adaptors: int, top_k: int, layer_norm_eps: float):
        super().__init__()
        self.num_adaptors = num_adaptors
        self.layer_norm = PrismerLayerNorm(width, eps=layer_norm_eps)
        self.activation = ACT2FN["gelu"]
        self.shared_down_proj = nn.Linear(width, adaptor_size)
        self.shared_up_proj = nn.Linear(adaptor_size, width)
        if num_adaptors:
            self.router = PrismerRouter(width, num_adaptors, top_k)
            self.down_proj = nn.Linear(width, num_adaptors * adaptor_size)
            self.up_proj = nn.Linear(num_adaptors * adaptor_size, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, Routes | None]:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, num_tokens, width)`)
            condition (`torch.FloatTensor` of shape `(batch_size, width)`): for the router.

        Returns:
            The tokens in the same shape, and the router's choice, `None` without routed adaptors.
        """
        inner, routes = self.layer_norm(hidden_states), None
        added = self.shared_up_proj(self.activation(self.shared_down_proj(inner)))
        if self.num_adaptors:
            routes = self.router(inner, condition)
            units = self.activation(self.down_proj(inner)).unflatten(-1, (self.num_adaptors, -1))
            added = added + self.up_proj((units * routes.gates[..., None].to(units.dtype)).flatten(-2))
        return hidden_states + added, routes


@torch.no_grad()
def init_adaptor_weights(module: nn.Module) -> None:
    """Initialises routed adaptors as the identity, and a router that its condition does not change."""
    if isinstance(module, PrismerRouter):
        for layer in (module.film, module.noise):
            init.zeros_(layer.weight)
            init.zeros_(layer.bias)
    elif isinstance(module, PrismerRoutedAdaptors):
        init.zeros_(module.shared_up_proj.weight)
        if module.num_adaptors:
            init.zeros_(module.up_proj.weight)
