"""Prompts about images: which text is about which images, its placeholders, and rows of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


NOT_LEARNED = -100

# The tensors with one entry for each token, and their padding; that of `input_ids` is the tokenizer's.
PADDING = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": NOT_LEARNED}

Row = dict[str, list[int]]


class Prompt(NamedTuple):
    """
    One row of text.

    Args:
        pieces (`list[str]`): the text in pieces. Every second one is learned: the turns of an assistant.
        images (`list[int]`): numbers of the images that the row is about.
        suffix (`str`, *optional*): a text to learn that follows.
    """

    pieces: list[str]
    images: list[int]
    suffix: str | None = None


# ---- which text is about which images ----


def texts_of_images(prompts: list[Prompt], num_images: int, token: str) -> list[list[str]]:
    """The texts about each image, without the placeholders of images."""
    texts: list[list[str]] = [[] for _ in range(num_images)]
    for prompt in prompts:
        text = "".join(prompt.pieces).replace(token, " ")
        for number in prompt.images:
            texts[number].append(text)
    return texts


def flatten_images(images: Any) -> tuple[Any, list[list[int]] | None]:
    """A list of lists as one list, and the numbers of each prompt's images; other images as they are."""
    if not isinstance(images, list | tuple) or not any(isinstance(own, list | tuple) for own in images):
        return images, None
    if not all(own is None or isinstance(own, list | tuple) for own in images):
        raise ValueError("images has lists beside single images; a list for each prompt is needed, or none")
    flat = [image for own in images for image in own or ()]
    return flat, _split_numbers([len(own or ()) for own in images])


def lay_out(
    text: Any, suffix: Any, num_images: int, groups: list[list[int]] | None, token: str, fusion: str
) -> list[Prompt]:
    """
    The rows of text with their images and suffixes.

    Args:
        text (`str`, `list[str]` or `list[list[str]]`, *optional*): see [`PrismerLMProcessor.__call__`].
        suffix: in the layout of `text`.
        num_images (`int`): number of images.
        groups (`list[list[int]]`, *optional*): the images of each prompt, if `images` was a list of lists.
        token (`str`): stands for an image in a text.
        fusion (`str`): `"prefix"` or `"cross_attention"`.

    Raises:
        TypeError: if `text` is none of these.
        ValueError: if texts, suffixes and images do not fit together.
    """
    single = text is None or isinstance(text, str)
    texts: list[Any] = [text or ""] if single else list(text) if isinstance(text, list | tuple) else []
    nested = not single and all(isinstance(own, list | tuple) for own in texts)
    if not texts or not all(isinstance(own, str) for part in texts for own in (part if nested else [part])):
        raise TypeError("text must be a string, a list of strings, or a list of lists of strings; none is empty")
    if groups is None:
        groups = _group_images(texts, num_images, token, single, nested)
    if nested and len(texts) != len(groups):
        raise ValueError(f"text has {len(texts)} lists for {len(groups)} images; one list for each image is needed")
    if not nested:
        if single:  # for every image, and as often as it has suffixes
            texts = texts * len(groups) * _suffixes_each(suffix, len(groups))
        each, rest = divmod(len(texts), len(groups))
        if rest:
            raise ValueError(
                f"{len(texts)} texts for {len(groups)} images; as many texts as images, or a multiple, is needed"
            )
        texts = [texts[start : start + each] for start in range(0, len(texts), each)]
    counts = [len(own) for own in texts]
    if len(set(counts)) > 1:
        raise ValueError(
            f"text has lists of {', '.join(map(str, counts))} entries; every image needs equally many, since the rows "
            "of a batch are divided evenly among its images"
        )
    rows = [(own, group) for part, group in zip(texts, groups) for own in part]
    suffixes = _flatten_suffixes(suffix, counts)
    return [Prompt([own], group, each) for (own, group), each in zip(_place_images(rows, token, fusion), suffixes)]


def _group_images(texts: list[Any], num_images: int, token: str, single: bool, nested: bool) -> list[list[int]]:
    """Divides a flat list of images among the prompts, by the placeholders in the texts."""
    counts = [] if nested else [own.count(token) for own in texts]
    if nested or not any(counts):
        return [[number] for number in range(num_images)] or [[] for _ in texts]
    if single:
        counts = counts * (num_images // counts[0] or 1)
    shared = max(1, sum(counts) // max(1, num_images))  # prompts about the same images
    firsts = counts[::shared]
    if sum(firsts) != num_images or counts != [count for count in firsts for _ in range(shared)]:
        raise ValueError(f"text has {sum(counts)} {token} for {num_images} images; one for each image is needed")
    return _split_numbers(firsts)


def _place_images(rows: list[tuple[str, list[int]]], token: str, fusion: str) -> Iterator[tuple[str, list[int]]]:
    """Puts placeholders in front of the texts that need them and have none."""
    # if some rows have placeholders or no images, the others need theirs: without any, each row gets an image
    some = any(token in text for text, _ in rows) or not all(images for _, images in rows)
    for number, (text, images) in enumerate(rows):
        count = text.count(token)
        if count not in (0, len(images)):
            raise ValueError(f"text {number} has {count} {token} for {len(images)} images; one for each is needed")
        if not count and len(images) > 1 and fusion == "cross_attention":
            raise ValueError(
                f"text {number} is about {len(images)} images: with fusion='cross_attention' it needs {token} before "
                "the text about each of them"
            )
        if not count and (fusion == "prefix" or some):
            text = token * len(images) + text
        yield text, images


def _suffixes_each(suffix: Any, num_prompts: int) -> int:
    if suffix is None or isinstance(suffix, str) or not suffix:
        return 1
    return len(suffix[0]) if isinstance(suffix[0], list | tuple) else max(1, len(suffix) // num_prompts)


def _flatten_suffixes(suffix: Any, counts: list[int]) -> list[Any]:
    """The suffix of each row; `counts` are the rows of each image."""
    if suffix is None:
        return [None] * sum(counts)
    suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
    if any(isinstance(own, list | tuple) for own in suffixes):
        found = [len(own) for own in suffixes]
        if found != counts:
            raise ValueError(f"suffix has lists of {found} entries for {counts} prompts; one for each is needed")
        suffixes = [each for own in suffixes for each in own]
    if len(suffixes) != sum(counts) or not all(isinstance(own, str) for own in suffixes):
        raise ValueError(f"{len(suffixes)} suffixes for {sum(counts)} prompts; a string for each prompt is needed")
    return suffixes


def _split_numbers(counts: Sequence[int]) -> list[list[int]]:
    """0, 1, 2, … in lists of these lengths."""
    ends = np.cumsum([0, *counts]).tolist()
    return [list(range(start, end)) for start, end in zip(ends, ends[1:])]


# ---- placeholders and rows of tokens ----


def expand(prompt: Prompt, words: Sequence[str], token: str, each: int) -> tuple[str, list[bool]]:
    """
    The text of a prompt with all placeholders of its images, and whether each of them is a mark. Marks stand between
    the pieces of a prompt: so they are found again among the tokens of any tokenizer or processor.

    Args:
        prompt ([`Prompt`]): the prompt, with one `token` for each image. A row about one image may have none.
        words (`list[str]`): for each image a text that follows its placeholders.
        token (`str`): the placeholder.
        each (`int`): placeholders of one image.
    """
    if len(prompt.pieces) == len(prompt.images) == 1 and token not in prompt.pieces[0]:
        return words[prompt.images[0]] + prompt.pieces[0], []
    places = sum(piece.count(token) for piece in prompt.pieces)
    if places != len(prompt.images):
        raise ValueError(f"a text has {places} {token} for {len(prompt.images)} images; one for each image is needed")
    images = iter(prompt.images)
    text, marks = "", []
    for index, piece in enumerate(prompt.pieces):
        start, *parts = piece.split(token)
        text += (token if index else "") + start
        marks += [True] * bool(index)
        for part in parts:
            text += token * each + words[next(images)] + part
            marks += [False] * each
    return text, marks


def take_marks_out(row: Row, marks: list[bool], token_id: int) -> Row:
    """
    The row without its marks, and with `learned`: 1 between the first mark and the second, the third and the fourth, …

    Raises:
        ValueError: if placeholders of the text did not become tokens.
    """
    places = [place for place, number in enumerate(row["input_ids"]) if number == token_id]
    if len(places) != len(marks):
        raise ValueError(f"{len(places)} of {len(marks)} placeholders in a text became tokens; was it cut?")
    is_mark = dict(zip(places, marks))
    row = {**row, "learned": []}
    is_learned = False
    for place in range(len(row["input_ids"])):
        is_learned ^= is_mark.get(place, False)
        row["learned"].append(int(is_learned and place not in is_mark))
    kept = [place for place in range(len(row["learned"])) if not is_mark.get(place, False)]
    return {name: [values[place] for place in kept] for name, values in row.items()}


def pad_rows(
    rows: Sequence[Row],
    pad_token_id: int,
    on_right: bool,
    padding: bool | str | None = True,
    pad_to_multiple_of: int | None = None,
    max_length: int | None = None,
) -> dict[str, list[list[int]]]:
    """Rows of one length, as a tokenizer pads them."""
    length = max(len(row["input_ids"]) for row in rows)
    if padding == "max_length":
        length = max(length, max_length or 0)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    data: dict[str, list[list[int]]] = {name: [] for name in rows[0]}
    for row in rows:
        for name, values in row.items():
            missing = 0 if padding in (False, None, "do_not_pad") else length - len(values)
            filling = [pad_token_id if name == "input_ids" else PADDING.get(name, 0)] * missing
            data[name].append(values + filling if on_right else filling + values)
    return data
