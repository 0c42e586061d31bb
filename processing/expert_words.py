"""Experts in words: objects, regions and text of an image, as a language model reads them. Saved with a processor."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .expert_labels import BACKGROUND, ExpertFields, read_ids, read_items


POSITIONS = ("names", "boxes")
TITLES = {"detection": "Objects", "segmentation": "Regions", "ocr": "Text"}
LONGEST_SIDE = 1024  # pixels; a larger map is read at every n-th pixel
MOST_BOXES = 4  # of one class
LEAST_SHARE = 0.005  # of the image; smaller regions are left out

_COLUMNS = ("left", "", "right")
_ROWS = ("top", "", "bottom")


class Item(NamedTuple):
    """A part of an expert's sentence that is written whole or not at all."""

    text: str
    area: float  # share of the image, 0 to 1: the larger, the more important
    place: int  # in the sentence


class Area(NamedTuple):
    """Where the pixels of one id are. All numbers are shares of the image's sides, 0 to 1."""

    area: float
    left: float
    top: float
    right: float
    bottom: float

    @property
    def name(self) -> str:
        """One of nine names, from `"top left"` to `"bottom right"`."""
        column = _COLUMNS[min(2, int(3 * (self.left + self.right) / 2))]
        row = _ROWS[min(2, int(3 * (self.top + self.bottom) / 2))]
        return " ".join(filter(None, (row, column))) or "center"

    @property
    def box(self) -> str:
        """`"[left, top, right, bottom]"` in percent."""
        return f"[{', '.join(str(round(100 * value)) for value in self[1:])}]"


def can_be_written(label: Any, expert: ExpertFields, class_names: Sequence[str] | None) -> bool:
    """Whether a label has words: those that were read, or the names of the expert's classes. Dense maps have none."""
    if expert.is_dense:
        return False
    return bool(class_names) if expert.num_classes else isinstance(label, Mapping) and label.get("words") is not None


def write_experts(
    labels: Mapping[str, Any],
    experts: Sequence[ExpertFields],
    class_names: Mapping[str, Sequence[str]],
    max_tokens: int,
    count_tokens: Callable[[str], int],
    positions: str = "names",
    clean: Callable[[str], str] = str,
) -> str:
    """
    Writes the experts' labels of one image as text: one sentence for each expert that can be verbalised.

    A detector gives the number of objects of each class and their positions, a segmentation the share of each class, a
    reader of text the words in quotes and their positions. Dense maps, such as depth, are skipped. Nothing is written
    about an expert that is missing; one that found nothing writes `none`.

    Args:
        labels (`dict`): from an expert's name to its label, from `processor.run_experts`.
        experts: the configured experts, from [`read_experts`].
        class_names (`dict`): from an expert's name to the names of its classes. Experts with classes need them.
        max_tokens (`int`):
            Limit for the whole text. Items are left out until it fits, the smallest ones first. Each expert keeps as
            many items as the others, as long as it has them.
        count_tokens (`Callable`): from a text to its number of tokens.
        positions (`str`, *optional*, defaults to `"names"`):
            `"names"` such as `top left`, or `"boxes"`: `[left, top, right, bottom]` in percent of the image's sides.
        clean (`Callable`, *optional*): changes the text before it is counted, such as to break up control tokens.

    Returns:
        `str`: such as `Objects: 2 dog (left, right), 1 ball (center). Text: "stop" (top left).`
    """
    titles, sentences = [], []
    for expert in experts:
        label = labels.get(expert.name)
        if label is not None and can_be_written(label, expert, class_names.get(expert.name)):
            titles.append(TITLES.get(expert.name, expert.name.replace("_", " ").capitalize()))
            items = items_of(label, expert, class_names.get(expert.name, ()), positions)
            sentences.append(sorted(items, key=lambda item: -item.area))
    # the most important item of each expert, then the second one of each, …
    order = sorted((rank, number) for number, items in enumerate(sentences) for rank in range(len(items)))

    def written(number_of_items: int) -> str:
        kept: list[list[Item]] = [[] for _ in sentences]
        for rank, number in order[:number_of_items]:
            kept[number].append(sentences[number][rank])
        texts = []
        for title, items, all_items in zip(titles, kept, sentences):
            if items or not all_items:
                items.sort(key=lambda item: item.place)
                texts.append(f"{title}: {', '.join(item.text for item in items) or 'none'}.")
        return clean(" ".join(texts))

    number_of_items = bisect_right(range(1, len(order) + 1), max_tokens, key=lambda n: count_tokens(written(n)))
    text = written(number_of_items)
    return text if count_tokens(text) <= max_tokens else ""


def items_of(label: Any, expert: ExpertFields, class_names: Sequence[str], positions: str) -> list[Item]:
    """The items of one expert, in the order of its sentence."""
    areas = find_areas(read_ids(label, expert))
    if expert.num_classes is None:
        return _words(label, areas, positions)
    if expert.instances:
        classes = read_items(label, expert)
        return _objects([] if classes is None else classes.tolist(), areas, class_names, positions)
    return _regions(areas, class_names)


def find_areas(ids: np.ndarray) -> dict[int, Area]:
    """The area of each id in a map (height, width) uint8, background left out."""
    step = -(-max(ids.shape) // LONGEST_SIDE)
    ids = ids[::step, ::step]
    height, width = ids.shape
    areas = {}
    for number in np.unique(ids):
        if number != BACKGROUND:
            found = ids == number
            rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
            areas[int(number)] = Area(
                float(found.mean()),
                columns[0] / width,
                rows[0] / height,
                (columns[-1] + 1) / width,
                (rows[-1] + 1) / height,
            )
    return areas


def _objects(classes: list[int], areas: dict[int, Area], class_names: Sequence[str], positions: str) -> list[Item]:
    by_class: dict[int, list[Area | None]] = {}
    for number, class_id in enumerate(classes):
        by_class.setdefault(class_id, []).append(areas.get(number))  # None: hidden by others
    items = []
    for class_id, own in by_class.items():
        seen = sorted((area for area in own if area is not None), key=lambda area: -area.area)
        if positions == "boxes":
            where = [area.box for area in seen[:MOST_BOXES]]
        else:
            where = list(dict.fromkeys(area.name for area in seen))
        text = f"{len(own)} {_name(class_id, class_names)}" + (f" ({', '.join(where)})" if where else "")
        items.append((sum(area.area for area in seen), text))
    items.sort(key=lambda item: -item[0])
    return [Item(text, area, place) for place, (area, text) in enumerate(items)]


def _regions(areas: dict[int, Area], class_names: Sequence[str]) -> list[Item]:
    largest = sorted(areas.items(), key=lambda item: -item[1].area)
    return [
        Item(f"{_name(class_id, class_names)} {max(1, round(100 * area.area))} %", area.area, place)
        for place, (class_id, area) in enumerate(largest)
        if area.area >= LEAST_SHARE
    ]


def _words(label: Mapping[str, Any], areas: dict[int, Area], positions: str) -> list[Item]:
    """Words that follow each other at one place share their quotes."""
    groups: list[tuple[list[str], str, float]] = []
    for number, word in enumerate(label["words"]):
        word = " ".join(str(word).replace('"', "'").split())
        if not word:
            continue
        area = areas.get(number)
        where = "" if area is None else area.box if positions == "boxes" else area.name
        size = 0.0 if area is None else area.area
        if groups and groups[-1][1] == where:
            groups[-1] = ([*groups[-1][0], word], where, groups[-1][2] + size)
        else:
            groups.append(([word], where, size))
    return [
        Item(f'"{" ".join(words)}"' + (f" ({where})" if where else ""), size, place)
        for place, (words, where, size) in enumerate(groups)
    ]


def _name(class_id: int, class_names: Sequence[str]) -> str:
    return class_names[class_id].replace("_", " ") if class_id < len(class_names) else f"class {class_id}"
