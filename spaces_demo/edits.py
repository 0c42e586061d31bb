"""A visitor's changes to the map of an expert: noise, paint, moved boxes, other words."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from checks import Refused, as_number, as_text
from PIL import Image, ImageDraw

from modeling_prismer import ExpertSpec
from modeling_prismer.expert_spec import BACKGROUND
from modeling_prismer.processing.expert_labels import label_parts
from modeling_prismer.processing.experts import quantized


MAX_STROKES, MAX_POINTS, MAX_BOXES, MAX_LETTERS = 400, 20_000, 60, 40
MAX_PAINTED = 200.0  # times the area of the map; many wide strokes take long to draw
NOT_EDITED = "edit: {} is a grid of vectors, which cannot be edited."
MAX_WORD_LETTERS = 1000  # accepted; the letters beyond MAX_LETTERS are cut


def tool_for(spec: ExpertSpec) -> str:
    """
    How an expert's map is edited: `"paint"`, `"boxes"` (objects with classes) or `"words"`; `"none"` for a grid of
    vectors, which have no meaning of their own.
    """
    if spec.is_features:
        return "none"
    return {(): "paint", ("classes",): "boxes"}.get(spec.label_parts, "words")


# ---- labels as boxes ----


def boxes_of(label: Any) -> list[dict[str, Any]]:
    """Objects or words as `{"box": [left, top, right, bottom] from 0 to 1, "class": int or "text": str}`."""
    if label is None:
        return []
    ids = np.asarray(label["ids"])
    height, width = ids.shape
    names = ("class", label["classes"]) if "classes" in label else ("text", label.get("words", []))
    found = []
    for number, name in enumerate(names[1]):
        rows, columns = np.nonzero(ids == number)
        if len(rows):
            box = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
            found.append({"box": [round(float(side), 4) for side in box], names[0]: name})
    return found


# ---- noise ----


def noise(spec: ExpertSpec, size: tuple[int, int], encode_words: Callable, seed: int = 0) -> Any:
    """A random label of the expert's form, of `size` (width, height)."""
    random = np.random.default_rng(seed)
    width, height = size
    tool = tool_for(spec)
    if tool == "none":
        return quantized(random.standard_normal((12, 12, spec.channels)), spec.channels)
    if tool == "paint":
        channels, highest = (spec.channels, 256) if spec.is_dense else (1, spec.num_classes)
        # squares that remain when the map is reduced to the size that the network reads
        coarse = random.integers(0, highest, (24, 24, channels), dtype=np.uint8)
        rows, columns = (np.arange(length) * 24 // length for length in (height, width))
        values = coarse[rows][:, columns]
        values = values[..., 0] if channels == 1 else values
        return values if spec.is_dense else {"ids": values}
    boxes = []
    for _ in range(6):
        left, top = random.uniform(0, 0.8, 2)
        box = [left, top, left + random.uniform(0.1, 0.4), top + random.uniform(0.08, 0.3)]
        letters = "".join(chr(97 + letter) for letter in random.integers(0, 26, 5))
        named = {"class": int(random.integers(spec.num_classes))} if tool == "boxes" else {"text": letters}
        boxes.append({"box": [min(1.0, float(side)) for side in box], **named})
    return paint_items(boxes, tool, size, encode_words)


# ---- edits ----


def check_edit(edit: Any, spec: ExpertSpec) -> dict[str, list]:
    """
    Checks an edit that the page or a link has sent: `{"strokes": …}` or `{"boxes": …}`.

    Raises:
        Refused: if it has another form, or is too long.
    """
    tool = tool_for(spec)
    if tool == "none":
        raise Refused(NOT_EDITED.format(spec.name))
    try:
        if tool == "paint":
            return {"strokes": _check_strokes(edit, spec)}
        return {"boxes": _check_boxes(edit, tool, spec.num_classes or BACKGROUND)}
    except Refused:
        raise
    except (KeyError, TypeError, ValueError, OverflowError):
        needed = {
            "paint": "strokes, each with a value of the map, a width and points",
            "boxes": "boxes, each with a box of four numbers and a class of this expert",
            "words": "boxes, each with a box of four numbers and a text",
        }
        raise Refused(f"edit: this change to {spec.name} cannot be read; it needs {needed[tool]}.") from None


def _check_strokes(edit: Any, spec: ExpertSpec) -> list[dict[str, Any]]:
    strokes, painted = [], 0.0
    for stroke in edit["strokes"]:
        value = stroke["value"]
        if isinstance(value, list) != (spec.is_dense and spec.channels > 1):
            raise ValueError
        if isinstance(value, list) and len(value) != spec.channels:
            raise ValueError
        value = [_as_value(part) for part in value] if isinstance(value, list) else _as_value(value)
        if spec.num_classes is not None and value >= spec.num_classes and value != BACKGROUND:
            raise ValueError
        points = [[_share(x), _share(y)] for x, y in stroke["points"]]
        width = min(0.5, max(0.004, as_number(stroke["width"])))
        strokes.append({"value": value, "width": width, "points": points})
        painted += width * (width + sum(math.dist(*pair) for pair in pairwise(points)))
    num_points = sum(len(stroke["points"]) for stroke in strokes)
    if len(strokes) > MAX_STROKES or num_points > MAX_POINTS or painted > MAX_PAINTED:
        raise Refused("edit: this is too much paint. Please undo some of it.")
    return [stroke for stroke in strokes if stroke["points"]]


def _check_boxes(edit: Any, tool: str, num_classes: int) -> list[dict[str, Any]]:
    boxes = []
    for item in edit["boxes"]:
        left, top, right, bottom = (_share(side) for side in item["box"])
        box: dict[str, Any] = {"box": [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]}
        if tool == "boxes":
            box["class"] = int(as_number(item["class"]))
            if not 0 <= box["class"] < num_classes:
                raise ValueError
        else:
            box["text"] = as_text(item["text"], "word", MAX_WORD_LETTERS).strip()[:MAX_LETTERS]
        boxes.append(box)
    if len(boxes) > MAX_BOXES:
        raise Refused(f"edit: the limit is {MAX_BOXES} boxes. Please remove some.")
    return boxes


def _as_value(number: Any) -> int:
    return int(as_number(number)) % 256


def apply_edit(
    label: Any, edit: Mapping[str, list], spec: ExpertSpec, size: tuple[int, int], encode_words: Callable
) -> Any:
    """The label, `None` if there was none, with the visitor's changes; of the image's `size` (width, height)."""
    if "boxes" in edit:
        return paint_items(edit["boxes"], tool_for(spec), size, encode_words)
    if label is None:
        channels = (spec.channels,) if spec.is_dense and spec.channels > 1 else ()
        values = np.full((size[1], size[0], *channels), 0 if spec.is_dense else BACKGROUND, np.uint8)
    else:
        values = np.array(label_parts(label, spec.is_dense)["values" if spec.is_dense else "ids"])
    flat = values if values.ndim == 3 else values[..., None]
    layers = [Image.fromarray(np.ascontiguousarray(flat[..., channel])) for channel in range(flat.shape[2])]
    for stroke in edit["strokes"]:
        parts = stroke["value"] if isinstance(stroke["value"], list) else [stroke["value"]] * len(layers)
        for layer, value in zip(layers, parts):
            _draw_stroke(layer, stroke["points"], stroke["width"], value)
    painted = np.stack([np.asarray(layer) for layer in layers], axis=-1)
    painted = painted if values.ndim == 3 else painted[..., 0]
    return painted if spec.is_dense else {"ids": painted}


def paint_items(
    boxes: Sequence[Mapping[str, Any]], tool: str, size: tuple[int, int], encode_words: Callable
) -> dict[str, Any]:
    """Boxes as the label of an expert for objects or words, with small boxes over large ones."""
    width, height = size
    boxes = [box for box in boxes if tool == "boxes" or box["text"]]
    ids = np.full((height, width), BACKGROUND, np.uint8)
    sides = [
        (round(left * width), round(top * height), round(right * width), round(bottom * height))
        for left, top, right, bottom in (box["box"] for box in boxes)
    ]
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in sides]
    for number in sorted(range(len(boxes)), key=lambda number: -areas[number]):
        left, top, right, bottom = sides[number]
        ids[top : max(bottom, top + 1), left : max(right, left + 1)] = number
    if tool == "boxes":
        return {"ids": ids, "classes": [box["class"] for box in boxes]}
    words = [box["text"] for box in boxes]
    return {"ids": ids, "words": words, "features": encode_words(words)}


def _draw_stroke(layer: Image.Image, points: Sequence, share: float, value: int) -> None:
    draw = ImageDraw.Draw(layer)
    radius = max(1.0, share * max(layer.size) / 2)
    placed = [(x * layer.width, y * layer.height) for x, y in points]
    draw.line(placed, fill=value, width=round(2 * radius), joint="curve")
    for x, y in (placed[0], placed[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value)


def _share(number: Any) -> float:
    return round(min(1.0, max(0.0, float(as_number(number)))), 4)
