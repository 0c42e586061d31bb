"""
From the experts' tensors to latents: a stem for each expert, and the resampler.

Every network of this package reads experts in the same way. It takes their tensors out of its arguments with
`pop_expert_inputs`, sorts and checks them with `gather_expert_inputs`, and runs them with [`ExpertsMixin`].
"""

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import torch_compilable_check

from .configuration_prismer import PrismerVisionConfig
from .expert_spec import BACKGROUND, MAX_IDS, ExpertSpec, is_expert_input, seems_expert_input
from .layers import PrismerAttention, PrismerLayerNorm, PrismerMLP, init_layer_weights


class PrismerExpertStem(nn.Module):
    """
    Turns an expert's map into tokens on a grid: a bilinear resize, four 3×3 convolutions each followed by BatchNorm
    and ReLU, and a 1×1 convolution. Ids are painted with features during the resize, so that the painted map never
    exists at full size. A grid of vectors keeps its size and has two convolutions.
    """

    def __init__(self, config: PrismerVisionConfig, spec: ExpertSpec):
        super().__init__()
        width = config.hidden_size
        self.name, self.channels = spec.name, spec.channels
        self.num_instance_embeddings = config.num_instance_embeddings if spec.instances else 0
        # After this resize, strides of 16 in all (dense) or 4 (label) lead to the grid of the image's patches.
        self.scale_factor = (4 if spec.is_label else 16) / config.patch_size
        strides: tuple[int, ...] = (2, 2, 1, 1) if spec.is_label else (2, 2, 2, 2)
        sizes: tuple[int, ...] = (self.channels, width // 8, width // 4, width // 2, width)
        if spec.is_features:
            self.scale_factor, strides, sizes = 1.0, (1, 1), (self.channels, width, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(sizes[i], sizes[i + 1], kernel_size=3, stride=stride, padding=1, bias=False)
            for i, stride in enumerate(strides)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size, eps=1e-5) for size in sizes[1:])
        self.projection = nn.Conv2d(width, width, kernel_size=1, bias=False)
        if spec.is_label:
            # One row for each class, and the background's as the last.
            features = self.initial_class_features((spec.num_classes or 0) + 1)
            self.class_features = nn.Buffer(torch.empty(features.shape).copy_(features))
        if self.num_instance_embeddings:
            self.instance_embedding = nn.Parameter(torch.empty(self.num_instance_embeddings, width))

    def initial_class_features(self, num_rows: int) -> torch.Tensor:
        """
        Features until `set_class_features` sets those of the classes. They are random but always the same, because a
        model on the meta device makes its buffers again when it is loaded.
        """
        generator = torch.Generator().manual_seed(0)
        return torch.randn(num_rows, self.channels, generator=generator, device="cpu") * self.channels**-0.5

    def check_inputs(
        self,
        values: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> None:
        """
        Arguments as in `forward`.

        Raises:
            ValueError: naming the tensor, what is wrong with it and what is accepted.
        """
        name, is_label = self.name, hasattr(self, "class_features")
        if values is None and ids is None:
            raise ValueError(f"neither {name}_values nor {name}_ids given")
        if ids is not None and not is_label:
            raise ValueError(f"{name}_ids given; the dense expert '{name}' takes {name}_values")
        if values is not None and (values.ndim != 4 or values.shape[1] != self.channels):
            raise ValueError(
                f"{name}_values has the shape {tuple(values.shape)}; "
                f"the config's expert '{name}' needs (batch, {self.channels}, height, width)"
            )
        if values is None and features is None:
            if len(self.class_features) == 1:
                raise ValueError(
                    f"{name}_ids given, but neither a table of class features in the model (`set_class_features`), "
                    f"nor {name}_features with the sample; dense {name}_values would do as well"
                )
            if classes is None and self.num_instance_embeddings:
                raise ValueError(f"{name}_ids count instances; their classes are needed as {name}_classes")
        shapes = {"ids": (ids, 3, "(batch, height, width)"), "classes": (classes, 2, "(batch, instances)")}
        for suffix, (tensor, ndim, needed) in shapes.items():
            if tensor is not None and tensor.ndim != ndim:
                raise ValueError(f"{name}_{suffix} has the shape {tuple(tensor.shape)}; {needed} is needed")
        if features is not None and (features.ndim != 3 or features.shape[2] != self.channels):
            raise ValueError(
                f"{name}_features has the shape {tuple(features.shape)}; (batch, number of ids, {self.channels}) is "
                "needed"
            )
        tensors = {"values": values, "features": features, "ids": ids, "classes": classes, "rows": rows}
        for suffix, tensor in tensors.items():
            if tensor is not None:
                require_kind(tensor, f"{name}_{suffix}", is_float=suffix in ("values", "features"))

    def feature_table(
        self, classes: torch.Tensor | None, features: torch.Tensor | None, batch_size: int
    ) -> torch.Tensor:
        """
        The features of each id of a map: `(batch_size or 1, number of ids + 1, channels)`, background last. A class
        without a feature in the model is background too.
        """
        background, num_classes = self.class_features[-1], self.class_features.shape[0] - 1
        if features is None:
            if classes is None:
                return self.class_features[None]
            classes = classes.long()
            known = (classes >= 0) & (classes < num_classes)
            features = self.class_features[torch.where(known, classes, num_classes)]
        return torch.cat([features.to(background), background.expand(batch_size, 1, -1)], dim=1)

    def paint(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """
        The features of `ids` `(batch, height, width)` from `table` `(batch or 1, ids + 1, channels)`, resized
        bilinearly (`align_corners=True`) by gathering the four taps of each output pixel: `(batch, channels, h, w)`.
        An id without a row is background.
        """
        batch, height, width = ids.shape
        out_height, out_width = (max(1, math.floor(size * self.scale_factor)) for size in (height, width))
        num_ids = table.shape[1] - 1
        if table.shape[0] > 1:
            row_offset = torch.arange(batch, device=ids.device)[:, None, None] * (num_ids + 1)
        else:
            row_offset = 0
        table = table.flatten(0, 1)

        def gather(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            tap = _read_ids(ids[:, rows][:, :, columns])
            tap = torch.where((tap == BACKGROUND) | (tap >= num_ids), num_ids, tap)
            return F.embedding(tap + row_offset, table)  # (batch, out_height, out_width, channels)

        if (out_height, out_width) == (height, width):
            rows, columns = (torch.arange(size, device=ids.device) for size in (height, width))
            return gather(rows, columns).permute(0, 3, 1, 2)
        top, bottom, row_weight = _linear_taps(height, out_height, ids.device)
        left, right, column_weight = _linear_taps(width, out_width, ids.device)
        row_weight, column_weight = row_weight[:, None, None].to(table), column_weight[:, None].to(table)
        upper = torch.lerp(gather(top, left), gather(top, right), column_weight)
        lower = torch.lerp(gather(bottom, left), gather(bottom, right), column_weight)
        return torch.lerp(upper, lower, row_weight).permute(0, 3, 1, 2)

    def instance_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The row of the instance embedding for each id: see `detection_rows` of [`PrismerModel.forward`]."""
        ids = _read_ids(ids)
        if self.training:
            row_of_value = torch.randint(self.num_instance_embeddings, (MAX_IDS,), device=ids.device)
            return row_of_value[ids]
        return self.fixed_rows(ids)

    def fixed_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ids that are not drawn at random."""
        ids, background_row = _read_ids(ids), self.num_instance_embeddings - 1
        return torch.where(ids == BACKGROUND, background_row, ids % background_row)

    def embed_instances(self, rows: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Embeds `rows` `(batch, height, width)` after a resize to the token grid by the floor rule of `"nearest"`."""
        taps = []
        for size, out_size in zip(rows.shape[1:], grid):
            positions = torch.arange(size, dtype=torch.float32, device=rows.device)
            taps.append(F.interpolate(positions[None, None], size=out_size, mode="nearest")[0, 0].long())
        rows = rows[:, taps[0]][:, :, taps[1]].long()
        table = self.instance_embedding
        return look_up(lambda rows: F.embedding(rows, table), rows, f"{self.name}_rows", len(table))

    def forward(
        self,
        values: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes as in [`PrismerModel.forward`]. Returns tokens on their grid: `(batch, width, height, width)`."""
        dtype = self.projection.weight.dtype
        if values is not None:
            hidden_states = values.to(dtype)
            if self.scale_factor != 1:
                hidden_states = F.interpolate(
                    hidden_states, scale_factor=self.scale_factor, mode="bilinear", align_corners=True
                )
        else:
            assert ids is not None
            hidden_states = self.paint(ids, self.feature_table(classes, features, ids.shape[0])).to(dtype)
        for conv, norm in zip(self.convs, self.norms):
            hidden_states = F.relu(norm(conv(hidden_states)))
        hidden_states = self.projection(hidden_states)
        if self.num_instance_embeddings and (rows is not None or ids is not None):
            rows = self.instance_rows(ids) if rows is None else rows
            embeddings = self.embed_instances(rows, hidden_states.shape[2:])
            hidden_states = hidden_states + embeddings.permute(0, 3, 1, 2)
        return hidden_states

    def train(self, mode: bool = True) -> "PrismerExpertStem":
        """As in every module. A frozen BatchNorm keeps its statistics, because adapters are saved without them."""
        super().train(mode)
        for norm in self.norms:
            if not norm.weight.requires_grad:
                norm.eval()
        return self


def require_kind(tensor: torch.Tensor, name: str, is_float: bool) -> None:
    if tensor.is_floating_point() != is_float or tensor.is_complex():
        needed = "floating point numbers are" if is_float else "an integer type is"
        raise ValueError(f"{name} is of the type {tensor.dtype}; {needed} needed")


def _read_ids(ids: torch.Tensor) -> torch.Tensor:
    """Ids of any integer type as int64. Negative ids and ids that no map holds become `BACKGROUND`."""
    ids = ids.long()
    return torch.where((ids < 0) | (ids >= MAX_IDS), BACKGROUND, ids)


def look_up(embed: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, name: str, number: int) -> torch.Tensor:
    """`embed(ids)`, with an error that names the ids. (A GPU has an assertion of its own.)"""
    try:
        return embed(ids)
    except IndexError as error:
        raise ValueError(
            f"{name} has values from {ids.min()} to {ids.max()}; 0 to {number - 1} is accepted"
        ) from error


def _linear_taps(size: int, out_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each output of a linear resize with aligned corners: the two source indices and the weight of the second."""
    scale = (size - 1) / (out_size - 1) if out_size > 1 else 0.0
    source = torch.arange(out_size, dtype=torch.float32, device=device) * scale
    first = source.long().clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), source - first


class PrismerResamplerLayer(GradientCheckpointingLayer):
    """Latents attend to all tokens and to themselves; an MLP follows. Both have a residual connection."""

    def __init__(self, config: PrismerVisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.latents_layer_norm = PrismerLayerNorm(width, eps=eps)
        self.tokens_layer_norm = PrismerLayerNorm(width, eps=eps)
        self.latent_attn = PrismerAttention(config, config.resampler_attention_heads, config.attention_dropout)
        self.mlp_layer_norm = PrismerLayerNorm(width, eps=eps)
        self.mlp = PrismerMLP(width, 4 * width, "relu2")

    def forward(
        self,
        latents: torch.Tensor,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed_latents = self.latents_layer_norm(latents)
        # The latents are the last keys, because flash attention takes the end of the keys' mask for the queries.
        states = torch.cat([self.tokens_layer_norm(tokens), normed_latents], dim=1)
        attn_output, _ = self.latent_attn(normed_latents, attention_mask=attention_mask, states=states, **kwargs)
        latents = latents + attn_output
        return latents + self.mlp(self.mlp_layer_norm(latents))


class PrismerResampler(nn.Module):
    """Condenses the tokens of all experts, of any number, to a fixed number of latents."""

    def __init__(self, config: PrismerVisionConfig):
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))
        self.layers = nn.ModuleList(PrismerResamplerLayer(config) for _ in range(config.resampler_layers))

    def forward(
        self,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        condition: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            tokens (`torch.FloatTensor` of shape `(batch_size, num_tokens, width)`): zero where masked.
            token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*): the tokens that exist.
            condition (`Callable`, *optional*):
                Changes the learned latents `(batch_size, num_latents, width)` before the first layer, such as by a
                question.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_latents, width)`.
        """
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        if condition is not None:
            latents = condition(latents)
        latents = latents.to(tokens.dtype)
        attention_mask = None
        if token_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=latents,
                attention_mask=F.pad(token_mask, (0, latents.shape[1]), value=True),
                encoder_hidden_states=torch.cat([tokens, latents], dim=1),
            )
        for layer in self.layers:
            latents = layer(latents, tokens, attention_mask=attention_mask, **kwargs)
        return latents


def pop_expert_inputs(tensors: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """
    Takes every tensor out of `tensors` that belongs to one of the experts `names`, or seems to belong to one that is
    not configured. `gather_expert_inputs` tells these apart.
    """
    return {
        key: tensors.pop(key) for key in list(tensors) if is_expert_input(key, names) or seems_expert_input(key, names)
    }


def gather_expert_inputs(
    tensors: dict[str, Any],
    expert_mask: torch.Tensor | None,
    names: list[str],
    strict: bool,
    imitated: Collection[str] = (),
) -> dict[str, dict[str, torch.Tensor]]:
    """
    Sorts tensors named `<expert>_<suffix>` by expert and takes them out of `tensors`. Others stay.

    Args:
        tensors (`dict[str, Any]`): arguments of a network.
        expert_mask (`torch.BoolTensor` of shape `(batch_size, number of experts)`, *optional*):
            Which experts each sample has.
        names (`list[str]`): the configured experts.
        strict (`bool`): whether an expert that is neither given nor masked out is an error.
        imitated (`Collection[str]`, *optional*): experts that can be missing in any case.

    Returns:
        `dict[str, dict[str, torch.Tensor]]`: for each given expert, its tensors by suffix.

    Raises:
        ValueError: if a tensor seems to belong to an expert that is not configured, if an expert lacks a tensor, or if
            an expert is neither given nor masked out.
    """
    gathered: dict[str, dict[str, torch.Tensor]] = {}
    for key in list(tensors):
        if seems_expert_input(key, names):
            if tensors.pop(key) is not None:
                raise ValueError(f"{key} given, but the config's experts are: {', '.join(names) or 'none'}")
        elif is_expert_input(key, names):
            name, _, suffix = key.rpartition("_")
            tensor = tensors.pop(key)
            if tensor is None:
                continue
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{key} is a {type(tensor).__name__}; a tensor is needed")
            gathered.setdefault(name, {})[suffix] = tensor
    if expert_mask is not None and (expert_mask.ndim != 2 or expert_mask.shape[1] != len(names)):
        raise ValueError(
            f"expert_mask has the shape {tuple(expert_mask.shape)}; (batch, {len(names)}) is needed, one column "
            f"for each of {', '.join(names) or 'no experts'}"
        )
    for name, inputs in gathered.items():
        if "values" not in inputs and "ids" not in inputs:
            raise ValueError(f"{name}_{next(iter(inputs))} given without {name}_ids or {name}_values")
    missing = [name for name in names if name not in gathered]
    if missing and expert_mask is not None:
        claimed = expert_mask[:, [names.index(name) for name in missing]].bool().any(dim=0)
        torch_compilable_check(
            ~claimed,
            lambda: (
                f"expert_mask says that there are {', '.join(itertools.compress(missing, claimed.tolist()))}, "
                "but their tensors are not given"
            ),
        )
    elif strict and (missing := [name for name in missing if name not in imitated]):
        raise ValueError(
            f"the config's experts {', '.join(missing)} are neither given nor masked out. Give their tensors "
            "(with Trainer: is remove_unused_columns=False needed?), or pass expert_mask with False in their "
            "columns, or set config.strict_experts=False to run without what is not given"
        )
    return gathered


class ExpertsMixin:
    """
    Gives a network the experts' stems and the resampler.

    The network calls `init_experts` in its constructor and defines `expert_positions`. Its modules `expert_stems` and
    `resampler` (`None` without experts) then turn the experts' tensors into latents: `check_expert_inputs` first,
    `encode_experts` next.

    Example:

    ```python
    >>> from modeling_prismer import PrismerVisionModel

    >>> model = PrismerVisionModel.from_pretrained(path)  # a network with experts
    >>> edges = processor.process_images(image)["edge_values"]
    >>> model.encode_experts({"edge": {"values": edges}}, None, batch_size=1, device="cpu").shape
    torch.Size([1, 16, 128])
    ```
    """

    expert_stems: nn.ModuleDict
    resampler: Any  # a PrismerResampler; None without experts
    training: bool

    def init_experts(self, config: PrismerVisionConfig) -> None:
        """Makes the modules. Of `config` it reads the experts, their sizes and those of the resampler."""
        self.expert_stems = nn.ModuleDict({spec.name: PrismerExpertStem(config, spec) for spec in config.expert_specs})
        self.resampler = PrismerResampler(config) if config.experts else None

    def expert_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position embeddings of the experts' tokens on a grid: `(grid[0] * grid[1], width)`."""
        raise NotImplementedError

    def check_expert_inputs(
        self,
        expert_inputs: dict[str, dict[str, torch.Tensor]],
        expert_mask: torch.Tensor | None,
        images: dict[str, torch.Tensor],
    ) -> None:
        """
        Arguments as in `encode_experts`; `images` are the network's own inputs, at least one.

        Raises:
            ValueError: if an input does not fit its expert or has not one row for each image. In training also if a
                sample has numbers that are not finite, which would get into the statistics of BatchNorm and into all
                weights. A GPU waits for this check; TRANSFORMERS_DISABLE_TORCH_CHECK=1 turns it off.
        """
        batch_size = next(iter(images.values())).shape[0]
        if expert_mask is not None and expert_mask.shape[0] != batch_size:
            raise ValueError(f"expert_mask has {expert_mask.shape[0]} rows for {batch_size} images")
        names, tensors, present = list(self.expert_stems), dict(images), {}
        for name, inputs in expert_inputs.items():
            if name not in names:
                raise ValueError(f"expert_inputs has '{name}'; the config's experts are: {', '.join(names) or 'none'}")
            for suffix, tensor in inputs.items():
                key = f"{name}_{suffix}"
                if tensor.shape[0] != batch_size:
                    raise ValueError(f"{key} has {tensor.shape[0]} rows for {batch_size} images")
                tensors[key] = tensor
                if expert_mask is not None:
                    present[key] = expert_mask[:, names.index(name)]
            self.expert_stems[name].check_inputs(**inputs)
        if self.training and not torch.compiler.is_compiling():
            _require_finite(tensors, present)

    def embed_experts(
        self,
        expert_inputs: dict[str, dict[str, torch.Tensor]],
        expert_mask: torch.Tensor | None,
        batch_size: int,
        device: torch.device | str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Runs the stems. Arguments as in `encode_experts`.

        Returns:
            The tokens of all given experts `(batch_size, num_tokens, width)`, zero for samples without the expert, and
            the mask of the tokens that exist `(batch_size, num_tokens)`, `None` if all do.
        """
        counts = None  # in training: how many samples have each expert
        if expert_mask is not None and self.training:
            counts = expert_mask.sum(dim=0).tolist()
            if all(count == batch_size for name, count in zip(self.expert_stems, counts) if name in expert_inputs):
                expert_mask = counts = None
        all_tokens, token_masks, last_grid = [], [], None
        for index, (name, stem) in enumerate(self.expert_stems.items()):
            if name not in expert_inputs:
                continue
            inputs, rows = expert_inputs[name], None
            present = None if expert_mask is None else expert_mask[:, index]
            if present is not None and counts is not None and counts[index] < batch_size:
                # The statistics of BatchNorm must not contain samples without the expert. Every rank runs the stem,
                # even on an empty batch, so that DDP sees all gradients and SyncBatchNorm all statistics.
                if counts[index] == 0 and not _in_process_group():
                    continue
                rows = present.int().argsort(descending=True, stable=True)[: counts[index]]
                inputs = {key: tensor[rows] for key, tensor in inputs.items()}
            elif counts is None and present is not None and "rows" in inputs:  # padding may lie outside the table
                is_present = present.to(inputs["rows"].device)[:, None, None]
                inputs = {**inputs, "rows": torch.where(is_present, inputs["rows"], 0)}
            tokens = stem(**inputs)
            grid = tuple(tokens.shape[2:])
            tokens = tokens.flatten(2).transpose(1, 2).to(device)
            if grid != last_grid:  # not a dict: in an export with any sizes the grid cannot be hashed
                last_grid, positions = grid, self.expert_positions(grid).to(device)
            tokens = tokens + positions
            if rows is not None:
                tokens = tokens.new_zeros(batch_size, *tokens.shape[1:]).index_copy(0, rows, tokens)
            elif counts is None and present is not None:
                tokens = torch.where(present[:, None, None], tokens, 0)  # padding may hold anything, NaN too
            all_tokens.append(tokens)
            if present is not None:
                token_masks.append(present[:, None].expand(tokens.shape[:2]))
        token_mask = torch.cat(token_masks, dim=1) if token_masks else None
        if all_tokens:
            return torch.cat(all_tokens, dim=1), token_mask
        latents = self.resampler.latents
        return torch.empty(batch_size, 0, latents.shape[1], dtype=latents.dtype, device=device), token_mask

    def encode_experts(
        self,
        expert_inputs: dict[str, dict[str, torch.Tensor]],
        expert_mask: torch.Tensor | None,
        batch_size: int,
        device: torch.device | str,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Runs the stems and the resampler.

        Args:
            expert_inputs (`dict[str, dict[str, torch.Tensor]]`):
                For each given expert, the arguments of its stem.
            expert_mask (`torch.BoolTensor` of shape `(batch_size, number of experts)`, *optional*):
                Which experts each sample has, on `device`.
            batch_size (`int`): number of images.
            device (`torch.device`): device of the latents; the stems may be spread over several.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_latents, width)`.
        """
        tokens, token_mask = self.embed_experts(expert_inputs, expert_mask, batch_size, device)
        return self.resampler(tokens, token_mask, **kwargs).to(device)


def _in_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _require_finite(tensors: dict[str, torch.Tensor], present: dict[str, torch.Tensor]) -> None:
    """Raises an error that names the samples that are not finite, except those that are not `present` `(batch,)`."""
    finite: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            rows = torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)
            finite[name] = rows | ~present[name].bool().to(rows.device) if name in present else rows

    def describe() -> str:
        samples = {name: (~rows).nonzero()[:, 0].tolist() for name, rows in finite.items()}
        named = [f"{name} of sample {', '.join(map(str, wrong))}" for name, wrong in samples.items() if wrong]
        return f"{'; '.join(named)} holds numbers that are not finite; leave the sample out, or mask the expert out"

    if finite:
        device = next(iter(finite.values())).device
        everywhere = torch.stack([rows.to(device) for rows in finite.values()])  # one check, because a GPU waits
        torch_compilable_check(everywhere, describe)


@torch.no_grad()
def init_expert_weights(module: nn.Module) -> None:
    """Initialises a stem, so that it keeps the variance of its input, or a part of the resampler."""
    if isinstance(module, PrismerExpertStem):
        for conv in module.convs:
            init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        # The mean over channels carries no information after ReLU, so the projection removes it.
        weight = module.projection.weight
        init.normal_(weight, std=module.projection.in_channels**-0.5)
        init.copy_(weight, weight - weight.mean(1, keepdim=True))
        if hasattr(module, "class_features"):
            init.copy_(module.class_features, module.initial_class_features(len(module.class_features)))
        if module.num_instance_embeddings:
            init.normal_(module.instance_embedding, std=0.02)
    elif isinstance(module, PrismerResampler):
        init.normal_(module.latents, std=module.latents.shape[-1] ** -0.5)
    elif isinstance(module, PrismerResamplerLayer):
        depth = module.latent_attn.config.resampler_layers
        init_layer_weights(module.latent_attn, module.mlp, depth, is_resampler=True)
