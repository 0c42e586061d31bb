"""
Profiles the rows of the benchmark: torch.profiler's operators with their input shapes, sorted by their own time.

    python benchmarks/profile_rows.py --out runs/profile_before
    python benchmarks/profile_rows.py --only encode --top 20

Each row is profiled five times in its own process, and the fastest run is shown. The first runs are slower, because
memory is new or fragmented by the profiler. The profiler slows down small operators, so read the shares here and the
times in benchmark.py. The program writes result.json and table.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import in_own_process, machine_facts, machine_text, markdown_table, positive, seconds, write_result
from rows import ROWS, Setup, select
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


RUNS = 5


def profile_row(name: str, setup: Setup) -> dict[str, Any]:
    """The time of the fastest run, and the calls and own time of each operator with each of its input shapes."""
    cuda = setup.torch_device.type == "cuda"
    torch.manual_seed(0)
    work = ROWS[name](setup)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wall, events = float("inf"), []
    for _ in range(RUNS):
        with profile(activities=activities, record_shapes=True) as profiler:
            run = seconds(work, setup.torch_device)
        if run < wall:
            wall, events = run, profiler.key_averages(group_by_input_shape=True)
    operators = []
    for event in events:
        if event.device_type != DeviceType.CPU:  # a kernel; its operator has the same time
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds:
            shapes = [shape for shape in event.input_shapes if shape]
            operators.append(
                {"name": event.key, "shapes": shapes, "calls": event.count, "seconds": microseconds / 1e6}
            )
    return {"seconds": wall, "operators": sorted(operators, key=lambda operator: -operator["seconds"])}


def row_table(row: dict[str, Any], top: int) -> str:
    """The operators that take the most time. Shares refer to the time of all operators."""
    operators = row["operators"]
    total = sum(operator["seconds"] for operator in operators)
    rows, shown = [], 0.0
    for operator in operators[:top]:
        shown += operator["seconds"]
        shapes = ", ".join("×".join(map(str, shape)) for shape in operator["shapes"])
        times = f"{operator['seconds'] * 1e3:,.2f}", f"{operator['seconds'] / total:.1%}", f"{shown / total:.0%}"
        rows.append([f"`{operator['name']}`", shapes, str(operator["calls"]), *times])
    head = ["operator", "shapes of its inputs", "calls", "own time, ms", "share", "cumulative"]
    by_name: dict[str, float] = {}
    for operator in operators:
        by_name[operator["name"]] = by_name.get(operator["name"], 0) + operator["seconds"]
    names = sorted(by_name, key=lambda name: -by_name[name])[:8]
    summary = ", ".join(f"`{name}` {by_name[name] / total:.1%}" for name in names)
    return (
        f"{markdown_table(head, rows)}\n\nAll shapes together: {summary}. Operators took {total:.3g} s. The profiled "
        f"run took {row['seconds']:.3g} s with Python, other libraries and the profiler."
    )


def report(result: dict[str, Any], top: int) -> str:
    parts = [f"### {name}\n\n{row_table(row, top)}" for name, row in result["rows"].items()]
    return "\n\n".join([*parts, f"{result['network']}; {machine_text(result['machine'])}."])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/profile"), help="folder for the result")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only rows whose names contain one of these")
    parser.add_argument("--top", type=positive, default=12, help="number of operators per row")
    Setup.add_arguments(parser)
    parser.add_argument("--one_process", action="store_true", help="all rows in this process: faster")
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    machine = machine_facts(setup.torch_device, setup.torch_dtype)
    result: dict[str, Any] = {"network": setup.network, "machine": machine, "rows": {}}
    for name in select(args.only, list(ROWS)):
        print(f"{name} …", flush=True)
        if args.one_process:
            result["rows"][name] = profile_row(name, setup)
        else:
            result["rows"][name] = in_own_process(profile_row, name, setup, first=setup.prepare_process)
    write_result(args.out, result, report(result, args.top))


if __name__ == "__main__":
    main()
