"""
Writes predictions as the evaluation servers take them.

| server | function | fields of a row |
| --- | --- | --- |
| COCO captions, https://cocodataset.org/#format-results | write_caption_results | image_id, caption |
| NoCaps, https://nocaps.org | write_caption_results | image_id, caption |
| VQAv2, https://visualqa.org/evaluation.html | write_vqa_results | question_id, answer |

`image_id` is the image's `id` in the published list, not its file name. A server scores a whole split. With
`expected_ids`, an error reports a missing image or question before you upload the file.
"""

import json
import operator
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_caption_results(
    path: str | os.PathLike,
    image_ids: Sequence[int | str],
    captions: Sequence[str],
    expected_ids: Iterable[int | str] | None = None,
) -> Path:
    """
    Writes captions for the COCO and NoCaps servers: `[{"image_id": 42, "caption": "a dog"}, ...]`.

    Args:
        path: The file to write. Its folder is made if it does not exist. An existing file is replaced.
        image_ids: The numbers of the images, each once. Strings are accepted for your own data. A string such as "42"
            is written as a number, because the servers take numbers only.
        captions: One caption for each image.
        expected_ids: All images of the split. With it, a missing or an unknown image is an error.

    Returns:
        The path.

    Raises:
        ValueError: if the lengths differ, an id occurs twice, or the ids differ from the expected ones.
        TypeError: if an id is neither an integer nor a string, or a caption is not a string.
    """
    return _write(path, "image_id", image_ids, "caption", captions, expected_ids)


def write_vqa_results(
    path: str | os.PathLike,
    question_ids: Sequence[int | str],
    answers: Sequence[str],
    expected_ids: Iterable[int | str] | None = None,
) -> Path:
    """
    Writes answers for the VQAv2 server: `[{"question_id": 42000, "answer": "yes"}, ...]`.

    Args:
        path: The file to write. Its folder is made if it does not exist. An existing file is replaced.
        question_ids: The numbers of the questions, each once. Strings as in `write_caption_results`.
        answers: One answer for each question.
        expected_ids: All questions of the split. With it, a missing or an unknown question is an error.

    Returns:
        The path.

    Raises:
        ValueError: if the lengths differ, an id occurs twice, or the ids differ from the expected ones.
        TypeError: if an id is neither an integer nor a string, or an answer is not a string.
    """
    return _write(path, "question_id", question_ids, "answer", answers, expected_ids)


def _write(path, id_name, ids, text_name, texts, expected_ids) -> Path:
    if len(ids) != len(texts):
        raise ValueError(f"There are {len(ids)} {id_name}s and {len(texts)} {text_name}s; the numbers must be equal")
    ids = [_plain_id(value, id_name) for value in ids]
    repeated = [value for value, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"Each {id_name} must occur once; {len(repeated)} occur more often: {_some(repeated)}")
    if expected_ids is not None:
        expected = dict.fromkeys(_plain_id(value, id_name) for value in expected_ids)
        given = dict.fromkeys(ids)
        missing = [value for value in expected if value not in given]
        foreign = [value for value in given if value not in expected]
        if missing or foreign:
            raise ValueError(
                f"The {id_name}s differ from expected_ids: {len(missing)} are missing{_some(missing, ': ')}, "
                f"{len(foreign)} do not belong{_some(foreign, ': ')}"
            )
    for value, text in zip(ids, texts):
        if not isinstance(text, str):
            raise TypeError(f"The {text_name} of {id_name} {value} is {text!r}; it must be a str")

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # an own name, because several processes may write at once
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump([{id_name: value, text_name: text} for value, text in zip(ids, texts)], file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _plain_id(value, id_name: str) -> int | str:
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and str(int(value)) == value else value
    if isinstance(value, bool):
        raise TypeError(f"{id_name} is {value!r}; it must be an integer or a str")
    try:
        return operator.index(value)  # also integers of NumPy, and integer tensors with one element
    except TypeError:
        raise TypeError(f"{id_name} is {value!r}; it must be an integer or a str") from None


def _some(values: list, before: str = "") -> str:
    if not values:
        return ""
    return before + ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
