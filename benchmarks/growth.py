"""
Measures how time and memory grow with the batch, the experts, the resolution, the candidates and the beams.

    python benchmarks/growth.py                                     (about 10 minutes on two cores)
    python benchmarks/growth.py --only resolution --device cuda --dtype bfloat16

Each curve has an expected growth, such as time = a + b·images. It is fitted to all points but the largest, and then
predicts the largest. A measurement above the prediction grows too fast. Floating-point operations and memory are
counted in a separate run, so they do not depend on the load of the machine. Memory is that of all tensors that are
held, including weights (on CUDA, the memory allocated by torch). The program writes result.json, table.md and
growth.png.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (
    HeldBytes,
    Timing,
    flop_counter,
    machine_facts,
    machine_text,
    machine_title,
    markdown_table,
    positive,
    seconds,
    spread_text,
    time_repeatedly,
    write_result,
)
from rows import Setup, Work, caption, encode, image_inputs, make_model, rank, select

from modeling_prismer import PrismerForConditionalGeneration


LONG = 10  # seconds; longer work runs once
TOLERANCE = {"seconds": 0.2, "flops": 0.02, "memory": 0.05}  # for noise, rounding and bookkeeping
KINDS = ("dense", "dense", "label", "dense", "label", "label")  # the kinds of the six experts, in order


@dataclass(frozen=True)
class Curve:
    """
    A measurement at several points, with its expected growth: a constant plus `terms` of x, each times a factor.
    `units` names one unit of each term.
    """

    name: str
    x: str
    points: tuple[int, ...]
    small_points: tuple[int, ...]
    prepare: Callable[[PrismerForConditionalGeneration, int], Work]
    expected: str
    units: tuple[str, ...]
    terms: tuple[Callable[[float], float], ...] = (float,)
    panel: str | None = None
    power: bool = True  # whether the exponent at the end is meaningful


def some_experts(model: PrismerForConditionalGeneration, number: int) -> Work:
    """Encodes one image with the first experts only."""
    inputs = image_inputs(model, 1)
    for spec in model.config.expert_specs[number:]:
        inputs = {key: tensor for key, tensor in inputs.items() if not spec.owns(key)}
    return torch.no_grad()(partial(model.get_image_features, **inputs))


def at_resolution(model: PrismerForConditionalGeneration, size: int) -> Work:
    model.resize_position_embeddings(size)
    return encode(model, images=1)


def kind_counter(kind: str) -> Callable[[float], float]:
    return lambda number: float(KINDS[: int(number)].count(kind))


CURVES = [
    Curve(
        "batch",
        "images encoded at once",
        (1, 2, 4, 8, 16),
        (1, 2, 4, 8),
        lambda model, x: encode(model, images=x),
        "linear growth",
        ("image",),
    ),
    Curve(
        "experts",
        "experts, one image",
        (0, 1, 2, 3, 4, 5, 6),
        (0, 1, 2, 3, 4, 5, 6),
        some_experts,
        "linear growth, steeper for dense experts than for label experts",
        ("dense expert", "label expert"),
        (kind_counter("dense"), kind_counter("label")),
        power=False,
    ),
    Curve(
        "resolution",
        "side of one image in pixels",
        (224, 320, 480, 640, 768),
        (64, 96, 128, 160, 192),
        at_resolution,
        "linear in the number of patches, and quadratic in attention",
        (),
        (lambda side: (side / 16) ** 2, lambda side: (side / 16) ** 4),
    ),
    Curve(
        "candidates",
        "candidates, all scored",
        (10, 30, 100, 300, 1000, 3000),
        (128, 256, 384, 512),
        lambda model, x: rank(model, candidates=x, shortest=6),
        "linear growth",
        ("candidate",),
    ),
    Curve(
        "candidates, k = 16",
        "candidates, the 16 most probable scored",
        (16, 30, 100, 300, 1000, 3000),
        (128, 256, 384, 512),
        lambda model, x: rank(model, candidates=x, k=16, shortest=6),
        "constant, because only the first choice looks at all candidates",
        (),
        (),
        panel="candidates",
        power=False,
    ),
    Curve(
        "beams",
        "beams, one image",
        (1, 2, 3, 4, 6, 8),
        (1, 2, 3, 4, 6, 8),
        lambda model, x: caption(model, images=1, beams=x),
        "linear growth",
        ("beam",),
    ),
]


# ---- measuring ----


def measure_curve(
    curve: Curve, model: PrismerForConditionalGeneration, setup: Setup, repeats: int
) -> list[dict[str, Any]]:
    """The times, floating-point operations and peak memory at each x."""
    device = setup.torch_device
    model.resize_position_embeddings(setup.train_size)  # another curve may have changed it
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    points = []
    for x in curve.small_points if setup.small else curve.points:
        torch.manual_seed(0)
        work = curve.prepare(model, x)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = seconds(work, device)
        timing = Timing(first, [first]) if points and first > LONG else time_repeatedly(work, repeats, device)
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        with HeldBytes(weights) as held, flop_counter() as counter:
            work()
        point = {"x": x, **asdict(timing), "flops": counter.get_total_flops(), "memory": memory or held.peak}
        print(f"{curve.name} {x}: {timing} s, {point['memory'] / 1e6:,.0f} MB", flush=True)
        points.append(point)
    return points


# ---- reading ----


def quantity(point: dict[str, Any], name: str) -> float:
    return min(point["seconds"]) if name == "seconds" else point[name]


def fit(curve: Curve, points: list[dict[str, Any]], name: str) -> np.ndarray:
    """The constant and the factors of the terms with the smallest relative error (least squares)."""
    y = np.array([quantity(point, name) for point in points])
    columns = np.array([[1.0, *(term(point["x"]) for term in curve.terms)] for point in points])
    return np.linalg.lstsq(columns / y[:, None], np.ones(len(y)), rcond=None)[0]


def value(curve: Curve, factors: np.ndarray, x: float) -> float:
    return float(factors @ [1.0, *(term(x) for term in curve.terms)])


def read_curve(curve: Curve, points: list[dict[str, Any]]) -> dict[str, Any]:
    """
    For time, operations and memory: the fitted factors, the prediction of the other points for the largest one, by how
    much it is above the prediction, and the exponent between the last two points.
    """
    last, before = points[-1], points[-2]
    reading: dict[str, Any] = {}
    for name, tolerance in TOLERANCE.items():
        predicted = value(curve, fit(curve, points[:-1], name), last["x"])
        measured = quantity(last, name)
        reading[name] = {
            "factors": fit(curve, points, name).tolist(),
            "predicted": predicted,
            "above": measured / predicted - 1,
            "exponent": math.log(measured / quantity(before, name)) / math.log(last["x"] / before["x"]),
            "as_expected": bool(measured <= (1 + tolerance) * predicted),
        }
    return reading


def sentence(curve: Curve, points: list[dict[str, Any]], reading: dict[str, Any]) -> str:
    """Describes a curve in words."""
    first, last = points[0], points[-1]
    time, memory = reading["seconds"], reading["memory"]
    slopes = [
        f"each {unit} {seconds * 1e3:,.3g} ms and {size / 1e6:,.3g} MB"
        for unit, seconds, size in zip(curve.units, time["factors"][1:], memory["factors"][1:])
    ]
    lines = [
        f"**{curve.name}**: from {first['x']} to {last['x']} time goes from {quantity(first, 'seconds'):.3g} to "
        f"{quantity(last, 'seconds'):.3g} s, operations from {first['flops'] / 1e9:,.4g} to "
        f"{last['flops'] / 1e9:,.4g} GFLOP, memory from {first['memory'] / 1e6:,.0f} to {last['memory'] / 1e6:,.0f} MB"
        + (f" ({'; '.join(slopes)})." if slopes else "."),
        f"Between the last two points time grows with the power {time['exponent']:.2f}." if curve.power else "",
        f"The expected growth is {curve.expected}. Fitted to the smaller points, it predicts "
        f"{time['predicted']:.3g} s, {reading['flops']['predicted'] / 1e9:,.4g} GFLOP and "
        f"{memory['predicted'] / 1e6:,.0f} MB for the largest.",
    ]
    names = {"seconds": "time", "flops": "operations", "memory": "memory"}
    faster = [f"{names[name]} by {entry['above']:.0%}" for name, entry in reading.items() if not entry["as_expected"]]
    lines.append(f"**Above that: {', '.join(faster)}.**" if faster else "Nothing grows faster than expected.")
    return " ".join(filter(None, lines))


def report(result: dict[str, Any]) -> str:
    parts = []
    for curve in (curve for curve in CURVES if curve.name in result["curves"]):
        points = result["curves"][curve.name]["points"]
        parts.append(sentence(curve, points, result["curves"][curve.name]["reading"]))
    rows = []
    for name, entry in result["curves"].items():
        for point in entry["points"]:
            cells = [name, str(point["x"]), spread_text(point["seconds"]), f"{point['flops'] / 1e9:,.4g}"]
            rows.append([*cells, f"{point['memory'] / 1e6:,.1f}"])
    parts.append(markdown_table(["curve", "x", "seconds, median (min – max)", "GFLOP", "memory, MB"], rows))
    parts.append(f"{result['network']}; {machine_text(result['machine'])}.")
    return "\n\n".join(parts)


TIME, MEMORY = ("#0072B2", "#56B4E9"), ("#D55E00", "#E69F00")  # of Okabe and Ito


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a panel per quantity: measured points, and the fitted expected growth as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    curves = [curve for curve in CURVES if curve.name in result["curves"]]
    panels = list(dict.fromkeys(curve.panel or curve.name for curve in curves))
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    axes = dict(zip(panels, figure.subplots(2, 3).flat))
    for axis in figure.axes[len(panels) :]:
        axis.set_axis_off()
    for panel, axis in axes.items():
        memory_axis = axis.twinx()
        together = [curve for curve in curves if (curve.panel or curve.name) == panel]
        for number, curve in enumerate(together):
            entry = result["curves"][curve.name]
            points, reading = entry["points"], entry["reading"]
            x = [point["x"] for point in points]
            fine = np.array(x) if curve.name == "experts" else np.geomspace(x[0], x[-1], 60)
            marker = "os"[number]
            factors = np.array(reading["seconds"]["factors"])
            axis.plot(fine, [value(curve, factors, at) for at in fine], color=TIME[number], linewidth=1.3)
            times = [sorted(point["seconds"]) for point in points]
            bars = [np.zeros(len(times)), [slowest - fastest for fastest, *_, slowest in (t * 2 for t in times)]]
            style = {"color": TIME[number], "marker": marker, "markersize": 5, "linestyle": "none"}
            axis.errorbar(x, [fastest for fastest, *_ in times], yerr=bars, **style)
            memory = [point["memory"] / 1e6 for point in points]
            style = {"color": MEMORY[number], "marker": marker, "markersize": 4, "linestyle": ":", "linewidth": 1.2}
            memory_axis.plot(x, memory, markerfacecolor="white", **style)
        if panel == "candidates":
            axis.set_xscale("log")
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_xticks(x, [str(at) for at in x])
        axis.set_xticks([], minor=True)
        memory_axis.set_ylim(0, 1.25 * memory_axis.get_ylim()[1])
        readings = [result["curves"][curve.name]["reading"]["seconds"] for curve in together if curve.power]
        powers = [f", time ∼ x^{reading['exponent']:.2f} at the end" for reading in readings]
        axis.set_title("".join([panel, *powers]), fontsize=10)
        axis.set_xlabel(together[0].x if len(together) == 1 else "candidates: all scored (○), 16 scored (□)")
        axis.set_ylabel("seconds", color=TIME[0])
        memory_axis.set_ylabel("MB", color=MEMORY[0])
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        for each in (axis, memory_axis):
            each.spines["top"].set_visible(False)
    points = {"marker": "o", "markersize": 5}
    legend = [
        Line2D([], [], **points, color=TIME[0], linestyle="none", label="time: fastest run, bar to the slowest"),
        Line2D([], [], color=TIME[0], label="expected growth of time, fitted"),
        Line2D([], [], **points, color=MEMORY[0], linestyle=":", markerfacecolor="white", label="memory with weights"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(machine_title(result["network"], result["machine"]))
    FigureCanvasAgg(figure).print_png(str(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="folder for the result")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only curves whose names contain one of these")
    parser.add_argument("--repeats", type=positive, default=2, help="runs that count at each point")
    Setup.add_arguments(parser)
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    setup.prepare_process()
    result: dict[str, Any] = {
        "network": setup.network,
        "machine": machine_facts(setup.torch_device, setup.torch_dtype),
        "curves": {},
    }
    names = select(args.only, [curve.name for curve in CURVES])
    torch.manual_seed(0)
    model = make_model(setup, setup.train_size)
    model.config.strict_experts = False  # experts may be left out
    for curve in (curve for curve in CURVES if curve.name in names):
        points = measure_curve(curve, model, setup, args.repeats)
        result["curves"][curve.name] = {"points": points, "reading": read_curve(curve, points)}
    write_result(args.out, result, report(result))
    draw(result, args.out / "growth.png")


if __name__ == "__main__":
    main()
