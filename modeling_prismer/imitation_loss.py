"""
The losses of a distillation of experts: the student's tokens and maps against those of the experts, as in PRISM (arXiv
2606.03444). PRISM compares features of each level with those of a teacher's level; here the tokens of an expert's stem
are the target at every level, and the cosine is that of tokens. The mean of an expert's tokens is subtracted and their
scale divided out, as in PHI-S of RADIO (arXiv 2410.01680, without its rotation).
"""

from collections.abc import Iterable
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
def teacher_tokens(
    network: ImitatingExpertsMixin, expert_inputs: Inputs, side: int | None = None
) -> dict[str, torch.Tensor]:
    """
    The tokens of the imitated experts that are given, `(batch_size, side * side, width)`, by default on their own
    grid. The rows of instances are those of evaluation, because nobody could predict random ones.

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
        if side is not None and grid.shape[2:] != (side, side):
            grid = F.interpolate(grid.float(), size=(side, side), mode="bilinear").to(grid.dtype)
        tokens[name] = grid.flatten(2).transpose(1, 2)
    return tokens


@torch.no_grad()
def fit_teachers(network: ImitatingExpertsMixin, batches: Iterable[tuple[Inputs, dict[str, torch.Tensor]]]) -> None:
    """
    Measures the mean of each imitated expert's tokens, for each channel, and their scale, for all channels together.
    The heads predict tokens in these units.

    Args:
        batches: for each batch, the teachers as arguments of their stems, and the samples that have each of them.

    Raises:
        ValueError: if an expert has no sample.
    """
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    numbers = dict.fromkeys(network.imitation.names, 0)
    for teachers, present in batches:
        for name, inputs in teachers.items():
            inputs = {suffix: tensor[present[name]] for suffix, tensor in inputs.items()}
            if not present[name].any():
                continue
            tokens = teacher_tokens(network, {name: inputs})[name].double().flatten(0, 1)
            sums[name] = sums.get(name, 0) + tokens.sum(dim=0)
            squares[name] = squares.get(name, 0) + tokens.pow(2).sum(dim=0)
            numbers[name] += len(tokens)
    for name, number in numbers.items():
        if not number:
            raise ValueError(f"no sample has the expert '{name}', which the network is to imitate")
        head, mean = network.imitation.heads[name], sums[name] / number
        head.token_mean.copy_(mean)
        head.token_scale.copy_((squares[name] / number - mean**2).mean().clamp(min=1e-12).sqrt())


def token_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    0.9 of the cosine distance of tokens and 0.1 of the smooth L1 distance.

    Args:
        predicted, target (`torch.FloatTensor` of shape `(batch_size, num_tokens, width)`): in the expert's units.

    Returns:
        `torch.FloatTensor` of shape `(batch_size,)`.
    """
    distance = 1 - F.cosine_similarity(predicted, target, dim=-1).mean(dim=1)
    difference = F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=(1, 2))
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
    all_states = imitated.level_states
    side = round(all_states[-1].shape[1] ** 0.5)
    zero = all_states[-1].new_zeros((), dtype=torch.float32)
    tokens, maps, num_tokens, num_maps = zero, zero, 0, 0
    described = {spec.name: spec for spec in specs}
    for name in (name for name in network.imitation.names if name in expert_inputs):
        head, inputs, states = network.imitation.heads[name], expert_inputs[name], all_states
        has_samples = True
        if present is not None:
            rows = present[name].nonzero()[:, 0]
            has_samples = len(rows) > 0
            rows = rows if has_samples else rows.new_zeros(1)
            states = tuple(level[rows.to(level.device)] for level in states)
            inputs = {suffix: tensor[rows.to(tensor.device)] for suffix, tensor in inputs.items()}
        predicted, own_map = head(states[-1], with_map=True)
        levels = [head.level_tokens(level, own) for level, own in enumerate(states[:-1])] + [predicted]
        if not has_samples:  # every process runs each head, so that DDP sees all gradients
            tokens = tokens + 0 * (torch.stack(levels).float().sum() + own_map.float().sum())
            continue
        target = head.normalize(teacher_tokens(network, {name: inputs}, side)[name].to(zero.device))
        tokens = tokens + sum(token_losses(head.normalize(level), target).sum() for level in levels)
        num_tokens += len(predicted)
        map_of = map_target(described[name], inputs, own_map.shape[-1])
        if map_of is not None:
            maps = maps + map_losses(own_map, map_of.to(zero.device)).sum()
            num_maps += len(predicted)
    far = [decorrelation(level) for level in all_states[:DECORRELATED_LEVELS]]
    balances = [routes.balance() for routes in imitated.routes]
    return ImitationLoss(
        tokens=tokens / max(num_tokens, 1),
        maps=maps / max(num_maps, 1),
        decorrelation=torch.stack(far).sum(),
        balance=torch.stack(balances).mean() if balances else zero,
    )
