"""studies/experts.py: runs of every kind train, conditions change the labels, runs resume, reports are right."""

import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from modeling_prismer.processing.labels import label_images
from scenes import train_backbones
from scenes.scenes import EXPERTS, Scenes, expert_labels
from studies import experts as study
from studies import report as study_report
from studies.design import EXPERT_DROPOUT, NONE, STUDIES, Condition, Run, conditions_of, only, runs_of
from studies.experts import parse_arguments, train_and_evaluate, work
from studies.report import report
from tests.training_examples.simple_experts import simple_suite


SIZES = {"scenes": {"train": 4, "validation": 0, "test": 6}, "shifted": {"test": 3}}


def few_scenes(cache_dir, config_name):
    return Scenes(cache_dir=cache_dir, config_name=config_name, **SIZES[config_name])


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(study, "Scenes", few_scenes)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes of both domains, small untrained backbones, a suite of experts, and its labels for the scenes."""
    folder = tmp_path_factory.mktemp("study")
    suite = simple_suite()
    suite.save_pretrained(folder / "suite")
    for name in SIZES:
        few_scenes(folder / "data", name).download_and_prepare()
    splits = few_scenes(folder / "data", "scenes").as_dataset()
    for rows in splits.values():
        images = rows.select_columns(["image_id", "image"])
        label_images(images, suite, folder / "labels", image_column="image", key_column="image_id", progress=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_backbones, "HEAD_WIDTH", 12)
        train_backbones.train_tokenizer(train_backbones.texts_of(splits["train"]), folder / "tokenizer")
        tokenizer = train_backbones.RobertaTokenizer.from_pretrained(folder / "tokenizer")
        train_backbones.new_clip(tokenizer, 24, 1).save_pretrained(folder / "clip")
        train_backbones.new_roberta(tokenizer, 24, 2).save_pretrained(folder / "roberta")
    return folder


def command_line(folder, output_dir, *more):
    own = {"output_dir": output_dir, "backbones": folder, "suite": folder / "suite", "labels": folder / "labels"}
    own |= {"data_dir": folder / "data", "train_rows": 4, "eval_rows": 2, "epochs": 1}
    return [*(f"--{name}={value}" for name, value in own.items()), *map(str, more)]


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """The arguments, after labelling the shifted domain."""
    args = parse_arguments(command_line(folder, tmp_path_factory.mktemp("runs")))
    study.prepare(args)
    return args


# ---- trainings ----


RUNS = [
    Run(),
    NONE,
    only("ocr", "depth"),
    Run(labels="true"),
    Run(labels="coarse"),
    Run(expert_dropout=EXPERT_DROPOUT),
    Run(freeze="vision"),
    Run(freeze="none"),
    Run(renewed="resampler"),
    Run(resampler=False),
    Run(renewed="adaptors"),
    Run(adaptation="lora", renewed="adaptors"),
    Run(adaptation="dora", renewed="adaptors"),
    Run(freeze="none", renewed="adaptors"),
]


def train_under(conditions, run, args, monkeypatch):
    monkeypatch.setattr(study, "conditions_of", lambda run, seed: conditions)
    return json.loads(json.dumps(train_and_evaluate(run, 1, args)))


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_runs_of_every_kind_are_trained_and_evaluated(prepared, run, monkeypatch):
    conditions = [condition for condition in conditions_of(run, 0) if condition.name in ("test", "data=shifted")]
    result = train_under(conditions, run, prepared, monkeypatch)
    assert result["run"]["experts"] == list(run.experts) and result["seed"] == 1
    assert list(result["evaluations"]) == [condition.name for condition in conditions]
    for scores in result["evaluations"].values():
        assert {"all", "color", "relation"} <= scores["answers"].keys()
        assert scores["captions"].keys() == {"cider", "exact_attributes", "objects"}
    training = result["training"]
    assert training["steps"] == 1 and np.isfinite(training["loss"]) and training["seconds_per_step"] > 0
    assert training["memory"] >= 0 and (training["trained_share"] == 1) == (run.freeze == "none")


@pytest.mark.parametrize("adaptation", ["lora", "dora"])
def test_lora_has_about_as_many_weights_as_the_adaptors(prepared, adaptation):
    rows = few_scenes(prepared.data_dir, "scenes").as_dataset()["train"]

    def trainer(run):
        args = argparse.Namespace(**{**vars(prepared), "epochs": 3})  # the first step only warms up
        return study.trainer_of(run, 0, args, rows, dict.fromkeys(rows["image_id"], {}))

    def parts(model):
        """Numbers of trained and frozen weights of adaptors, LoRA, backbones and other parts."""
        found = {}
        backbone = set(model._backbone_parameters(model.model, True)) | set(
            model._backbone_parameters(model.model, False)
        )
        for name, weights in model.named_parameters():
            part = "lora" if "lora_" in name else "adaptor" if ".adaptor." in name else "other"
            part = "backbone" if part == "other" and weights in backbone else part
            number = found.setdefault((part, weights.requires_grad), 0)
            found[part, weights.requires_grad] = number + weights.numel()
        return found

    with_adaptors, lora = parts(trainer(Run()).model), trainer(Run(adaptation=adaptation))
    with_lora = parts(lora.model)
    assert with_lora["lora", True] == pytest.approx(with_adaptors["adaptor", True], rel=0.2)
    assert with_lora["adaptor", False] == with_adaptors["adaptor", True]
    for part in ("other", True), ("backbone", False):
        assert with_lora[part] == with_adaptors[part]
    assert ("backbone", True) not in with_lora and ("adaptor", True) not in with_lora

    before = {name: weights.detach().clone() for name, weights in lora.model.named_parameters()}
    lora.train()
    changed = {name for name, weights in lora.model.named_parameters() if not weights.equal(before[name])}
    assert any("lora_B" in name for name in changed) and any("resampler" in name for name in changed)
    assert not any(".adaptor." in name or "base_layer" in name for name in changed)


@pytest.mark.parametrize("trained, run", [(Run(), only("ocr")), (Run(), NONE), (NONE, Run())])
def test_run_can_start_from_another_trained_model(prepared, tmp_path, trained, run):
    rows = few_scenes(prepared.data_dir, "scenes").as_dataset()["train"]
    labels = dict.fromkeys(rows["image_id"], {})
    start = study.trainer_of(trained, 5, prepared, rows, labels).model
    start.save_pretrained(tmp_path)
    args = argparse.Namespace(**{**vars(prepared), "start": tmp_path})
    found, expected = study.trainer_of(run, 0, args, rows, labels).model.state_dict(), start.state_dict()
    shared = found.keys() & expected.keys()
    assert all(found[name].equal(expected[name]) for name in shared)
    assert {name.split(".")[2] for name in found.keys() ^ shared} <= {"expert_stems", "resampler"}
    assert any("adaptor" in name for name in shared)
    assert any("resampler" in name for name in shared) == bool(trained.experts and run.experts)


@pytest.mark.parametrize("part", ["adaptors", "resampler"])
def test_renewed_part_starts_with_new_weights(prepared, tmp_path, part):
    rows = few_scenes(prepared.data_dir, "scenes").as_dataset()["train"]
    labels = dict.fromkeys(rows["image_id"], {})
    start = study.trainer_of(Run(), 5, prepared, rows, labels).model
    with torch.no_grad():
        for weights in start.parameters():
            weights.add_(1.0)
    start.save_pretrained(tmp_path)
    args = argparse.Namespace(**{**vars(prepared), "start": tmp_path})
    found = study.trainer_of(Run(renewed=part), 0, args, rows, labels).model
    renewed = {name for name, weights in start.named_parameters() if not weights.equal(found.get_parameter(name))}
    assert renewed == {name for name, _ in start.named_parameters() if part.removesuffix("s") in name}


# ---- labels and conditions ----


@pytest.fixture(scope="module")
def true_labels(prepared):
    rows = few_scenes(prepared.data_dir, "scenes").as_dataset()["test"]
    return {row["image_id"]: expert_labels(row) for row in rows}


def test_each_condition_has_its_own_labels(prepared, true_labels, monkeypatch):
    seen = []

    def note(model, processor, scenes, collator, num_beams):
        labels = collator.labels_for(scenes["image_id"])
        inputs = collator([{**row, "text": "What?", "task": "vqa"} for row in scenes])
        seen.append((dict(zip(scenes["image_id"], labels, strict=True)), inputs))
        return {}

    monkeypatch.setattr(study, "measure", note)
    conditions = {
        "test": Condition(),
        "noise": Condition(noise=1.0),
        "missing": Condition(missing="depth"),
        "true": Condition(labels="true"),
        "shifted": Condition(data="shifted"),
        "shifted, true": Condition(data="shifted", labels="true"),
    }
    train_under(list(conditions.values()), Run(), prepared, monkeypatch)
    labels = {name: each[0] for name, each in zip(conditions, seen, strict=True)}
    inputs = {name: each[1] for name, each in zip(conditions, seen)}
    one, other = labels["test"]
    for name in EXPERTS:
        np.testing.assert_equal(labels["noise"][one][name], labels["test"][other][name])
    assert labels["test"][one]["ocr"]["words"] == ["seen"]
    np.testing.assert_equal(labels["true"][one], true_labels[one])
    assert inputs["test"]["expert_mask"].all()
    assert inputs["missing"]["expert_mask"].tolist() == [[False, True, True, True, True, True]] * 2
    assert all(image_id.startswith("shifted/") for image_id in labels["shifted"])
    image_id = next(iter(labels["shifted"]))
    assert labels["shifted"][image_id]["ocr"]["words"] == ["seen"] != labels["shifted, true"][image_id]["ocr"]["words"]


def test_models_with_some_experts_get_no_other_labels(prepared):
    rows = few_scenes(prepared.data_dir, "scenes").as_dataset()["train"]
    run = only("depth", "ocr")
    labels = study.labels_for(rows, run, "predicted", prepared.labels)
    assert all(label.keys() == {"depth", "ocr"} for label in labels.values())
    trainer = study.trainer_of(run, 0, prepared, rows, study.labels_for(rows, run, "true", "true"))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["expert_mask"].tolist() == [[name in run.experts for name in EXPERTS]]


# ---- all runs ----


def test_finished_and_running_runs_are_not_started_again(folder, tmp_path, capsys):
    started = []

    def start(run, seed, args):
        started.append(f"{run.name}-seed{seed}")
        result = {"settings": study.settings_of(args), "evaluations": {"test": {"answers": {"all": 0.5}}}}
        study.file_of(args.output_dir, run, seed).write_text(json.dumps(result))

    (tmp_path / "runs").mkdir()
    args = parse_arguments(command_line(folder, tmp_path, "--seeds=2", "--only", "quality", "freezing"))
    with FileLock(tmp_path / "runs" / "none-seed1.lock"):
        work(args, start)
    assert "none-seed1 is in progress in another process" in capsys.readouterr().out
    runs = ["none", "all,labels=coarse", "all", "all,labels=true", "all,freeze=vision", "all,freeze=none"]
    assert started == [f"{run}-seed{seed}" for seed in (0, 1) for run in runs if (run, seed) != ("none", 1)]

    started.clear()
    (tmp_path / "runs" / "all-seed0.json").unlink()
    work(args, start)
    assert started == ["all-seed0", "none-seed1"]
    with pytest.raises(SystemExit, match="was made with .*'epochs': 1.0.*; use another folder"):
        work(parse_arguments(command_line(folder, tmp_path, "--epochs=2")), start)


def test_command_runs_in_processes_and_then_reports(folder, tmp_path, monkeypatch):
    def run_here(command, stdout, stderr):
        assert command[:3] == [sys.executable, "-m", "studies.experts"]
        monkeypatch.setattr(sys, "argv", command[2:])
        study.main()
        return subprocess.CompletedProcess(command, 0)

    script = study.__file__
    arguments = command_line(folder, tmp_path / "out", "--seeds=1", "--only", "quality")
    monkeypatch.setattr(study, "runs_of", lambda studies, seed: [NONE])
    monkeypatch.setattr(study, "conditions_of", lambda run, seed: [Condition()])
    monkeypatch.setattr(study.subprocess, "run", run_here)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    study.main()
    assert [path.name for path in (tmp_path / "out" / "runs").glob("*.json")] == ["none-seed0.json"]
    monkeypatch.setattr(study_report, "figure", lambda study, rows, path: None)
    monkeypatch.setattr(
        sys, "argv", [script, f"--output_dir={tmp_path / 'out'}", f"--report={tmp_path / 'report'}", "--seeds=1"]
    )
    study.main()
    text = (tmp_path / "report" / "results.md").read_text()
    assert "These results come from 1 runs" in text
    assert "Missing: all,labels=coarse-seed0, all-seed0, all,labels=true-seed0." in text


def test_wrong_arguments_are_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experts.py", *command_line(folder, tmp_path, "--run", "al-seed0")])
    with pytest.raises(SystemExit, match="--run is al-seed0; accepted are .*all-seed0"):
        study.main()
    with pytest.raises(SystemExit):
        parse_arguments([f"--output_dir={tmp_path}"])
    assert "--backbones and --labels are missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no results"):
        report(tmp_path, tmp_path / "report", 3)


# ---- the report ----


def write_result(output_dir, run, seed, all_right, conditions=None, **settings):
    (output_dir / "runs").mkdir(exist_ok=True)
    args = parse_arguments([f"--output_dir={output_dir}", "--backbones=there", "--labels=there"])
    scores = {"answers": {"all": all_right, "sign": 0.25}, "captions": {"cider": 1.5, "exact_attributes": 0.75}}
    result = {
        "settings": {**study.settings_of(args), **settings},
        "training": {"trained_share": 0.5, "seconds_per_step": 0.125 * (seed + 1), "memory": 800.0},
        "evaluations": {condition.name: scores for condition in conditions or conditions_of(run, seed)},
    }
    study.file_of(output_dir, run, seed).write_text(json.dumps(result))


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(study_report, "figure", lambda study, rows, path: None)


def test_tables_have_means_and_deviations_over_seeds(tmp_path, without_figures):
    for seed, right in enumerate((0.5, 0.52, 0.57)):
        write_result(tmp_path, Run(), seed, right)
    write_result(tmp_path, Run(freeze="vision"), 1, 0.6)
    report(tmp_path, tmp_path / "report", 3)
    section = (
        (tmp_path / "report" / "results.md").read_text().split("## Frozen against fully trained")[1].split("## ")[0]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    table = {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}
    assert table["both"]["seeds"] == "3" and table["both"]["all"] == "53.0 ± 3.6"
    assert table["both"]["CIDEr"] == "150.0 ± 0.0" and table["both"]["s a step"] == "0.25 ± 0.12"
    assert table["both"]["color"] == "–"  # there was no such question
    assert table["vision"]["seeds"] == "1" and table["vision"]["all"] == "60.0"
    assert table["none"]["seeds"] == "0" and table["none"]["all"] == "–"
    missing = "all,freeze=vision-seed0, all,freeze=none-seed0, all,freeze=none-seed1, all,freeze=vision-seed2"
    assert f"Missing: {missing}, all,freeze=none-seed2." in section


def test_missing_conditions_are_reported(tmp_path, without_figures):
    write_result(tmp_path, Run(), 0, 0.5, [Condition(), Condition(noise=0.5)])
    report(tmp_path, tmp_path / "report", 1)
    text = (tmp_path / "report" / "results.md").read_text()
    assert "Missing: all-seed0 under noise=0.25, all-seed0 under noise=0.75" in text
    assert "all-seed0 under data=shifted" in text


def test_each_study_with_results_has_a_small_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study_report, "STUDIES", {name: STUDIES[name] for name in ("noise", "freezing", "transfer")})
    for seed in range(2):
        for run in runs_of(["noise", "freezing"], seed):
            write_result(tmp_path, run, seed, 0.5 + 0.01 * seed)
    report(tmp_path, tmp_path / "report", 2)
    text = (tmp_path / "report" / "results.md").read_text()
    assert "Missing" not in text
    for name in study_report.STUDIES:
        path = tmp_path / "report" / f"{name}.png"
        assert f"]({name}.png)" in text and path.stat().st_size < 60_000
        with Image.open(path) as image:
            assert image.width > 800


def test_results_of_different_settings_are_not_compared(tmp_path):
    write_result(tmp_path, Run(), 0, 0.5)
    write_result(tmp_path, NONE, 0, 0.5, epochs=9)
    with pytest.raises(SystemExit, match="different settings"):
        report(tmp_path, tmp_path / "report", 1)


# ---- the design ----


def test_each_seed_has_its_own_order_of_experts():
    sizes = [[cell.run.experts for cell in STUDIES["number_of_experts"].cells(seed)] for seed in range(4)]
    for experts in sizes:
        assert [len(each) for each in experts] == list(range(7))
        assert all(set(some) < set(more) for some, more in zip(experts, experts[1:]))
    assert len({tuple(each) for each in sizes}) == 4


def test_studies_share_their_runs():
    cells = [cell for study in STUDIES.values() for cell in study.cells(0)]
    runs = runs_of(list(STUDIES), 0)
    assert len(runs) == len({run.name for run in runs}) == 23 < len(cells)
    assert all(len(set(conditions_of(run, 0))) == len(conditions_of(run, 0)) for run in runs)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_excludes_the_parent_process():
    # the child has the function alone, because torch needs seconds and memory
    head = "import sys, types; from pathlib import Path; no = types.SimpleNamespace(is_available=lambda: False)"
    code = f"{head}; torch = types.SimpleNamespace(cuda=no)\n{inspect.getsource(study.peak_memory)}"
    command = [sys.executable, "-c", f"{code}\nprint(peak_memory())"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 1 < float(printed) < 100 < 300 < study.peak_memory()  # this process has imported torch
