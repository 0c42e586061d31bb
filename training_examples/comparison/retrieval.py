"""Retrieval: captions of an image, and images of a caption."""

from typing import Any

import numpy as np

from .arguments import CompareArguments
from .models import Model
from .scores import Score
from .sources import Sample, load_samples
from .trials import Trial


RANKS = (1, 5, 10)


def retrieval(args: CompareArguments) -> list[Trial]:
    """All captions are ranked for each image, and all images for each caption."""
    samples = load_samples(args, "caption")
    texts = [caption for sample in samples for caption in sample.references]

    def ask(model: Model) -> list[list[float]]:
        return model.match([sample.image for sample in samples], texts).tolist()

    content = [sample.content for sample in samples]
    return [Trial("retrieval", ask, lambda said: score_matches(said, samples), len(samples), content)]


def score_matches(said: list[list[float]], samples: list[Sample]) -> list[Score]:
    """
    Recall at 1, 5 and 10 in both directions. Candidates with the same score are in random order: a hit then counts by
    its probability.
    """
    scores: Any = np.array(said)  # (images, captions)
    owner = np.repeat(np.arange(len(samples)), [len(sample.references) for sample in samples])
    groups = [sample.image.image_id for sample in samples]
    found = []
    for name, matrix, is_own, of in (
        ("text", scores, owner == np.arange(len(samples))[:, None], groups),
        ("image", scores.T, owner[:, None] == np.arange(len(samples)), [groups[number] for number in owner]),
    ):
        for k in RANKS:
            found.append(Score.of_samples(f"{name} R@{k}", hits(matrix, is_own, k), of))
    return found


def hits(scores: np.ndarray, is_own: np.ndarray, k: int) -> np.ndarray:
    """
    The probability that the best own candidate of each row is among the first k, `(rows,)`.

    Args:
        scores (`np.ndarray` of shape `(rows, candidates)`): the larger, the better.
        is_own (`np.ndarray` of shape `(rows, candidates)`): which candidates are right.
    """
    best = np.where(is_own, scores, -np.inf).max(axis=1, keepdims=True)
    above, equal = (scores > best).sum(axis=1), scores == best
    # of the places left for equal candidates, none is an own one with the probability of drawing others only
    left = np.clip(k - above, 0, equal.sum(axis=1))
    probabilities = []
    for places, number, own in zip(left, equal.sum(axis=1), (equal & is_own).sum(axis=1)):
        others = number - own
        missed = np.prod([(others - drawn) / (number - drawn) for drawn in range(places)]) if places <= others else 0
        probabilities.append(1 - missed)
    return np.array(probabilities, dtype=float)
