"""The loss of a distillation of experts, for the trainers of the recipes, and a measure of the imitation."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from modeling_prismer.expert_stems import gather_expert_inputs, pop_expert_inputs
from modeling_prismer.imitation import ImitationOutput
from modeling_prismer.imitation_loss import (
    ImitationLoss,
    Inputs,
    fit_teachers,
    freeze_teachers,
    imitation_loss,
    teacher_tokens,
)


@dataclass
class Distillation:
    """
    The settings of a distillation.

    Args:
        stage (`str`):
            `"teachers"`: each sample imitates one of its experts, and the routers know which. `"experts"`: the routers
            see the image, and one pass imitates all experts. `"task"`: so it does, and the network learns its task on
            the imitations.
        weight (`float`): weight of the distillation beside the task's loss.
        live_experts (`float`): in `"task"`, the share of experts that stay live in a sample.
        maps, decorrelation, balance (`float`): weights of the parts; see [`ImitationLoss.total`].
    """

    stage: str = "teachers"
    weight: float = 1.0
    live_experts: float = 0.0
    maps: float = 1.0
    decorrelation: float = 0.5
    balance: float = 0.01


@contextmanager
def forward_as(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While it is open, `model(…)` calls `function`. A wrapper such as DDP around the model then synchronises it."""
    own = vars(model).get("forward")
    model.forward = function
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class DistillationMixin:
    """
    Gives a trainer of the recipes the loss of a distillation.

    Args:
        distillation ([`Distillation`]): the settings.
        args, kwargs: as those of the trainer.
    """

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self._parts: dict[str, list[float]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        network = self.accelerator.unwrap_model(model)
        distil = self.learn_task if self.distillation.stage == "task" else self.learn_experts
        with forward_as(network, partial(distil, network, network.forward)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def learn_experts(self, network: nn.Module, forward: Callable, **inputs: Any) -> dict[str, torch.Tensor]:
        """The distillation alone: of one teacher for each sample, drawn among the experts that it has, or of all."""
        teachers, present = teachers_of(network, inputs)
        drawn = None
        if self.distillation.stage == "teachers":
            drawn = draw_teachers(network, present)
            names = network.expert_network.imitation.names
            present = {name: rows & (drawn == names.index(name)) for name, rows in present.items()}
        with self.accelerator.autocast():
            imitated = network.expert_network.imitate(embed_patches(network, inputs), teachers=drawn)
            return {"loss": self.weigh(self.loss_of(network, imitated, teachers, present), inputs)}

    def learn_task(self, network: nn.Module, forward: Callable, **inputs: Any) -> Any:
        """Stage 2: the task's loss on imitated experts, and the distillation of all of them."""
        teachers, present = teachers_of(network, inputs)
        imitation, captured = network.expert_network.imitation, []
        hook = imitation.register_forward_hook(lambda module, args, output: captured.append(output))
        try:
            outputs = forward(**{**inputs, "expert_mask": self.hide_experts(network, inputs, present)})
        finally:
            hook.remove()
        with self.accelerator.autocast():
            images = next(iter(present.values())).shape[0] if present else 0
            if not captured or len(captured[-1].level_states[-1]) != images:  # all are live, or questions were asked
                captured.append(network.expert_network.imitate(embed_patches(network, inputs)))
            outputs.loss = outputs.loss + self.weigh(self.loss_of(network, captured[-1], teachers, present), inputs)
        return outputs

    def hide_experts(
        self, network: nn.Module, inputs: dict[str, Any], present: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Which experts the network reads live: all that are not imitated, and a share of the others."""
        names, imitated = network.config.expert_names, network.expert_network.imitation.names
        mask = inputs.get("expert_mask")
        if mask is None:
            images = next(tensor for name, tensor in inputs.items() if name.startswith(("pixel_values", "patch_")))
            given = [any(key.startswith(f"{name}_") for key in inputs) for name in names]
            mask = torch.tensor(given, device=images.device).expand(len(images), -1)
        live = torch.rand(mask.shape, device=mask.device) < self.distillation.live_experts
        kept = torch.tensor([name not in imitated for name in names], device=mask.device)
        return mask.bool() & (live | kept)

    def loss_of(
        self, network: nn.Module, imitated: ImitationOutput, teachers: Inputs, present: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        parts = imitation_loss(network.expert_network, network.config.expert_specs, imitated, teachers, present)
        self.note(parts)
        settings = self.distillation
        return parts.total(settings.maps, settings.decorrelation, settings.balance)

    def weigh(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss beside that of the task, which is a mean over samples."""
        if inputs.get("num_items_in_batch") is None:
            return self.distillation.weight * loss
        # The task's loss is a sum over tokens, divided by those of all micro-batches and processes.
        across = self.args.average_tokens_across_devices and self.args.world_size > 1
        shares = self.args.gradient_accumulation_steps * (self.args.world_size if across else 1)
        return self.distillation.weight * loss / shares

    # ---- the log ----

    def note(self, parts: ImitationLoss) -> None:
        for name in ("tokens", "maps", "decorrelation", "balance"):
            self._parts[name].append(getattr(parts, name).detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._parts:
            logs |= {f"imitation_{name}": torch.stack(own).mean().item() for name, own in self._parts.items()}
            self._parts.clear()
        super().log(logs, *args, **kwargs)


FIT_SAMPLES = 256  # samples on which the units of the experts' tokens are measured


def prepare(trainer: Any) -> None:
    """
    Freezes the teachers, and everything but the student unless the task is learned. Measures the units of the
    experts' tokens if the student is new.
    """
    model, distillation = trainer.model, trainer.distillation
    imitation = model.expert_network.imitation
    if distillation.stage != "task":
        model.requires_grad_(False)
    imitation.requires_grad_(True)
    # DDP refuses parameters without a gradient
    imitation.teacher_embedding.requires_grad_(distillation.stage == "teachers")
    for module in (imitation.condition_norm, imitation.image_condition):
        module.requires_grad_(distillation.stage != "teachers")
    freeze_teachers(model.expert_network)
    if all(head.token_scale == 1 and not head.token_mean.any() for head in imitation.heads.values()):
        model.to(trainer.args.device)
        state = torch.get_rng_state()
        fit_teachers(model.expert_network, _first_batches(trainer))
        torch.set_rng_state(state)


def _first_batches(trainer: Any) -> Iterator[tuple[Inputs, dict[str, torch.Tensor]]]:
    """The teachers of the first samples of the training; all processes read the same ones."""
    rows, size = iter(trainer.train_dataset), trainer.args.train_batch_size
    taken = 0
    while taken < FIT_SAMPLES and (batch := list(itertools.islice(rows, size))):
        taken += len(batch)
        tensors = trainer.data_collator(batch)
        yield teachers_of(trainer.model, {name: own.to(trainer.model.device) for name, own in tensors.items()})


def teachers_of(network: nn.Module, inputs: dict[str, Any]) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """
    The imitated experts' tensors in a batch, as arguments of their stems, and the samples that have each of them,
    `(batch_size,)`.
    """
    names, imitated = network.config.expert_names, network.expert_network.imitation.names
    mask = inputs.get("expert_mask")
    tensors = gather_expert_inputs(pop_expert_inputs(dict(inputs), names), mask, names, strict=False)
    teachers = {name: own for name, own in tensors.items() if name in imitated}
    if not teachers:
        raise ValueError(f"a batch has no labels of {', '.join(imitated)}, which the network is to imitate")
    present = {}
    for name, own in teachers.items():
        first = next(iter(own.values()))
        everywhere = torch.ones(len(first), dtype=torch.bool, device=first.device)
        present[name] = everywhere if mask is None else mask[:, names.index(name)].bool()
    return teachers, present


def draw_teachers(network: nn.Module, present: dict[str, torch.Tensor]) -> torch.Tensor:
    """One teacher for each sample, by its place in the imitation's names: `(batch_size,)`."""
    nowhere = torch.zeros_like(next(iter(present.values())))
    chances = torch.stack([present.get(name, nowhere) for name in network.expert_network.imitation.names], dim=1)
    return torch.multinomial(chances.float() + 1e-6, 1)[:, 0]


def embed_patches(network: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    images = {
        name: tensor for name, tensor in inputs.items() if name.startswith("pixel_values") or name == "patch_features"
    }
    return network.embed_patches(**images)


@torch.no_grad()
def measure_imitation(
    network: nn.Module, batches: Iterator[dict[str, torch.Tensor]], total: int | None = None
) -> dict[str, float]:
    """
    How well a network imitates the tokens of each expert: the share of their variance over images that the student
    explains, where the mean token of each place explains 0.

    Args:
        network: a model with imitation.
        batches (`Iterator[dict]`): from a collator, with the experts' tensors.
    """
    network.eval()
    experts = network.expert_network
    error: dict[str, float] = defaultdict(float)
    number: dict[str, int] = defaultdict(int)
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, float] = defaultdict(float)
    for batch in tqdm(batches, total=total, desc="imitation", leave=False):
        batch = {name: tensor.to(network.device) for name, tensor in batch.items()}
        teachers, present = teachers_of(network, batch)
        imitated = experts.imitate(embed_patches(network, batch))
        side = round(imitated.level_states[-1].shape[1] ** 0.5)
        for name, target in teacher_tokens(experts, teachers, side).items():
            rows = present[name]
            target, predicted = target[rows].double(), imitated.tokens[name][rows].double()
            error[name] += (predicted - target).pow(2).sum().item()
            squares[name] += target.pow(2).sum().item()
            sums[name] = sums.get(name, 0) + target.sum(dim=0)
            number[name] += len(target)
    variance = {name: squares[name] - (sums[name] ** 2).sum().item() / number[name] for name in sums}
    return {name: 1 - error[name] / variance[name] if variance[name] > 0 else math.nan for name in sums}
