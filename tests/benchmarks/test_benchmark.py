"""The benchmark measures a tiny network, and compares with every recorded row."""

import json

import benchmark
import pytest
import torch
from rows import ROWS, Setup, bytes_of_a_sample, make_model


SMALL = Setup(small=True)
REFERENCE = json.loads(benchmark.REFERENCE.read_text())
MACHINE = {
    **{"device": "CPU", "cpu": "a CPU", "cores": 2, "threads": 2, "dtype": "float32", "torch": "2"},
    **{"transformers": "5", "python": "3", "system": "Linux", "load_before": 0.0},
}


def made_up_result(seconds=10.0, speed=20.0, **machine):
    """A result of the true size in which every row took as long, with 100 GFLOP each."""
    row = {"first": 11.0, "seconds": [0.9 * seconds, seconds, 1.2 * seconds], "peak_memory": 2_000_000_000}
    row |= {"gemm_gflops": [speed / 2, speed * 3 / 2] * 2, "peak_gflops": [speed, speed * 3] * 2, "flops": 10**11}
    sizes = {name: recorded["bytes"] // 2 for name, recorded in REFERENCE["sizes"].items()}
    rows = {name: dict(row) for name in REFERENCE["rows"]}
    machine = MACHINE | machine
    return {"network": "prismer_base", "machine": machine, "own_processes": True, "rows": rows, "sizes": sizes}


@pytest.fixture(scope="module")
def result():
    return benchmark.run(SMALL, repeats=1, own_processes=False)


def test_every_recorded_row_is_measured(result):
    assert set(result["rows"]) == set(REFERENCE["rows"]) and set(result["sizes"]) == set(REFERENCE["sizes"])
    for row in result["rows"].values():
        assert min(row["seconds"], default=0) > 0 and row["peak_memory"] > 0
        assert len(row["gemm_gflops"]) == len(row["peak_gflops"]) == (2 if row["flops"] else 1)
    counted = {name for name, row in result["rows"].items() if row["flops"] > 0}
    assert counted == {name for name, recorded in REFERENCE["rows"].items() if "gemm_gflop" in recorded}
    json.dumps(result)


def test_four_images_take_four_times_the_operations_of_one(result):
    flops = {name: row["flops"] for name, row in result["rows"].items()}
    assert flops["encode 4 images"] == 4 * flops["encode 1 image"]
    assert flops["caption 4 images"] == 4 * flops["caption 1 image"]


def test_rows_run_the_named_work():
    torch.manual_seed(0)
    encoded = ROWS["encode 4 images"](SMALL)()
    assert encoded.last_hidden_state.shape == (4, 36 + 64, 64)  # patches and latents of all experts
    caption = ROWS["caption 4 images"](SMALL)
    assert caption().shape == (4, 20) and caption.keywords["min_length"] == 20 and caption.keywords["num_beams"] == 3
    assert ROWS["rank 128 candidates"](SMALL)().indices.shape == (1, 128)


def test_training_step_keeps_the_backbones(monkeypatch):
    models = []

    def keep(*args, **kwargs):
        models.append(make_model(*args, **kwargs))
        return models[0]

    monkeypatch.setattr("rows.make_model", keep)
    step = ROWS["training step"](SMALL)
    before = {name: parameter.clone() for name, parameter in models[0].named_parameters()}
    step()
    changed = {name for name, parameter in models[0].named_parameters() if not parameter.equal(before[name])}
    layer = "model.{}_model.layers.0.{}.weight"
    assert not {layer.format("vision", "mlp.fc1"), layer.format("text", "self_attn.q_proj")} & changed
    assert {layer.format("vision", "adaptor.up_proj"), layer.format("text", "cross_attn.q_proj")} <= changed


def test_bytes_of_a_sample_are_those_of_its_tensors():
    tensors = bytes_of_a_sample(SMALL)
    ids = 224 * 224  # one byte a pixel
    assert tensors["detection_ids"] == tensors["ocr_ids"] == tensors["segmentation_ids"] == ids
    assert tensors["ocr_features"] == 128 * 64 * 4 and tensors["expert_mask"] == 6
    assert tensors["normal_values"] == 3 * tensors["depth_values"] == 3 * tensors["edge_values"]
    values = tensors["depth_values"] // ids
    channels = tensors["pixel_values"] // (96 * 96)
    assert values in (1, 4) and channels in (3, 12)  # 8 bits or float32
    total = 3 * ids + 5 * ids * values + channels * 96 * 96 + 128 * 8 + 128 * 64 * 4 + 6
    assert sum(tensors.values()) == total


def test_times_are_compared_in_units_of_the_matrix_product():
    table = benchmark.table(made_up_result(seconds=10.0, speed=20.0))
    # 10 s at 20 GFLOP/s are 200 GFLOP, the reference has 330; 100 GFLOP in 10 s are a quarter of 40 GFLOP/s
    row = "| encode 1 image | 10.0 (9.0 – 12.0) | 200 | 330 | 1.65× | 1.05× | 1.3× | 100.0 | 25% | 2.00 GB |"
    assert row in table
    assert "| bytes of a sample | 21.35 MB | 42.70 MB | 2× | 10× | 30× |" in table


def test_each_run_counts_with_the_speed_around_it():
    result = made_up_result()
    # the machine becomes half as fast, and even slower in the last product
    row = {"seconds": [1.0, 2.0, 2.0], "gemm_gflops": [200.0, 200.0, 100.0, 80.0], "peak_gflops": [300.0] * 4}
    result["rows"]["training step"] |= row
    assert benchmark.gemm_gflop(result["rows"]["training step"]) == pytest.approx(200)  # of 200, 300 and 180
    assert benchmark.times_better(result, REFERENCE)["training step"] == pytest.approx(8)


def test_rows_without_matrix_products_compare_in_seconds():
    assert benchmark.times_better(made_up_result(seconds=0.0174), REFERENCE)["labels to inputs"] == pytest.approx(10)


def test_two_results_are_compared(monkeypatch, tmp_path, capsys):
    old, new = made_up_result(seconds=10.0, speed=20.0), made_up_result(seconds=4.0, speed=25.0, torch="3")
    new["rows"]["training step"]["seconds"] = [9.5, 9.8, 10.0]
    new["sizes"]["bytes of a sample"] = old["sizes"]["bytes of a sample"] // 5
    del new["rows"]["caption 4 images"]
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, result in zip(paths, (old, new)):
        path.write_text(json.dumps(result))
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--compare", *map(str, paths)])
    benchmark.main()
    printed = capsys.readouterr().out
    # 10 s and 4 s; 200 and 100 GFLOP; 100 GFLOP in 10 s at 40 GFLOP/s, and in 4 s at 50
    row = "| encode 1 image | 10.0 (9.0 – 12.0) | 4.00 (3.60 – 4.80) | 2.50× | 2.00× | 25% → 50% | 2.00 GB → 2.00 GB |"
    assert row in printed
    assert "| training step | 10.0 (9.0 – 12.0) | 9.80 (9.50 – 10.00) | 1.02× (spreads overlap) |" in printed
    assert "| bytes of a sample | 21.35 MB | 4.27 MB | 5.00× |" in printed
    assert "- torch: 2 before, 3 after" in printed and "caption 4 images" not in printed


def test_rows_can_be_chosen(monkeypatch, tmp_path, capsys):
    arguments = ["--small", "--one_process", "--repeats", "1", "--only", "painting", "bytes", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["rows"]) == ["labels to inputs: painting"] and list(result["sizes"]) == ["bytes of a sample"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_other_dtypes_are_measured():
    row = benchmark.measure_row("encode 1 image", Setup(small=True, dtype="bfloat16"), repeats=1)
    assert row["flops"] > 0 and row["peak_gflops"] != row["gemm_gflops"]
    benchmark.measure_row("training step", Setup(small=True, dtype="bfloat16"), repeats=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_it_runs_on_cuda():
    result = benchmark.run(Setup(True, "cuda", "bfloat16"), repeats=1, own_processes=False)
    assert all(row["peak_memory"] > 0 for row in result["rows"].values())
