"""distil_scenes.py trains and measures students on a few scenes; its report has tables, Δm and a figure."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dense.measures import Result
from modeling_prismer import PrismerForConditionalGeneration, pretrained_path
from scenes import distil_scenes, report_distillation, time_distillation


SIZES = ("--train_scenes", 6, "--validation_scenes", 0, "--test_scenes", 4)
EXPERTS = ["depth", "normal", "segmentation", "edge"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a stage, and returns its results and its folder."""
    data_dir = tmp_path_factory.mktemp("scenes")

    def run(model, *arguments):
        out = tmp_path_factory.mktemp("out")
        shared = ["--model", model, "--data_dir", data_dir, *SIZES, "--labels", "true", "--do_eval", "--use_cpu"]
        shared += ["--max_steps", 2, "--per_device_train_batch_size", 3, "--dataloader_num_workers", 0]
        shared += ["--max_eval_rows", 2, "--save_strategy", "no", "--output_dir", out]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "argv", ["distil_scenes", *map(str, [*shared, *arguments])])
            distil_scenes.main()
        return json.loads((out / "distillation_results.json").read_text()), out

    run.data_dir = data_dir
    return run


@pytest.fixture(scope="module")
def student(run):
    adaptors = ("--imitate", ",".join(EXPERTS), "--layers", "0,1", "--num_adaptors", 3, "--adaptor_size", 8)
    return run("prismer-scenes", "--distil", "teachers", "--do_train", *adaptors)


def test_student_is_measured(student):
    results, _ = student
    assert results["imitation"].keys() == set(EXPERTS) and all(value < 1 for value in results["imitation"].values())
    assert results["maps"].keys() == set(EXPERTS)
    assert 0 <= results["maps"]["normal"] <= 180 and 0 <= results["maps"]["segmentation"] <= 1
    gates = np.array(results["routes"]["gates"])
    assert gates.shape == (2, 4, 3)
    np.testing.assert_allclose(gates.sum(axis=-1), 1, atol=1e-5)
    assert results["test"] == {}  # the language task is not trained in this stage


def test_dynamic_routers_are_measured_by_what_they_lose(run, student):
    results, _ = run(student[1], "--distil", "experts", "--do_train")
    losses = np.array(results["routes"]["losses"])
    assert losses.shape == (2, 4, 3) and np.isfinite(losses).all()


def test_task_and_control_are_measured(run, student):
    distilled, folder = run(student[1], "--distil", "task", "--do_train", "--texts_per_image", 2)
    assert PrismerForConditionalGeneration.from_pretrained(folder).config.imitated_experts == EXPERTS
    without, _ = run("prismer-scenes", "--distil", "none", "--experts", "none", "--do_train", "--texts_per_image", 2)
    for results in (distilled, without):
        own = results["test"]
        assert own["interval"][0] <= own["answers"]["all"] <= own["interval"][1]
        assert own["captions"].keys() == {"cider", "exact_attributes", "objects"}
        assert np.mean(np.concatenate(own["hits"])) == pytest.approx(own["answers"]["all"])
    assert "imitation" in distilled and "imitation" not in without


def test_live_experts_answer_better_than_none(run):
    live, _ = run("prismer-scenes", "--eval_experts", "all")
    none, _ = run("prismer-scenes", "--eval_experts", "none")
    assert live["held_out"]["answers"]["all"] > none["held_out"]["answers"]["all"]


@torch.no_grad()
def test_perfect_maps_have_the_best_measures():
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.zeros(2, 3, 128, 128),
        "depth_values": torch.rand(2, 1, 32, 32, generator=generator) * 2 - 1,
        "normal_values": torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1,
        "edge_values": torch.where(torch.rand(2, 1, 32, 32, generator=generator) < 0.2, -1.0, 1.0),
        "segmentation_ids": torch.randint(12, (2, 32, 32), generator=generator),
    }
    batch["segmentation_ids"][0, 0] = 255
    classes = batch["segmentation_ids"].masked_fill(batch["segmentation_ids"] == 255, 12)
    maps = {name: batch[f"{name}_values"] for name in ("depth", "normal", "edge")}
    maps["segmentation"] = torch.nn.functional.one_hot(classes, 13).permute(0, 3, 1, 2).float()
    model.imitate = lambda pixel_values: type("Imitated", (), {"maps": maps})()
    found = distil_scenes.read_out(model, iter([batch]))
    assert found == pytest.approx({"depth": 0, "normal": 0, "segmentation": 1, "edge": 1}, abs=1e-2)
    maps["edge"] = -maps["edge"]
    assert distil_scenes.read_out(model, iter([batch]))["edge"] < 0.5


def test_interval_is_of_scenes():
    assert distil_scenes.interval_of([[True, True], [True]]) == [1, 1]
    low, high = distil_scenes.interval_of([[True] * 20, [False] * 20] * 20)
    assert 0.3 < low < 0.45 and 0.55 < high < 0.7  # 40 scenes, not 800 answers


def result_of(tmp_path, name, maps, routes=None, hits=((True, True), (False, True))):
    folder = tmp_path / name
    folder.mkdir()
    answers = {"all": 0.8, "color": 0.9, "sign": 0.1}
    own = {"answers": answers, "interval": [0.7, 0.9], "captions": {"cider": 1.5, "exact_attributes": 0.5}}
    own |= {"hits": hits, "types": [["color", "sign"]] * len(hits)}
    imitation = dict.fromkeys(maps, 0.5) | ({"detection": 0.6} if len(maps) > 1 else {})
    results = {"test": own, "held_out": own, "maps": maps, "imitation": imitation, "routes": routes}
    (folder / "distillation_results.json").write_text(json.dumps(results))
    return folder


def test_report_has_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    routes = {"experts": ["depth", "edge"], "gates": [[[0.5, 0.5], [1.0, 0.0]]] * 2}
    routed = result_of(tmp_path, "routed", {"depth": 0.3, "edge": 0.5}, routes)
    dynamic = result_of(tmp_path, "dynamic", {"depth": 0.5, "edge": 0.5}, {**routes, "losses": routes.pop("gates")})
    other = result_of(tmp_path, "other", {}, hits=((True, False), (True, False)))
    single = [result_of(tmp_path, "one", {"depth": 0.4}), result_of(tmp_path, "two", {"edge": 0.4})]
    arguments = ["--texts", f"a={routed}", f"b={other}", "--students", f"routed={routed}", f"dynamic={dynamic}"]
    arguments += ["--single", *single, "--routes", routed, dynamic, "--figure", tmp_path / "routes.png"]
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report_distillation.main()
    printed = capsys.readouterr().out
    assert "| correct answers, all | 75.0 % (50.0 to 100.0) | 50.0 % (50.0 to 50.0) |" in printed
    assert "| correct answers without signs, % | 50.0 (0.0 to 100.0) | 100.0 (100.0 to 100.0) |" in printed
    assert "| difference in points |  | +50.0 (+0.0 to +100.0) |" in printed
    assert "| color | 90.0 % | 90.0 % |" in printed and "relation" not in printed
    assert "| depth, RMSE | 0.400 | 0.300 | 0.500 |" in printed
    assert "| Δm |  | +25.0 % | +0.0 % |" in printed  # depth +25 and −25 %, edges +25 %
    assert "| edge: tokens explained | 50 % | 50 % | 50 % |" in printed
    assert "| detection: tokens explained |  | 60 % | 60 % |" in printed  # no student of detection alone
    assert Image.open(tmp_path / "routes.png").width > 500
    assert report_distillation.map_results({"maps": {"depth": 0.3}}) == {"depth": Result(0.3, True)}


def test_report_joins_seeds(tmp_path, monkeypatch, capsys):
    right, wrong, half = ((True, True),) * 2, ((False, True),) * 2, ((True, True), (False, True))
    folders = {
        name: str(result_of(tmp_path, name, {}, hits=hits)) for name, hits in zip("abcd", (wrong, half, half, right))
    }
    texts = ["--texts", f"none={folders['a']},{folders['b']}", f"distilled={folders['c']},{folders['d']}"]
    monkeypatch.setattr(sys, "argv", ["report", *texts, f"live={folders['d']}"])
    report_distillation.main()
    printed = capsys.readouterr().out
    assert "| correct answers without signs, % | 25.0 (0.0 to 50.0) | 75.0 (50.0 to 100.0) | 100.0 " in printed
    assert "| difference in points |  | +50.0 (+50.0 to +50.0) | +75.0 (+50.0 to +100.0) |" in printed
    assert "| difference, each seed |  | +50.0, +50.0 | +100.0, +50.0 |" in printed
    monkeypatch.setattr(sys, "argv", ["report", *texts, ",".join(["three=" + folders["a"]] + [folders["b"]] * 2)])
    with pytest.raises(SystemExit, match="3 seeds do not compare with 2"):
        report_distillation.main()


def test_report_prints_what_was_measured(tmp_path, monkeypatch, capsys):
    one = result_of(tmp_path, "one", {}, hits=((True, True),))
    results = json.loads((one / "distillation_results.json").read_text())
    (one / "distillation_results.json").write_text(json.dumps({"test": results["test"]}))
    monkeypatch.setattr(sys, "argv", ["report", "--texts", f"a={one}"])
    report_distillation.main()
    printed = capsys.readouterr().out
    assert "| test | a |" in printed and "held_out" not in printed
    assert (
        "| correct answers, all | 100.0 % |" in printed and "| correct answers without signs, % | 100.0 |" in printed
    )
    (one / "distillation_results.json").write_text(json.dumps({"test": {}}))  # a stage that learns no texts
    with pytest.raises(SystemExit):
        report_distillation.main()
    assert "--texts: no folder has answers" in capsys.readouterr().err


def test_seconds_are_measured_for_each_network(run, student, tmp_path, monkeypatch):
    arguments = ["none=prismer-scenes@none", f"student={student[1]}@none", "--data_dir", run.data_dir, *SIZES]
    arguments += ["--images", 1, "--output", tmp_path / "seconds.json"]
    monkeypatch.setattr(sys, "argv", ["time", *map(str, arguments)])
    monkeypatch.setattr(time_distillation, "WARM_UP", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    time_distillation.main()
    networks = json.loads((tmp_path / "seconds.json").read_text())["networks"]
    assert networks["none"]["cpu_ratio"] == 1 and networks["student"]["cpu_seconds"] > 0
