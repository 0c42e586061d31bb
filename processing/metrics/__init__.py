"""
Metrics for captions, answers and classes, as modules of evaluate. README.md lists them.

    caption_metrics = load_metric("caption_metrics")
"""

from pathlib import Path
from typing import Any


def load_metric(name: str) -> Any:
    """
    Load a metric of this folder. Nothing is downloaded.

    Args:
        name (`str`):
            `"caption_metrics"`, `"vqa_accuracy"`, `"top_accuracy"`, `"yes_no_accuracy"` or `"choice_accuracy"`.

    Returns:
        `evaluate.EvaluationModule`: has `compute(predictions=..., references=...)`.

    Raises:
        ValueError: There is no such metric.

    Examples:

    ```python
    >>> from modeling_prismer.processing.metrics import load_metric

    >>> load_metric("vqa_accuracy").compute(predictions=["a red ball"], references=[["red ball"]])
    {'vqa_accuracy': 1.0}
    ```
    """
    import evaluate  # part of the extra "train"

    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(names)}")
    return evaluate.load(str(folder / name))
