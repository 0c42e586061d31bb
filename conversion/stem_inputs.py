"""
Compares the maps that a stem gets with those of its training, and finds out what is wrong with them.

The BatchNorms of a stem have recorded the mean and the variance of each channel over the training. Maps of the same
kind give the same figures. If they do not, each known fault is undone in turn: the fault after whose removal the
figures agree is the likely cause.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from modeling_prismer.expert_spec import BACKGROUND, ExpertSpec
from modeling_prismer.expert_stems import PrismerExpertStem


Inputs = dict[str, torch.Tensor]  # the arguments of a stem

MIN_IMAGES = 4  # fewer say too little about means and variances
MIN_IMAGES_OF_CLASSES = 8  # the classes in fewer images say too little about their order
CHUNK = 8  # images that run together
NUM_RESAMPLES = 32
NUM_SHUFFLES = 16
SEARCHED = 8  # images on which faults are undone

# Distances, see `StemFinding`. For `prismer-scenes` they were measured on 32 test scenes.
FAMILIAR = 0.03  # below, nothing is looked for; the right maps have at most 0.007
UNLIKE = 0.5  # above, the maps are of another kind, even if no fault explains it; augmentation in training gave 0.3
UNORDERED = 0.1, 0.5  # classes are in another order from this distance, and this share of that of random orders
CODES = 100, 255  # vectors whose largest value is between these, and none negative, seem to be stored numbers
EXPLAINED = 0.3  # a fault is the cause if its removal leaves at most this share of the distance


class Moments(NamedTuple):
    """
    The mean and the mean square of the inputs of a stem's BatchNorms, for each image.

    Args:
        means, squares (`list[torch.Tensor]`): `(images, channels)` for each BatchNorm.
    """

    means: list[torch.Tensor]
    squares: list[torch.Tensor]

    def of(self, rows: torch.Tensor | slice = slice(None)) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The mean and the variance of each channel over some of the images."""
        means = [mean[rows].mean(0) for mean in self.means]
        return [(mean, square[rows].mean(0) - mean**2) for mean, square in zip(means, self.squares)]


@dataclass
class StemFinding:
    """
    The result of [`examine_stem`].

    Args:
        distance (`float`):
            How different the maps are from those of the training: the Kullback-Leibler divergence between normal
            distributions with the means and variances of each channel, averaged over channels and BatchNorms. 0 is
            equal.
        noise (`float`): the distance that the small number of images explains.
        cause (`str`, *optional*): what is wrong; `None` if the maps look like those of the training.
        mended (`float`, *optional*): the distance without the cause.
    """

    distance: float
    noise: float
    cause: str | None = None
    mended: float | None = None


class Fault(NamedTuple):
    """A fault that a stem's inputs may have, and the inputs without it."""

    cause: str
    undo: Callable[[Inputs], Inputs]


UNKNOWN = (
    "its maps are unlike those of the training, and no known fault explains it: another expert, other settings, or "
    "images of another kind"
)


def examine_stem(
    stem: PrismerExpertStem, spec: ExpertSpec, inputs: Inputs, orders: dict[str, list[int]] | None = None
) -> StemFinding:
    """
    Compares the inputs of a stem with those of its training.

    Args:
        stem ([`PrismerExpertStem`]): a trained stem.
        spec ([`ExpertSpec`]): its expert.
        inputs (`dict[str, torch.Tensor]`): the arguments of the stem for at least 4 images; better 16 or more.
        orders (`dict[str, list[int]]`, *optional*):
            Orders of the classes that the expert may have by mistake, by their description. The i-th number is the
            right class for the expert's class i, `BACKGROUND` for none.

    Returns:
        [`StemFinding`]
    """
    if spec.is_features:
        return _examine_vectors(stem, inputs["values"].float())
    if spec.is_dense:
        return _examine_dense(stem, inputs["values"].float())
    return _examine_label(stem, spec, inputs, orders or {})


# ---- maps of values ----


def _examine_dense(stem: PrismerExpertStem, values: torch.Tensor) -> StemFinding:
    flat = values.flatten(1)
    if (flat.amax(1) - flat.amin(1) == 0).all():
        return _finding(stem, {"values": values}, "its maps are constant: the expert finds nothing in any image")
    low, high = flat.min().item(), flat.max().item()
    stretched = _stretch(values)
    if low < -1.01 or high > 1.01 or (flat.amin(1) > -0.99).all():
        cause = f"its values go from {low:.3g} to {high:.3g} instead of -1 to 1: they are not normalised"
        found = _search(stem, {"values": stretched}, list(_dense_faults(values.shape[1])))
        found.cause = cause if found.cause is None else f"{cause}, and {found.cause}"
        found.distance = _distance(stem, _moments(stem, {"values": values}).of())
        return found
    return _search(stem, {"values": values}, list(_dense_faults(values.shape[1])))


def _dense_faults(channels: int) -> Iterator[Fault]:
    """Inverted maps, and channels in another order or with the opposite sign."""

    def undo(order: tuple[int, ...], signs: tuple[int, ...]) -> Callable[[Inputs], Inputs]:
        def change(inputs: Inputs) -> Inputs:
            factors = inputs["values"].new_tensor(signs)[:, None, None]
            return {"values": _stretch(inputs["values"][:, list(order)] * factors)}

        return change

    straight = tuple(range(channels))
    yield Fault("its maps are inverted", undo(straight, (-1,) * channels))
    if channels == 1:
        return
    if channels != 3:
        yield Fault("its channels are in the reverse order", undo(straight[::-1], (1,) * channels))
        return
    for order in itertools.permutations(straight):
        for signs in itertools.product((1, -1), repeat=3):
            if order == straight and len(set(signs)) == 1:
                continue
            parts = []
            if order != straight:
                found = ", ".join(str(order.index(i)) for i in straight)  # `order` undoes it
                parts.append(f"its channels are swapped: they are {found} in place of 0, 1, 2")
            if -1 in signs:
                flipped = " and ".join(str(i) for i in straight if signs[i] < 0)
                parts.append(f"the opposite sign in channel {flipped}")
            yield Fault(" and ".join(parts), undo(order, signs))


def _stretch(values: torch.Tensor) -> torch.Tensor:
    """Each image stretched to [-1, 1] over all its channels, as by the image processor."""
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return 2 * (values - low) / (high - low + 1e-6) - 1


# ---- grids of vectors ----


def _examine_vectors(stem: PrismerExpertStem, values: torch.Tensor) -> StemFinding:
    if (values.amax((2, 3)) - values.amin((2, 3)) == 0).all():
        return _finding(stem, {"values": values}, "its vectors are the same everywhere in every image")
    low, high = values.min().item(), values.max().item()
    if low >= 0 and CODES[0] < high <= CODES[1]:
        cause = (
            f"its values go from {low:.3g} to {high:.3g}: they seem to be the stored 8-bit numbers, without the range "
            "(low, high) of their channels"
        )
        return _finding(stem, {"values": values}, cause)
    return _search(stem, {"values": values}, list(_vector_faults()))


def _vector_faults() -> Iterator[Fault]:
    yield from _scale_faults("values", "its vectors are")
    yield Fault("its vectors have the opposite sign", lambda inputs: {"values": -inputs["values"]})
    yield Fault("its channels are in the reverse order", lambda inputs: {"values": inputs["values"].flip(1)})


# ---- maps of ids ----


def _examine_label(
    stem: PrismerExpertStem, spec: ExpertSpec, inputs: Inputs, orders: dict[str, list[int]]
) -> StemFinding:
    if "values" in inputs:
        return _search(stem, inputs, [])
    if (inputs["ids"] == BACKGROUND).all():
        return _finding(stem, inputs, "it finds nothing in any image: every pixel is background")
    if "features" in inputs:
        found = _search(stem, inputs, list(_scale_faults("features", "the features of its words are")))
        if found.cause == UNKNOWN:
            found.cause = "its words may be encoded by another encoder than in the training, or it reads other words"
        return found
    classes = "classes" if "classes" in inputs else "ids"
    num_classes = len(stem.class_features) - 1
    faults = [Fault(cause, _reorder(classes, order)) for cause, order in _class_orders(num_classes, orders)]
    found = _search(stem, inputs, faults)
    is_enough = len(inputs["ids"]) >= MIN_IMAGES_OF_CLASSES and found.distance > UNORDERED[0]
    if found.cause in (None, UNKNOWN) and is_enough:
        if found.distance >= UNORDERED[1] * _shuffled_distance(stem, inputs, classes, num_classes):
            found.cause = (
                "its ids fit the table of class features hardly better than ids in random order: the labels are in "
                "another order than the table, or are other labels"
            )
    if found.cause == UNKNOWN and not stem.class_features[-1].any():
        found.cause = "the feature of the background is zero; convert again with background_features.pt"
    return found


def _class_orders(num_classes: int, orders: dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    yield from orders.items()
    yield (
        "its class numbers are one too large (class 0 may be the background)",
        [BACKGROUND, *range(num_classes - 1)],
    )
    yield "its class numbers are one too small", [*range(1, num_classes), BACKGROUND]


def _reorder(name: str, order: list[int]) -> Callable[[Inputs], Inputs]:
    def undo(inputs: Inputs) -> Inputs:
        ids = inputs[name].long()
        table = torch.tensor(order, device=ids.device)
        is_class = (ids >= 0) & (ids < len(table))
        changed = torch.where(is_class, table[torch.where(is_class, ids, 0)], ids)
        if name == "classes":  # a class without a feature is background
            changed = torch.where(changed == BACKGROUND, torch.iinfo(torch.int32).max, changed)
        return {**inputs, name: changed}

    return undo


def _shuffled_distance(stem: PrismerExpertStem, inputs: Inputs, classes: str, num_classes: int) -> float:
    """The median distance of ids in random order."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: tensor[:SEARCHED] for name, tensor in inputs.items()}
    orders = [torch.randperm(num_classes, generator=generator).tolist() for _ in range(NUM_SHUFFLES)]
    distances = [_distance(stem, _moments(stem, _reorder(classes, order)(inputs)).of()) for order in orders]
    return torch.tensor(distances).median().item()


def _scale_faults(name: str, what: str) -> Iterator[Fault]:
    def scaled(factor: float) -> Callable[[Inputs], Inputs]:
        return lambda inputs: {**inputs, name: inputs[name] * factor}

    for factor in (3, 10, 30):
        yield Fault(f"{what} about {factor} times too large", scaled(1 / factor))
        yield Fault(f"{what} about {factor} times too small", scaled(factor))


# ---- the search ----


def _search(stem: PrismerExpertStem, inputs: Inputs, faults: list[Fault]) -> StemFinding:
    """The fault without which the inputs are most like those of the training, if it explains the difference."""
    finding = _finding(stem, inputs)
    if finding.distance <= FAMILIAR + finding.noise:
        return finding
    some = {name: tensor[:SEARCHED] for name, tensor in inputs.items()}
    best, cause = finding.distance, None
    for fault in faults:
        distance = _distance(stem, _moments(stem, fault.undo(some)).of())
        if distance < best:
            best, cause = distance, fault.cause
    if cause is not None and best <= EXPLAINED * finding.distance:
        finding.cause, finding.mended = cause, best
    elif finding.distance > UNLIKE + finding.noise:
        finding.cause = UNKNOWN
    return finding


def _finding(stem: PrismerExpertStem, inputs: Inputs, cause: str | None = None) -> StemFinding:
    moments = _moments(stem, inputs)
    return StemFinding(_distance(stem, moments.of()), _noise(stem, moments), cause)


@torch.no_grad()
def _moments(stem: PrismerExpertStem, inputs: Inputs) -> Moments:
    means: list[list[torch.Tensor]] = [[] for _ in stem.norms]
    squares: list[list[torch.Tensor]] = [[] for _ in stem.norms]

    def record(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            states = args[0].float()
            means[index].append(states.mean((2, 3)).double().cpu())
            squares[index].append(states.square().mean((2, 3)).double().cpu())

        return hook

    hooks = [norm.register_forward_pre_hook(record(index)) for index, norm in enumerate(stem.norms)]
    try:
        number = len(next(iter(inputs.values())))
        for start in range(0, number, CHUNK):
            stem(**{name: tensor[start : start + CHUNK] for name, tensor in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return Moments([torch.cat(parts) for parts in means], [torch.cat(parts) for parts in squares])


def _distance(
    stem: PrismerExpertStem,
    moments: list[tuple[torch.Tensor, torch.Tensor]],
    reference: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> float:
    """The distance from the statistics of the training, or from a `reference`; see [`StemFinding`]."""
    if reference is None:
        reference = [(norm.running_mean.double().cpu(), norm.running_var.double().cpu()) for norm in stem.norms]
    distances = []
    for norm, (mean, variance), (other, spread) in zip(stem.norms, moments, reference):
        variance, spread = variance.clamp(min=0) + norm.eps, spread + norm.eps
        ratio = variance / spread
        distances.append((ratio + (mean - other) ** 2 / spread - 1 - ratio.log()).mean() / 2)
    return torch.stack(distances).mean().item()


def _noise(stem: PrismerExpertStem, moments: Moments) -> float:
    """The distance between samples of this size: a high one of those between resampled images and all images."""
    number = len(moments.means[0])
    generator = torch.Generator().manual_seed(0)
    everything = moments.of()
    distances = [
        _distance(stem, moments.of(torch.randint(number, (number,), generator=generator)), everything)
        for _ in range(NUM_RESAMPLES)
    ]
    return torch.tensor(distances).quantile(0.9).item()
