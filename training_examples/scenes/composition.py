"""
Questions of Scenes 2: comparisons, two steps, negation, absent and marked objects, and several signs.

Each question is a program (programs.py), so its answer follows from the facts and can be checked on any other facts,
such as those that the experts' labels tell. As in language.py, the answer is drawn first, and then a question for it.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .language import Facts, article, descriptions, phrase, plural
from .programs import NONE, RELATIONS, Reader, Unclear
from .scene import COLORS, HELD_OUT, MATERIALS, SHAPES, SIZES
from .words import WORDS


VALUES = {"color": COLORS, "shape": SHAPES, "material": MATERIALS, "size": SIZES}
COUNTS = tuple(map(str, range(10)))
YES_NO = ("yes", "no")
TYPES = (
    *("color", "shape", "material", "size", "count", "relation", "two steps", "same", "not", "absent", "marked"),
    *("nearest", "sign", "yes/no"),
)
OBJECTS = ["objects"]

Candidate = tuple[str, list]  # a question and its program


# ---- words ----


def noun(attributes: dict[str, str], many: bool = False) -> str:
    """`small red ball`, `shiny object`; with `many`, `small red balls`."""
    word = attributes.get("shape", "object")
    return phrase(attributes, tuple(attributes), plural(word) if many else word)


def the(attributes: dict[str, str]) -> str:
    return "the " + noun(attributes)


def only(attributes: dict[str, str]) -> list:
    """The program for the one object with these attributes."""
    return ["unique", ["filter", attributes, OBJECTS]]


# ---- questions ----


class _Composer:
    """Draws questions about one scene. Each form is a method that yields candidates in random order."""

    def __init__(self, facts: Facts, random: np.random.Generator, held_out: bool):
        self.random, self.held_out = random, held_out
        self.reader = Reader(facts)
        self.things, self.signs = facts["objects"], facts["signs"]

    def pick(self, choices: Any) -> Any:
        return choices[self.random.integers(len(choices))]

    def shuffled(self, items: Any) -> list:
        items = list(items)
        return [items[k] for k in self.random.permutation(len(items))]

    def description(self, thing: dict, without: str | None = None) -> dict[str, str] | None:
        """Attributes that fit this object alone."""
        found = descriptions(thing, self.things, without)
        return self.pick(found) if found else None

    def described(self, without: str | None = None) -> Iterator[tuple[dict, dict[str, str]]]:
        for thing in self.shuffled(self.things):
            attributes = self.description(thing, without)
            if attributes is not None:
                yield thing, attributes

    def pairs(self, without: str | None = None) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
        named = list(self.described(without))
        yield from self.shuffled([(a, b) for one, a in named for other, b in named if one is not other])

    def absent(self, without: str | None = None) -> Iterator[dict[str, str]]:
        """Descriptions that differ from one of an object in a single attribute, and fit nothing."""
        for _, attributes in self.described(without):
            name = self.pick(list(attributes))
            changed = {**attributes, name: self.pick(VALUES[name])}
            if not self.reader.filter(changed, self.things):
                yield changed

    # ---- forms ----

    def attribute(self, name: str) -> Iterator[Candidate]:
        for _, attributes in self.described(without=name):
            text = self.pick((f"What {name} is {{}}?", f"What is the {name} of {{}}?"))
            yield text.format(the(attributes)), ["query", name, ["filter", attributes, OBJECTS]]

    def color(self) -> Iterator[Candidate]:
        return self.attribute("color")

    def shape(self) -> Iterator[Candidate]:
        return self.attribute("shape")

    def material(self) -> Iterator[Candidate]:
        for text, program in self.attribute("material"):
            name = the(program[2][1])
            yield self.pick((text, f"Is {name} matte, shiny or striped?")), program

    def size(self) -> Iterator[Candidate]:
        for text, program in self.attribute("size"):
            yield self.pick((text, f"Is {the(program[2][1])} small or large?")), program

    def maybe(self) -> Iterator[Candidate]:
        """As the four forms above; half of the objects do not exist."""
        name = self.pick(list(VALUES))
        there = [attributes for _, attributes in self.described(without=name)]
        for attributes in [*there, *self.absent(without=name)]:
            yield f"What {name} is {the(attributes)}?", ["query", name, ["filter", attributes, OBJECTS]]

    def there(self) -> Iterator[Candidate]:
        for _, attributes in self.described():
            yield f"Is there {article(noun(attributes))}?", ["exists", ["filter", attributes, OBJECTS]]
        for attributes in self.absent():
            yield f"Is there {article(noun(attributes))}?", ["exists", ["filter", attributes, OBJECTS]]

    def count(self) -> Iterator[Candidate]:
        names = self.pick(
            ((), ("shape",), ("color",), ("material",), ("size",), ("size", "shape"), ("color", "shape"))
        )
        groups = [{}]
        for name in names:
            groups = [{**group, name: value} for group in groups for value in VALUES[name]]
        template = self.pick(("How many {} are there?", "How many {} can you see?"))
        for group in self.shuffled(groups):
            yield template.format(noun(group, many=True)), ["count", ["filter", group, OBJECTS]]

    def count_without(self) -> Iterator[Candidate]:
        for name in self.shuffled(("color", "material")):
            for value in self.shuffled(VALUES[name]):
                for shape in ({}, {"shape": self.pick(SHAPES)}):
                    program = ["count", ["without", {name: value}, ["filter", shape, OBJECTS]]]
                    yield f"How many {noun(shape, many=True)} are not {value}?", program

    def count_related(self) -> Iterator[Candidate]:
        for relation in self.shuffled(RELATIONS):
            for _, attributes in self.described():
                group = self.pick(({}, {}, {"shape": self.pick(SHAPES)}, {"color": self.pick(COLORS)}))
                program = ["related", relation, only(attributes), ["filter", group, OBJECTS]]
                text = f"How many {noun(group, many=True)} are {RELATIONS[relation]} {the(attributes)}?"
                yield text, ["count", program]

    def count_same(self) -> Iterator[Candidate]:
        for name in self.shuffled(("color", "shape", "material")):
            for _, attributes in self.described(without=name):
                text = f"How many other objects have the same {name} as {the(attributes)}?"
                yield text, ["count", ["same", name, only(attributes), OBJECTS]]

    def choose(self) -> Iterator[Candidate]:
        pairs = (("left", "right", "left or right of"), ("front", "behind", "in front of or behind"))
        relation, opposite, words = self.pick(pairs)
        for one, other in self.pairs():
            program = ["choose", relation, opposite, only(one), only(other)]
            yield f"Is {the(one)} {words} {the(other)}?", program
        if len(self.signs) == 1:
            for _, one in self.described():
                program = ["choose", relation, opposite, only(one), ["unique", ["signs"]]]
                yield f"Is {the(one)} {words} the sign?", program

    def two_steps(self) -> Iterator[Candidate]:
        """Asks for an object by its relation to another."""
        name = self.pick(list(VALUES))
        groups = [{}, *({own: value} for own in ("shape", "color") if own != name for value in VALUES[own])]
        for relation in self.shuffled(RELATIONS):
            for _, reference in self.described():
                for group in self.shuffled(groups):
                    found = ["filter", group, ["related", relation, only(reference), OBJECTS]]
                    text = f"What {name} is the {noun(group)} {RELATIONS[relation]} {the(reference)}?"
                    yield text, ["query", name, found]

    def same(self) -> Iterator[Candidate]:
        """Asks for the other object with the same color, shape or material."""
        name, asked = self.shuffled(("color", "shape", "material"))[:2]
        for _, reference in self.described(without=name):
            text = f"What {asked} is the other object with the same {name} as {the(reference)}?"
            yield text, ["query", asked, ["same", name, only(reference), OBJECTS]]

    def not_this(self) -> Iterator[Candidate]:
        """Asks for the object that lacks an attribute."""
        name = self.pick(list(VALUES))
        lacking = self.pick([own for own in ("color", "material", "size") if own != name])
        for shape in self.shuffled(({}, *({"shape": value} for value in SHAPES))):
            if name == "shape" and shape:
                continue
            for value in self.shuffled(VALUES[lacking]):
                found = ["without", {lacking: value}, ["filter", shape, OBJECTS]]
                if self.reader.filter({**shape, lacking: value}, self.things):  # else the name alone is enough
                    yield f"What {name} is the {noun(shape)} that is not {value}?", ["query", name, found]

    def there_without(self) -> Iterator[Candidate]:
        for name in self.shuffled(("color", "material", "size")):
            for shape in self.shuffled(SHAPES):
                for value in self.shuffled(VALUES[name]):
                    found = ["without", {name: value}, ["filter", {"shape": shape}, OBJECTS]]
                    if self.reader.filter({"shape": shape, name: value}, self.things):
                        yield f"Is there {article(shape)} that is not {value}?", ["exists", found]

    def marked(self) -> Iterator[Candidate]:
        way = self.pick(("query", "query", "query", "count", "choose", "equal"))
        if way == "query":
            name = self.pick(list(VALUES))
            yield f"What {name} is the marked object?", ["query", name, ["set_of", ["marked"]]]
        elif way == "count":
            name = self.pick(("color", "shape", "material"))
            text = f"How many other objects have the same {name} as the marked object?"
            yield text, ["count", ["same", name, ["marked"], OBJECTS]]
        for thing, one in self.described():
            if way == "choose" and thing is not self.reader.marked():
                relation, opposite = self.pick((("left", "right"), ("front", "behind")))
                words = "left or right of" if relation == "left" else "in front of or behind"
                program = ["choose", relation, opposite, ["marked"], only(one)]
                yield f"Is the marked object {words} {the(one)}?", program
            elif way == "equal" and thing is not self.reader.marked():
                name = self.pick(("color", "shape", "material"))
                if name not in one:
                    text = f"Does the marked object have the same {name} as {the(one)}?"
                    yield text, ["equal", name, ["marked"], only(one)]

    def outermost(self) -> Iterator[Candidate]:
        orders = {"nearest": "nearest to the camera", "farthest": "farthest from the camera"}
        orders |= {"leftmost": "farthest to the left", "rightmost": "farthest to the right"}
        name = self.pick(("color", "shape", "material", "size"))
        for order in self.shuffled(orders):
            for group in self.shuffled(({}, *({"shape": value} for value in SHAPES if name != "shape"))):
                if group and len(self.reader.filter(group, self.things)) < 2:
                    continue
                found = ["first", order, ["filter", group, OBJECTS]]
                text = f"What {name} is the {noun(group)} {orders[order]}?"
                yield text, ["query", name, ["set_of", found]]

    def word(self) -> Iterator[Candidate]:
        signs = ["signs"]
        if len(self.signs) == 1:
            yield self.pick(("What does the sign say?", "What word is on the sign?")), ["word", ["unique", signs]]
        elif self.signs:
            for side in ("left", "right"):
                text = f"What does the {side if len(self.signs) == 2 else side + 'most'} sign say?"
                yield text, ["word", ["first", f"{side}most", signs]]
            yield "What does the sign nearest to the camera say?", ["word", ["first", "nearest", signs]]

    def says(self) -> Iterator[Candidate]:
        words = [sign["word"] for sign in self.signs]
        others = [word for word in WORDS if word not in words]
        for word in [*words, *(self.pick(others) for _ in words)]:
            text = f"Does the sign say {word}?" if len(words) == 1 else f"Does a sign say {word}?"
            yield text, ["exists", ["filter", {"word": word}, ["signs"]]]

    def number_of_signs(self) -> Iterator[Candidate]:
        yield "How many signs are there?", ["count", ["signs"]]

    def holds(self) -> Iterator[Candidate]:
        relation = self.pick(list(RELATIONS))
        for one, other in self.pairs():
            yield f"Is {the(one)} {RELATIONS[relation]} {the(other)}?", ["holds", relation, only(one), only(other)]

    def nearer(self) -> Iterator[Candidate]:
        for one, other in self.pairs():
            yield f"Is {the(one)} nearer to the camera than {the(other)}?", ["holds", "nearer", only(one), only(other)]

    def larger(self) -> Iterator[Candidate]:
        for one, other in self.pairs(without="size"):
            yield f"Is {the(one)} larger than {the(other)}?", ["larger", only(one), only(other)]

    def more(self) -> Iterator[Candidate]:
        name = self.pick(("shape", "color", "material"))
        for one in self.shuffled(VALUES[name]):
            for other in self.shuffled(VALUES[name]):
                groups = [self.reader.filter({name: value}, self.things) for value in (one, other)]
                if one != other and all(groups) and len(groups[0]) != len(groups[1]):
                    sets = [["filter", {name: value}, OBJECTS] for value in (one, other)]
                    words = [noun({name: value}, many=True) for value in (one, other)]
                    yield f"Are there more {words[0]} than {words[1]}?", ["more", *sets]

    def equal(self) -> Iterator[Candidate]:
        name = self.pick(("color", "shape", "material"))
        for one, other in self.pairs(without=name):
            yield f"Do {the(one)} and {the(other)} have the same {name}?", ["equal", name, only(one), only(other)]


# ---- drawing ----

# method, type, number of draws, answers, and how many answers are tried before the draw is given up
FORMS: tuple[tuple[str, str, int, tuple[str, ...], int], ...] = (
    ("color", "color", 2, COLORS, 4),
    ("shape", "shape", 1, SHAPES, 3),
    ("material", "material", 1, MATERIALS, 2),
    ("size", "size", 1, SIZES, 1),
    ("count", "count", 4, COUNTS, 10),
    ("count_related", "count", 1, COUNTS, 10),
    ("count_same", "same", 1, COUNTS, 10),
    ("count_without", "not", 1, COUNTS, 10),
    ("choose", "relation", 2, ("left", "right", "in front", "behind"), 2),
    ("two_steps", "two steps", 3, (*COLORS, *SHAPES, *MATERIALS, *SIZES), 8),
    ("same", "same", 1, (*COLORS, *SHAPES, *MATERIALS), 9),
    ("not_this", "not", 1, (*COLORS, *SHAPES, *MATERIALS, *SIZES), 12),
    ("there_without", "not", 1, YES_NO, 1),
    ("maybe", "absent", 2, (), 1),
    ("marked", "marked", 3, (), 1),
    ("outermost", "nearest", 2, (*COLORS, *SHAPES, *MATERIALS, *SIZES), 4),
    ("word", "sign", 1, (), 1),
    ("number_of_signs", "sign", 1, (), 1),
    ("says", "yes/no", 1, YES_NO, 1),
    ("there", "yes/no", 1, YES_NO, 1),
    ("holds", "yes/no", 1, YES_NO, 1),
    ("nearer", "yes/no", 1, YES_NO, 1),
    ("larger", "yes/no", 1, YES_NO, 1),
    ("more", "yes/no", 1, YES_NO, 1),
    ("equal", "yes/no", 1, YES_NO, 1),
)
# Share of questions to keep, by form and answer. It balances answers that are not equally frequent.
KEPT: dict[tuple[str, str], float] = {
    **{("count", answer): share for answer, share in zip("01234", (0.06, 0.06, 0.1, 0.25, 0.6))},
    **{
        (form, answer): share
        for form in ("count_related", "count_same")
        for answer, share in zip("012", (0.2, 0.2, 0.4))
    },
    **{("number_of_signs", answer): share for answer, share in zip("012", (0.25, 0.15, 0.6))},
    ("size", "small"): 0.75,
}
ENOUGH = 60  # candidates of a form that are read


def ask(facts: Facts, random: np.random.Generator, held_out: bool = False) -> list[dict[str, str]]:
    """
    Draws the questions about a scene.

    Args:
        facts (`dict`): the facts of the scene, from [`describe`], with `marked`, the index of the marked object.
        random (`np.random.Generator`): the source of random numbers.
        held_out (`bool`, *optional*, defaults to `False`): whether questions may name pairs of `HELD_OUT`.

    Returns:
        `list[dict]` with `question`, `answer`, `type` (one of `TYPES`) and `program` (JSON), without duplicates.
    """
    composer = _Composer(facts, random, held_out)
    questions: dict[str, dict[str, str]] = {}
    for form, kind, number, answers, tries in FORMS:
        for _ in range(number):
            found = _draw(composer, form, answers, tries)
            if found is not None and found[0] not in questions:
                text, answer, program = found
                row = {"question": text, "answer": answer, "type": kind, "program": json.dumps(program)}
                questions[text] = row
    return list(questions.values())


def _draw(composer: _Composer, form: str, answers: tuple[str, ...], tries: int) -> tuple[str, str, list] | None:
    """Draws an answer, then a question with this answer. Without `answers`, draws among those that there are."""
    choices: dict[str, list[Candidate]] = {}
    candidates: Callable[[], Iterator[Candidate]] = getattr(composer, form)
    for number, (text, program) in enumerate(candidates()):
        if number == ENOUGH:
            break
        if not composer.held_out and names_held_out(program):
            continue
        try:
            answer = composer.reader.read(program)
        except Unclear:
            continue
        if answer != NONE or form == "maybe":
            choices.setdefault(answer, []).append((text, program))
    for answer in composer.shuffled(answers or choices)[:tries]:
        if choices.get(answer) and composer.random.random() < KEPT.get((form, answer), 1.0):
            text, program = composer.pick(choices[answer])
            return text, answer, program
    return None


def names_held_out(program: list) -> bool:
    """Whether a program names a pair of color and shape of `HELD_OUT`."""
    return any(
        (each.get("color"), each.get("shape")) in HELD_OUT if isinstance(each, dict) else names_held_out(each)
        for each in program
        if isinstance(each, dict | list)
    )
