"""What is measured: each task makes trials from the arguments."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import CompareArguments
from .models import Model
from .scores import Score


@dataclass(frozen=True)
class Trial:
    """
    A measurement that is the same for all models.

    Args:
        task (`str`): the name of the task.
        ask (`Callable`): asks a model, and returns what it said for each sample, as JSON.
        score (`Callable`): the scores of what a model said, the most important one first.
        num_images (`int`): the number of images that a model sees.
        content (`Sequence`): what is asked, as JSON: ids of images, texts and references.
        condition (`int` or `str`, *optional*): what differs between trials of a task: shots, or images of a haystack.
        condition_name (`str`): its unit, such as `"shots"`.
    """

    task: str
    ask: Callable[[Model], list[Any]]
    score: Callable[[list[Any]], list[Score]]
    num_images: int
    content: Sequence[Any]
    condition: int | str | None = None
    condition_name: str = ""

    @property
    def title(self) -> str:
        return self.task if self.condition is None else f"{self.task}, {self.condition} {self.condition_name}"

    @property
    def file_name(self) -> str:
        return self.task if self.condition is None else f"{self.task}-{self.condition}"

    @property
    def digest(self) -> str:
        """Of the content. A result counts as long as it stays the same."""
        return hashlib.sha256(json.dumps(self.content).encode()).hexdigest()[:16]


def make_trials(args: CompareArguments) -> list[Trial]:
    """
    The trials of all tasks of `--tasks`.

    Raises:
        ValueError: if there is no such task, or if the data do not fit one.
    """
    from . import answers, captions, choices, classes, needles, retrieval

    tasks: dict[str, Callable[[CompareArguments], Sequence[Trial]]] = {
        "caption": captions.captions,
        "vqa": answers.vqa,
        "vqa_ranking": answers.vqa_ranking,
        "yes_no": answers.yes_no,
        "classification": classes.classification,
        "few_shot_classes": classes.few_shot_classes,
        "retrieval": retrieval.retrieval,
        "multiple_choice": choices.multiple_choice,
        "needle": needles.needle,
    }
    unknown = [task for task in args.tasks if task not in tasks]
    if unknown or not args.tasks:
        raise ValueError(f"--tasks is {' '.join(args.tasks) or 'missing'}; accepted are {', '.join(tasks)}")
    return [trial for task in args.tasks for trial in tasks[task](args)]
