"""
Reads conversations with images, from JSON or JSON lines: LLaVA's files, and files with `messages`.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", …}]}
    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", …}]}
"""

import os
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from ..chat import IMAGE_MARKER, as_text, read_messages
from .faults import BadRecord, Faults, MissingFile, place_of_record
from .images import fault_of, find_file, image_in, is_there, place_of
from .lists import columns_in, read_list


FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Value("string")),
        "image_ids": List(Value("string")),
    }
)


def is_chat_file(path: Any) -> bool:
    """Whether a file is a list of conversations, by its first record."""
    path = Path(str(path))
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return False
    return any(column in ("messages", "conversations") for column in columns_in(path))


def load_chats(
    path: str | Path,
    image_folder: str | Path | None = None,
    max_rows: int | None = None,
    bad_rows: str = "error",
    check_images: bool = True,
) -> Dataset:
    """
    Loads conversations for training.

    Args:
        path (`str` or `Path`): a `.json` file with a list, or a `.jsonl` file.
        image_folder (`str` or `Path`, *optional*): what paths of images are relative to; the file's folder by default.
        max_rows (`int`, *optional*): the largest number of rows.
        bad_rows (`str`, *optional*, defaults to `"error"`): `"error"` or `"skip"`; see [`load_rows`].
        check_images (`bool`, *optional*, defaults to `True`): whether to open each image.

    Returns:
        `Dataset` with

        - `messages`: `[{"role": …, "content": …}]`, in which `<image>` stands for an image;
        - `images`: the paths or URLs of the images in their order, and `image_ids`, their keys in a label store.

    Raises:
        FileNotFoundError: Images are missing and nothing else is wrong.
        ValueError: The file cannot be read, or conversations cannot be used.
    """
    path = Path(path)
    root = os.path.abspath(image_folder or path.parent)
    rows: list[dict[str, Any]] = []
    faults = Faults(os.fspath(path), 0)
    opened: dict[str, BadRecord | None] = {}
    for number, record in enumerate(islice(read_list(path, root), max_rows), 1):
        faults.total = number
        try:
            if isinstance(record, BadRecord):
                raise record
            rows.append(_row(record, root, opened if check_images else None))
        except BadRecord as problem:
            faults.add(place_of_record(path.name, number, path.name), problem)
    faults.report(skip=bad_rows == "skip")
    if not rows:
        raise ValueError(f"{path} has no conversations")
    return Dataset.from_list(rows, features=FEATURES)


def _row(record: dict[str, Any], root: str, opened: dict[str, BadRecord | None] | None) -> dict[str, Any]:
    images = record.get("images", record.get("image"))
    given = [] if images in (None, "") else images if isinstance(images, list) else [images]
    try:
        messages, images = read_messages(record.get("messages") or record.get("conversations") or [], given or None)
        messages = as_text(messages, IMAGE_MARKER, lambda text: text.replace(IMAGE_MARKER, "< image>"))
    except (ValueError, TypeError, AttributeError) as error:
        raise BadRecord(str(error)) from error
    if not any(message["role"] == "assistant" and message.get("content") for message in messages):
        raise BadRecord("the conversation has no turn of the assistant, which is what is learned")
    places = [_place(image, root, opened) for image in images]
    return {
        "messages": [{"role": message["role"], "content": message.get("content") or ""} for message in messages],
        "images": [file for file, _ in places],
        "image_ids": [name for _, name in places],
    }


def _place(image: Any, root: str, opened: dict[str, BadRecord | None] | None) -> tuple[str, str]:
    """The path or URL of an image, and its key in a label store."""
    cell = image_in(image)
    if not isinstance(cell, str):
        raise BadRecord("the image is in the file itself; a path or URL is needed")
    file, name = place_of(cell, root)
    if not is_there(file):
        file = find_file(file, root) or file
    problem: BadRecord | None
    if opened is None:
        problem = None if is_there(file) else MissingFile(f"image {file} is missing or empty")
    elif file in opened:
        problem = opened[file]
    else:
        problem = opened[file] = fault_of(file)
    if problem is not None:
        raise problem
    return file, name
