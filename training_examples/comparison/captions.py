"""Captions: CIDEr, BLEU, and SPICE if its files are present."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocoevalcap.spice import spice

from modeling_prismer.processing.metrics import load_metric

from .arguments import CompareArguments
from .examples import Examples
from .models import Query
from .scores import Score
from .sources import Sample, load_samples
from .trials import Trial


MAX_NEW_TOKENS = 30
ORDERS = (1, 2, 3, 4)


def captions(args: CompareArguments) -> list[Trial]:
    """A trial for each number of shots, or one without examples."""
    samples = load_samples(args, "caption")
    examples = Examples(args, "caption", samples) if args.shots else None
    trials = []
    for shots in args.shots or [None]:
        queries = [Query((sample.image,)) for sample in samples] if examples is None else examples.queries(shots or 0)
        trials.append(
            Trial(
                "caption",
                lambda model, queries=queries: model.answer(queries, MAX_NEW_TOKENS),
                lambda said: score_captions(said, samples),
                len(samples),
                [[query.content, sample.references] for query, sample in zip(queries, samples, strict=True)],
                shots,
                "shots",
            )
        )
    return trials


def score_captions(said: list[str], samples: Sequence[Sample]) -> list[Score]:
    metric = load_metric("caption_metrics")
    has_java = shutil.which("java") is not None
    names = ["cider", "bleu", *(["spice"] if has_java and has_spice() else [])]
    found: dict[str, Any] = metric.compute(
        predictions=said,
        references=[list(sample.references) for sample in samples],
        metrics=names,
        tokenizer="ptb" if has_java else "regex",  # the latter is approximate, as the metric says
        per_caption=True,
    )
    groups = [sample.image.image_id for sample in samples]
    counts = np.array(found["bleu_counts_per_caption"])  # (captions, 10)
    scores = [Score.of_samples("CIDEr", found["cider_per_caption"], groups)]
    for order in (4, 1):
        columns = [*range(order), *range(4, 4 + order), 8, 9]
        scores.append(Score.of_samples(f"BLEU-{order}", counts[:, columns], groups, "bleu"))
    if "spice" in names:
        scores.append(Score.of_samples("SPICE", found["spice_per_caption"], groups))
    return scores


def has_spice() -> bool:
    """Whether the files are there that `python -m pycocoevalcap.spice.get_stanford_models` downloads."""
    return len(list(Path(spice.__file__).with_name("lib").glob("stanford-corenlp-3.6.0*.jar"))) == 2
