"""Checks of inputs. Each error names the input, the problem and what is accepted."""

import json
from typing import Any


MAX_DEPTH = 16  # levels of nested lists and objects; the page sends 8
JSON_KINDS = {
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list",
}


class Refused(ValueError):
    """An input cannot be used. The message is for the visitor."""


def kind_of(value: Any) -> str:
    """Returns the kind of a value as messages call it: "a number"."""
    return JSON_KINDS.get(type(value), type(value).__name__)


def as_text(value: Any, name: str, max_letters: int) -> str:
    """
    Returns the value if it is a text. `name` is the name of the input in messages.

    Raises:
        Refused: if it is not a text, is longer than `max_letters`, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise Refused(f"{name}: a text is needed, not {kind_of(value)}.")
    if len(value) > max_letters:
        raise Refused(f"{name}: this is too long ({len(value)} letters); the limit is {max_letters}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise Refused(f"{name}: U+{code:04X} is half a character (a lone surrogate).") from None
    return value


def as_number(value: Any) -> float:
    """
    Returns the value if it is a finite number. JSON can also contain `NaN` and `1e999`.

    Raises:
        ValueError: if it is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError
    return value


def parse_json(content: str | bytes) -> Any:
    """
    Parses JSON.

    Raises:
        ValueError: if the content is not JSON, or is nested deeper than the parser can read.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_too_deep(value: Any, max_depth: int = MAX_DEPTH) -> bool:
    """Returns whether lists and objects are nested more than `max_depth` levels deep. It does not recurse."""
    level = [value]
    for _ in range(max_depth + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True
