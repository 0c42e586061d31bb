"""Answers to questions: written or ranked, and yes or no as POPE counts them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lm_training import tidy_answer
from modeling_prismer.processing.data import read_candidates
from modeling_prismer.processing.metrics import load_metric

from .arguments import CompareArguments
from .examples import Examples
from .models import Model, Query
from .scores import Score
from .sources import Sample, load_samples
from .trials import Trial


MAX_NEW_TOKENS = 10


def vqa(args: CompareArguments) -> list[Trial]:
    """A trial for each number of shots, or one without examples."""
    samples = load_samples(args, "vqa")
    examples = Examples(args, "vqa", samples) if args.shots else None
    trials = []
    for shots in args.shots or [None]:
        queries = plain_queries(samples) if examples is None else examples.queries(shots or 0)
        trials.append(
            Trial(
                "vqa",
                lambda model, queries=queries: model.answer(queries, MAX_NEW_TOKENS),
                lambda said: score_answers(said, samples),
                count_images(samples),
                [[query.content, sample.references] for query, sample in zip(queries, samples, strict=True)],
                shots,
                "shots",
            )
        )
    return trials


def vqa_ranking(args: CompareArguments) -> list[Trial]:
    """The best of all answers in the data, or of those in `--candidates`."""
    samples = load_samples(args, "vqa")
    if args.candidates is None:
        candidates = sorted({answer.strip() for sample in samples for answer in sample.references} - {""})
    else:
        candidates = read_candidates(args.candidates)

    def ask(model: Model) -> list[str]:
        return [candidates[best] for best in model.rank(plain_queries(samples), candidates).argmax(axis=1)]

    content = [candidates, *(sample.content for sample in samples)]
    return [Trial("vqa_ranking", ask, lambda said: score_answers(said, samples), count_images(samples), content)]


def yes_no(args: CompareArguments) -> list[Trial]:
    """The questions that are answered by yes or no. The most frequent answer to a question is its reference."""
    samples = load_samples(args, "vqa")
    found = [(sample, yes_or_no(sample)) for sample in samples]
    asked = [replace(sample, references=(answer,)) for sample, answer in found if answer is not None]
    if not asked:
        raise ValueError(
            "--tasks yes_no: --data has no question whose answers are yes or no, one of them more often than the other"
        )
    if len(asked) < len(samples):
        print(f"yes_no: {len(asked)} of {len(samples)} questions are answered by yes or no")
    return [
        Trial(
            "yes_no",
            lambda model: model.answer(plain_queries(asked), MAX_NEW_TOKENS),
            lambda said: score_yes_no(said, asked),
            count_images(asked),
            [sample.content for sample in asked],
        )
    ]


def yes_or_no(sample: Sample) -> str | None:
    """The more frequent answer to a question. `None` if there is another one, or if both are as frequent."""
    counts = Counter(tidy_answer(answer) for answer in sample.references)
    if counts.keys() - {"yes", "no"} or counts["yes"] == counts["no"]:
        return None
    return max(counts, key=lambda answer: counts[answer])


def plain_queries(samples: Sequence[Sample]) -> list[Query]:
    return [Query((sample.image,), sample.text) for sample in samples]


def count_images(samples: Sequence[Sample]) -> int:
    return len({sample.image.image_id for sample in samples})


def groups_of(samples: Sequence[Sample]) -> list[str]:
    return [sample.image.image_id for sample in samples]


def score_answers(said: list[str], samples: Sequence[Sample]) -> list[Score]:
    """The soft accuracy of the VQA challenge, and the share of answers that are a reference in lower case."""
    references = [list(sample.references) for sample in samples]
    metric = load_metric("vqa_accuracy")
    soft = metric.compute(predictions=said, references=references, per_question=True)["vqa_accuracy_per_question"]
    exact = [tidy_answer(text) in map(tidy_answer, own) for text, own in zip(said, references, strict=True)]
    groups = groups_of(samples)
    return [Score.of_samples("VQA accuracy", soft, groups), Score.of_samples("exact match", exact, groups)]


def score_yes_no(said: list[str], samples: Sequence[Sample]) -> list[Score]:
    metric = load_metric("yes_no_accuracy")
    truth = [answer for sample in samples for answer in sample.references]  # one of each
    is_yes = metric.compute(predictions=said, references=truth, per_question=True)["is_yes_per_question"]
    says, right = np.array(is_yes, dtype=float), np.array([answer == "yes" for answer in truth], dtype=float)
    groups = groups_of(samples)
    return [
        Score.of_samples("accuracy", says == right, groups),
        Score.of_samples("F1", np.stack([says * right, says, right], axis=1), groups, "f1"),
        Score.of_samples("yes ratio", says, groups),
    ]
