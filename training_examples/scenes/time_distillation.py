"""
Measures the seconds per image, end to end, of networks with live, imitated and without experts.

    export PYTHONPATH=training_examples
    python -m scenes.time_distillation --data_dir runs/scenes-data --output runs/distillation/seconds.json \\
        without=runs/distillation/without@none distilled=runs/distillation/task@none live=prismer-scenes@all

A network is a checkpoint and the experts that run, `all`, `none` or names. Each image goes through all networks before
the next one, so that what else the machine does meets all of them. The processor, the experts that run, and the answer
to one question are measured, one image at a time, in float32 by `optimize_for_cpu`, with one thread.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, optimize_for_cpu
from modeling_prismer.pretrained import find_checkpoint
from training import write_json

from .scenes import NUMBERS, open_scenes


WARM_UP = 3  # images that are not measured


def load(name: str) -> tuple[Any, Any, list[str] | None]:
    path, _, experts = name.rpartition("@")
    processor = PrismerProcessor.from_pretrained(find_checkpoint(path))
    model = PrismerForConditionalGeneration.from_pretrained(find_checkpoint(path), dtype=torch.float32)
    chosen = None if experts == "all" else [each for each in experts.split(",") if each != "none"]
    return optimize_for_cpu(model), processor, chosen


@torch.no_grad()
def answer(network: tuple[Any, Any, list[str] | None], image: Any, question: str) -> str:
    model, processor, experts = network
    inputs = processor(images=image, text=question, task="vqa", experts=experts)
    generated = model.generate(**inputs, num_beams=1, max_new_tokens=8)
    return processor.post_process_generation(generated, inputs["input_ids"].shape[1], task="vqa")[0]


def measure(networks: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each network the median of wall and of CPU seconds per image, and the ratio to the first network's CPU."""
    wall: dict[str, list[float]] = {name: [] for name in networks}
    cpu: dict[str, list[float]] = {name: [] for name in networks}
    for number, row in enumerate(rows):
        question = row["questions"][number % len(row["questions"])]["question"]
        for name, network in networks.items():
            start = time.perf_counter(), time.process_time()
            answer(network, row["image"], question)
            if number >= WARM_UP:
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
    first = np.array(next(iter(cpu.values())))
    return {
        name: {
            "wall_seconds": float(np.median(wall[name])),
            "cpu_seconds": float(np.median(cpu[name])),
            "cpu_ratio": float(np.median(np.array(cpu[name]) / first)),
        }
        for name in networks
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("networks", nargs="+", metavar="NAME=CHECKPOINT@EXPERTS")
    parser.add_argument("--data_dir", help="folder of the data set")
    parser.add_argument("--output", required=True, help="JSON file for the results")
    parser.add_argument("--images", type=int, default=40, help="number of test scenes")
    for split in NUMBERS:
        parser.add_argument(f"--{split}_scenes", type=int, help="as in distil_scenes.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    splits = open_scenes(args.data_dir, "scenes", args.train_scenes, args.validation_scenes, args.test_scenes)
    rows = list(splits["test"].select(range(args.images + WARM_UP)))
    networks = {name: load(place) for name, place in (entry.split("=", 1) for entry in args.networks)}
    results = {"images": args.images, "networks": measure(networks, rows)}
    write_json(Path(args.output), results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
