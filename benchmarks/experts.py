"""
Measures the time of each live expert of a checkpoint: loading, the first image, one image, and a batch.

    python benchmarks/experts.py
    pip install --no-deps --target older VERSION_OR_FOLDER && python benchmarks/experts.py --other older

With `--other`, processes of both versions run in turn, so that both see the same load of the machine. The result has
the medians over the processes. CPU time is that of all threads; it depends less on other programs than the wall-clock
time does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any


STEPS = {
    "load": "loading, with the imports",
    "first": "the first image, after loading",
    "one": "one image",
    "batch": "an image of the batch",
}


def measure(model: str, num_images: int, size: int, repeats: int, threads: int) -> dict[str, Any]:
    """
    Returns `{expert: {step: [seconds, CPU seconds]}}`, for the bundled image. The experts run one after the other.
    """
    import torch
    from PIL import Image

    from modeling_prismer import PrismerProcessor, pretrained_path, sample_image

    torch.set_num_threads(threads)
    image = sample_image("scene").convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    suite = PrismerProcessor.from_pretrained(model if Path(model).is_dir() else pretrained_path(model)).experts
    known: dict[str, Any] = {}
    found = {}
    for name in suite:
        run = partial(_run, suite.only(name), image, known)
        times = {"load": _timed(suite[name].load), "first": _timed(run, 1)}
        for step, count in (("one", 1), ("batch", num_images)):
            runs = [_timed(run, count) for _ in range(repeats if count == 1 else 1)]
            times[step] = [statistics.median(column) / count for column in zip(*runs)]
        known[name] = run(1)[0][name]
        found[name] = times
    return found


def _run(expert: Any, image: Any, known: dict[str, Any], count: int) -> list[dict[str, Any]]:
    return expert([image] * count, [known] * count)


def _timed(work: Any, *args: Any) -> list[float]:
    start, cpu = time.perf_counter(), time.process_time()
    work(*args)
    return [time.perf_counter() - start, time.process_time() - cpu]


def in_own_process(folder: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """Measures in a process of its own, which imports the package from `folder` if there is one."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--model", args.model]
    for name in ("images", "size", "repeats", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = os.environ if folder is None else {**os.environ, "PYTHONPATH": str(folder.resolve())}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {step: [statistics.median(own) for own in zip(*(run[name][step] for run in runs))] for step in STEPS}
        for name in runs[0]
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table in milliseconds: wall-clock time (CPU time)."""
    from measuring import markdown_table

    names = list(results)
    head = ["expert", *(f"{step}, {name}" for step in STEPS for name in names)]
    rows = []
    for expert in results[names[0]]:
        row = [expert]
        for step in STEPS:
            row += [
                "{:,.0f} ({:,.0f})".format(*(1e3 * each for each in results[name][expert][step])) for name in names
            ]
        rows.append(row)
    notes = "; ".join(f"{step}: {text}" for step, text in STEPS.items())
    text = f"{markdown_table(head, rows)}\n\nMilliseconds, in brackets the CPU time. {notes}."
    if len(names) == 2:
        ratios = ", ".join(
            f"{expert} {results[names[1]][expert]['one'][1] / max(results[names[0]][expert]['one'][1], 1e-9):.2f}"
            for expert in results[names[0]]
        )
        text += f"\n\nCPU time of one image, {names[1]} / {names[0]}: {ratios}."
    return text


def main() -> None:
    from measuring import positive

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/experts"), help="folder for the result")
    parser.add_argument("--model", default="prismer-scenes", help="a checkpoint with live experts")
    parser.add_argument("--images", type=positive, default=32, help="images in the batch")
    parser.add_argument("--size", type=positive, default=384, help="pixels of each side")
    parser.add_argument("--repeats", type=positive, default=5, help="runs of one image in each process")
    parser.add_argument("--rounds", type=positive, default=3, help="processes for each version")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--other", type=Path, help="a folder with another version of the package, to compare with")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.model, args.images, args.size, args.repeats, args.threads)))
        return
    from measuring import write_result

    versions = {"now": None} | ({"other": args.other} if args.other else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
    for number in range(args.rounds):
        for name, folder in versions.items():
            print(f"round {number + 1} of {args.rounds}: {name} …", flush=True)
            runs[name].append(in_own_process(folder, args))
    results = {name: median_of(own) for name, own in runs.items()}
    facts = {"images": args.images, "size": args.size, "threads": args.threads, "load": os.getloadavg()[0]}
    write_result(args.out, {"facts": facts, "results": results}, table(results))


if __name__ == "__main__":
    main()
