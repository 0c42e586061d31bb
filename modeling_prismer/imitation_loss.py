"""
The losses of a distillation of experts: the student's tokens and maps against those of the experts, as in PRISM (arXiv
2606.03444). PRISM compares features of each level with those of a teacher's level; here the tokens of an expert's stem
are the target at every level, and the cosine is that of tokens.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .expert_spec import BACKGROUND, ExpertSpec
from .imitation import ImitatingExpertsMixin, ImitationOutput


COSINE, SMOOTH_L1 = 0.9, 0.1  # weights of the two parts of the token loss
DECORRELATED_LEVELS = 2  # the first levels, which are to stay local
NEIGHBOURHOOD = 0.1  # standard deviation of a token's neighbourhood, as a share of the grid's side

Inputs = dict[str, dict[str, torch.Tensor]]  # for each expert, the arguments of its stem


@dataclass
class ImitationLoss:
    """
    The parts of the loss, each `()`.

    Args:
        tokens: mean over samples and experts, summed over levels.
        maps: mean over samples and experts.
        decorrelation: sum over the first levels.
        balance: mean over levels; 0 without routed adaptors.
    """

    tokens: torch.Tensor
    maps: torch.Tensor
    decorrelation: torch.Tensor
    balance: torch.Tensor

    def total(self, maps: float = 1.0, decorrelation: float = 0.5, balance: float = 0.01) -> torch.Tensor:
        """The weighted sum. PRISM has 0.5 for the decorrelation, and no maps in its first stage."""
        return self.tokens + maps * self.maps + decorrelation * self.decorrelation + balance * self.balance


def freeze_teachers(network: ImitatingExpertsMixin) -> None:
    """Freezes the stems of the imitated experts, with the statistics of their BatchNorms."""
    for name in network.imitation.names:
        network.expert_stems[name].requires_grad_(False).eval()


@torch.no_grad()
def teacher_tokens(network: ImitatingExpertsMixin, expert_inputs: Inputs, side: int) -> dict[str, torch.Tensor]:
    """
    The tokens of the imitated experts that are given, `(batch_size, side * side, width)`. The rows of instances are
    those of evaluation, because nobody could predict random ones.

    Raises:
        ValueError: if a stem's BatchNorm is in training mode: its tokens would depend on the batch.
    """
    tokens = {}
    for name in network.imitation.names:
        if name not in expert_inputs:
            continue
        stem, inputs = network.expert_stems[name], dict(expert_inputs[name])
        if any(norm.training for norm in stem.norms):
            raise ValueError(f"the stem of the teacher '{name}' is trained; call freeze_teachers first")
        if stem.num_instance_embeddings and "ids" in inputs and "rows" not in inputs:
            inputs["rows"] = stem.fixed_rows(inputs["ids"])
        grid = stem(**inputs)
        if grid.shape[2:] != (side, side):
            grid = F.interpolate(grid.float(), size=(side, side), mode="bilinear").to(grid.dtype)
        tokens[name] = grid.flatten(2).transpose(1, 2)
    return tokens


def token_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    0.9 of the cosine distance of tokens and 0.1 of the smooth L1 distance, relative to the target's root mean square.

    Args:
        predicted, target (`torch.FloatTensor` of shape `(batch_size, num_tokens, width)`)

    Returns:
        `torch.FloatTensor` of shape `(batch_size,)`.
    """
    predicted, target = predicted.float(), target.float()
    distance = 1 - F.cosine_similarity(predicted, target, dim=-1).mean(dim=1)
    scale = target.pow(2).mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    difference = F.smooth_l1_loss(predicted / scale, target / scale, reduction="none").mean(dim=(1, 2))
    return COSINE * distance + SMOOTH_L1 * difference


def map_target(spec: ExpertSpec, inputs: dict[str, torch.Tensor], side: int) -> torch.Tensor | None:
    """
    What the map of an imitated expert is compared with: values `(batch_size, channels, side, side)` of a dense expert,
    classes `(batch_size, side, side)` of a label expert, with the background last; `None` if a label expert is given
    as painted values.
    """
    if not spec.is_label:
        return F.interpolate(inputs["values"].float(), size=(side, side), mode="bilinear", antialias=True)
    if "ids" not in inputs:
        return None
    ids = F.interpolate(inputs["ids"][:, None].float(), size=(side, side), mode="nearest-exact")[:, 0].long()
    if spec.num_classes is None:
        return (ids == BACKGROUND).long()
    classes = ids
    if spec.instances:
        table = inputs["classes"].long()
        classes = table.gather(1, ids.clamp(0, table.shape[1] - 1).flatten(1)).view(ids.shape)
        classes = torch.where(ids < table.shape[1], classes, spec.num_classes)
    is_class = (ids >= 0) & (ids != BACKGROUND) & (classes >= 0) & (classes < spec.num_classes)
    return torch.where(is_class, classes, spec.num_classes)


def map_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of classes, or the smooth L1 distance of values: `(batch_size,)`."""
    if target.is_floating_point():
        return F.smooth_l1_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
    return F.cross_entropy(predicted.float(), target, reduction="none").mean(dim=(1, 2))


def decorrelation(hidden_states: torch.Tensor) -> torch.Tensor:
    """
    PRISM's decorrelation of a level: the mean absolute cosine between tokens, times one minus a Gaussian of their
    distance, so that distant tokens are to differ.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, side * side, width)`)
    """
    side = round(hidden_states.shape[1] ** 0.5)
    place = torch.stack(torch.meshgrid(*[torch.arange(side, device=hidden_states.device)] * 2, indexing="ij"), dim=-1)
    distance = torch.cdist(place.flatten(0, 1).float()[None], place.flatten(0, 1).float()[None])[0]
    far = 1 - torch.exp(-(distance**2) / (2 * (NEIGHBOURHOOD * side) ** 2))
    tokens = F.normalize(hidden_states.float(), dim=-1)
    return ((tokens @ tokens.transpose(1, 2)).abs() * far).mean()


def imitation_loss(
    network: ImitatingExpertsMixin,
    specs: list[ExpertSpec],
    imitated: ImitationOutput,
    expert_inputs: Inputs,
    present: dict[str, torch.Tensor] | None = None,
) -> ImitationLoss:
    """
    Args:
        network ([`ImitatingExpertsMixin`]): the network with stems and imitation.
        specs (`list[ExpertSpec]`): the configured experts.
        imitated ([`ImitationOutput`]): of the network.
        expert_inputs (`dict[str, dict[str, torch.Tensor]]`): the teachers, as arguments of their stems.
        present (`dict[str, torch.BoolTensor]`, *optional*):
            Samples that learn from each expert, `(batch_size,)`; by default all.
    """
    states = imitated.level_states
    side = round(states[-1].shape[1] ** 0.5)
    zero = states[-1].new_zeros((), dtype=torch.float32)
    tokens = maps = zero
    num_tokens = num_maps = zero
    described = {spec.name: spec for spec in specs}
    for name, target in teacher_tokens(network, expert_inputs, side).items():
        head = network.imitation.heads[name]
        weights = torch.ones(len(target), device=zero.device) if present is None else present[name].to(zero)
        predicted, own_map = head(states[-1], with_map=True)
        losses = token_losses(predicted, target)
        for level in range(len(states) - 1):
            losses = losses + token_losses(head.level_tokens(level, states[level]), target)
        tokens, num_tokens = tokens + (losses * weights).sum(), num_tokens + weights.sum()
        map_of = map_target(described[name], expert_inputs[name], own_map.shape[-1])
        if map_of is not None:
            maps = maps + (map_losses(own_map, map_of.to(zero.device)) * weights).sum()
            num_maps = num_maps + weights.sum()
    far = [decorrelation(level) for level in states[:DECORRELATED_LEVELS]]
    balances = [routes.balance() for routes in imitated.routes]
    return ImitationLoss(
        tokens=tokens / num_tokens.clamp(min=1),
        maps=maps / num_maps.clamp(min=1),
        decorrelation=torch.stack(far).sum(),
        balance=torch.stack(balances).mean() if balances else zero,
    )
