"""
Makes tables and a figure from the results of distil_scenes.py.

    export PYTHONPATH=training_examples
    python -m scenes.report_distillation --texts without=runs/distillation/without distilled=runs/distillation/task \\
        live=runs/distillation/live --students routed=runs/distillation/experts plain=runs/distillation/plain \\
        --single runs/distillation/single-* --routes runs/distillation/teachers runs/distillation/experts \\
        --figure docs/images/distillation_routes.png

`--texts` compares answers and captions, with the paired difference to the first network; several folders of a network,
separated by commas, are its seeds. `--students` compares imitated tokens and maps, with Δm over the students of single
experts in `--single`, and `--routes` draws which routed adaptor serves which expert. All arguments are output folders.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from comparison.report import markdown
from comparison.scores import Interval, Score, difference, interval
from dense.measures import Result, delta_m

from .distil_scenes import new_measures
from .language import TYPES


MAP_TITLES = {
    "depth": "depth, RMSE",
    "normal": "normals, mean angle",
    "segmentation": "segmentation, mIoU",
    "edge": "edges, F",
}


def load(folder: str | Path) -> dict[str, Any]:
    return json.loads(Path(folder, "distillation_results.json").read_text())


def named(entries: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The results of each network, one for each seed."""
    pairs = (entry.split("=", 1) for entry in entries)
    return {name: [load(folder) for folder in folders.split(",")] for name, folders in pairs}


def right_answers(seeds: list[dict[str, Any]], without: str = "") -> Score:
    """
    Right answers to all questions, or to those that are not of the type `without`. A scene is drawn with the answers
    of all seeds.
    """
    values: list[bool] = []
    groups: list[str] = []
    for result in seeds:
        for scene, (hits, types) in enumerate(zip(result["hits"], result["types"], strict=True)):
            known = [hit for hit, kind in zip(hits, types, strict=True) if kind != without]
            values += known
            groups += [str(scene)] * len(known)
    return Score.of_samples("answers", values, groups)


def written(found: Interval, unit: str = "", sign: str = "") -> str:
    value = f"{found.value:{sign}.1f}{unit}"
    return value if found.low is None else f"{value} ({found.low:{sign}.1f} to {found.high:{sign}.1f})"


def texts_table(results: dict[str, list[dict[str, Any]]], split: str) -> str:
    """
    Answers by type and captions of each network on a split, as means of its seeds. The differences are to the first
    network; below, those of each seed.
    """
    own = {name: [each[split] for each in seeds] for name, seeds in results.items() if seeds[0].get(split)}
    shares = {"correct answers, all": [written(interval(right_answers(seeds)), " %") for seeds in own.values()]}
    first, *others = own.values()
    score = right_answers(first, "sign")
    scores = [right_answers(seeds, "sign") for seeds in others]
    shares["correct answers without signs, %"] = [written(interval(each)) for each in (score, *scores)]
    shares["difference in points"] = ["", *(written(difference(each, score), sign="+") for each in scores)]
    if len(first) > 1:
        shares["difference, each seed"] = ["", *(seed_differences(seeds, first) for seeds in others)]
    for kind in TYPES:
        if all(kind in each["answers"] for seeds in own.values() for each in seeds):
            shares[kind] = [f"{mean(seeds, 'answers', kind, 100):.1f} %" for seeds in own.values()]
    shares["captions, CIDEr"] = [f"{mean(seeds, 'captions', 'cider'):.2f}" for seeds in own.values()]
    shares["objects in captions with all attributes true"] = [
        f"{mean(seeds, 'captions', 'exact_attributes', 100):.1f} %" for seeds in own.values()
    ]
    return markdown([split, *own], [[title, *values] for title, values in shares.items()])


def seed_differences(seeds: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """The differences of pairs of seeds. A network of one seed is compared with each seed of the other."""
    if len(seeds) not in (1, len(others)):
        raise SystemExit(f"--texts: {len(seeds)} seeds do not compare with {len(others)}; give equally many, or one")
    pairs = zip(seeds * (len(others) // len(seeds)), others)
    found = [interval(right_answers([a], "sign")).value - interval(right_answers([b], "sign")).value for a, b in pairs]
    return ", ".join(f"{value:+.1f}" for value in found)


def mean(seeds: list[dict[str, Any]], part: str, name: str, factor: float = 1.0) -> float:
    return factor * float(np.mean([each[part][name] for each in seeds]))


def map_results(result: dict[str, Any]) -> dict[str, Result]:
    measures = new_measures(1)
    return {name: Result(value, measures[name].lower_is_better) for name, value in result["maps"].items()}


def students_table(students: dict[str, dict[str, Any]], single: list[dict[str, Any]]) -> str:
    """The maps of each student with Δm over students of one expert, and the share of the tokens that it explains."""
    alone: dict[str, Result] = {}
    explained: dict[str, float] = {}
    for result in single:
        alone |= map_results(result)
        explained |= result["imitation"]
    names = list(students)
    rows = []
    for task, title in MAP_TITLES.items():
        values = [map_results(result).get(task) for result in students.values()]
        if any(values) or task in alone:
            cells = [alone.get(task), *values]
            rows.append([title, *("" if cell is None else f"{cell.value:.3f}" for cell in cells)])
    gains = []
    for result in students.values():
        own = {task: value for task, value in map_results(result).items() if task in alone}
        gains.append(f"{delta_m(own, alone):+.1f} %" if own.keys() == alone.keys() else "")
    rows.append(["Δm", "", *gains])
    for expert in next(iter(students.values()))["imitation"]:
        shares = [explained.get(expert), *(result["imitation"].get(expert) for result in students.values())]
        cells = ["" if share is None else f"{100 * share:.0f} %" for share in shares]
        rows.append([f"{expert}: tokens explained", *cells])
    return markdown(["", "one expert each", *names], rows)


def draw_routes(results: list[dict[str, Any]], path: Path) -> None:
    """A heat map for each level: experts as rows, routed adaptors as columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {"gates": "mean gate, if the router knows the expert", "losses": "rise of the token loss without it"}
    levels = len(next(iter(results[0]["routes"].get(kind) for kind in titles if kind in results[0]["routes"])))
    figure, axes = plt.subplots(
        len(results), levels, figsize=(3.1 * levels + 1.2, 2.5 * len(results)), squeeze=False, layout="constrained"
    )
    for line, result in zip(axes, results):
        routes = result["routes"]
        kind = next(kind for kind in titles if kind in routes)
        table = np.array(routes[kind])
        for level, (axis, values) in enumerate(zip(line, table)):
            image = axis.imshow(values, cmap="viridis", vmin=min(0, table.min()), vmax=table.max(), aspect="auto")
            axis.set_xticks(range(values.shape[1]), [str(i + 1) for i in range(values.shape[1])])
            axis.set_yticks(range(len(routes["experts"])), routes["experts"] if level == 0 else [])
            axis.set_title(f"level {level + 1}: {titles[kind]}" if level == 0 else f"level {level + 1}", fontsize=9)
            axis.set_xlabel("routed adaptor", fontsize=9)
        figure.colorbar(image, ax=line, shrink=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--texts", nargs="*", default=[], metavar="NAME=FOLDER,FOLDER")
    parser.add_argument("--students", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--single", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--routes", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--figure", metavar="PNG")
    args = parser.parse_args()
    if bool(args.routes) != bool(args.figure):
        parser.error("--routes and --figure need each other")
    if args.texts:
        results = named(args.texts)
        splits = [split for split in ("test", "held_out") if any(seeds[0].get(split) for seeds in results.values())]
        if not splits:
            parser.error("--texts: no folder has answers; `--distil task` and `none` measure them, with --do_eval")
        for split in splits:
            print(texts_table(results, split), end="\n\n")
    if args.students:
        students = {name: seeds[0] for name, seeds in named(args.students).items()}
        print(students_table(students, [load(folder) for folder in args.single]), end="\n\n")
    if args.routes:
        draw_routes([load(folder) for folder in args.routes], Path(args.figure))


if __name__ == "__main__":
    main()
