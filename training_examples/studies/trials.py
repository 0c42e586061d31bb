"""
Trainings of several conditions, each with a learning rate of its own: every condition is trained with the same rates
and the first seed, and then with its best rate on the validation images and the other seeds. Each training runs in a
process of its own and writes a JSON file, so that a study can be stopped and restarted, and several processes can work
on one folder.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from comparison.scores import Score
from training import write_json


@dataclass(frozen=True)
class Training:
    condition: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        plain = re.sub("[^a-z0-9 ]", "", self.condition.lower().replace("³", "3")).replace(" ", "-")
        return f"{plain}-{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Trials:
    """
    The trainings of a study in a folder.

    Args:
        folder (`Path`): the folder of the results.
        settings (`dict`): what all trainings share. Results with other settings are refused.
        conditions (`list[str]`): the names of the conditions.
        learning_rates (`list[float]`): the rates that are tried.
        seeds (`int`): trainings with the best rate.
    """

    folder: Path
    settings: dict[str, Any]
    conditions: Sequence[str]
    learning_rates: Sequence[float]
    seeds: int

    def path(self, training: Training) -> Path:
        return self.folder / "runs" / f"{training.name}.json"

    def result(self, training: Training) -> dict[str, Any] | None:
        path = self.path(training)
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        if result["settings"] != self.settings:
            raise SystemExit(f"{path} was made with {result['settings']}, not {self.settings}; use another folder")
        return result

    def best_rate(self, condition: str) -> float | None:
        """The learning rate with the most right answers in validation, `None` if one is still missing."""
        results = {rate: self.result(Training(condition, rate, 0)) for rate in self.learning_rates}
        known = {rate: share(result, "validation") for rate, result in results.items() if result is not None}
        return max(known, key=lambda rate: known[rate]) if len(known) == len(results) else None

    def results(self, condition: str) -> list[dict[str, Any]] | None:
        """The results of all seeds with the best rate, `None` if one is still missing."""
        best = self.best_rate(condition)
        if best is None:
            return None
        found = [self.result(Training(condition, best, seed)) for seed in range(self.seeds)]
        known = [result for result in found if result is not None]
        return known if len(known) == len(found) else None

    def wanted(self) -> list[Training]:
        """The next trainings: all rates with the first seed, then the best rate with the others."""
        trainings = []
        for condition in self.conditions:
            best = self.best_rate(condition)
            if best is None:
                trainings += [Training(condition, rate, 0) for rate in self.learning_rates]
            else:
                trainings += [Training(condition, best, seed) for seed in range(self.seeds)]
        return trainings

    def named(self, name: str) -> Training:
        every = [
            Training(condition, rate, seed)
            for condition in self.conditions
            for rate in self.learning_rates
            for seed in range(self.seeds)
        ]
        names = {training.name: training for training in every}
        if name not in names:
            raise SystemExit(f"--training is {name}; accepted are {', '.join(sorted(names))}")
        return names[name]

    def train(self, training: Training, train: Callable[[Training], dict[str, Any]]) -> None:
        """Writes the result of `train`, with the training, the settings and the minutes that it took."""
        start = time.perf_counter()
        result = train(training)
        minutes = (time.perf_counter() - start) / 60
        result = {"training": asdict(training), "settings": self.settings, **result, "minutes": minutes}
        write_json(self.path(training), result)

    def in_own_process(self, training: Training, module: str) -> None:
        """Starts a study's script for one training in a new process, so that its memory can be measured."""
        log = self.path(training).with_suffix(".log")
        with log.open("w") as output:
            command = [sys.executable, "-m", module, *sys.argv[1:], "--training", training.name]
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
                raise SystemExit(f"{training.name} failed; see {log}")

    def work(self, start: Callable[[Training], None]) -> None:
        """Does with `start` all trainings that have no results yet and are not in progress in another process."""
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the second round knows the best rates
            for training in self.wanted():
                try:
                    with FileLock(self.path(training).with_suffix(".lock"), timeout=0):
                        if self.result(training) is None:
                            start(training)
                except Timeout:
                    print(f"{training.name} is in progress in another process", flush=True)
                    continue
                result = self.result(training)
                assert result is not None
                print(f"{training.name}: {100 * share(result, 'validation'):.1f} % in validation", flush=True)


def add_arguments(parser: argparse.ArgumentParser, learning_rates: Sequence[float]) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=list(learning_rates))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="only write the tables here")
    parser.add_argument("--training", help="do this training only, such as lora-0.001-seed0, in this process")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if len(args.learning_rates) < 3:
        parser.error("--learning_rates: at least three values are needed, so that each condition is tuned alike")


def run(
    args: argparse.Namespace,
    trials: Trials,
    train: Callable[[Training, argparse.Namespace], dict[str, Any]],
    report: Callable[[Trials, Path], None],
    module: str,
) -> None:
    """Reports, does one training or does all of them, as the arguments of [`add_arguments`] say."""
    if args.report:
        report(trials, args.report)
    elif args.training:
        trials.train(trials.named(args.training), lambda training: train(training, args))
    else:
        trials.work(lambda training: trials.in_own_process(training, module))


# ---- scores ----


AT_AN_END = "\\* The smallest or largest rate that was tried; one beyond it may be better."


def write_rate(trials: Trials, results: Sequence[dict[str, Any]]) -> str:
    """The learning rate of results, marked as [`AT_AN_END`] says."""
    rate = results[0]["training"]["learning_rate"]
    return f"{rate:g}" + "*" * (rate in (min(trials.learning_rates), max(trials.learning_rates)))


def write_costs(results: Sequence[dict[str, Any]]) -> list[str]:
    """The seconds of a step and the megabytes, medians over the seeds."""
    seconds, megabytes = (
        np.median([result[name] for result in results]) for name in ("seconds_per_step", "megabytes")
    )
    return [f"{seconds:.2f}", f"{megabytes:.0f}"]


def share(result: dict[str, Any], split: str) -> float:
    return score_of([result], split).value / 100


def score_of(results: Sequence[dict[str, Any]], split: str = "test", kinds: Sequence[str] | None = None) -> Score:
    """
    The share of right answers of all seeds. An image is drawn with the answers of all seeds.

    Args:
        results (`list[dict]`): the results of the seeds. `counts` has, for each split and each image, how many answers
            of each kind are right, and how many there are.
        kinds (`list[str]`, *optional*): answers of these kinds only.
    """
    parts = np.zeros((len(results[0]["counts"][split]), 2))
    for result in results:
        for place, counts in enumerate(result["counts"][split]):
            for kind, own in counts.items():
                if kinds is None or kind in kinds:
                    parts[place] += own
    return Score("right answers", parts)


def write_validation(trials: Trials, condition: str) -> str:
    """The right answers in validation with each rate, in percent."""
    results = {rate: trials.result(Training(condition, rate, 0)) for rate in trials.learning_rates}
    known = {rate: result for rate, result in results.items() if result is not None}
    return "; ".join(f"{rate:g}: {100 * share(result, 'validation'):.1f}" for rate, result in known.items())


# ---- costs ----


class StepTimes(TrainerCallback):
    """Records the computing time of the training steps in seconds, without making the batches."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.process_time() - self.start)
