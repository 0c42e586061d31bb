"""
Questions as small programs that compute the answer from the facts of a scene.

A program is a list: the name of an operation, then its inputs, which are programs, texts or attributes. It is plain
JSON. "What color is the cube left of the ball?" is

    ball = ["unique", ["filter", {"shape": "ball"}, ["objects"]]]
    program = ["query", "color", ["filter", {"shape": "cube"}, ["related", "left", ball, ["objects"]]]]
    Reader(facts).read(program)  # "red", or "none" without such a cube
"""

from collections.abc import Callable
from typing import Any

from .facts import MARGIN_SIDE, farthest_from_camera, is_in_front, is_left, is_nearer, nearest_to_camera


RELATIONS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}
NONE = "none"  # the answer if the object in question does not exist


class Unclear(ValueError):
    """The facts do not determine the answer."""


class Reader:
    """
    Runs programs on the facts of one scene.

    Args:
        facts (`dict`):
            `objects`, `signs` and `marked` (the index of the marked object), see [`describe`]. Relations need
            `center`, `depth` and `distance` of each object; with margins also `position`.
        margins (`bool`, *optional*, defaults to `True`):
            Whether a relation that holds by less than the margins of facts.py is unclear.
    """

    def __init__(self, facts: dict[str, Any], margins: bool = True):
        self.facts, self.margins = facts, margins

    def read(self, program: list) -> Any:
        """
        Runs a program.

        Raises:
            Unclear: The facts do not determine the answer.
            ValueError: The program has an unknown operation.
        """
        operation, *inputs = program
        if operation not in OPERATIONS:
            raise ValueError(f"there is no operation {operation!r}; there are {', '.join(OPERATIONS)}")
        values = (self.read(each) if isinstance(each, list) else each for each in inputs)
        return OPERATIONS[operation](self, *values)

    # ---- sets of objects ----

    def objects(self) -> list[dict]:
        return self.facts["objects"]

    def signs(self) -> list[dict]:
        return self.facts["signs"]

    def filter(self, attributes: dict[str, str], things: list[dict]) -> list[dict]:
        return [thing for thing in things if _has(thing, attributes)]

    def without(self, attributes: dict[str, str], things: list[dict]) -> list[dict]:
        return [thing for thing in things if not _has(thing, attributes)]

    def related(self, relation: str, reference: dict, things: list[dict]) -> list[dict]:
        return [thing for thing in things if thing is not reference and self.stands(relation, thing, reference)]

    def same(self, attribute: str, reference: dict, things: list[dict]) -> list[dict]:
        return [thing for thing in things if thing is not reference and thing[attribute] == reference[attribute]]

    def set_of(self, thing: dict) -> list[dict]:
        return [thing]

    # ---- one object ----

    def unique(self, things: list[dict]) -> dict:
        if len(things) != 1:
            raise Unclear(f"{len(things)} objects fit")
        return things[0]

    def marked(self) -> dict:
        if self.facts.get("marked") is None:
            raise Unclear("no object is marked")
        return self.facts["objects"][self.facts["marked"]]

    def first(self, order: str, things: list[dict]) -> dict:
        """The nearest, farthest, leftmost or rightmost thing."""
        if not self.margins:
            return min(things, key=ORDERS[order][1]) if things else self.unique([])
        found = ORDERS[order][0](things)
        if found is None:
            raise Unclear(f"no thing is clearly the {order} one")
        return found

    # ---- answers ----

    def query(self, attribute: str, things: list[dict]) -> str:
        return self.unique(things)[attribute] if things else NONE

    def count(self, things: list[dict]) -> str:
        return str(len(things))

    def exists(self, things: list[dict]) -> str:
        return _yes(bool(things))

    def more(self, things: list[dict], others: list[dict]) -> str:
        return _yes(len(things) > len(others))

    def equal(self, attribute: str, one: dict, other: dict) -> str:
        return _yes(one[attribute] == other[attribute])

    def larger(self, one: dict, other: dict) -> str:
        if one["size"] == other["size"]:
            raise Unclear("both have the same size")
        return _yes(one["size"] == "large")

    def holds(self, relation: str, one: dict, other: dict) -> str:
        return _yes(self.stands(relation, one, other))

    def choose(self, relation: str, opposite: str, one: dict, other: dict) -> str:
        """The relation that holds, of two opposite ones."""
        answer = relation if self.stands(relation, one, other) else opposite
        return "in front" if answer == "front" else answer

    def word(self, sign: dict) -> str:
        return sign["word"]

    def stands(self, relation: str, one: dict, other: dict) -> bool:
        holds, place = HOLDS[relation]
        if not self.margins:
            return place(one) < place(other)
        if one.get("on_wall") or other.get("on_wall"):
            if relation in ("front", "behind", "nearer"):
                raise Unclear("a sign on the wall is behind everything")
        if not holds(one, other) and not holds(other, one):
            raise Unclear(f"neither is clearly {relation} of the other")
        return holds(one, other)


HOLDS: dict[str, tuple[Callable[[dict, dict], bool], Callable[[dict], float]]] = {
    "left": (is_left, lambda thing: thing["center"][0]),
    "right": (lambda one, other: is_left(other, one), lambda thing: -thing["center"][0]),
    "front": (is_in_front, lambda thing: thing["depth"]),
    "behind": (lambda one, other: is_in_front(other, one), lambda thing: -thing["depth"]),
    "nearer": (is_nearer, lambda thing: thing["distance"]),
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: getattr(Reader, name)
    for name in (
        *("objects", "signs", "filter", "without", "related", "same", "set_of", "unique", "marked", "first"),
        *("query", "count", "exists", "more", "equal", "larger", "holds", "choose", "word"),
    )
}


def _outermost(things: list[dict], side: int) -> dict | None:
    found = sorted(things, key=lambda thing: side * thing["center"][0])
    if not found:
        return None
    return found[0] if len(found) == 1 or abs(found[0]["center"][0] - found[1]["center"][0]) > MARGIN_SIDE else None


ORDERS: dict[str, tuple[Callable[[list[dict]], dict | None], Callable[[dict], float]]] = {
    "nearest": (nearest_to_camera, lambda thing: thing["distance"]),
    "farthest": (farthest_from_camera, lambda thing: -thing["distance"]),
    "leftmost": (lambda things: _outermost(things, 1), lambda thing: thing["center"][0]),
    "rightmost": (lambda things: _outermost(things, -1), lambda thing: -thing["center"][0]),
}


def _has(thing: dict, attributes: dict[str, str]) -> bool:
    return all(thing[name] == value for name, value in attributes.items())


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
