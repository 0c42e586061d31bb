"""Reads the texts in the cells of a data set without changing them."""

import re
from typing import Any

from datasets import ClassLabel

from .faults import BadRecord, checked


IS_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}").fullmatch  # 007 is not a number


def named(value: Any, feature: Any) -> Any:
    """Replaces class numbers by class names, at any depth of the value."""
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        return feature.names[value] if 0 <= value < len(feature.names) else None
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: named(inner, feature.get(name)) for name, inner in value.items()}
    inner_feature = getattr(feature, "feature", None)
    if inner_feature is not None and isinstance(value, list):
        return [named(inner, inner_feature) for inner in value]
    return value


def as_text(value: Any) -> str:
    """A value as text, as in the data: `true` rather than `True`."""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    return str(value).lower() if isinstance(value, bool) else str(value)


def texts_of(value: Any, role: str) -> list[str]:
    """The texts in "a cat", ["a cat", "a pet"], [{"raw": "a cat"}] (Karpathy) or [{"answer": "yes"}] (VQAv2)."""

    def inner(value: Any) -> Any:
        if isinstance(value, dict) and not {"answer", "raw"} & value.keys():
            raise BadRecord(f"the {role} is an object with {', '.join(value) or 'nothing'}; accepted are texts")
        return value.get("answer", value.get("raw")) if isinstance(value, dict) else value

    value = inner(value)
    texts = [inner(text) for text in value] if isinstance(value, list) else [value]
    texts = ["" if text is None else as_text(text) for text in texts]
    if not texts or not all(text.strip() for text in texts):
        raise BadRecord(f"the {role} is empty" if len(texts) < 2 else f"one of the {len(texts)} {role}s is empty")
    return [checked(text, role) for text in texts]


def one_text_of(value: Any, role: str) -> str:
    texts = texts_of(value, role)
    if len(texts) > 1:
        raise BadRecord(f"the cell has {len(texts)} texts for the {role}; accepted is one per row")
    return texts[0]
