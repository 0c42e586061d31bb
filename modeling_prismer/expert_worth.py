"""
What each expert is worth, from the scores of a network with subsets of its experts. `prismer worth` measures them.

    plan = SubsetPlan.make(["depth", "ocr"])
    scores = np.stack([score(subset) for subset in plan.subsets])  # (subsets, samples)
    worth = measure_worth(plan, scores, groups=image_ids)
    worth.experts["ocr"].shapley

Shapley values divide the gain of all experts among them: each gets its mean gain over all orders in which the experts
can be added (Shapley, 1953). CUR and the information gap are those of arXiv 2507.03262.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


Subset = frozenset[str]

MAX_EXACT = 6  # experts up to which all subsets are measured, which are 64
PERMUTATIONS = 20  # that are drawn for more experts
RESAMPLES = 2000
CONFIDENCE = 0.95
ALL_TYPES = "all"  # the name of all types of samples together


@dataclass(frozen=True)
class SubsetPlan:
    """
    The subsets of experts to measure: none, all, all but one and each alone, and those that Shapley values need.

    Attributes:
        experts (`tuple[str, ...]`): the experts.
        subsets (`tuple[Subset, ...]`): the subsets, from none to all.
        orders (`tuple[tuple[str, ...], ...]`, *optional*):
            The sampled orders in which experts are added. `None` if the plan has all subsets, so that Shapley values
            are exact.

    Example:

    ```python
    >>> from modeling_prismer.expert_worth import SubsetPlan

    >>> plan = SubsetPlan.make(["depth", "ocr"])
    >>> [plan.name_of(subset) for subset in plan.subsets]
    ['none', 'depth', 'ocr', 'depth+ocr']
    ```
    """

    experts: tuple[str, ...]
    subsets: tuple[Subset, ...]
    orders: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    def make(cls, experts: Iterable[str], permutations: int | None = None, seed: int = 0) -> "SubsetPlan":
        """
        Args:
            experts (`Iterable[str]`): the names of the experts.
            permutations (`int`, *optional*):
                The number of orders to draw. By default all subsets of up to six experts are measured, and 20 orders
                are drawn for more.
            seed (`int`, *optional*, defaults to 0): the seed of the orders.

        Raises:
            ValueError: if there are no experts, or two of one name, or `permutations` is below 1.
        """
        experts = tuple(experts)
        if not experts or len(set(experts)) < len(experts):
            raise ValueError(f"experts are {', '.join(experts) or 'none'}; at least one is needed, each once")
        if permutations is not None and permutations < 1:
            raise ValueError(f"permutations is {permutations}; at least 1 is needed")
        sizes = range(len(experts) + 1)
        if permutations is None and len(experts) <= MAX_EXACT:
            return cls(
                experts, tuple(frozenset(own) for size in sizes for own in itertools.combinations(experts, size))
            )
        random = np.random.default_rng(seed)
        orders = tuple(
            tuple(experts[place] for place in random.permutation(len(experts)))
            for _ in range(permutations or PERMUTATIONS)
        )
        found = {frozenset(order[:size]) for order in orders for size in sizes}
        for expert in experts:
            found |= {frozenset([expert]), frozenset(experts) - {expert}}
        places = {expert: place for place, expert in enumerate(experts)}
        return cls(
            experts,
            tuple(sorted(found, key=lambda subset: (len(subset), sorted(places[name] for name in subset)))),
            orders,
        )

    def ordered(self, subset: Collection[str]) -> list[str]:
        """The experts of a subset, in the order of `experts`."""
        return [expert for expert in self.experts if expert in subset]

    def name_of(self, subset: Collection[str]) -> str:
        """The name of a subset: `none`, or its experts, such as `depth+ocr`."""
        return "+".join(self.ordered(subset)) or "none"

    def row_of(self, subset: Collection[str]) -> int:
        """The number of a subset in `subsets`."""
        return self.subsets.index(frozenset(subset))

    def contributions(self) -> np.ndarray:
        """
        The factors of each subset's score in the Shapley values of each order: `(orders, experts, subsets)`. Exact
        values have a single order, which stands for all.
        """
        number, count = len(self.experts), len(self.subsets)
        rows = {subset: row for row, subset in enumerate(self.subsets)}
        if self.orders is None:
            factors = np.zeros((1, number, count))
            for subset, row in rows.items():
                for place, expert in enumerate(self.experts):
                    # the share of all orders in which exactly these others come before the expert
                    share = 1 / (number * math.comb(number - 1, len(subset - {expert})))
                    factors[0, place, row] = share if expert in subset else -share
            return factors
        factors = np.zeros((len(self.orders), number, count))
        for index, order in enumerate(self.orders):
            for size, expert in enumerate(order):
                place = self.experts.index(expert)
                factors[index, place, rows[frozenset(order[: size + 1])]] += 1
                factors[index, place, rows[frozenset(order[:size])]] -= 1
        return factors


# ---- estimates ----


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ExpertWorth:
    """
    What one expert is worth.

    Attributes:
        alone, without ([`Estimate`]): the score with this expert alone, and with all others.
        shapley ([`Estimate`]): its Shapley value, in units of the score.
        cur ([`Estimate`]): (score with all − score without it) / score with all. Not a number if that score is 0.
    """

    alone: Estimate
    without: Estimate
    shapley: Estimate
    cur: Estimate


@dataclass(frozen=True)
class TypeWorth:
    """
    What the experts are worth for one type of samples.

    Attributes:
        samples (`int`): the number of samples.
        with_all, with_none ([`Estimate`]): the scores with all experts and without any.
        information_gap ([`Estimate`]): the largest CUR minus the smallest one.
        experts (`dict[str, ExpertWorth]`): the worth of each expert.
        subsets (`tuple[Estimate, ...]`): the score of each subset of the plan.
    """

    samples: int
    with_all: Estimate
    with_none: Estimate
    information_gap: Estimate
    experts: dict[str, ExpertWorth]
    subsets: tuple[Estimate, ...]


def measure_worth(
    plan: SubsetPlan,
    scores: np.ndarray,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> TypeWorth:
    """
    Computes what experts are worth, with bootstrap intervals of 95 % (percentiles). Each resample draws groups of
    samples, because the questions about one image are not independent, and the orders of a plan that has some.

    Args:
        plan ([`SubsetPlan`]): the experts and subsets.
        scores (`np.ndarray` of shape `(subsets, samples)`): the score of each sample with each subset.
        groups (`Sequence[str]`, *optional*): the group of each sample, such as its image. By default each is its own.
        resamples (`int`, *optional*, defaults to 2000): the number of resamples.
        seed (`int`, *optional*, defaults to 0): the seed of the resamples.

    Returns:
        [`TypeWorth`]

    Raises:
        ValueError: if the shapes do not fit, or there are no samples.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.expert_worth import SubsetPlan, measure_worth

    >>> plan = SubsetPlan.make(["depth", "ocr"])
    >>> reads = [[float("ocr" in subset)] * 8 for subset in plan.subsets]  # text alone answers
    >>> worth = measure_worth(plan, np.array(reads))
    >>> worth.experts["ocr"].shapley.value, worth.experts["depth"].shapley.value
    (1.0, 0.0)
    ```
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or len(scores) != len(plan.subsets) or not scores.shape[1]:
        raise ValueError(
            f"scores have the shape {scores.shape}; ({len(plan.subsets)} subsets, samples) is needed, with one sample "
            "or more"
        )
    samples = scores.shape[1]
    if groups is not None and len(groups) != samples:
        raise ValueError(f"{len(groups)} groups for {samples} samples")
    members = np.unique(np.arange(samples) if groups is None else np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(members)  # (groups,)
    sums = np.stack([np.bincount(members, weights=own) for own in scores])  # (subsets, groups)
    random = np.random.default_rng(seed)
    resampled = [sums.sum(axis=1) / samples]  # first the data themselves
    for _ in range(resamples):
        drawn = np.bincount(random.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        resampled.append(sums @ drawn / (sizes @ drawn))
    means = np.stack(resampled)  # (1 + resamples, subsets)

    shapley = _shapley_values(plan, means, random)
    rows_without = [plan.row_of(set(plan.experts) - {expert}) for expert in plan.experts]
    rows_alone = [plan.row_of({expert}) for expert in plan.experts]
    with_all = means[:, -1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        cur = np.where(with_all == 0, np.nan, (with_all - means[:, rows_without]) / with_all)
    estimates = [_estimates(values) for values in (means[:, rows_alone], means[:, rows_without], shapley, cur)]
    subsets = tuple(_estimates(means))
    return TypeWorth(
        samples=samples,
        with_all=subsets[-1],
        with_none=subsets[0],
        information_gap=_estimates(np.ptp(cur, axis=1, keepdims=True))[0],
        experts={expert: ExpertWorth(*own) for expert, own in zip(plan.experts, zip(*estimates))},
        subsets=subsets,
    )


def measure_worth_by_type(
    plan: SubsetPlan,
    scores: np.ndarray,
    types: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, TypeWorth]:
    """
    As [`measure_worth`], for all samples (`"all"`) and for those of each type.

    Args:
        types (`Sequence[str]`, *optional*): the type of each sample.
        plan, scores, groups, resamples, seed: as in [`measure_worth`].

    Raises:
        ValueError: if a type is called `"all"`, or if samples and types differ in number.
    """
    if types is not None and ALL_TYPES in types:
        raise ValueError(f"a type is called {ALL_TYPES!r}, the name of all types together; give it another name")
    scores = np.asarray(scores, dtype=float)
    found = {ALL_TYPES: measure_worth(plan, scores, groups, resamples, seed)}
    if types is None:
        return found
    own_types, own_groups = np.asarray(types), None if groups is None else np.asarray(groups)
    if len(own_types) != scores.shape[1]:
        raise ValueError(f"{len(own_types)} types for {scores.shape[1]} samples")
    for name in dict.fromkeys(types):
        is_own = own_types == name
        members = None if own_groups is None else own_groups[is_own]
        found[str(name)] = measure_worth(plan, scores[:, is_own], members, resamples, seed)
    return found


def _shapley_values(plan: SubsetPlan, means: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The Shapley values for each row of means `(rows, subsets)`: `(rows, experts)`. Row 0 has all orders once."""
    factors = plan.contributions()
    count = len(factors)
    shares = random.multinomial(count, np.full(count, 1 / count), size=len(means)) / count  # (rows, orders)
    shares[0] = 1 / count
    return np.einsum("rs,ro,oes->re", means, shares, factors, optimize=True)


def _estimates(values: np.ndarray) -> list[Estimate]:
    """From values `(1 + resamples, n)`, those of the data first, an estimate for each column."""
    margin = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[1:], [margin, 1 - margin], axis=0)
    return [Estimate(*map(float, own)) for own in zip(values[0], low, high)]


# ---- costs ----


@dataclass(frozen=True)
class ExpertCost:
    """
    What one expert costs.

    Attributes:
        seconds (`float`): for each image, without the experts that it needs. Not a number if unknown.
        memory_bytes (`int`, *optional*): growth of the memory while it was loaded and ran; `None` if unknown.
        needs (`tuple[str, ...]`): experts that run with it, because it takes their labels.
        label_bytes (`float`): of a stored label.
    """

    seconds: float
    memory_bytes: int | None = None
    needs: tuple[str, ...] = ()
    label_bytes: float = math.nan


def seconds_of(subset: Iterable[str], costs: Mapping[str, ExpertCost]) -> float:
    """The seconds for each image of the experts of a subset, with those that they need."""
    running, waiting = set(), list(subset)
    while waiting:
        name = waiting.pop()
        if name not in running:
            running.add(name)
            waiting += costs[name].needs
    return sum(costs[name].seconds for name in running)


def pareto_front(seconds: Sequence[float], scores: Sequence[float]) -> list[int]:
    """
    The numbers of the subsets that no other subset beats, from the fastest to the best: every other subset is slower
    or worse, or equal in both. Subsets of unknown time are left out.

    Example:

    ```python
    >>> from modeling_prismer.expert_worth import pareto_front

    >>> pareto_front([1.0, 2.0, 3.0, 2.5], [0.5, 0.8, 0.7, 0.9])
    [0, 1, 3]
    ```
    """
    front: list[int] = []
    timed = [number for number, own in enumerate(seconds) if not math.isnan(own)]
    for number in sorted(timed, key=lambda number: (seconds[number], -scores[number])):
        if not front or scores[number] > scores[front[-1]]:
            front.append(number)
    return front


def best_within(seconds: Sequence[float], scores: Sequence[float], budget: float) -> int:
    """
    The number of the subset with the best score within a budget; of equal ones the fastest.

    Raises:
        ValueError: if no subset is fast enough.
    """
    affordable = [number for number in pareto_front(seconds, scores) if seconds[number] <= budget]
    if not affordable:
        raise ValueError(
            f"no subset runs in {budget:g} seconds for each image; the fastest takes {np.nanmin(seconds):.3g} seconds"
        )
    return affordable[-1]
