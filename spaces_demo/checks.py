"""What visitors send, checked: each error names the input, what is wrong with it and what is accepted."""

import json
from typing import Any


MAX_DEPTH = 16  # of nested lists and objects; the page itself sends 8
JSON_KINDS = {
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list",
}


class Refused(ValueError):
    """What a visitor gave cannot be used; the message is for them."""


def kind_of(value: Any) -> str:
    """What a value is called in messages."""
    return JSON_KINDS.get(type(value), type(value).__name__)


def as_text(value: Any, name: str, max_letters: int) -> str:
    """
    The value itself, which is the text of the input called `name`.

    Raises:
        Refused: if it is no text, is longer than `max_letters`, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise Refused(f"{name}: a text is needed, not {kind_of(value)}.")
    if len(value) > max_letters:
        raise Refused(f"{name}: this is too long ({len(value)} letters); up to {max_letters} are read.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise Refused(f"{name}: U+{code:04X} is half a character. Please send whole ones.") from None
    return value


def as_number(value: Any) -> float:
    """
    Raises:
        ValueError: if it is no finite number; JSON has `NaN` and `1e999`, too.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError
    return value


def parse_json(content: str | bytes) -> Any:
    """
    Raises:
        ValueError: if it is no JSON, or its lists and objects are nested deeper than the parser goes.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_too_deep(value: Any, max_depth: int = MAX_DEPTH) -> bool:
    """Whether lists and objects lie in each other more than `max_depth` deep. Does not recurse itself."""
    level = [value]
    for _ in range(max_depth + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True
