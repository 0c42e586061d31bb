"""
Measures what the tokens of a checkpoint's encoder tell about scenes, with linear probes: what limits its answers.

    export PYTHONPATH=training_examples
    python -m scenes.probe --model prismer-scenes --data_dir runs/scenes-data --max_rows 600

A probe is a linear classifier of a frozen network's tokens. It is trained on scenes like those of the training, and
tested on such scenes and on scenes with held-out combinations. For the attributes of an object it reads the mean of
the tokens that its box covers, and for numbers of objects the mean of all tokens. Three kinds of tokens are compared:

| column | tokens |
| --- | --- |
| image alone | patches of the encoder, without experts |
| with experts | patches of the encoder, with all experts (their true labels) |
| stems | what the stems make of the experts' maps: the mean over the experts, before the resampler |
"""

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.pretrained import find_checkpoint

from .run_scenes import evaluation_splits
from .scene import SHAPES
from .scenes import add_data_arguments, expert_labels, first, open_data


ATTRIBUTES = ("color", "shape", "material", "size")
SITES = ("image alone", "with experts", "stems")
BATCH = 16

Tokens = dict[str, np.ndarray]  # by site: (scenes, side, side, width)


@torch.inference_mode()
def encode(model: PrismerForConditionalGeneration, processor: PrismerProcessor, scenes: Dataset) -> Tokens:
    """The tokens of each scene at each of `SITES`, on the grid of the patches: `(scenes, side, side, width)`."""
    found: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
    names = tuple(model.config.expert_names)
    encoder, stems = model.model.vision_model, []
    hooks = [
        stem.register_forward_hook(lambda module, inputs, output: stems.append(output))
        for stem in encoder.expert_stems.values()
    ]
    for batch in _batches(scenes):
        labels = [expert_labels(row, names=names) for row in batch]
        inputs = processor(images=[row["image"] for row in batch], expert_labels=labels, return_tensors="pt")
        inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        none = torch.zeros(len(batch), len(names), dtype=torch.bool)
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        for site, mask in (("image alone", none), ("with experts", ~none)):
            stems.clear()
            states = model.get_image_features(**{**inputs, "expert_mask": mask}, return_dict=True).last_hidden_state
            found[site].append(states[:, : side**2].unflatten(1, (side, side)))
        maps = torch.stack([_on_grid(output, side) for output in stems])
        found["stems"].append(maps.mean(dim=0))
    for hook in hooks:
        hook.remove()
    return {site: torch.cat(parts).float().numpy() for site, parts in found.items()}


def _batches(scenes: Dataset) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(scenes), BATCH):
        yield [scenes[k] for k in range(start, min(start + BATCH, len(scenes)))]


def _on_grid(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """A stem's map `(batch, width, h, w)` or tokens `(batch, h * w, width)` as `(batch, side, side, width)`."""
    if tokens.ndim == 3:
        own = round(tokens.shape[1] ** 0.5)
        tokens = tokens.transpose(1, 2).unflatten(2, (own, own))
    return torch.nn.functional.adaptive_avg_pool2d(tokens, side).permute(0, 2, 3, 1)


def of_objects(tokens: np.ndarray, scenes: Dataset) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The mean token in the box of each object `(objects, width)`, and its attributes."""
    features, attributes = [], {name: [] for name in ATTRIBUTES}
    side = tokens.shape[1]
    for number, (facts, image) in enumerate(zip(scenes["facts"], scenes["image"])):
        for thing in facts["objects"]:
            left, top, right, bottom = (value * side / image.width for value in thing["box"])
            rows = slice(int(top), max(int(np.ceil(bottom)), int(top) + 1))
            columns = slice(int(left), max(int(np.ceil(right)), int(left) + 1))
            features.append(tokens[number, rows, columns].mean(axis=(0, 1)))
            for name in ATTRIBUTES:
                attributes[name].append(thing[name])
    return np.stack(features), {name: np.array(values) for name, values in attributes.items()}


def counts_of(scenes: Dataset) -> dict[str, np.ndarray]:
    """The number of objects, and of each shape, in each scene."""
    shapes = [[thing["shape"] for thing in facts["objects"]] for facts in scenes["facts"]]
    counts = {"objects": np.array([len(own) for own in shapes])}
    return counts | {shape: np.array([own.count(shape) for own in shapes]) for shape in SHAPES}


def probe(train: tuple[Tokens, Dataset], test: tuple[Tokens, Dataset]) -> dict[str, dict[str, float]]:
    """The share of right predictions, by what is predicted and by site."""
    results: dict[str, dict[str, float]] = {}
    for site in SITES:
        (features, known), (own, wanted) = (of_objects(tokens[site], scenes) for tokens, scenes in (train, test))
        for name in ATTRIBUTES:
            classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
            classifier.fit(features, known[name])
            results.setdefault(name, {})[site] = float(np.mean(classifier.predict(own) == wanted[name]))
        means = [tokens[site].mean(axis=(1, 2)) for tokens, _ in (train, test)]
        hits = {}
        for (name, known_counts), wanted_counts in zip(counts_of(train[1]).items(), counts_of(test[1]).values()):
            regression = make_pipeline(StandardScaler(), Ridge(alpha=100.0))
            predicted = regression.fit(means[0], known_counts).predict(means[1])
            hits[name] = float(np.mean(np.rint(predicted) == wanted_counts))
        results.setdefault("number of objects", {})[site] = hits.pop("objects")
        results.setdefault("number of a shape", {})[site] = float(np.mean(list(hits.values())))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="prismer-scenes", help="a Prismer: a folder or a shipped checkpoint")
    add_data_arguments(parser, "scenes")
    parser.add_argument("--max_rows", type=int, help="train on the first scenes only")
    parser.add_argument("--max_eval_rows", type=int, help="test on the first scenes of each kind only")
    arguments = parser.parse_args()
    splits = open_data(arguments)
    path = find_checkpoint(arguments.model)
    processor = PrismerProcessor.from_pretrained(path)
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    train = first(splits["train" if "train" in splits else "validation"], arguments.max_rows)
    known = (encode(model, processor, train), train)
    for name, scenes in evaluation_splits({"test": splits["test"]}, arguments.max_eval_rows).items():
        results = probe(known, (encode(model, processor, scenes), scenes))
        print(f"\n{name}, {len(scenes)} scenes; trained on {len(train)}\n\n| | {' | '.join(SITES)} |")
        print("| --- | --- | --- | --- |")
        for kind, shares in results.items():
            print(f"| {kind} | {' | '.join(f'{100 * shares[site]:.1f} %' for site in SITES)} |")


if __name__ == "__main__":
    main()
