"""Shapley values, CUR and intervals of experts whose worth is known by construction."""

import itertools
import math

import numpy as np
import pytest

from modeling_prismer.expert_worth import (
    MAX_EXACT,
    ExpertCost,
    SubsetPlan,
    best_within,
    measure_worth,
    measure_worth_by_type,
    pareto_front,
    seconds_of,
)


SAMPLES = 400
GUESSED = np.arange(SAMPLES) % 2  # half of the questions are answered right without experts


def score(subset):
    """`answer` carries the answer, `copy` is its copy, `noise` changes the guesses, `harm` spoils a fifth."""
    found = GUESSED.copy() if "noise" not in subset else np.roll(GUESSED, 1)
    if {"answer", "copy"} & set(subset):
        found = np.ones(SAMPLES)
    return np.where((np.arange(SAMPLES) // 2 % 5 == 0) & ("harm" in subset), 0, found)


def scores_of(plan):
    return np.stack([score(subset) for subset in plan.subsets])


def values(worth, what):
    return {name: round(getattr(own, what).value, 6) for name, own in worth.experts.items()}


def test_known_worths_are_found():
    plan = SubsetPlan.make(["noise", "answer", "copy", "harm"])
    worth = measure_worth(plan, scores_of(plan))
    assert (worth.samples, worth.with_none.value, worth.with_all.value) == (SAMPLES, 0.5, 0.8)
    assert values(worth, "alone") == {"noise": 0.5, "answer": 1, "copy": 1, "harm": 0.4}
    assert values(worth, "without") == {"noise": 0.8, "answer": 0.8, "copy": 0.8, "harm": 1}
    assert values(worth, "cur") == {"noise": 0, "answer": 0, "copy": 0, "harm": -0.25}
    assert worth.information_gap.value == pytest.approx(0.25)
    shapley = values(worth, "shapley")
    # the copy shares the worth of the answer, the noise has none, and all together have gained 0.3
    assert shapley["noise"] == 0 and shapley["answer"] == shapley["copy"] > 0.2 and shapley["harm"] < -0.1
    assert sum(shapley.values()) == pytest.approx(0.8 - 0.5, abs=1e-5)


def test_exact_values_are_means_over_all_orders():
    experts = ["a", "b", "c", "d"]
    plan = SubsetPlan.make(experts)
    scores = np.random.default_rng(0).random((len(plan.subsets), 7))
    rows = {subset: row for row, subset in enumerate(plan.subsets)}
    gains = {name: [] for name in experts}
    for order in itertools.permutations(experts):
        for place, name in enumerate(order):
            with_it, without = rows[frozenset(order[: place + 1])], rows[frozenset(order[:place])]
            gains[name].append(scores[with_it].mean() - scores[without].mean())
    expected = {name: round(float(np.mean(own)), 6) for name, own in gains.items()}
    assert values(measure_worth(plan, scores), "shapley") == expected


def test_sampled_orders_come_close_to_exact_values():
    experts = ["noise", "answer", "copy", "harm"]
    plan = SubsetPlan.make(experts, permutations=200)
    assert len(plan.orders) == 200
    exact = measure_worth(SubsetPlan.make(experts), scores_of(SubsetPlan.make(experts)))
    sampled = measure_worth(plan, scores_of(plan))
    for name, own in sampled.experts.items():
        assert own.shapley.value == pytest.approx(exact.experts[name].shapley.value, abs=0.05)
        assert own.shapley.low <= exact.experts[name].shapley.value <= own.shapley.high
        assert own.cur.value == pytest.approx(exact.experts[name].cur.value)


def test_few_orders_have_wide_intervals():
    """The copy is worth everything or nothing, by who comes first: the choice of orders is uncertain too."""
    plan = SubsetPlan.make(["answer", "copy"], permutations=8)
    scores = np.stack([np.full(SAMPLES, float(bool(subset))) for subset in plan.subsets])
    own = measure_worth(plan, scores).experts["copy"].shapley
    assert own.low < 0.3 and own.high > 0.7
    exact = SubsetPlan.make(["answer", "copy"])
    own = measure_worth(exact, scores).experts["copy"].shapley
    assert (own.low, own.value, own.high) == (0.5, 0.5, 0.5)


def test_plan_measures_what_every_figure_needs():
    experts = [f"e{number}" for number in range(9)]
    plan = SubsetPlan.make(experts, seed=3)
    assert len(plan.orders) == 20 and len(plan.subsets) < 2**9
    assert plan.subsets[0] == frozenset() and plan.subsets[-1] == frozenset(experts)
    for name in experts:
        assert {frozenset([name]), frozenset(experts) - {name}} <= set(plan.subsets)
    for order in plan.orders:
        assert all(frozenset(order[:size]) in plan.subsets for size in range(10))
    assert SubsetPlan.make(experts, seed=3) == plan != SubsetPlan.make(experts, seed=4)
    assert len(SubsetPlan.make(experts[:MAX_EXACT]).subsets) == 2**MAX_EXACT
    assert SubsetPlan.make(["b", "a"]).name_of({"a", "b"}) == "b+a"


def test_interval_is_that_of_the_mean():
    random = np.random.default_rng(0)
    plan = SubsetPlan.make(["a"])
    scores = np.stack([np.zeros(1000), random.normal(0.3, 1.0, 1000)])
    own = measure_worth(plan, scores).experts["a"].shapley
    margin = 1.96 * scores[1].std() / math.sqrt(1000)
    assert own.value == pytest.approx(scores[1].mean())
    assert (own.low, own.high) == pytest.approx((own.value - margin, own.value + margin), abs=0.1 * margin)


def test_texts_about_one_image_count_together():
    """Ten equal questions about each of 50 images tell as much as one question each."""
    random = np.random.default_rng(0)
    plan = SubsetPlan.make(["a"])
    once = np.stack([np.zeros(50), random.integers(0, 2, 50)])
    often, images = np.repeat(once, 10, axis=1), np.repeat(np.arange(50), 10)
    few = measure_worth(plan, once).experts["a"].shapley
    grouped = measure_worth(plan, often, groups=[f"{image}.png" for image in images]).experts["a"].shapley
    single = measure_worth(plan, often).experts["a"].shapley
    assert grouped.high - grouped.low == pytest.approx(few.high - few.low, rel=0.1)
    assert single.high - single.low < 0.5 * (few.high - few.low)


def test_each_type_has_its_own_worth():
    plan = SubsetPlan.make(["ocr", "depth"])
    types = ["sign", "far"] * 10
    scores = np.stack(
        [[float({"sign": "ocr", "far": "depth"}[name] in subset) for name in types] for subset in plan.subsets]
    )
    found = measure_worth_by_type(plan, scores, types, groups=[str(number // 2) for number in range(20)])
    assert list(found) == ["all", "sign", "far"]
    assert [values(own, "shapley") for own in found.values()] == [
        {"ocr": 0.5, "depth": 0.5},
        {"ocr": 1.0, "depth": 0.0},
        {"ocr": 0.0, "depth": 1.0},
    ]
    assert [own.samples for own in found.values()] == [20, 10, 10]


def test_cur_of_a_score_of_zero_is_no_number():
    plan = SubsetPlan.make(["a", "b"])
    worth = measure_worth(plan, np.zeros((4, 5)))
    assert math.isnan(worth.experts["a"].cur.value) and math.isnan(worth.information_gap.value)
    assert worth.experts["a"].shapley.value == 0


def test_seconds_include_what_an_expert_needs():
    costs = {
        "depth": ExpertCost(1.0),
        "normal": ExpertCost(0.25, needs=("depth",)),
        "tilt": ExpertCost(0.5, needs=("normal",)),
    }
    assert seconds_of([], costs) == 0
    assert seconds_of(["normal"], costs) == 1.25
    assert seconds_of(["tilt", "depth"], costs) == 1.75


def test_front_and_budget_choose_the_best_for_the_time():
    seconds, scores = [1.0, 2.0, 2.2, 2.5, 2.5, math.nan], [0.5, 0.8, 0.8, 0.7, 0.9, 1.0]
    assert pareto_front(seconds, scores) == [0, 1, 4]  # an equal score in more time is no gain
    assert [best_within(seconds, scores, budget) for budget in (1, 2.4, 100)] == [0, 1, 4]
    with pytest.raises(ValueError, match="no subset runs in 0.5 seconds for each image; the fastest takes 1 seconds"):
        best_within(seconds, scores, 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda plan: SubsetPlan.make([]), "experts are none"),
        (lambda plan: SubsetPlan.make(["a", "a"]), "each once"),
        (lambda plan: SubsetPlan.make(["a"], permutations=0), "permutations is 0"),
        (lambda plan: measure_worth(plan, np.zeros((3, 5))), r"shape \(3, 5\); \(4 subsets, samples\)"),
        (lambda plan: measure_worth(plan, np.zeros((4, 0))), "with one sample or more"),
        (lambda plan: measure_worth(plan, np.zeros((4, 5)), groups=["a"]), "1 groups for 5 samples"),
        (lambda plan: measure_worth_by_type(plan, np.zeros((4, 5)), ["a"]), "1 types for 5 samples"),
        (lambda plan: measure_worth_by_type(plan, np.zeros((4, 2)), ["a", "all"]), "a type is called 'all', the name"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(SubsetPlan.make(["a", "b"]))
