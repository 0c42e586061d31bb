"""
The design of the studies: the trainings that experts.py compares, and the conditions of their evaluations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from scenes.language import TYPES
from scenes.scenes import EXPERTS


EXPERT_DROPOUT = 0.3
NOISE = (0.0, 0.25, 0.5, 0.75, 1.0)


def _name(plain: str, settings: Any, skip: tuple[str, ...] = ()) -> str:
    """A name from `plain` and the settings that differ from their defaults, such as `all,labels=true`."""
    others = [
        f"{field.name}={getattr(settings, field.name)}"
        for field in fields(settings)
        if field.name not in skip and getattr(settings, field.name) != field.default
    ]
    return ",".join([plain, *others] if plain else others)


@dataclass(frozen=True)
class Run:
    """
    A training.

    Args:
        experts (`tuple[str]`): the experts of the model, in the order of `EXPERTS`.
        labels (`str`): the expert labels for training and evaluation: `"predicted"`, `"true"` or `"coarse"`.
        expert_dropout (`float`): probability that a training sample lacks an expert, for each expert.
        freeze (`str`): the frozen backbones: `"both"`, `"vision"` or `"none"`.
        resampler (`bool`): whether the model has a resampler. Without it, the encoder gets all tokens of the experts,
            64 of each, instead of 64 latents.
        adaptation (`str`): how frozen backbones are adapted: by the paper's `"adaptors"`, or peft's `"lora"` or
            `"dora"`.
        renewed (`str`, *optional*): the part that starts with new weights if all others start with trained ones:
            `"adaptors"` or `"resampler"`.
    """

    experts: tuple[str, ...] = EXPERTS
    labels: str = "predicted"
    expert_dropout: float = 0.0
    freeze: str = "both"
    resampler: bool = True
    adaptation: str = "adaptors"
    renewed: str | None = None

    @property
    def name(self) -> str:
        experts = "all" if self.experts == EXPERTS else "+".join(self.experts) or "none"
        return _name(experts, self, skip=("experts",))


@dataclass(frozen=True)
class Condition:
    """
    An evaluation.

    Args:
        data (`str`): `"scenes"`, which are like the training scenes, or `"shifted"`, another domain.
        labels (`str`, *optional*): `"true"` to evaluate with true labels. By default those of the run.
        noise (`float`): share of the experts' labels that come from another image.
        missing (`str`, *optional*): the missing expert.
    """

    data: str = "scenes"
    labels: str | None = None
    noise: float = 0.0
    missing: str | None = None

    @property
    def name(self) -> str:
        return _name("", self) or "test"


@dataclass(frozen=True)
class Cell:
    """A row in the table and a point in the figure of a study. A cell without a label is a line across the figure."""

    label: str | int | None
    run: Run
    condition: Condition = Condition()
    series: str = ""


@dataclass(frozen=True)
class Study:
    """
    Args:
        title (`str`): the title of table and figure.
        text (`str`): a description of the comparison.
        axis (`str`): a name for the labels.
        cells (`Callable`): returns the cells of the study for a seed.
        panels (`tuple[str]`): six of `METRICS`, for the figure.
        columns (`tuple[str]`): some of `METRICS`, for the table.
    """

    title: str
    text: str
    axis: str
    cells: Callable[[int], list[Cell]]
    panels: tuple[str, ...] = ("all", "relation", "nearest", "sign", "cider", "exact_attributes")
    columns: tuple[str, ...] = ("all", *TYPES, "cider", "exact_attributes")


def expert_order(seed: int) -> list[str]:
    """The order in which the models of a seed get their experts."""
    return np.random.default_rng(seed).permutation(EXPERTS).tolist()


def only(*names: str) -> Run:
    return Run(experts=tuple(name for name in EXPERTS if name in names))


NONE = only()
WITH_DROPOUT = {
    "trained without expert dropout": Run(),
    f"trained with expert dropout {EXPERT_DROPOUT}": Run(expert_dropout=EXPERT_DROPOUT),
}
COSTS = ("trained_share", "seconds_per_step", "memory")


def number_of_experts(seed: int) -> list[Cell]:
    order = expert_order(seed)
    return [Cell(number, only(*order[:number])) for number in range(len(EXPERTS) + 1)]


def quality(seed: int) -> list[Cell]:
    kinds = [Cell(kind, Run(labels=kind)) for kind in ("coarse", "predicted", "true")]
    return [Cell("no experts", NONE), *kinds]


def noise(seed: int) -> list[Cell]:
    cells = [
        Cell(round(100 * share), run, Condition(noise=share), series)
        for series, run in WITH_DROPOUT.items()
        for share in NOISE
    ]
    return [*cells, Cell(None, NONE, series="no experts")]


def missing(seed: int) -> list[Cell]:
    cells = [
        Cell(name or "nothing", run, Condition(missing=name), series)
        for series, run in WITH_DROPOUT.items()
        for name in (None, *EXPERTS)
    ]
    return [*cells, Cell(None, NONE, series="no experts")]


def freezing(seed: int) -> list[Cell]:
    return [Cell(freeze, Run(freeze=freeze)) for freeze in ("both", "vision", "none")]


def resampler(seed: int) -> list[Cell]:
    return [Cell("with", Run(renewed="resampler")), Cell("without", Run(resampler=False))]


def single(seed: int) -> list[Cell]:
    return [Cell("none", NONE), *[Cell(name, only(name)) for name in EXPERTS], Cell("all six", Run())]


def adaptation(seed: int) -> list[Cell]:
    methods = {
        "adaptors": Run(renewed="adaptors"),
        "LoRA": Run(adaptation="lora", renewed="adaptors"),
        "DoRA": Run(adaptation="dora", renewed="adaptors"),
        "everything": Run(freeze="none", renewed="adaptors"),
    }
    return [Cell(name, run) for name, run in methods.items()]


def transfer(seed: int) -> list[Cell]:
    models = {"no experts": (NONE, None), "predicted labels": (Run(), None), "true labels": (Run(), "true")}
    return [
        Cell(series, run, Condition(data=data, labels=labels), domain)
        for domain, data in {"scenes like those of the training": "scenes", "shifted domain": "shifted"}.items()
        for series, (run, labels) in models.items()
    ]


STUDIES = {
    "number_of_experts": Study(
        "Number of experts",
        "Models with none to all of the experts. Each seed adds them in its own order, so the deviation includes the "
        "choice of experts.",
        "experts",
        number_of_experts,
    ),
    "quality": Study(
        "Quality of labels",
        "Models are trained and evaluated with true labels, with the labels of the trained experts, or with these "
        "labels degraded: maps at 8x8, one letter of each word wrong.",
        "labels",
        quality,
    ),
    "noise": Study(
        "Noise",
        "Models are trained as usual. In the evaluation, a share of the experts' labels comes from another image.",
        "labels of another image, %",
        noise,
    ),
    "missing": Study(
        "One expert missing",
        "Models are trained with all six experts. In the evaluation, one of them is missing.",
        "missing",
        missing,
    ),
    "freezing": Study(
        "Frozen against fully trained",
        "The table names the frozen backbones. The parts that Prismer adds to the backbones are always trained.",
        "frozen backbones",
        freezing,
        ("all", "cider", "exact_attributes", *COSTS),
        ("all", *TYPES, "cider", "exact_attributes", *COSTS),
    ),
    "resampler": Study(
        "With and without the resampler",
        "Without the resampler, the encoder gets all 64 tokens of each expert instead of 64 latents for all experts. "
        "The resampler is initialised anew.",
        "resampler",
        resampler,
        ("all", "relation", "cider", *COSTS),
        ("all", *TYPES, "cider", "exact_attributes", *COSTS),
    ),
    "single": Study("Single experts", "Models with one expert, compared with none and all.", "experts", single),
    "adaptation": Study(
        "Adaptors against LoRA, DoRA and full fine-tuning",
        "The backbones are adapted by the paper's adaptors, both backbones frozen; by LoRA or DoRA in all their "
        "linear layers, with the same number of trained weights; or by training everything, including the adaptors. "
        "The adaptors are initialised anew. The other parts that Prismer adds are always trained.",
        "adapted by",
        adaptation,
        ("all", "cider", "exact_attributes", *COSTS),
        ("all", *TYPES, "cider", "exact_attributes", *COSTS),
    ),
    "transfer": Study(
        "Transfer to a shifted domain",
        "Models are trained as usual. They are also evaluated on scenes with other shades, textures, light, camera "
        "and resolution, with the labels of the experts or with true labels.",
        "evaluated with",
        transfer,
    ),
}


def runs_of(studies: Sequence[str], seed: int) -> list[Run]:
    """The runs that studies need, without duplicates."""
    return list(dict.fromkeys(cell.run for study in studies for cell in STUDIES[study].cells(seed)))


def conditions_of(run: Run, seed: int) -> list[Condition]:
    """The conditions of a run in any study, also in those that are not selected."""
    cells = [cell for study in STUDIES.values() for cell in study.cells(seed) if cell.run == run]
    return list(dict.fromkeys([Condition(), *(cell.condition for cell in cells)]))
