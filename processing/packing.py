"""Many texts about one image in one row: the image's tokens come once, and each text sees them and itself."""

from collections.abc import Sequence

import torch

from .prompts import NOT_LEARNED, Row


def pack_rows(groups: Sequence[Sequence[Row]], image_token_id: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Packs the rows of each group into one. What they have in common at the beginning comes once: the placeholders of
    the image, and the text before and after them that is the same. The rest of each row follows.

    Args:
        groups (`list[list[dict]]`): rows of tokens about the same images, from [`PrismerLMProcessor.encode`].
        image_token_id (`int`): the placeholder.
        pad_token_id (`int`): fills the shorter rows, on the right.

    Returns:
        `dict[str, torch.Tensor]`: for each group

        - `input_ids`, `labels` (groups, length) int64;
        - `position_ids` (groups, length) int64, which go on after the common part in each text;
        - `attention_mask` (groups, 1, length, length) bool: which token attends to which.

    Raises:
        ValueError: if rows of a group have other images, or learn their first token of their own.
    """
    packed = [_pack(rows, image_token_id, number) for number, rows in enumerate(groups)]
    length = max(len(ids) for ids, *_ in packed)
    fillings = (pad_token_id, NOT_LEARNED, 0, -1)
    ids, labels, positions, texts = (
        torch.tensor([row[part] + [filling] * (length - len(row[part])) for row in packed])
        for part, filling in enumerate(fillings)
    )
    own = texts[:, None, :, None] == texts[:, None, None, :]  # (groups, 1, length, length)
    common = texts[:, None, None, :] == 0
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "input_ids": ids,
        "attention_mask": (own | common) & causal,
        "position_ids": positions,
        "labels": labels,
    }


def _pack(rows: Sequence[Row], image_token_id: int, number: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, labels, positions, and the number of the text that each token belongs to, 0 for the common part."""
    placeholders = [place for place, token in enumerate(rows[0]["input_ids"]) if token == image_token_id]
    common = _common_length([row["input_ids"] for row in rows])
    # A text's first token is predicted from the common part, which has one next token only: it must not be learned.
    common = min(common, *(_first_learned(row) - 1 for row in rows), *(len(row["input_ids"]) - 1 for row in rows))
    if common <= max(placeholders, default=-1):
        raise ValueError(
            f"the texts of row {number} cannot be packed: they need the same text up to the last image, and each of "
            "them text of its own before what is learned"
        )
    ids, learned = rows[0]["input_ids"][:common], [0] * common
    positions, texts = list(range(common)), [0] * common
    for text, row in enumerate(rows, start=1):
        ids += row["input_ids"][common:]
        learned += row["learned"][common:]
        positions += range(common, len(row["input_ids"]))
        texts += [text] * (len(row["input_ids"]) - common)
    labels = [token if is_learned else NOT_LEARNED for token, is_learned in zip(ids, learned)]
    return ids, labels, positions, texts


def _common_length(rows: Sequence[list[int]]) -> int:
    """The number of tokens at the beginning that all rows have in common."""
    return next((place for place, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1), min(map(len, rows)))


def _first_learned(row: Row) -> int:
    return next((place for place, is_learned in enumerate(row["learned"]) if is_learned), len(row["learned"]))
