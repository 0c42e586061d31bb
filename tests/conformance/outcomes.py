"""A plugin for pytest that writes down how each test ended, which mixin it comes from and why it was skipped."""

import json
import os
from collections import defaultdict


ORIGINS = {}
OUTCOMES = defaultdict(list)
SKIPPED_PARTS = defaultdict(set)


def pytest_itemcollected(item):
    # The class that first defines the test: subclasses carry wrapped copies.
    name = getattr(item, "originalname", item.name)
    for ancestor in reversed(item.cls.__mro__ if item.cls else ()):
        if name in vars(ancestor):
            ORIGINS[item.nodeid] = ancestor.__name__
            break


def pytest_runtest_logreport(report):
    if report.when != "call" and report.passed:
        return
    reason = ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if type(report).__name__ == "SubtestReport":  # a part of a test: counts where it failed
        if report.skipped:
            SKIPPED_PARTS[report.nodeid].add(reason.removeprefix("Skipped: "))
        if not report.failed:
            return
    OUTCOMES[report.nodeid].append((report.outcome, reason.removeprefix("Skipped: "), report.duration))


def pytest_sessionfinish(session):
    results = []
    for node, reports in OUTCOMES.items():
        kinds = [outcome for outcome, _, _ in reports]
        outcome = next(kind for kind in ("failed", "skipped", "passed") if kind in kinds)
        reason = next((reason for kind, reason, _ in reports if kind == outcome), "")
        _, class_name, test = node.rsplit("::", 2)
        results.append(
            {
                "class": class_name,
                "test": test,
                "mixin": "ConfigTester" if test == "test_config" else ORIGINS.get(node, class_name),
                "outcome": outcome,
                "reason": reason,
                "skipped_parts": sorted(SKIPPED_PARTS[node]),
                "seconds": round(sum(duration for _, _, duration in reports), 2),
            }
        )
    with open(os.environ["CONFORMANCE_OUTCOMES"], "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
