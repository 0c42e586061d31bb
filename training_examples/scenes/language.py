"""
Writes questions with answers, and captions, from the facts of [`describe`].

The answer of every question follows from the image: each object in it is unique, and relations hold by the margins of
facts.py. Answers cannot be guessed from questions, since the answer is drawn first, and then a question for it. Where
this does not balance the answers, `KEPT` leaves out some of the too frequent questions.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .facts import (
    farthest_from_camera,
    is_in_front,
    is_left,
    is_nearer,
    nearest_to_camera,
    nearest_to_sign,
)
from .scene import COLORS, HELD_OUT, MATERIALS, SHAPES, SIZES
from .words import WORDS


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COUNTS = ("0", "1", "2", "3", "4")
TYPES = ("color", "shape", "material", "size", "count", "relation", "nearest", "sign", "yes/no")
CAPTIONS = 5
MAX_GROUPS = 7  # kinds of objects that a caption lists

# Share of questions to keep, by form and answer. It balances answers that are not equally frequent.
KEPT: dict[tuple[str, str], float] = {
    **{(f"count {kind}", "0"): 0.5 for kind in ("shape", "color", "size and shape")},
    **{(f"count {kind}", "1"): 0.52 for kind in ("shape", "color", "size and shape")},
    ("count size and shape", "1"): 0.48,
    ("count material", "1"): 0.75,
    ("count material", "2"): 0.85,
    ("same color", "no"): 0.75,
    ("size", "small"): 0.92,
    ("sign in front", "in front"): 0.74,
    ("sign left", "left"): 0.9,
}

Facts = dict[str, Any]


# ---- naming objects ----


def plural(shape: str) -> str:
    return shape + "s"


def phrase(thing: dict, attributes: tuple[str, ...] = ("color",), noun: str | None = None) -> str:
    """The words for an object without an article, such as `large shiny red ball`."""
    words = [thing[name] for name in ("size", "material", "color") if name in attributes]
    return " ".join([*words, noun or thing["shape"]])


def article(words: str) -> str:
    return ("an " if words[0] in "aeio" else "a ") + words


CHOICES = (
    ("shape",),
    ("color", "shape"),
    ("color",),
    ("size", "shape"),
    ("material", "shape"),
    ("size", "color", "shape"),
    ("material", "color", "shape"),
    ("size", "color"),
    ("material", "color"),
)


def descriptions(thing: dict, objects: list[dict], without: str | None = None) -> list[dict[str, str]]:
    """
    Attributes that fit this object alone, without the attribute `without`. Three attributes are used only if fewer
    are not enough.
    """
    found: list[dict[str, str]] = []
    for attributes in CHOICES:
        if without in attributes or (len(attributes) == 3 and any(len(shorter) < 3 for shorter in found)):
            continue
        if all(other is thing or any(other[name] != thing[name] for name in attributes) for other in objects):
            found.append({name: thing[name] for name in attributes})
    return found


def names_of(thing: dict, objects: list[dict], without: str | None = None) -> list[str]:
    """Names for the descriptions of [`descriptions`]: `the cone`, `the red cone`, `the shiny object`."""
    found = descriptions(thing, objects, without)
    return ["the " + phrase(each, tuple(each), each.get("shape", "object")) for each in found]


# ---- questions ----


class _Asker:
    """Draws the questions about one scene. Each form of question is a method."""

    def __init__(self, facts: Facts, random: np.random.Generator, held_out: bool):
        self.facts, self.random, self.held_out = facts, random, held_out
        self.objects = facts["objects"]
        self.signs = facts["signs"]

    def pick(self, choices: list | tuple) -> Any:
        return choices[self.random.integers(len(choices))]

    def coin(self) -> bool:
        return bool(self.random.random() < 0.5)

    def name(self, thing: dict, without: str | None = None) -> str | None:
        names = names_of(thing, self.objects, without)
        return self.pick(names) if names else None

    def shuffled(self, items: list) -> list:
        return [items[k] for k in self.random.permutation(len(items))]

    def pairs(self, holds: Callable[[dict, dict], bool]) -> Iterator[tuple[str, str, dict, dict]]:
        """Pairs of objects for which `holds` is true, in random order: their names, and the objects."""
        pairs = [(a, b) for a in self.objects for b in self.objects if a is not b and holds(a, b)]
        for one, other in self.shuffled(pairs):
            first, second = self.name(one), self.name(other)
            if first and second:
                yield first, second, one, other

    def by_answer(self, form: str, choices: dict[str, list[str]], answers: tuple[str, ...], tries: int):
        """Draws an answer, then one of its `choices`. If the answer has none, draws another, `tries` times in all."""
        for answer in self.shuffled(list(answers))[:tries]:
            if choices.get(answer) and self.random.random() < KEPT.get((form, answer), 1.0):
                return self.pick(choices[answer]), answer
        return None

    # Each method below returns (question, answer), or None.

    def attribute(self, name: str, answers: tuple[str, ...], templates: tuple[str, ...], tries: int):
        choices: dict[str, list[str]] = {}
        for thing in self.objects:
            if name == "shape" and thing["visible_share"] < 0.7:
                continue
            called = self.name(thing, without=name)
            if called:
                choices.setdefault(thing[name], []).append(self.pick(templates).format(called))
        return self.by_answer(name, choices, answers, tries)

    def color(self):
        return self.attribute("color", COLORS, ("What color is {}?", "What is the color of {}?"), 4)

    def shape(self):
        return self.attribute("shape", SHAPES, ("What shape is {}?", "What is the shape of {}?"), 3)

    def material(self):
        templates = ("Is {} matte, shiny or striped?", "What does the surface of {} look like?")
        return self.attribute("material", MATERIALS, templates, 1)

    def size(self):
        return self.attribute("size", SIZES, ("Is {} small or large?", "What size is {}?"), 1)

    def count(self):
        kind = self.pick(("shape", "color", "material", "size and shape"))
        choices: dict[str, list[str]] = {}
        if kind == "shape":
            groups = [((shape,), plural(shape)) for shape in SHAPES]
            count = {key: sum(o["shape"] == key[0] for o in self.objects) for key, _ in groups}
        elif kind == "color":
            groups = [((color,), f"{color} objects") for color in COLORS]
            count = {key: sum(o["color"] == key[0] for o in self.objects) for key, _ in groups}
        elif kind == "material":
            groups = [((material,), f"{material} objects") for material in MATERIALS]
            count = {key: sum(o["material"] == key[0] for o in self.objects) for key, _ in groups}
        else:
            groups = [((size, shape), f"{size} {plural(shape)}") for size in SIZES for shape in SHAPES]
            count = {key: sum((o["size"], o["shape"]) == key for o in self.objects) for key, _ in groups}
        for key, words in groups:
            template = self.pick(("How many {} are there?", "How many {} can you see?"))
            choices.setdefault(str(count[key]), []).append(template.format(words))
        return self.by_answer(f"count {kind}", choices, COUNTS, 1)

    def side(self):
        for first, second, _, _ in self.pairs(is_left):
            if self.coin():
                return f"Is {first} left or right of {second}?", "left"
            return f"Is {second} left or right of {first}?", "right"

    def before(self):
        for first, second, _, _ in self.pairs(is_in_front):
            if self.coin():
                return f"Is {first} in front of or behind {second}?", "in front"
            return f"Is {second} in front of or behind {first}?", "behind"

    def side_of_sign(self):
        if len(self.signs) == 1:
            return self._to_sign(is_left, "left or right of", ("left", "right"))

    def before_sign(self):
        if len(self.signs) == 1 and not self.signs[0]["on_wall"]:
            return self._to_sign(is_in_front, "in front of or behind", ("in front", "behind"))

    def _to_sign(self, holds, words: str, answers: tuple[str, str]):
        choices: dict[str, list[str]] = {}
        for thing in self.objects:
            called = self.name(thing)
            if called and holds(thing, self.signs[0]):
                choices.setdefault(answers[0], []).append(f"Is {called} {words} the sign?")
            elif called and holds(self.signs[0], thing):
                choices.setdefault(answers[1], []).append(f"Is {called} {words} the sign?")
        return self.by_answer(f"sign {answers[0]}", choices, answers, 1)

    def extreme(self):
        """Asks for the object nearest to the camera or to the sign, or farthest from the camera."""
        posts = [sign for sign in self.signs if not sign["on_wall"]]
        ways = [
            ("nearest to the camera", nearest_to_camera(self.objects)),
            ("farthest from the camera", farthest_from_camera(self.objects)),
        ]
        if len(self.signs) == 1:
            ways += [("nearest to the sign", nearest_to_sign(self.objects, self.signs[0]))] * 2
        where, thing = self.pick(ways)
        if thing is None:
            return None
        # the sign must not be the nearest or farthest thing
        if where.startswith("nearest to the camera") and any(sign["distance"] < thing["distance"] for sign in posts):
            return None
        if where.startswith("farthest") and any(sign["distance"] > thing["distance"] for sign in posts):
            return None
        name = self.pick(("color", "shape"))
        form = f"{where} {name}"
        if self.random.random() < KEPT.get((form, thing[name]), 1.0):
            return f"What {name} is the object {where}?", thing[name]

    def nearer(self):
        def fits(one, other):
            return is_nearer(one, other) and one["shape"] != other["shape"]

        for first, second, one, _ in self.pairs(fits):
            if "object" in first or "object" in second:
                continue
            first, second = (first, second) if self.coin() else (second, first)
            return f"Which is nearer to the camera, {first} or {second}?", one["shape"]

    def word(self):
        if len(self.signs) == 1:
            question = self.pick(("What does the sign say?", "What word is on the sign?"))
            return question, self.signs[0]["word"]
        if len(self.signs) == 2:
            one, other = self.signs
            if is_left(one, other) or is_left(other, one):
                left, right = (one, other) if is_left(one, other) else (other, one)
                side, sign = self.pick((("left", left), ("right", right)))
                return f"What does the {side} sign say?", sign["word"]

    def says(self):
        if len(self.signs) == 1:
            word = self.signs[0]["word"]
            if self.coin():
                return f"Does the sign say {word}?", "yes"
            return f"Does the sign say {self.pick([other for other in WORDS if other != word])}?", "no"

    def exists(self):
        """Asks whether an object exists. If not, its color and its shape exist, but on different objects."""
        present = {(thing["color"], thing["shape"]) for thing in self.objects}
        if self.coin():
            color, shape = self.pick(sorted(present))
            answer = "yes"
        else:
            colors, shapes = ({pair[k] for pair in present} for k in (0, 1))
            absent = [
                (color, shape)
                for color in sorted(colors)
                for shape in sorted(shapes)
                if (color, shape) not in present and (self.held_out or (color, shape) not in HELD_OUT)
            ]
            if not absent:
                return None
            (color, shape), answer = self.pick(absent), "no"
        if self.random.random() < KEPT.get(("exists", answer), 1.0):
            return f"Is there {article(f'{color} {shape}')}?", answer

    def side_or_not(self):
        for first, second, _, _ in self.pairs(is_left):
            word, (first, second) = self.pick((("left", (first, second)), ("right", (second, first))))
            if self.coin():
                return f"Is {first} {word} of {second}?", "yes"
            return f"Is {second} {word} of {first}?", "no"

    def before_or_not(self):
        for first, second, _, _ in self.pairs(is_in_front):
            word, (first, second) = self.pick((("in front of", (first, second)), ("behind", (second, first))))
            if self.coin():
                return f"Is {first} {word} {second}?", "yes"
            return f"Is {second} {word} {first}?", "no"

    def nearer_or_not(self):
        for first, second, _, _ in self.pairs(is_nearer):
            if self.coin():
                return f"Is {first} nearer to the camera than {second}?", "yes"
            return f"Is {second} nearer to the camera than {first}?", "no"

    def larger_or_not(self):
        pairs = [(a, b) for a in self.objects for b in self.objects if a["size"] == "large" and b["size"] == "small"]
        for one, other in self.shuffled(pairs):
            first, second = self.name(one, without="size"), self.name(other, without="size")
            if first and second:
                if self.coin():
                    return f"Is {first} larger than {second}?", "yes"
                return f"Is {second} larger than {first}?", "no"

    def more_or_not(self):
        counts = {shape: sum(thing["shape"] == shape for thing in self.objects) for shape in SHAPES}
        pairs = [(a, b) for a in SHAPES for b in SHAPES if counts[a] > counts[b] > 0]
        if pairs:
            many, few = (plural(shape) for shape in self.pick(pairs))
            if self.coin():
                return f"Are there more {many} than {few}?", "yes"
            return f"Are there more {few} than {many}?", "no"

    def same_color(self):
        same = self.coin()
        pairs = [(a, b) for a in self.objects for b in self.objects if a is not b]
        for one, other in self.shuffled([(a, b) for a, b in pairs if (a["color"] == b["color"]) == same]):
            first, second = self.name(one, without="color"), self.name(other, without="color")
            if first and second:
                answer = "yes" if same else "no"
                if self.random.random() < KEPT.get(("same color", answer), 1.0):
                    return f"Are {first} and {second} the same color?", answer
                return None


# The forms of questions: method, type, number of draws.
FORMS: tuple[tuple[str, str, int], ...] = (
    ("color", "color", 2),
    ("shape", "shape", 1),
    ("material", "material", 2),
    ("size", "size", 2),
    ("count", "count", 5),
    ("side", "relation", 1),
    ("before", "relation", 1),
    ("side_of_sign", "relation", 1),
    ("before_sign", "relation", 1),
    ("extreme", "nearest", 3),
    ("nearer", "nearest", 1),
    ("word", "sign", 1),
    ("says", "yes/no", 1),
    ("exists", "yes/no", 1),
    ("side_or_not", "yes/no", 1),
    ("before_or_not", "yes/no", 1),
    ("nearer_or_not", "yes/no", 1),
    ("larger_or_not", "yes/no", 1),
    ("more_or_not", "yes/no", 1),
    ("same_color", "yes/no", 1),
)


def ask(facts: Facts, random: np.random.Generator, held_out: bool = False) -> list[dict[str, str]]:
    """
    Draws the questions about a scene.

    Args:
        facts (`dict`): the facts of the scene, from [`describe`].
        random (`np.random.Generator`): the source of random numbers.
        held_out (`bool`, *optional*, defaults to `False`): whether questions may name pairs of `HELD_OUT`.

    Returns:
        `list[dict]` with `question`, `answer` and `type` (one of `TYPES`), without duplicates.
    """
    asker = _Asker(facts, random, held_out)
    questions: dict[str, dict[str, str]] = {}
    for form, kind, number in FORMS:
        for _ in range(number):
            found = getattr(asker, form)()
            if found is not None and found[0] not in questions:
                questions[found[0]] = {"question": found[0], "answer": found[1], "type": kind}
    return list(questions.values())


# ---- captions ----


def captions_of(facts: Facts) -> list[str]:
    """Five captions in lower case, to continue "a picture of": the objects, their places, and the word on the sign."""
    objects = sorted(facts["objects"], key=lambda thing: thing["center"][0])
    signs, place = facts["signs"], facts["place"]
    where = "on a table" if place == "table" else "in a room"
    groups = _groups(objects)
    return [
        f"{_listed(groups if len(groups) <= MAX_GROUPS else _shape_counts(objects))} {where}",
        f"a {place} with {_number_of_objects(objects)} and {_sign_words(signs)}",
        _front_caption(objects, where),
        _sign_caption(objects, signs, place),
        f"{article(phrase(objects[0], ('material', 'color')))} on the left and "
        f"{article(phrase(objects[-1], ('material', 'color')))} on the right",
    ]


def _number_of_objects(objects: list[dict]) -> str:
    return f"{NUMBERS[len(objects)]} objects"


def _groups(objects: list[dict]) -> list[str]:
    """Groups objects by color and shape, from left to right: `a red ball`, `two blue cubes`."""
    counts: dict[tuple[str, str], int] = {}
    for thing in objects:
        pair = (thing["color"], thing["shape"])
        counts[pair] = counts.get(pair, 0) + 1
    return [
        article(f"{color} {shape}") if count == 1 else f"{NUMBERS[count]} {color} {plural(shape)}"
        for (color, shape), count in counts.items()
    ]


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _sign_words(signs: list[dict]) -> str:
    if not signs:
        return "no sign"
    if len(signs) == 1:
        return f"a sign that says {signs[0]['word']}"
    words = [sign["word"] for sign in sorted(signs, key=lambda sign: sign["center"][0])]
    return f"{NUMBERS[len(words)]} signs that say {_listed(words)}"


def _front_caption(objects: list[dict], where: str) -> str:
    """The largest object that is in front of another, and the largest object behind it."""
    by_area = sorted(objects, key=lambda thing: -thing["visible_pixels"])
    for one in by_area:
        for other in by_area:
            if one is not other and is_in_front(one, other):
                words = (article(phrase(each, ("size", "material", "color"))) for each in (one, other))
                return " in front of ".join(words)
    return f"{article(phrase(by_area[0], ('size', 'material', 'color')))} {where}"


def _sign_caption(objects: list[dict], signs: list[dict], place: str) -> str:
    if not signs:
        return f"a {place} with {_listed(_shape_counts(objects))}"
    sign = signs[0]
    near = nearest_to_sign(objects, sign)
    said = f"a sign that says {sign['word']}"
    if near is not None:
        return f"{said} next to {article(phrase(near))}"
    if sign["on_wall"]:
        return f"{said} on the wall behind {_number_of_objects(objects)}"
    return f"{said} among {_number_of_objects(objects)}"


def _shape_counts(objects: list[dict]) -> list[str]:
    counts: dict[str, int] = {}
    for thing in objects:
        counts[thing["shape"]] = counts.get(thing["shape"], 0) + 1
    return [article(shape) if count == 1 else f"{NUMBERS[count]} {plural(shape)}" for shape, count in counts.items()]


_MENTION = re.compile(
    rf"(?:\b(?P<size>{'|'.join(SIZES)}) )?(?:\b(?P<material>{'|'.join(MATERIALS)}) )?"
    rf"(?:\b(?P<color>{'|'.join(COLORS)}) )?\b(?P<shape>{'|'.join(SHAPES)})s?\b"
)


def mentions(caption: str) -> dict[str, list]:
    """
    Parses the claims of a caption, to check whether they are true.

    Returns:
        `dict` with `objects`, a dict for each named object with its `shape` and, if named, `size`, `material` and
        `color`; and `words`, the words on signs.
    """
    caption = caption.lower()
    found = [
        {name: value for name, value in match.groupdict().items() if value} for match in _MENTION.finditer(caption)
    ]
    words = re.findall(r"\bsays (\w+)", caption)
    words += [
        word
        for listed in re.findall(r"\bsay ((?:\w+, )*\w+ and \w+)", caption)
        for word in re.split(", | and ", listed)
    ]
    return {"objects": found, "words": words}


def true_share(caption: str, facts: Facts) -> tuple[int, int]:
    """The number of true claims of a caption, and of all its claims. Each named object and each word is a claim."""
    claims = mentions(caption)
    right = sum(
        any(all(thing[name] == value for name, value in claim.items()) for thing in facts["objects"])
        for claim in claims["objects"]
    )
    right += sum(word in {sign["word"] for sign in facts["signs"]} for word in claims["words"])
    return right, len(claims["objects"]) + len(claims["words"])
