"""Shortens answers that do not fit into the model."""

import logging
from typing import Any

from datasets import Dataset, IterableDataset

from ..processing_prismer import PrismerProcessor
from ..tasks import Task, find_task
from .faults import SHOWN


logger = logging.getLogger(__name__)


def shorten_answers(
    rows: Dataset | IterableDataset, processor: PrismerProcessor, text_config: Any
) -> Dataset | IterableDataset:
    """
    Cuts the answers (column `suffix`, texts or lists of texts) that do not fit into the model after the longest
    prompt. A warning names their rows. Needed for tasks whose suffix the processor does not cut, such as `"vqa"`.
    """
    task = find_task(processor.task)
    positions = text_config.max_position_embeddings - text_config.pad_token_id - 1
    shortener = _Shortener(processor, task, positions - task.max_prompt_tokens - 1)
    if task.max_tokens is not None or shortener.room < 1:
        return rows
    if isinstance(rows, IterableDataset):
        features = rows.features
        if features is None or "suffix" not in features:
            return rows
        return rows.map(shortener, features=features)
    if "suffix" not in rows.column_names:
        return rows
    texts = rows["suffix"][:]
    shortened = [shortener.all_of(text) for text in texts]
    long = [row for row, (text, shorter) in enumerate(zip(texts, shortened)) if text != shorter]
    if not long:
        return rows
    shown = [f"row {row + 1}: {str(texts[row])[:60]!r}…" for row in long[:SHOWN]]
    more = [f"… and {len(long) - SHOWN} more"] if len(long) > SHOWN else []
    heading = f"the answers of {len(long)} of {len(rows)} rows are cut to {shortener.room} tokens, the most that fit"
    logger.warning("\n  ".join([heading, *shown, *more]))
    feature, format_ = rows.features["suffix"], rows.format
    rows = rows.with_format(None).remove_columns("suffix").add_column("suffix", shortened, feature=feature)
    return rows.with_format(format_["type"], **format_["format_kwargs"])


class _Shortener:
    def __init__(self, processor: PrismerProcessor, task: Task, room: int):
        self.tokenizer = processor.tokenizer
        self.task = task
        self.room = room

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"suffix": self.all_of(row["suffix"])}

    def all_of(self, suffix: str | list[str]) -> str | list[str]:
        return [self.one(text) for text in suffix] if isinstance(suffix, list) else self.one(suffix)

    def one(self, answer: str) -> str:
        if len(answer.encode()) < self.room:  # each token has at least one byte; one byte is the leading space
            return answer
        text = f" {self.task.write_suffix(answer.strip(), keep=None)}"  # as the processor writes it
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return answer if len(offsets) <= self.room else text[: offsets[self.room - 1][1]].strip()
