"""
Computes top-k accuracy: the share of samples whose class is among the first k classes of the ranking.

    top_accuracy = load_metric("top_accuracy")
    top_accuracy.compute(predictions=[[3, 1, 7, 0, 2], [5, 4, 1, 0, 2]], references=[1, 5], k=(1, 5))
"""

import datasets
import evaluate


_CITATION = """\
@article{russakovsky2015imagenet,
  title   = {{ImageNet} Large Scale Visual Recognition Challenge},
  author  = {Russakovsky, Olga and Deng, Jia and Su, Hao and Krause, Jonathan and Satheesh, Sanjeev and Ma, Sean and
             Huang, Zhiheng and Karpathy, Andrej and Khosla, Aditya and Bernstein, Michael and Berg, Alexander C. and
             Fei-Fei, Li},
  journal = {International Journal of Computer Vision},
  year    = {2015}
}
"""

_DESCRIPTION = """\
Top-k accuracy, as used for ImageNet classification: the share of samples whose class is among the first k classes of
the model's ranking. k = 1 is plain accuracy.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]` or `list[list[str]]`): the ranked classes of each sample, best first, at least as
        many as the largest k: names, or the indices from `model.rank_candidates`, of shape (samples, k).
    references (`list[int]` or `list[str]`): the class of each sample.
    k (`int` or `tuple[int, ...]`, defaults to 1): the number of ranked classes that count.
Returns:
    `dict` with a `float` from 0 to 1 named top_1, top_5, ... for each k.
Raises:
    `ValueError` if a k is below 1 or a ranking is shorter than the largest k.
Examples:
    >>> top_accuracy = load_metric("top_accuracy")
    >>> top_accuracy.compute(predictions=[[3, 1, 7], [5, 4, 1]], references=[1, 5], k=(1, 3))
    {'top_1': 0.5, 'top_3': 1.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TopAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features(
                    {"predictions": datasets.Sequence(datasets.Value(kind)), "references": datasets.Value(kind)}
                )
                for kind in ("int64", "string")
            ],
            reference_urls=["https://arxiv.org/abs/1409.0575"],
        )

    def _compute(self, predictions, references, k=1):
        ks = [k] if isinstance(k, int) else list(k)
        if not ks or min(ks) < 1:
            raise ValueError(f"k is {k}; accepted are integers of at least 1")
        for i, ranking in enumerate(predictions):
            if len(ranking) < max(ks):
                raise ValueError(f"predictions[{i}] ranks {len(ranking)} classes; k = {max(ks)} needs more")
        return {
            f"top_{k}": sum(r in ranking[:k] for ranking, r in zip(predictions, references)) / len(references)
            for k in ks
        }
