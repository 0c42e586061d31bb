"""Classes: ranked names, and a classifier on a few images of each class."""

import numpy as np

from .arguments import CompareArguments
from .models import CannotDo, Model
from .scores import Score
from .sources import Sample, load_samples, load_support
from .trials import Trial


SHOTS = (1, 4, 16)


def classification(args: CompareArguments) -> list[Trial]:
    """Zero-shot: the best of the names of all classes in the data."""
    samples = load_samples(args, "classification")
    names = class_names(samples)

    def ask(model: Model) -> list[str]:
        best = model.classify([sample.image for sample in samples], names).argmax(axis=1)
        return [names[number] for number in best]

    return [Trial("classification", ask, lambda said: score_classes(said, samples), len(samples))]


def few_shot_classes(args: CompareArguments) -> list[Trial]:
    """
    k-shot: a logistic regression on the vectors of k images of each class, as CLIP's linear probes. It is the same for
    all models that encode images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    samples = load_samples(args, "classification")
    trials = []
    for shots in args.shots or SHOTS:
        support = load_support(args, "classification", None, shots)

        def ask(model: Model, support: list[Sample] = support) -> list[str]:
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(embed(model, support), [sample.references[0] for sample in support])
            return probe.predict(embed(model, samples)).tolist()

        number = len(samples) + len(support)
        trial = Trial(
            "few_shot_classes", ask, lambda said: score_classes(said, samples), number, shots, "images of each class"
        )
        trials.append(trial)
    return trials


def embed(model: Model, samples: list[Sample]) -> np.ndarray:
    vectors = model.embed([sample.image for sample in samples])
    if not np.isfinite(vectors).all():
        raise CannotDo("its vectors of images are not finite")
    return vectors


def class_names(samples: list[Sample]) -> list[str]:
    return sorted({name for sample in samples for name in sample.references})


def score_classes(said: list[str], samples: list[Sample]) -> list[Score]:
    hits = [name in sample.references for name, sample in zip(said, samples, strict=True)]
    return [Score.of_samples("top-1", hits, [sample.image.image_id for sample in samples])]
