"""The true labels of a scene, in the same form as the predictions of the package's experts."""

from typing import Any

import numpy as np

from modeling_prismer.processing.experts.detection import paint_boxes
from modeling_prismer.processing.experts.text import paint

from .render import CLASSES, View


DETECTION_CLASSES = ("ball", "cube", "cylinder", "cone", "ring", "pyramid", "sign")
EXPERTS = ("depth", "normal", "segmentation", "edge", "detection", "ocr")


def true_labels(view: View, image: np.ndarray, facts: dict[str, Any]) -> dict[str, Any]:
    """
    Args:
        view (`View`): the view of the scene.
        image (`np.ndarray` of shape `(height, width, 3)`, uint8): the image of the scene.
        facts (`dict`): the result of [`describe`].

    Returns:
        `dict`, the labels by expert. Maps are uint8 and have the size of the image:

        - `depth`: inverse depth, from 0 at the farthest to 255 at the nearest point of the image.
        - `normal`: (n + 1) / 2 of the components to the right, up and towards the camera.
        - `segmentation`: indices of `CLASSES`.
        - `edge`: dark lines on white, where depth, object, direction or color changes suddenly.
        - `detection`: boxes of objects and signs, painted as in [`ObjectDetector`]. `classes` are indices of
          `DETECTION_CLASSES`; `boxes` has (left, top, right, bottom) of each instance.
        - `ocr`: `ids` of the words, from top to bottom, and `words` in lower case. There are no features.
    """
    depth = depth_label(view)
    seen = [
        *((each["shape"], each["box"]) for each in facts["objects"]),
        *(("sign", s["box"]) for s in facts["signs"]),
    ]
    boxes = np.array([box for _, box in seen], np.float64).reshape(-1, 4)
    size = (image.shape[1], image.shape[0])
    # almost equal scores, so that no instance is left out
    ids, rows = paint_boxes(boxes, np.linspace(1, 0.9, len(boxes)), size, depth, max_overlap=1.0)
    signs = sorted(facts["signs"], key=lambda sign: sign["corners"][0][1])
    return {
        "depth": depth,
        "normal": np.clip((view.normal + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8),
        "segmentation": np.array([CLASSES.index(part.label) for part in view.parts], np.uint8)[view.part],
        "edge": edge_label(view, image),
        "detection": {
            "ids": ids,
            "classes": [DETECTION_CLASSES.index(seen[row][0]) for row in rows],
            "boxes": [list(map(int, boxes[row])) for row in rows],
        },
        "ocr": {
            "ids": paint([np.array(sign["corners"]) for sign in signs], size),
            "words": [sign["word"] for sign in signs],
        },
    }


def depth_label(view: View) -> np.ndarray:
    inverse = 1 / view.depth
    low, high = inverse.min(), inverse.max()
    return ((inverse - low) / max(high - low, 1e-12) * 255 + 0.5).astype(np.uint8)


def edge_label(view: View, image: np.ndarray) -> np.ndarray:
    """Lines about two pixels wide. Outlines are darkest, then folds, then patterns."""
    inverse = (view.depth.min() / view.depth).astype(np.float32)  # linear in the image on any plane
    colors = image.astype(np.float32) / 255
    strength = np.zeros(view.depth.shape, np.float32)
    for axis in (0, 1):
        first, second = _neighbors(view.part, axis)
        outline = (first != second) & (_labels(view)[first] != _labels(view)[second])
        first, second = _neighbors(view.normal, axis)
        fold = 0.8 * _ramp(1 - (first * second).sum(-1), 0.06, 0.4)
        # how far the inverse depth is from a plane through its neighbors
        bend = np.zeros_like(inverse)
        inner, before, after = ((slice(None),) * axis + (slice(*ends),) for ends in ((1, -1), (None, -2), (2, None)))
        bend[inner] = np.abs(inverse[before] + inverse[after] - 2 * inverse[inner])
        jump = _ramp(np.maximum(*_neighbors(bend, axis)), 0.02, 0.06)
        first, second = _neighbors(colors, axis)
        pattern = 0.65 * _ramp(np.abs(first - second).max(-1), 0.07, 0.35)
        found = np.maximum.reduce([outline.astype(np.float32), fold, jump, pattern])
        for place in (slice(None, -1), slice(1, None)):
            at = (slice(None),) * axis + (place,)
            strength[at] = np.maximum(strength[at], found)
    strength = _smoothed(_smoothed(strength, 0), 1)
    low, high = strength.min(), strength.max()
    return 255 - (255 * (strength - low) / max(high - low, 1e-12)).astype(np.uint8)


def _labels(view: View) -> np.ndarray:
    """A number for each part; equal for parts of one thing, such as the top and the legs of a table."""
    names = [(part.label, part.thing, part.sign) for part in view.parts]
    return np.array([names.index(name) for name in names])


def _neighbors(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    before, after = [slice(None)] * 2, [slice(None)] * 2
    before[axis], after[axis] = slice(None, -1), slice(1, None)
    return values[tuple(before)], values[tuple(after)]


def _ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values - low) / (high - low), 0, 1)


def _smoothed(values: np.ndarray, axis: int) -> np.ndarray:
    padded = np.pad(values, [(1, 1) if each == axis else (0, 0) for each in (0, 1)], mode="edge")
    parts = [np.take(padded, range(start, start + values.shape[axis]), axis) for start in range(3)]
    return 0.2 * parts[0] + 0.6 * parts[1] + 0.2 * parts[2]
