"""
Imitation of experts: a network predicts the tokens of its experts from the image alone, and reads its prediction
wherever an expert is missing. After a distillation (training_examples/run_distillation.py) it needs no expert at all.

The student is a second, short path through the frozen encoder, with routed adaptors (routed_adaptors.py) after some of
its layers. The encoder's own path stays as it is: with all experts live, the network is the one without imitation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import output_capturing

from .configuration_prismer import PrismerVisionConfig
from .expert_spec import ExpertSpec
from .expert_stems import ExpertsMixin
from .image_features import resize_grid
from .imitation_spec import ImitationSpec
from .layers import PrismerLayerNorm
from .routed_adaptors import PrismerRoutedAdaptors, Routes, init_adaptor_weights


if TYPE_CHECKING:
    from typing import Self


@dataclass
class ImitationOutput:
    """
    What a network imitates of its experts, from an image alone.

    Args:
        tokens (`dict[str, torch.FloatTensor]`):
            The tokens of each imitated expert, `(batch_size, num_tokens, width)`, without positions.
        maps (`dict[str, torch.FloatTensor]`):
            The map of each of them, `(batch_size, channels, side, side)`: values in [-1, 1] of dense experts; scores
            of the classes and, last, the background of label experts; scores of text and background if a label expert
            has no classes. Empty unless asked for.
        level_states (`tuple[torch.FloatTensor]`):
            The student's tokens at each level, `(batch_size, num_tokens, width)`.
        routes (`tuple[Routes]`): the router's choice at each level; empty without routed adaptors.
    """

    tokens: dict[str, torch.Tensor]
    maps: dict[str, torch.Tensor]
    level_states: tuple[torch.Tensor, ...]
    routes: tuple[Routes, ...]


class PrismerImitationHead(nn.Module):
    """
    Predicts the tokens and the map of one expert from the student's last level. For the training, it also predicts the
    tokens from each level before.

    Tokens are predicted in the expert's own units. A distillation first measures `token_mean` and `token_scale` of the
    stem's tokens ([`fit_teachers`]). Without them, the loss would hardly notice more than the mean.
    """

    def __init__(self, config: PrismerVisionConfig, spec: ExpertSpec, num_levels: int, map_scale: int):
        super().__init__()
        width = config.hidden_size
        self.map_scale = 1 if spec.is_features else map_scale
        num_classes = 1 if spec.is_label and spec.num_classes is None else spec.num_classes  # text
        channels = num_classes + 1 if num_classes is not None else spec.channels
        self.layer_norm = PrismerLayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, width)
        self.activation = ACT2FN["gelu"]
        self.fc2 = nn.Linear(width, width)
        self.map_proj = nn.Linear(width, channels * self.map_scale**2)
        self.token_mean = nn.Buffer(torch.zeros(width))
        self.token_scale = nn.Buffer(torch.ones(()))
        self.level_proj = nn.ModuleList(nn.Linear(width, width) for _ in range(num_levels - 1))

    def forward(self, hidden_states: torch.Tensor, with_map: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, side * side, width)`): the last level.
            with_map (`bool`, *optional*, defaults to `False`): whether to predict the map.

        Returns:
            The tokens in the same shape, and the map `(batch_size, channels, side * map_scale, side * map_scale)`.
        """
        inner = self.activation(self.fc1(self.layer_norm(hidden_states)))
        tokens = self.fc2(inner) * self.token_scale + self.token_mean
        if not with_map:
            return tokens, None
        side = math.isqrt(hidden_states.shape[1])
        grid = self.map_proj(inner).transpose(1, 2).unflatten(2, (side, side))
        return tokens, F.pixel_shuffle(grid, self.map_scale)

    def level_tokens(self, level: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The tokens as predicted from a level before the last one."""
        return self.level_proj[level](self.layer_norm(hidden_states)) * self.token_scale + self.token_mean

    def normalize(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens in the expert's units, with a mean of 0 and a root mean square of 1."""
        return (tokens.float() - self.token_mean.float()) / self.token_scale.float()


class PrismerImitation(nn.Module):
    """
    The student of the experts: routed adaptors at some levels, and a head for each imitated expert.

    Args:
        config ([`PrismerVisionConfig`] or [`PrismerExpertsConfig`]): a configuration with `imitation`.
        input_size (`int`, *optional*): channels of the tokens that the student gets, if they are to be projected.
        context_size (`int`, *optional*): width of the question's embeddings, if a question can change the routes.
    """

    def __init__(
        self,
        config: PrismerVisionConfig,
        input_size: int | None = None,
        context_size: int | None = None,
    ):
        super().__init__()
        spec: Any = config.imitation_spec
        width = config.hidden_size
        self.names = list(spec.experts)
        self.layer_indices = list(spec.layers)
        self.grid_size = spec.grid_size
        self.input_proj = None if input_size is None else nn.Linear(input_size, width)
        self.condition_norm = PrismerLayerNorm(width, eps=config.layer_norm_eps)
        self.image_condition = nn.Linear(width, width)
        self.teacher_embedding = nn.Embedding(len(self.names), width)
        self.context_condition = None if context_size is None else nn.Linear(context_size, width)
        size = spec.adaptor_size or max(1, width // 4)
        self.adaptors = nn.ModuleList(
            PrismerRoutedAdaptors(width, size, spec.num_adaptors, spec.top_k, config.layer_norm_eps)
            for _ in spec.layers
        )
        described = {expert.name: expert for expert in config.expert_specs}
        self.heads = nn.ModuleDict(
            {
                name: PrismerImitationHead(config, described[name], len(spec.layers), spec.map_scale)
                for name in self.names
            }
        )

    def condition(
        self, hidden_states: torch.Tensor, teachers: torch.Tensor | None, context: torch.Tensor | None
    ) -> torch.Tensor:
        """What the routers know beside a token, the teacher or else image and question: `(batch_size, width)`."""
        if teachers is not None:
            return self.teacher_embedding(teachers)
        condition = self.image_condition(self.condition_norm(hidden_states.mean(dim=1)))
        if context is not None and self.context_condition is not None:
            condition = condition + self.context_condition(context.to(condition.dtype))
        return condition

    def forward(
        self,
        hidden_states: torch.Tensor,
        layers: Sequence[Callable[..., torch.Tensor]] | None = None,
        teachers: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        with_maps: bool = False,
        **kwargs: Any,
    ) -> ImitationOutput:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, num_patches, width or input_size)`):
                The image's tokens, the input of the first of `layers`.
            layers (`Sequence[Callable]`, *optional*): calls the layers of the encoder that the student runs through.
            teachers (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The expert to imitate, by its place in `names`: stage 1 of a distillation. By default the routers see
                the image, and one pass serves all experts.
            context (`torch.FloatTensor` of shape `(batch_size, context_size)`, *optional*): the question.
            with_maps (`bool`, *optional*, defaults to `False`): whether to predict the experts' maps too.
            kwargs: passed on to `layers`.
        """
        side = self.grid_size or math.isqrt(hidden_states.shape[1])
        if self.input_proj is not None:  # no layers follow, so that the grid can change first
            hidden_states = resize_grid(hidden_states, (side, side)).to(self.input_proj.weight.dtype)
            hidden_states = self.input_proj(hidden_states)
        level_states, routes, start = [], [], 0
        for index, adaptors in zip(self.layer_indices, self.adaptors):
            for layer in layers[start : index + 1] if layers is not None else ():
                hidden_states = layer(hidden_states, **kwargs)
            start, hidden_states = index + 1, hidden_states.to(self.teacher_embedding.weight.device)
            condition = self.condition(hidden_states, teachers, context)
            hidden_states, chosen = adaptors(hidden_states, condition)
            level_states.append(resize_grid(hidden_states, (side, side)))
            if chosen is not None:
                routes.append(chosen)
        tokens, maps = {}, {}
        for name, head in self.heads.items():
            tokens[name], own_map = head(level_states[-1], with_map=with_maps)
            if own_map is not None:
                maps[name] = own_map
        return ImitationOutput(tokens, maps, tuple(level_states), tuple(routes))


class ImitatingExpertsMixin(ExpertsMixin):
    """
    Gives a network stems and resampler ([`ExpertsMixin`]), and with `config.imitation` the imitation of experts.

    The network defines `imitate`. Its module `imitation` is `None` without the option.
    """

    imitation: Any  # a PrismerImitation; None without the option
    imitation_sizes: tuple[int | None, ...] = ()  # `input_size` and `context_size` of a PrismerImitation

    def init_imitation(self, config: PrismerVisionConfig) -> None:
        """Makes the module if `config.imitation` is given."""
        self.imitation = None if config.imitation is None else PrismerImitation(config, *self.imitation_sizes)

    def init_experts(self, config: PrismerVisionConfig) -> None:
        super().init_experts(config)
        self.init_imitation(config)

    def imitate(
        self,
        patches: torch.Tensor,
        teachers: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        with_maps: bool = False,
        **kwargs: Any,
    ) -> ImitationOutput:
        """
        Imitates the experts from `patches`, the embedded patches of images `(batch_size, num_patches, …)`. The other
        arguments are those of [`PrismerImitation`].
        """
        raise NotImplementedError

    def find_missing(
        self, expert_inputs: dict[str, dict[str, torch.Tensor]], expert_mask: torch.Tensor | None
    ) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor | None]]:
        """
        Arguments as in `encode_experts`.

        Returns:
            The inputs of the experts that run, and for each imitated expert that is missing somewhere the samples
            without it `(batch_size,)`, or `None` if it is missing everywhere. A GPU waits here if `expert_mask` and
            tensors of imitated experts are given.
        """
        if self.imitation is None:
            return expert_inputs, {}
        names: list[str] = list(self.expert_stems)
        missing = {name: None for name in self.imitation.names if name not in expert_inputs}
        if expert_mask is None:
            return expert_inputs, missing
        masked = {name: ~expert_mask[:, names.index(name)] for name in self.imitation.names if name in expert_inputs}
        if torch.compiler.is_compiling() or not masked:  # no host read in a compiled graph
            return expert_inputs, missing | masked
        counts = torch.stack(list(masked.values())).sum(dim=1).tolist()
        for (name, absent), count in zip(masked.items(), counts):
            if count == len(absent):
                missing[name] = None
                if not self.training:  # in training every rank runs the stem, so that DDP sees all gradients
                    expert_inputs = {key: inputs for key, inputs in expert_inputs.items() if key != name}
            elif count:
                missing[name] = absent
        return expert_inputs, missing

    def add_imitations(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        imitated: ImitationOutput,
        missing: dict[str, torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Adds the imitated tokens of missing experts to those of `embed_experts`, at the same positions.

        Args:
            tokens (`torch.FloatTensor` of shape `(batch_size, num_tokens, width)`): from `embed_experts`.
            token_mask (`torch.BoolTensor`, *optional*): from `embed_experts`.
            imitated ([`ImitationOutput`]): what is imitated.
            missing (`dict[str, torch.BoolTensor | None]`): from `find_missing`.

        Returns:
            All tokens, zero where they do not exist, and the mask of those that do, `None` if all do.
        """
        all_tokens, masks, batch_size = [tokens], [token_mask], tokens.shape[0]
        side = math.isqrt(imitated.level_states[-1].shape[1])
        positions = self.expert_positions((side, side)).to(tokens.device)
        for name, absent in missing.items():
            own = imitated.tokens[name].to(tokens.device) + positions
            all_tokens.append(own if absent is None else torch.where(absent[:, None, None], own, 0))
            masks.append(None if absent is None else absent[:, None].expand(batch_size, own.shape[1]))
        if all(mask is None for mask in masks):
            return torch.cat(all_tokens, dim=1), None
        exists = [
            part.new_ones(batch_size, part.shape[1], dtype=torch.bool) if mask is None else mask.to(part.device)
            for part, mask in zip(all_tokens, masks)
        ]
        return torch.cat(all_tokens, dim=1), torch.cat(exists, dim=1)

    def encode_experts(
        self,
        expert_inputs: dict[str, dict[str, torch.Tensor]],
        expert_mask: torch.Tensor | None,
        batch_size: int,
        device: torch.device | str,
        patches: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[`ExpertsMixin.encode_experts`], with the imitations that `imitate` makes of `patches`."""
        expert_inputs, missing = self.find_missing(expert_inputs, expert_mask)
        tokens, token_mask = self.embed_experts(expert_inputs, expert_mask, batch_size, device)
        if missing and patches is not None:
            tokens, token_mask = self.add_imitations(tokens, token_mask, self.imitate(patches, **kwargs), missing)
        return self.resampler(tokens, token_mask, **kwargs).to(device)


class ImitationMixin:
    """Gives a model with experts `add_imitation` and `imitate`."""

    if TYPE_CHECKING:
        config: Any
        training: bool
        expert_network: Any
        _init_weights: Any
        embed_patches: Any

    def add_imitation(
        self,
        experts: Sequence[str],
        layers: Sequence[int] | None = None,
        num_adaptors: int = 8,
        top_k: int = 2,
        **fields: Any,
    ) -> "Self":
        """
        Lets a model imitate experts where they are missing; see [`ImitationSpec`] for the arguments. The imitation is
        not trained yet: run training_examples/run_distillation.py. An imitation that the model has is replaced.

        Args:
            layers (`Sequence[int]`, *optional*):
                By default those after a quarter and after half of the encoder's layers.

        Example:

        ```python
        >>> model = model.add_imitation(["edge"], layers=[0, 1], num_adaptors=4)
        >>> inputs = processor(images=image, text="What color is the shape?", experts=["ocr"])
        >>> generated = model.generate(**inputs)  # with imitated edges
        >>> model.imitate(inputs["pixel_values"]).maps["edge"].shape
        torch.Size([1, 1, 32, 32])
        ```
        """
        network = self.expert_network
        config = network.config
        if layers is None:
            depth = getattr(config, "num_hidden_layers", 4)
            layers = sorted({max(0, depth // 4 - 1), max(0, depth // 2 - 1)})
        spec = ImitationSpec(experts, layers, num_adaptors=num_adaptors, top_k=top_k, **fields)
        spec.check(config.expert_specs, getattr(config, "num_hidden_layers", None))
        config.imitation = spec.to_dict()
        network.init_imitation(config)
        example = next(network.parameters())
        network.imitation.apply(getattr(network, "_init_weights", self._init_weights))
        network.imitation.to(device=example.device, dtype=example.dtype).train(self.training)
        return self

    def imitate(self, *args: Any, **kwargs: Any) -> ImitationOutput:
        """
        What the model imitates of its experts from an image alone, with their maps. The arguments are `pixel_values`
        (and in PrismerLM `pixel_values_1` … or `patch_features`).

        Raises:
            ValueError: if the model has no imitation.
        """
        network = self.expert_network
        if getattr(network, "imitation", None) is None:
            raise ValueError("the model imitates no expert: its configuration has no imitation (see add_imitation)")
        return network.imitate(self.embed_patches(*args, **kwargs), with_maps=True)


@contextmanager
def uncaptured_outputs() -> Iterator[None]:
    """While it is open, layers that run are not part of the outputs `hidden_states` and `attentions`."""
    collector: Any = getattr(output_capturing, "_active_collector", None)
    captured = None if collector is None else collector.get()
    if captured is None:
        yield
        return
    collector.set({})
    try:
        yield
    finally:
        collector.set(captured)


@torch.no_grad()
def init_imitation_weights(module: nn.Module) -> None:
    """Initialises the student. Its routers do not depend on their condition at first."""
    init_adaptor_weights(module)
    if isinstance(module, PrismerImitation):
        init.normal_(module.teacher_embedding.weight, std=1.0)
    elif isinstance(module, PrismerImitationHead):
        init.zeros_(module.token_mean)
        init.ones_(module.token_scale)
