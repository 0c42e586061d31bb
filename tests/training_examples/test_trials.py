"""studies/trials.py: trainings resume, the best rate wins, and scores join the seeds."""

import json
import subprocess
import sys

import pytest
from filelock import FileLock

from studies.trials import Training, Trials, score_of, share


def trials(folder, **changes):
    settings = {"settings": {"steps": 2}, "conditions": ["all, frozen", "(IA)³"], "learning_rates": (1e-3, 1e-2, 0.1)}
    return Trials(folder, **{**settings, "seeds": 2, **changes})


def counts(right):
    return {"counts": {name: [{"color": [right, 10], "sign": [1, 2]}] * 3 for name in ("validation", "test")}}


def do(own, done):
    rights = {1e-3: 3, 1e-2: 7, 0.1: 5}

    def start(training):
        done.append(training)
        own.train(training, lambda training: counts(rights[training.learning_rate]))

    return start


def test_the_best_rate_is_trained_with_all_seeds(tmp_path):
    own, done = trials(tmp_path), []
    own.work(do(own, done))
    assert done == [
        *(Training(name, rate, 0) for name in own.conditions for rate in own.learning_rates),
        *(Training(name, 1e-2, 1) for name in own.conditions),
    ]
    assert own.best_rate("(IA)³") == 1e-2
    assert [result["training"]["seed"] for result in own.results("(IA)³")] == [0, 1]
    assert sorted(path.stem for path in (tmp_path / "runs").glob("ia3-*.json"))[0] == "ia3-0.001-seed0"
    done.clear()
    own.work(do(own, done))
    assert done == []


def test_a_training_without_a_result_is_done_again(tmp_path):
    own, done = trials(tmp_path), []
    own.work(do(own, []))
    own.path(Training("(IA)³", 0.1, 0)).unlink()
    assert own.best_rate("(IA)³") is None and own.results("(IA)³") is None
    own.work(do(own, done))
    assert done == [Training("(IA)³", 0.1, 0)]


def test_a_training_in_another_process_is_left_alone(tmp_path, capsys):
    own, done = trials(tmp_path), []
    (tmp_path / "runs").mkdir()
    with FileLock(own.path(Training("(IA)³", 1e-3, 0)).with_suffix(".lock")):
        own.work(do(own, done))
    assert "ia3-0.001-seed0 is in progress in another process" in capsys.readouterr().out
    assert Training("(IA)³", 1e-3, 0) not in done and Training("(IA)³", 1e-2, 1) not in done


def test_results_of_other_settings_are_refused(tmp_path):
    own = trials(tmp_path)
    own.work(do(own, []))
    with pytest.raises(SystemExit, match=r"was made with .*2.*, not .*3.*; use another folder"):
        trials(tmp_path, settings={"steps": 3}).wanted()


def test_each_training_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    own, commands = trials(tmp_path), []

    def run(command, stdout, stderr):
        commands.append(command)
        own.train(own.named(command[-1]), lambda training: counts(5))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["script", "--steps", "2"])
    own.work(lambda training: own.in_own_process(training, "studies.claims"))
    start = [sys.executable, "-m", "studies.claims", "--steps", "2", "--training"]
    assert commands[0] == [*start, "all-frozen-0.001-seed0"] and len(commands) == 8

    monkeypatch.setattr(subprocess, "run", lambda command, **streams: subprocess.CompletedProcess(command, 1))
    own.path(Training("(IA)³", 0.1, 0)).unlink()
    with pytest.raises(SystemExit, match=r"ia3-0.1-seed0 failed; see .*ia3-0.1-seed0.log"):
        own.work(lambda training: own.in_own_process(training, "studies.claims"))
    with pytest.raises(SystemExit, match="--training is all; accepted are all-frozen-0.001-seed0, "):
        own.named("all")


def test_results_are_whole_files(tmp_path):
    own, training = trials(tmp_path), Training("(IA)³", 0.1, 0)
    own.train(training, lambda training: counts(5))
    result = json.loads(own.path(training).read_text())
    assert result["settings"] == own.settings and result["minutes"] >= 0
    assert result["training"] == {"condition": "(IA)³", "learning_rate": 0.1, "seed": 0}


def test_scores_join_the_seeds_by_image():
    results = [
        {"counts": {"test": [{"color": [1, 2], "sign": [0, 1]}, {"color": [2, 2]}]}},
        {"counts": {"test": [{"color": [2, 2], "sign": [1, 1]}, {"color": [0, 2]}]}},
    ]
    assert score_of(results).parts.tolist() == [[4, 6], [2, 4]]
    assert score_of(results, kinds=["sign"]).parts.tolist() == [[1, 2], [0, 0]]
    assert share(results[0], "test") == pytest.approx(3 / 5)
