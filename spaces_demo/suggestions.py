"""
Questions and labels that fit an image: those of an example, or those about what the experts found. The templates are
in examples.json. A click on the image selects an object in the same way.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import edits
import numpy as np
import torch
from reader import Reader
from torchvision.ops import box_iou

from modeling_prismer.expert_spec import BACKGROUND, ExpertSpec
from modeling_prismer.processing.expert_labels import label_parts
from modeling_prismer.processing.experts import look_of


MAX_QUESTIONS = 4
SAME_OBJECT = 0.5  # boxes of one class with a larger IoU show the same object
Box = Sequence[float]  # left, top, right, bottom, between 0 and 1


@dataclass
class Example:
    file: Path
    alt: str
    questions: list[str]


@dataclass
class Examples:
    """
    The content of an examples.json: images, and templates of questions.

    `about` has templates by the name of an object, and for other objects: `"one"` if an image shows one of them, and
    `"several"`. `always` are questions that fit every image. `classify` has question and labels of the tab Classify.
    """

    images: dict[str, Example] = field(default_factory=dict)
    about: dict[str, list[str]] = field(default_factory=dict)
    always: list[str] = field(default_factory=list)
    classify: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, name: str = "") -> "Examples":
        """Reads the examples of a folder, or of its sub-folder with the name of the checkpoint."""
        own = folder / name
        folder = own if name and (own / "examples.json").is_file() else folder
        content = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
        images = {
            file: Example(folder / file, entry["alt"], entry["questions"]) for file, entry in content["images"].items()
        }
        return cls(images, content["about"], content["always"], content["classify"])

    def questions_about(self, name: str, number: int) -> list[str]:
        """Questions about an object that `number` objects of the image have the name of."""
        templates = self.about.get(name) or self.about.get("one" if number == 1 else "several", [])
        return [template.format(object=name) for template in templates]

    def questions(self, source: str | None, things: Sequence["Thing"]) -> list[str]:
        """Questions that fit an image: an example's own, or one about each kind of object."""
        if source in self.images:
            return self.images[source].questions
        counts = Counter(thing.name for thing in things)
        order = sorted(counts, key=lambda name: (name not in self.about, counts[name]))
        questions = [question for name in order for question in self.questions_about(name, counts[name])[:1]]
        return [*questions, *self.always][:MAX_QUESTIONS]

    def classification(self, things: Sequence["Thing"]) -> dict[str, str]:
        """`{"question", "labels"}` that fit an image, or an empty dict."""
        counts = Counter(thing.name for thing in things)
        single = next((name for name, number in counts.items() if number == 1 and name not in self.about), None)
        if single is not None and "one" in self.classify:
            chosen = self.classify["one"]
            return {**chosen, "question": chosen["question"].format(object=single)}
        return self.classify.get("always", {})


# ---- what the experts found ----


@dataclass(frozen=True)
class Thing:
    """An object that an expert found: the name of its class, and its box."""

    name: str
    box: Box


def find_things(reader: Reader, labels: Mapping[str, Any]) -> list[Thing]:
    """The objects that the experts found and can name. Boxes on the same object count once."""
    things: list[Thing] = []
    for name, spec in reader.specs.items():
        if not spec.instances or labels.get(name) is None:
            continue
        names = reader.class_names(name)
        for found in edits.boxes_of(labels[name]):
            thing = Thing(names[found["class"]], found["box"])
            is_named = thing.name != f"class {found['class']}"
            if is_named and not any(
                other.name == thing.name and _iou(other.box, thing.box) > SAME_OBJECT for other in things
            ):
                things.append(thing)
    return things


def thing_at(things: Sequence[Thing], x: float, y: float) -> Thing | None:
    """The smallest object whose box contains a place, or `None`."""
    there = [each for each in things if each.box[0] <= x <= each.box[2] and each.box[1] <= y <= each.box[3]]
    return min(there, key=lambda each: _area(each.box), default=None)


def words_at(reader: Reader, labels: Mapping[str, Any], x: float, y: float) -> list[tuple[str, str]]:
    """Describes a place in words: pairs of an expert's title and its words. Normals, edges and vectors have none."""
    said = []
    for name, spec in reader.specs.items():
        if labels.get(name) is None:
            continue
        parts = label_parts(labels[name], is_dense=not spec.is_label)
        values = np.asarray(parts["ids" if spec.is_label else "values"])
        row, column = (min(int(place * side), side - 1) for place, side in zip((y, x), values.shape))
        words = _words(reader, spec, parts, values[row, column])
        if words:
            said.append((reader.title(name), words))
    return said


def _words(reader: Reader, spec: ExpertSpec, parts: Mapping[str, Any], value: Any) -> str:
    if not spec.is_label:
        look = look_of(spec.name)
        if spec.is_features or spec.channels > 1 or look.is_grey:
            return ""
        return f"{int(np.max(value)) / 2.55:.0f} % of the way from {look.ends[0]} to {look.ends[1]}"
    if value == BACKGROUND:
        return ""
    if "words" in parts:
        return f"“{parts['words'][value]}”"
    return reader.class_names(spec.name)[parts["classes"][value] if spec.instances else value]


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _iou(one: Box, other: Box) -> float:
    return box_iou(torch.tensor([list(one)]), torch.tensor([list(other)])).item()
