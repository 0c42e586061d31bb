"""Classes: ranked names, and a classifier on a few images of each class."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .arguments import CompareArguments
from .models import CannotDo, Model
from .scores import Score
from .sources import Sample, draw, load_samples, load_support
from .trials import Trial


SHOTS = (1, 4, 16)


def classification(args: CompareArguments) -> list[Trial]:
    """Zero-shot: the best of the names of all classes in the data."""
    samples = load_samples(args, "classification")
    names = class_names(samples)

    def ask(model: Model) -> list[str]:
        best = model.classify([sample.image for sample in samples], names).argmax(axis=1)
        return [names[number] for number in best]

    content = [sample.content for sample in samples]
    return [Trial("classification", ask, lambda said: score_classes(said, samples), len(samples), content)]


def few_shot_classes(args: CompareArguments) -> list[Trial]:
    """
    k-shot: a logistic regression on the vectors of k images of each class, as CLIP's linear probes. It is the same for
    all models that encode images. None of its images is measured.

    Raises:
        ValueError: if a number of shots is below 1, or if a class has fewer images to train on.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    all_shots = args.shots or SHOTS
    if min(all_shots) < 1:
        raise ValueError(f"--shots {min(all_shots)}: few_shot_classes needs at least 1 image of each class")
    samples = load_samples(args, "classification")
    known = training_samples(load_support(args, "classification"), samples, max(all_shots))
    trials = []
    for shots in all_shots:
        support = draw(known, shots, args.seed)

        def ask(model: Model, support: list[Sample] = support) -> list[str]:
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(embed(model, support), [sample.references[0] for sample in support])
            return probe.predict(embed(model, samples)).tolist()

        trials.append(
            Trial(
                "few_shot_classes",
                ask,
                lambda said: score_classes(said, samples),
                len(samples) + len(support),
                [sample.content for sample in (*samples, *support)],
                shots,
                "images of each class",
            )
        )
    return trials


def training_samples(support: Sequence[Sample], asked: Sequence[Sample], shots: int) -> list[Sample]:
    """
    The samples of the support whose images are not asked about.

    Raises:
        ValueError: if a class has fewer than `shots` of them.
    """
    own = {sample.image.image_id for sample in asked}
    kept = [sample for sample in support if sample.image.image_id not in own]
    numbers = Counter(sample.references[0] for sample in kept)
    for name in class_names([*asked, *support]):
        if numbers[name] < shots:
            raise ValueError(
                f"--shots {shots}: class {name!r} has {numbers[name]} images to train on, without the "
                f"{len(support) - len(kept)} rows of all classes whose image_id is in --data; name training images: "
                "--support_data/--support_split"
            )
    return kept


def embed(model: Model, samples: list[Sample]) -> np.ndarray:
    vectors = model.embed([sample.image for sample in samples])
    if not np.isfinite(vectors).all():
        raise CannotDo("its vectors of images are not finite")
    return vectors


def class_names(samples: Sequence[Sample]) -> list[str]:
    return sorted({name for sample in samples for name in sample.references})


def score_classes(said: list[str], samples: list[Sample]) -> list[Score]:
    hits = [name in sample.references for name, sample in zip(said, samples, strict=True)]
    return [Score.of_samples("top-1", hits, [sample.image.image_id for sample in samples])]
