"""Which questions about images a Prismer answers right."""

from typing import Any

import torch
from datasets import Dataset

from lm_training import batches_by_length
from modeling_prismer import DataCollatorForPrismer, PrismerForConditionalGeneration


def rows_of(scenes: Dataset) -> Dataset:
    """A row for each scene, with its questions, their answers and types."""

    def texts(row: dict[str, Any]) -> dict[str, list[str]]:
        columns = {"text": "question", "suffix": "answer", "type": "type"}
        return {name: [own[column] for own in row["questions"]] for name, column in columns.items()}

    rows = scenes.select_columns(["image_id", "image", "questions"])
    return rows.map(texts, remove_columns=["questions"], desc="questions")


@torch.no_grad()
def right_answers(
    model: PrismerForConditionalGeneration,
    collator: DataCollatorForPrismer,
    rows: Dataset,
    batch_size: int = 128,
) -> list[list[bool]]:
    """
    Which answers greedy generation would give: those whose tokens are each the most probable one after the right ones
    before. One forward pass finds them.

    Args:
        collator ([`DataCollatorForPrismer`]): makes the batches, with suffixes and without random choices.
        rows (`Dataset`): the images, with lists of questions, `text`, and of answers, `suffix`.
        batch_size (`int`, *optional*, defaults to 128): questions in a batch, at least those of one image.

    Returns:
        `list[list[bool]]`: for each image, whether each of its questions is answered right.
    """
    model.eval()
    lengths = [len(texts) for texts in rows["text"]]
    found: list[list[bool]] = [[]] * len(rows)
    for numbers in batches_by_length(lengths, batch_size):
        inputs = collator([rows[number] for number in numbers])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        labels = inputs.pop("labels")[:, 1:]
        said = model(**inputs).logits[:, -labels.shape[1] - 1 : -1].argmax(dim=-1)
        hits = ((said == labels) | (labels == -100)).all(dim=1).tolist()
        for place, number in enumerate(numbers):
            found[number] = hits[place * lengths[number] : (place + 1) * lengths[number]]
    return found
