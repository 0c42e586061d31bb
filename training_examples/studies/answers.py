"""Which questions about images a Prismer answers right, and which words it says right."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset

from lm_training import batches_by_length
from modeling_prismer import DataCollatorForPrismer, PrismerForConditionalGeneration


WORD_START = "Ġ"  # of a token of RoBERTa
Counts = dict[str, tuple[int, int]]  # of an image: for each kind, how many are right, and how many there are


def rows_of(scenes: Dataset) -> Dataset:
    """A row for each scene, with its questions, their answers and types."""

    def texts(row: dict[str, Any]) -> dict[str, list[str]]:
        columns = {"text": "question", "suffix": "answer", "type": "type"}
        return {name: [own[column] for own in row["questions"]] for name, column in columns.items()}

    rows = scenes.select_columns(["image_id", "image", "questions"])
    return rows.map(texts, remove_columns=["questions"], desc="questions")


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
    found: list[list[bool]] = [[]] * len(rows)
    for number, labels, said in _predictions(model, collator, rows, batch_size):
        found[number] = ((said == labels) | (labels == -100)).all(dim=1).tolist()
    return found


def right_words(
    model: PrismerForConditionalGeneration,
    collator: DataCollatorForPrismer,
    rows: Dataset,
    kind_of: Callable[[str], str | None],
    batch_size: int = 128,
) -> list[Counts]:
    """
    Counts the words of the suffixes that the model would say after the right words before.

    Args:
        model, collator, rows, batch_size: as for [`right_answers`].
        kind_of (`Callable`): the kind of a word in lower case, `None` for words that do not count.

    Returns:
        `list[dict]`: for each image, the number of right words of each kind, and of all words of this kind.
    """
    names = collator.processor.tokenizer.convert_ids_to_tokens
    found: list[Counts] = [{}] * len(rows)
    for number, labels, said in _predictions(model, collator, rows, batch_size):
        words: list[tuple[str, bool]] = []
        for row, hits in zip(labels.tolist(), (said == labels).tolist()):
            learned = [place for place, token in enumerate(row) if token != -100][:-1]  # without the end
            for place, token in zip(learned, names([row[place] for place in learned])):
                if token.startswith(WORD_START):
                    words.append((token[1:].lower(), hits[place]))
                elif token.isalpha():
                    words[-1] = words[-1][0] + token, words[-1][1] and hits[place]
        found[number] = counts = {}
        for word, hit in words:
            if (kind := kind_of(word)) is not None:
                right, total = counts.get(kind, (0, 0))
                counts[kind] = right + hit, total + 1
    return found


@torch.no_grad()
def _predictions(
    model: PrismerForConditionalGeneration, collator: DataCollatorForPrismer, rows: Dataset, batch_size: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each row, its number, the labels of its texts, and the most probable token at the place of each label."""
    model.eval()
    lengths = [len(texts) for texts in rows["text"]]
    for numbers in batches_by_length(lengths, batch_size):
        inputs = collator([rows[number] for number in numbers])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "sample_weight"}
        labels = inputs.pop("labels")[:, 1:]
        said = model(**inputs).logits[:, -labels.shape[1] - 1 : -1].argmax(dim=-1)
        for place, number in enumerate(numbers):
            own = slice(place * lengths[number], (place + 1) * lengths[number])
            yield number, labels[own].cpu(), said[own].cpu()
