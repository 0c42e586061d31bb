"""
Times Prismer with random weights of the true size and compares it with recorded times of the original network.

    python benchmarks/benchmark.py                                    (make benchmark)
    python benchmarks/benchmark.py --only encode
    python benchmarks/benchmark.py --device cuda --dtype bfloat16
    python benchmarks/benchmark.py --compare old/result.json new/result.json

rows.py defines the rows. Each row runs in its own process: a warm-up run, `--repeats` runs that count, and a run under
torch's counter of floating-point operations. A matrix product before and after each run that counts measures the
current speed of the machine. The reference was recorded next to the same product, so times are compared in units of
it: seconds times GFLOP/s. The program writes result.json, table.md and chart.png; docs/speed.md explains them.
"""

import argparse
import gc
import json
import statistics
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import (
    count_flops,
    in_own_process,
    machine_facts,
    machine_text,
    machine_title,
    markdown_table,
    matrix_product_gflops,
    onednn_product_gflops,
    peak_memory,
    positive,
    size_text,
    spread_text,
    time_repeatedly,
    write_result,
)
from rows import ROWS, Setup, bytes_of_a_sample, select


REFERENCE = Path(__file__).with_name("reference.json")
SIZES = ("bytes of a sample", "peak memory")  # rows in bytes
NONE = "–"


# ---- measuring ----


def measure_row(name: str, setup: Setup, repeats: int) -> dict[str, Any]:
    """Measures a row in this process: times, speed of the machine, peak memory and operations."""
    device = setup.torch_device
    torch.manual_seed(0)
    work = ROWS[name](setup)
    speeds: list[tuple[float, float]] = []
    memory = 0

    def between() -> None:
        nonlocal memory
        memory = max(memory, peak_memory(device))
        speeds.append(machine_speed(setup))
        if device.type == "cuda":  # forget the memory of the product
            torch.cuda.reset_peak_memory_stats(device)

    if "gemm_gflop" in json.loads(REFERENCE.read_text())["rows"][name]:
        timing = time_repeatedly(work, repeats, device, between=between)
    else:  # takes milliseconds, and is compared in seconds
        timing = time_repeatedly(work, repeats, device, at_least=0 if setup.small else 1)
        between()
    gemm, peak = zip(*speeds)
    return {
        **asdict(timing),
        "gemm_gflops": gemm,  # before and after each run
        "peak_gflops": peak,
        "peak_memory": memory,
        "flops": count_flops(work),
    }


def machine_speed(setup: Setup) -> tuple[float, float]:
    """
    The current speed in GFLOP/s of two products: the one that was measured for the reference, and one in the dtype of
    the run that is large enough to fill the device.
    """
    device, dtype = setup.torch_device, setup.torch_dtype
    gemm = matrix_product_gflops(device, torch.float32, setup.product_size)
    if device.type == "cpu" and dtype == torch.float32:  # the faster library depends on the processor
        return gemm, max(gemm, onednn_product_gflops(setup.product_size))
    return gemm, matrix_product_gflops(device, dtype, setup.product_size if device.type == "cpu" else 8192)


def peak_memory_of_all(setup: Setup) -> int:
    """The peak memory of a process that runs every row once, one after the other."""
    for prepare in ROWS.values():
        work = prepare(setup)
        work()
        del work
        gc.collect()
    return peak_memory(setup.torch_device)


def run(setup: Setup, repeats: int = 5, only: list[str] | None = None, own_processes: bool = True) -> dict[str, Any]:
    """Measures all rows, or those whose names contain a word of `only`; see `measure_row`."""
    call = partial(in_own_process, first=setup.prepare_process) if own_processes else lambda work, *args: work(*args)
    names = select(only, [*ROWS, *SIZES])
    result: dict[str, Any] = {
        "network": setup.network,
        "machine": {
            **machine_facts(setup.torch_device, setup.torch_dtype),
            "freed_memory": "kept" if own_processes and setup.keep_memory else "given back",
            "encoder": "compiled" if setup.compiled else "eager",
        },
        "own_processes": own_processes,
        "rows": {},
        "sizes": {},
    }
    for name in names:
        print(f"{name} …", flush=True)
        if name in ROWS:
            result["rows"][name] = call(measure_row, name, setup, repeats)
        elif name == "bytes of a sample":
            result["tensors_of_a_sample"] = bytes_of_a_sample(setup)
            result["sizes"][name] = sum(result["tensors_of_a_sample"].values())
        else:
            result["sizes"][name] = call(peak_memory_of_all, setup)
    return result


# ---- reading ----


def gemm_gflop(row: dict[str, Any], speeds: str = "gemm_gflops") -> float:
    """
    The row's time in units of the matrix product, in GFLOP: seconds times speed. The median of all runs, each with the
    speed measured just before and after it, because the speed of a machine may change within seconds.
    """
    return statistics.median(
        seconds * statistics.mean(around) for seconds, around in zip(row["seconds"], pairwise(row[speeds]))
    )


def share_of_peak(row: dict[str, Any]) -> float:
    return row["flops"] / gemm_gflop(row, "peak_gflops") / 1e9


def times_better(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """How many times faster or smaller than the reference each row is. Empty for a tiny network."""
    if result["network"] != reference["network"]:
        return {}
    better = {}
    for name, row in result["rows"].items():
        recorded = reference["rows"][name]
        if "gemm_gflop" in recorded:
            better[name] = recorded["gemm_gflop"] / gemm_gflop(row)
        else:  # not a matrix product, and none was measured next to it
            better[name] = recorded["seconds"] / statistics.median(row["seconds"])
    return better | {name: reference["sizes"][name]["bytes"] / size for name, size in result["sizes"].items()}


def table(result: dict[str, Any]) -> str:
    """The result next to the reference, as Markdown."""
    reference = json.loads(REFERENCE.read_text())
    better = times_better(result, reference)

    def comparison(name: str, recorded: dict[str, Any]) -> list[str]:
        factors = (better.get(name), recorded.get("required"), recorded.get("goal"))
        return [NONE if factor is None else f"{factor:.3g}×" for factor in factors]

    rows = []
    for name, row in result["rows"].items():
        recorded = reference["rows"][name]
        theirs = f"{recorded['gemm_gflop']:,}" if "gemm_gflop" in recorded else f"{recorded['seconds']} s"
        ours = f"{gemm_gflop(row):,.4g}" if "gemm_gflop" in recorded else NONE
        cells = [name, spread_text(row["seconds"]), ours, theirs, *comparison(name, recorded)]
        cells.append(f"{row['flops'] / 1e9:,.1f}" if row["flops"] else NONE)
        cells.append(f"{share_of_peak(row):.0%}" if row["flops"] else NONE)
        cells.append(size_text(row["peak_memory"]) if result["own_processes"] else NONE)
        rows.append(cells)
    head = ["work", "seconds, median (min – max)", "gemm-GFLOP", "reference", "times faster", "required", "goal"]
    parts = [markdown_table([*head, "GFLOP", "share of peak", "peak memory"], rows)] if rows else []
    if result["sizes"]:
        rows = []
        for name, size in result["sizes"].items():
            recorded = reference["sizes"][name]
            rows.append([name, size_text(size), size_text(recorded["bytes"])])
            rows[-1] += comparison(name, recorded)
        parts.append(markdown_table(["size", "here", "reference", "times smaller", "required", "goal"], rows))
    parts.append(f"{result['network']}; {machine_text(result['machine'])}; {speeds_text(result['rows'])}")
    return "\n\n".join(parts)


def speeds_text(rows: dict[str, Any]) -> str:
    text = []
    for key, name in (("gemm_gflops", "float32 matrix product"), ("peak_gflops", "peak")):
        speeds = [speed for row in rows.values() for speed in row[key]]
        if speeds:
            text.append(f"{name} {min(speeds):,.0f} – {max(speeds):,.0f} GFLOP/s")
    return ", ".join(text) or "nothing timed"


COLORS = {"goal": "#009E73", "required": "#0072B2", "neither": "#D55E00", "no": "0.55"}  # of Okabe and Ito


def draw_chart(result: dict[str, Any], path: Path) -> bool:
    """
    Draws a bar per row: how many times faster or smaller than the reference, with marks for required and goal. Returns
    False if there is nothing to compare.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    reference = json.loads(REFERENCE.read_text())
    better = times_better(result, reference)
    if not better:
        return False
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(better)), layout="constrained")
    axis = figure.subplots()
    for place, (name, factor) in enumerate(better.items()):
        recorded = (reference["rows"] | reference["sizes"])[name]
        required, goal = recorded.get("required"), recorded.get("goal")
        reached = (
            "no" if goal is None else "goal" if factor >= goal else "required" if factor >= required else "neither"
        )
        axis.barh(place, factor - 1, left=1, height=0.6, color=COLORS[reached])
        if name in result["rows"]:
            seconds = result["rows"][name]["seconds"]
            ends = [factor * statistics.median(seconds) / end for end in (max(seconds), min(seconds))]
            axis.plot(ends, [place, place], color="black", linewidth=1.2)
        for mark, style in ((required, ":"), (goal, "-")):
            if mark is not None:
                axis.plot([mark, mark], [place - 0.42, place + 0.42], color="black", linestyle=style, linewidth=2)
        axis.text(1.01, place, f"{factor:.3g}×", transform=axis.get_yaxis_transform(), va="center")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    low, high = min(better.values()), max([*better.values(), 30])
    axis.set_xlim(min(0.8, low * 0.8), high * 1.3)
    ticks = [
        tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if axis.get_xlim()[0] <= tick <= high * 1.3
    ]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_yticks(range(len(better)), better)
    axis.set_ylim(len(better) - 0.5, -0.5)
    axis.set_xlabel("times faster or smaller than the original network; thin line: fastest and slowest run")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    names = {"goal": "goal reached", "required": "required reached", "neither": "not reached", "no": "no requirement"}
    legend = [Patch(color=COLORS[key], label=name) for key, name in names.items()]
    marks = ((":", "required"), ("-", "goal"))
    legend += [Line2D([], [], color="black", linewidth=2, linestyle=style, label=name) for style, name in marks]
    figure.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.suptitle(machine_title(result["network"], result["machine"]), fontsize=11)
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The rows that two results have in common, side by side, as Markdown."""
    rows = []
    for name in (name for name in old["rows"] if name in new["rows"]):
        before, after = old["rows"][name], new["rows"][name]
        medians = [statistics.median(row["seconds"]) for row in (before, after)]
        apart = max(after["seconds"]) < min(before["seconds"]) or max(before["seconds"]) < min(after["seconds"])
        cells = [name, spread_text(before["seconds"]), spread_text(after["seconds"])]
        cells.append(f"{medians[0] / medians[1]:.2f}×" + ("" if apart else " (spreads overlap)"))
        if before["flops"] and after["flops"]:
            cells.append(f"{gemm_gflop(before) / gemm_gflop(after):.2f}×")
            cells.append(f"{share_of_peak(before):.0%} → {share_of_peak(after):.0%}")
        else:  # not a matrix product
            cells += [NONE, NONE]
        memory = " → ".join(size_text(row["peak_memory"]) for row in (before, after))
        rows.append([*cells, memory if old["own_processes"] and new["own_processes"] else NONE])
    head = ["work", "seconds before", "seconds after", "times faster", "in gemm units", "share of peak", "peak memory"]
    parts = [markdown_table(head, rows)] if rows else []
    sizes = [name for name in old["sizes"] if name in new["sizes"]]
    if sizes:
        pairs = [(name, old["sizes"][name], new["sizes"][name]) for name in sizes]
        rows = [[name, size_text(a), size_text(b), f"{a / b:.2f}×"] for name, a, b in pairs]
        parts.append(markdown_table(["size", "before", "after", "times smaller"], rows))
    facts = [{"network": result["network"], **result["machine"]} for result in (old, new)]
    unlike = [key for key in facts[0] if key != "load_before" and facts[0][key] != facts[1].get(key)]
    lines = [f"- {key}: {facts[0][key]} before, {facts[1].get(key)} after" for key in unlike]
    if lines:
        parts.append("\n".join(["Differences in the measurement:", "", *lines]))
    return "\n\n".join(parts)


def read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        if {"network", "machine", "rows"} <= result.keys():
            return result
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"--compare {path}: {error}; two result.json of this program are needed") from error
    raise SystemExit(f"--compare {path}: not a result of this program; two result.json of it are needed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for the result")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only rows whose names contain one of these")
    parser.add_argument("--repeats", type=positive, default=5, help="runs that count, after a warm-up run")
    Setup.add_arguments(parser)
    parser.add_argument(
        "--one_process", action="store_true", help="all rows in this process: faster, but without memory per row"
    )
    parser.add_argument("--compile", action="store_true", help="compile the encoder and the training step")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two result.json and run nothing"
    )
    args = parser.parse_args()
    if args.compare:
        print(compare(*map(read_result, args.compare)))
        return
    setup = replace(Setup.from_arguments(args), compiled=args.compile)
    result = run(setup, args.repeats, args.only, own_processes=not args.one_process)
    write_result(args.out, result, table(result))
    draw_chart(result, args.out / "chart.png")


if __name__ == "__main__":
    main()
