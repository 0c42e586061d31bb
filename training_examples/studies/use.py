"""
Measures how a trained Prismer answers when experts are missing, wrong or lying. Nothing is trained.

    export PYTHONPATH=training_examples
    python -m studies.use --data_dir runs/scenes-data --labels runs/scenes/labels --output_dir runs/use

The questions of the test scenes are answered under each condition: with the labels of the experts, with true and with
coarse labels, with one expert missing, with a share of labels from other images, and with an expert that lies in the
same way on every image. Each row of the report has the difference to the experts' labels, with the 95 % interval of a
bootstrap that draws the same scenes for both.

An expert that lies on a share of the images costs that share of the loss. The report has the share from which the
answers are worse than without the expert.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comparison.report import markdown, write_interval
from comparison.scores import Score, difference, interval
from modeling_prismer import DataCollatorForPrismer, PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.pretrained import find_checkpoint
from scenes.run_scenes import choose_attention, known_labels
from scenes.scenes import EXPERTS, add_data_arguments, first, open_data
from training import write_json, write_text

from .answers import right_answers, rows_of
from .wrong_labels import LIES, Labels, coarse, lying, noisy, without


NOISE = (0.25, 0.5, 0.75, 1.0)
PREDICTED = "labels of the experts"


def conditions(predicted: Labels, true: Labels, seed: int = 0) -> dict[str, Callable[[], Labels]]:
    """The labels of each condition, made when they are needed."""
    found: dict[str, Callable[[], Labels]] = {
        PREDICTED: lambda: predicted,
        "true labels": lambda: true,
        "coarse labels": lambda: {image_id: coarse(own, image_id) for image_id, own in predicted.items()},
        "no experts": lambda: without(predicted, *EXPERTS),
    }
    for name in EXPERTS:
        found[f"without {name}"] = lambda name=name: without(predicted, name)
    for share in NOISE:
        found[f"{100 * share:.0f} % from other images"] = lambda share=share: noisy(predicted, share, seed)
    for name in LIES:
        found[name] = lambda name=name: lying(predicted, name)
    return found


# ---- answers ----


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Returns:
        `dict` with `model`; `types`, the type of each question of each scene; and `hits`, for each condition whether
        each is answered right.
    """
    path = find_checkpoint(args.model)
    processor = PrismerProcessor.from_pretrained(path)
    processor.task = "vqa"
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    choose_attention(model)
    scenes = first(open_data(args)["test"], args.max_rows)
    ids, experts = scenes["image_id"][:], processor.image_processor.experts
    sources = (known_labels(labels, experts, {"test": scenes}) for labels in (args.labels, "true"))
    predicted, true = (dict(zip(ids, labels_for(ids))) for labels_for in sources)
    rows = rows_of(scenes)
    hits = {}
    for name, make in conditions(predicted, true).items():
        labels = make()
        collator = DataCollatorForPrismer(processor, lambda wanted, labels=labels: [labels[own] for own in wanted])
        hits[name] = right_answers(model, collator, rows)
        print(f"{name}: {100 * np.mean(sum(hits[name], [])):.1f} %", flush=True)
    return {"model": args.model, "types": rows["type"][:], "hits": hits}


# ---- the report ----


def scores_of(results: dict[str, Any], condition: str, kind: str | None = None) -> Score:
    """The share of right answers under a condition, of all questions or of those of a type."""
    hits = [
        [hit for hit, own in zip(hits, types, strict=True) if kind in (None, own)]
        for hits, types in zip(results["hits"][condition], results["types"], strict=True)
    ]
    scenes = np.repeat(np.arange(len(hits)), [len(own) for own in hits])
    return Score.of_samples(kind or "all", np.concatenate(hits), scenes)


def table(results: dict[str, Any]) -> str:
    """All conditions, with their differences to the experts' labels."""
    names = list(results["hits"])
    types = sorted({kind for own in results["types"] for kind in own})
    base = scores_of(results, PREDICTED)
    rows = []
    for name in names:
        score = scores_of(results, name)
        change = "–" if name == PREDICTED else write_interval(difference(score, base), signed=True)
        most = ""
        if name != PREDICTED:
            changes = {
                kind: scores_of(results, name, kind).value - scores_of(results, PREDICTED, kind).value
                for kind in types
            }
            kinds = sorted(changes, key=lambda kind: -abs(changes[kind]))[:3]
            most = ", ".join(f"{kind} {changes[kind]:+.0f}".replace("-", "−") for kind in kinds)
        rows.append([name, write_interval(interval(score)), change, most])
    return markdown(["condition", "right answers, %", "difference", "types that change most"], rows)


def thresholds(results: dict[str, Any]) -> str:
    """For each lie, the share of images from which the expert does harm."""
    rows = []
    base = scores_of(results, PREDICTED)
    for name, (expert, _) in LIES.items():
        gain = difference(base, scores_of(results, f"without {expert}"))
        loss = difference(base, scores_of(results, name))
        if gain.value <= 0 or (gain.low or 0) <= 0:
            threshold = "the expert has no clear gain"
        elif loss.value <= gain.value:
            threshold = "none: lies cost less than the expert gains"
        else:
            threshold = f"{100 * gain.value / loss.value:.0f} %"
        rows.append([name, write_interval(gain, signed=True), write_interval(loss, signed=True), threshold])
    return markdown(["lie", "gain of the expert", "loss if it always lies", "does harm from"], rows)


def report(results: dict[str, Any], path: Path) -> None:
    number = sum(len(own) for own in results["types"])
    text = [
        f"# {results['model']} with missing, wrong and lying experts",
        f"{number:,} questions about {len(results['types']):,} test scenes.",
        table(results),
        "## Lies",
        thresholds(results),
    ]
    write_text(path, "\n\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="prismer-scenes", help="a Prismer: a folder or a shipped checkpoint")
    add_data_arguments(parser, "scenes")
    parser.add_argument("--labels", required=True, help="label store of scenes/train_experts.py; or true, for a trial")
    parser.add_argument("--max_rows", type=int, help="answer questions about the first scenes only")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the answers, use.json")
    parser.add_argument("--report", type=Path, help="write the tables here (use.md in the output folder)")
    args = parser.parse_args()
    results = measure(args)
    write_json(args.output_dir / "use.json", results)
    report(results, args.report or args.output_dir / "use.md")


if __name__ == "__main__":
    main()
