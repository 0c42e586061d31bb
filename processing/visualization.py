"""Draws the labels of experts."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..expert_spec import BACKGROUND, ExpertSpec, read_specs
from .expert_labels import ExpertFields, ids_of_8_bits, label_parts, read_vectors
from .experts.base import Expert, look_of
from .experts.look import Color, ExpertLook


# Steps of the perceptually uniform color map "inferno", from dark to light, with linear interpolation between them.
COLOR_MAP = np.array(
    [
        (0, 0, 4),
        (22, 11, 57),
        (66, 10, 104),
        (106, 23, 110),
        (147, 38, 103),
        (188, 55, 84),
        (221, 81, 58),
        (243, 120, 25),
        (252, 165, 10),
        (246, 215, 70),
        (252, 255, 164),
    ],
    dtype=np.float32,
)

# Colors for regions, in this order. Most people can tell them apart, also with a color vision deficiency.
PALETTE = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
    (240, 228, 66),
    (148, 103, 189),
    (23, 190, 207),
    (227, 26, 28),
    (127, 201, 60),
    (166, 86, 40),
]

PAPER, INK, FAINT, RULE = (255, 255, 255), (32, 33, 36), (110, 113, 118), (218, 220, 224)

MARGIN = 16
TITLE_SIZE, TEXT_SIZE = 19, 14


@dataclass
class Drawing:
    """
    The drawing of one label, for pages with their own layout of titles and legends.

    Attributes:
        title (`str`): the title of the expert.
        subtitle (`str`): numbers such as `"2 words"`; empty if there are none.
        image (`PIL.Image.Image`, *optional*): RGB; `None` without a label.
        legend (`list[tuple[Color, str]]`): colors (red, green and blue from 0 to 255) and their meanings.
        scale (`tuple[str, np.ndarray, str]`, *optional*):
            The text at the low end, colors of shape (n, 3), and the text at the high end.
    """

    title: str
    subtitle: str = ""
    image: Image.Image | None = None
    legend: list[tuple[Color, str]] = field(default_factory=list)
    scale: tuple[str, np.ndarray, str] | None = None


def experts_panel(
    image: Image.Image,
    labels: Mapping[str, Any],
    descriptions: Sequence[Mapping[str, Any] | ExpertSpec] | None = None,
    class_names: Mapping[str, Sequence[str] | Mapping[int, str]] | None = None,
    tile_size: int = 400,
    columns: int | None = None,
) -> Image.Image:
    """
    Draws an image and the labels of its experts side by side: depth and normals in color, edges, and segments, objects
    and words over the image with their names. An expert without a label has a tile with the word "missing". Titles and
    colors come from the [`ExpertLook`] of each expert.

    Args:
        image (`PIL.Image.Image`): the image, of any size and mode.
        labels (`dict`):
            The label of each expert by name, as experts return it, or `None`. Maps are uint8 of any size and are
            stretched over the image:

            - dense: (H, W), or (H, W, 3), drawn as red, green and blue;
            - `{"ids": (H, W)}`: ids are classes, 255 is background;
            - `{"ids": (H, W), "classes": [class of instance 0, …]}`: ids are instances;
            - `{"ids": (H, W), "words": [str, …]}`: ids are words.
        descriptions (`list[dict]` or `list[ExpertSpec]`, *optional*):
            The experts of the config or suite (`suite.descriptions`). They give the order, the missing experts, and
            whether a bare (H, W) array has values or ids. By default, the order is that of `labels`, and the kind is
            that of the expert class with this name, or `"dense"`.
        class_names (`dict`, *optional*):
            The names of the classes of each expert, as a list or a dict from class to name. By default the
            `class_names` of `descriptions`. Classes without a name are numbered.
        tile_size (`int`, *optional*, defaults to 400):
            Long side of the drawn image in pixels.
        columns (`int`, *optional*):
            Number of tiles in a row. By default it depends on the number of tiles.

    Returns:
        `PIL.Image.Image`: an RGB image, whose size depends on the number of tiles and the length of the legends.

    Raises:
        ValueError: if `tile_size` is below 64, or if a label is wrong. The message names the expert.

    Example:

    ```python
    >>> from modeling_prismer.processing.visualization import experts_panel

    >>> labels = processor.run_experts([image])[0]
    >>> panel = experts_panel(image, labels, descriptions=processor.experts.descriptions)
    >>> panel.save("panel.png")
    >>> panel.mode
    'RGB'
    ```
    """
    if tile_size < 64:
        raise ValueError(f"tile_size is {tile_size}; at least 64 is needed")
    specs: dict[str, str | ExpertSpec] = {spec.name: spec for spec in read_specs(list(descriptions or ()))}
    experts = [*specs.values(), *(name for name in labels if name not in specs)]
    base = _fit(image.convert("RGB"), tile_size)
    drawings = [Drawing("Image", f"{image.width} x {image.height} pixels", base)]
    for expert in experts:
        name = expert if isinstance(expert, str) else expert.name
        drawings.append(_draw(expert, labels.get(name), base, (class_names or {}).get(name)))

    width = max(base.width, min(tile_size, 280))
    tiles = [_Tile(drawing, width, base.height) for drawing in drawings]
    columns = columns or (2 if len(tiles) in (2, 4) else 3 if len(tiles) <= 6 else 4)
    columns = min(columns, len(tiles))
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    panel = Image.new(
        "RGB", (columns * width + (columns + 1) * MARGIN, sum(heights) + (len(rows) + 1) * MARGIN), PAPER
    )
    top = MARGIN
    for row, height in zip(rows, heights):
        for column, tile in enumerate(row):
            tile.draw(panel, MARGIN + column * (width + MARGIN), top)
        top += height + MARGIN
    return panel


def draw_expert(
    image: Image.Image,
    expert: str | Mapping[str, Any] | ExpertSpec,
    label: Any,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    size: int = 400,
) -> Drawing:
    """
    Draws the label of one expert in the same way as [`experts_panel`].

    Args:
        image (`PIL.Image.Image`): the image, of any size and mode.
        expert (`str`, `dict` or [`ExpertSpec`]): the expert's name or description.
        label: the label, as [`experts_panel`] takes it; `None` if there is none.
        class_names (`list` or `dict`, *optional*): the names of the classes; by default those of the description.
        size (`int`, *optional*, defaults to 400): long side of the drawing in pixels.

    Returns:
        [`Drawing`]: title, image and legend.

    Raises:
        ValueError: if the label is wrong.

    Example:

    ```python
    >>> from modeling_prismer.processing.visualization import draw_expert

    >>> drawing = draw_expert(image, "edge", processor.run_experts([image])[0]["edge"])
    >>> drawing.title, drawing.image.size
    ('Edges', (400, 400))
    ```
    """
    expert = expert if isinstance(expert, str) else ExpertSpec.from_dict(expert)
    return _draw(expert, label, _fit(image.convert("RGB"), size), class_names)


def label_in_words(
    label: Any, spec: ExpertSpec, class_names: Sequence[str] | Mapping[int, str] | None = None
) -> list[str] | None:
    """
    Writes a label in words.

    Args:
        label: the label, as [`experts_panel`] takes it; `None` if there is none.
        spec ([`ExpertSpec`]): the expert.
        class_names (`list` or `dict`, *optional*): the names of the classes; by default those of the spec.

    Returns:
        `list[str]`: the words, the class of each instance, or the classes in the map; `None` without a label and for
        a dense expert.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer import ExpertSpec
    >>> from modeling_prismer.processing.visualization import label_in_words

    >>> spec = ExpertSpec("segmentation", "label", channels=64, num_classes=2, class_names=["sky", "tree"])
    >>> label_in_words(np.array([[1, 255], [1, 0]], np.uint8), spec)
    ['sky', 'tree']
    ```
    """
    if label is None or spec.is_dense:
        return None
    parts = _read_parts(spec.name, label, is_dense=False)
    if "words" in parts:
        return [str(word) for word in parts["words"]]
    ids = parts["ids"]
    classes = parts["classes"] if "classes" in parts else np.unique(ids[ids != BACKGROUND])
    return [_class_name(class_names or spec.class_names, int(index)) for index in classes]


def value_color(value: int | Sequence[int], look: ExpertLook) -> Color:
    """The color of a value of a dense map: red, green and blue from 0 to 255."""
    if not isinstance(value, int):
        red, green, blue = value if len(value) == 3 else [value[0]] * 3
        return red, green, blue
    if look.is_grey:
        return value, value, value
    red, green, blue = map(int, _colored(np.array(value / 255)))
    return red, green, blue


class _Tile:
    """A drawing in a panel, with the title above and the legend below the image."""

    def __init__(self, drawing: Drawing, width: int, image_height: int, max_lines: int = 10):
        self.drawing, self.width, self.image_height = drawing, width, image_height
        font = _font(TEXT_SIZE)
        lines: list[list[tuple[float, Any, str]]] = [[]]
        x = 0.0
        for number, (color, text) in enumerate(drawing.legend):
            text = _shorten(text, font, width - 24)
            needed = 22 + font.getlength(text) + 14
            if x and x + needed - 14 > width:
                if len(lines) == max_lines:
                    rest = f"and {len(drawing.legend) - number} more"
                    while lines[-1] and x + font.getlength(rest) > width:
                        x = lines[-1].pop()[0]
                        number -= 1
                        rest = f"and {len(drawing.legend) - number} more"
                    lines[-1].append((x, None, rest))
                    break
                lines.append([])
                x = 0.0
            lines[-1].append((x, color, text))
            x += needed
        self.lines = lines if drawing.legend else []
        self.height = 30 + image_height + 10 + 20 * len(self.lines) + (24 if drawing.scale else 0)

    def draw(self, panel: Image.Image, left: int, top: int) -> None:
        draw, drawing = ImageDraw.Draw(panel), self.drawing
        title, font = _font(TITLE_SIZE), _font(TEXT_SIZE)
        draw.text((left, top + 22), drawing.title, fill=INK, font=title, anchor="ls")
        room = self.width - title.getlength(drawing.title) - 10
        draw.text(
            (left + self.width, top + 22), _shorten(drawing.subtitle, font, room), fill=FAINT, font=font, anchor="rs"
        )
        top += 30
        if drawing.image is None:
            box = (left, top, left + self.width - 1, top + self.image_height - 1)
            draw.rectangle(box, fill=(244, 245, 246), outline=RULE)
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            draw.text(middle, "missing", fill=FAINT, font=_font(TITLE_SIZE), anchor="mm")
        else:
            x = left + (self.width - drawing.image.width) // 2
            panel.paste(drawing.image, (x, top))
            draw.rectangle((x - 1, top - 1, x + drawing.image.width, top + drawing.image.height), outline=RULE)
        top += self.image_height + 10
        if drawing.scale:
            self._draw_scale(panel, draw, left, top, *drawing.scale)
            top += 24
        for line in self.lines:
            for place, color, text in line:
                start = left + place
                if color is not None:
                    draw.rounded_rectangle((start, top + 2, start + 14, top + 14), 3, fill=color)
                    start += 22
                draw.text((start, top + 13), text, fill=INK if color else FAINT, font=font, anchor="ls")
            top += 20

    def _draw_scale(
        self, panel: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, low: str, colors: Any, high: str
    ) -> None:
        font = _font(TEXT_SIZE)
        draw.text((left, top + 13), low, fill=INK, font=font, anchor="ls")
        draw.text((left + self.width, top + 13), high, fill=INK, font=font, anchor="rs")
        start = left + round(font.getlength(low)) + 8
        length = max(1, left + self.width - round(font.getlength(high)) - 8 - start)
        bar = Image.fromarray(np.asarray(colors, np.uint8)[None]).resize((length, 12), Image.Resampling.BILINEAR)
        panel.paste(bar, (start, top + 2))
        draw.rectangle((start, top + 2, start + length - 1, top + 13), outline=RULE)


# ---- labels ----


def _draw(expert: str | ExpertSpec, label: Any, image: Image.Image, class_names: Any) -> Drawing:
    """Draws a label over an image of the final size."""
    if isinstance(expert, str):
        name, known = expert, Expert.by_name.get(expert)
        is_dense = known is None or known.kind == "dense"
    else:
        name, is_dense = expert.name, expert.is_dense
        class_names = class_names or expert.class_names
    look = look_of(name)
    if label is None:
        return Drawing(look.title)
    if isinstance(label, Mapping) and "low" in label:
        label = _main_directions(name, label)
    parts = _read_parts(name, label, is_dense)
    if "values" in parts:
        return _draw_values(look, parts["values"], image)
    ids = np.array(_resize(parts["ids"], image.size, Image.Resampling.NEAREST))
    if "words" in parts:
        return _draw_words(look, ids, [str(word) for word in parts["words"]], image)
    if "classes" in parts:
        return _draw_instances(look, ids, [int(index) for index in parts["classes"]], image, class_names)
    return _draw_classes(look, ids, image, class_names)


def _main_directions(name: str, label: Mapping[str, Any]) -> np.ndarray:
    """A grid of vectors as an image: its three main directions as red, green and blue, (h, w, 3) uint8."""
    height, width, channels = np.shape(label["values"])
    vectors = read_vectors(label, ExpertFields(name, "features", channels, None, None)).reshape(channels, -1).T
    vectors = vectors - vectors.mean(0)
    found = vectors @ np.linalg.svd(vectors, full_matrices=False)[2][:3].T
    image = np.zeros((len(found), 3), np.float32)
    image[:, : found.shape[1]] = found
    spread = np.abs(image).max(0) + 1e-12
    return np.round((image / spread + 1) * 127.5).astype(np.uint8).reshape(height, width, 3)


def _read_parts(name: str, label: Any, is_dense: bool) -> dict[str, Any]:
    """The parts of a label; the map is a uint8 NumPy array."""
    parts = label_parts(label, is_dense)
    part = "ids" if "ids" in parts else "values"
    if part not in parts:
        raise ValueError(f"the label of '{name}' has {', '.join(parts) or 'nothing'}; 'ids' or a map is needed")
    array = parts[part]
    array = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (part == "values" and array.ndim == 3) or 0 in array.shape:
        raise ValueError(f"the map of '{name}' has the shape {array.shape}; (height, width) is needed")
    if part == "ids":
        array = ids_of_8_bits(array, f"the map of '{name}'")
    elif array.dtype != np.uint8:
        if array.dtype.kind not in "iub" or array.min() < 0 or array.max() > 255:
            raise ValueError(f"the map of '{name}' is {array.dtype}; 8-bit values are needed")
        array = array.astype(np.uint8)
    return {**parts, part: array}


def _draw_values(look: ExpertLook, values: np.ndarray, image: Image.Image) -> Drawing:
    if values.ndim == 3:
        drawn = _resize(_three_channels(values), image.size, Image.Resampling.BILINEAR)
        return Drawing(look.title, image=drawn, legend=list(look.legend))
    values = np.asarray(_resize(values, image.size, Image.Resampling.BILINEAR))
    if look.is_grey:
        return Drawing(look.title, image=Image.fromarray(values).convert("RGB"))
    low, high = int(values.min()), int(values.max())
    stretched = (values.astype(np.float32) - low) / max(1, high - low)
    scale = (look.ends[0], COLOR_MAP, look.ends[1])
    return Drawing(look.title, f"{low} to {high}", Image.fromarray(_colored(stretched)), scale=scale)


def _draw_classes(look: ExpertLook, ids: np.ndarray, image: Image.Image, class_names: Any) -> Drawing:
    found, areas = np.unique(ids[ids != BACKGROUND], return_counts=True)
    classes = [int(index) for index in found[np.argsort(-areas, kind="stable")]]
    colors = {index: _color(number) for number, index in enumerate(classes)}
    drawn = _overlay(image, ids, colors)
    legend = [(colors[index], _class_name(class_names, index)) for index in classes]
    tags = []
    for index in classes[:12]:
        place = _inner_point(ids == index)
        if place is not None:
            tags.append((place, _class_name(class_names, index), colors[index]))
    _draw_tags(drawn, tags, centered=True)
    return Drawing(look.title, _count(len(classes), "class", "classes"), drawn, legend)


def _draw_instances(
    look: ExpertLook, ids: np.ndarray, classes: list[int], image: Image.Image, class_names: Any
) -> Drawing:
    instances = [int(number) for number in np.unique(ids) if number < len(classes)]
    # instances of a class have the same color
    order = list(dict.fromkeys(classes[number] for number in instances))
    colors = {index: _color(place) for place, index in enumerate(order)}
    color_of = {number: colors[classes[number]] for number in instances}
    drawn = _overlay(image, ids, color_of, opacity=0.25, outlines=False)
    drawn, boxes = _boxes(drawn, [ids == number for number in instances], list(color_of.values()))
    tags = [
        ((box[0], box[1]), _class_name(class_names, classes[number]), color_of[number])
        for box, number in zip(boxes, instances)
    ]
    _draw_tags(drawn, tags)
    counts = {index: sum(classes[number] == index for number in instances) for index in order}
    legend = [
        (colors[index], _class_name(class_names, index) + (f" ({counts[index]})" if counts[index] > 1 else ""))
        for index in order
    ]
    return Drawing(look.title, _count(len(instances), "object", "objects"), drawn, legend)


def _draw_words(look: ExpertLook, ids: np.ndarray, words: list[str], image: Image.Image) -> Drawing:
    colors = [_color(number) for number in range(len(words))]
    seen = [int(number) for number in np.unique(ids) if number < len(words)]
    drawn = _overlay(image, ids, {number: colors[number] for number in seen}, opacity=0.3)
    tags, boxes = [], []
    for number in seen:
        rows, columns = np.nonzero(ids == number)
        boxes.append((columns.min(), rows.min(), columns.max(), rows.max()))
        tags.append((boxes[-1][:2], words[number], colors[number]))
    if len(tags) <= 20:  # dense text has only the legend, in reading order
        _draw_tags(drawn, tags, obstacles=boxes)
    return Drawing(look.title, _count(len(words), "word", "words"), drawn, list(zip(colors, words)))


def _three_channels(values: np.ndarray) -> np.ndarray:
    """(height, width, channels) to three channels: removes additional ones, and fills missing ones with 0."""
    three = np.zeros((*values.shape[:2], 3), np.uint8)
    channels = min(3, values.shape[2])
    three[..., :channels] = values[..., :channels]
    return three


def _class_name(class_names: Any, index: int) -> str:
    if isinstance(class_names, Mapping):
        return str(class_names.get(index, f"class {index}"))
    if class_names is not None and index < len(class_names):
        return str(class_names[index])
    return f"class {index}"


def _count(number: int, one: str, many: str) -> str:
    return f"no {many}" if number == 0 else f"{number} {one if number == 1 else many}"


# ---- drawing ----


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Resizes the long side to `size` pixels. The pixels of a much smaller image stay visible as squares."""
    scale = size / max(image.size)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(fitted, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.BICUBIC)


def _resize(array: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    map_image = Image.fromarray(array)
    enlarged = min(size[0] / map_image.width, size[1] / map_image.height) >= 4
    return map_image.resize(size, Image.Resampling.NEAREST if enlarged else resample)


def _colored(values: np.ndarray) -> np.ndarray:
    """Colors for values in [0, 1]: (height, width) to uint8 (height, width, 3)."""
    position = np.clip(values, 0, 1) * (len(COLOR_MAP) - 1)
    below = np.minimum(position.astype(int), len(COLOR_MAP) - 2)
    part = (position - below)[..., None]
    return (COLOR_MAP[below] * (1 - part) + COLOR_MAP[below + 1] * part).round().astype(np.uint8)


def _color(number: int) -> tuple[int, int, int]:
    return PALETTE[number % len(PALETTE)]


def _overlay(
    image: Image.Image, ids: np.ndarray, colors: Mapping[int, tuple], opacity: float = 0.45, outlines: bool = True
) -> Image.Image:
    """Paints each region of `ids`, (height, width), over the image in its color, with an outline."""
    table = np.zeros((256, 3), np.float32)
    opacities = np.zeros((256, 1), np.float32)
    for number, color in colors.items():
        table[number], opacities[number] = color, opacity
    share = opacities[ids]  # (height, width, 1)
    if outlines:
        values = torch.from_numpy(ids)[None, None].float()
        highest, negative_lowest = (
            torch.nn.functional.max_pool2d(each, 5, stride=1, padding=2)[0, 0].numpy() for each in (values, -values)
        )
        share = np.where((highest != -negative_lowest)[..., None] & (share > 0), np.float32(1), share)
    pixels = np.asarray(image, np.float32)
    return Image.fromarray((pixels * (1 - share) + table[ids] * share).round().astype(np.uint8))


def _boxes(image: Image.Image, masks: list, colors: list) -> tuple[Image.Image, list[list[float]]]:
    """Draws a box around each mask. Also returns the boxes as left, top, right, bottom."""
    if not masks:
        return image, []
    from torchvision.ops import masks_to_boxes
    from torchvision.utils import draw_bounding_boxes

    boxes = masks_to_boxes(torch.from_numpy(np.stack(masks)))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    drawn = draw_bounding_boxes(pixels, boxes, colors=colors, width=3)
    return Image.fromarray(drawn.permute(1, 2, 0).numpy()), boxes.tolist()


def _inner_point(mask: np.ndarray) -> tuple[float, float] | None:
    """A point (x, y) in the thickest part of a mask; `None` if the mask is tiny."""
    if mask.sum() < 0.004 * mask.size:
        return None
    step = max(1, min(mask.shape) // 64)
    layer = torch.from_numpy(mask[::step, ::step].copy())[None, None].float()
    depth = torch.zeros_like(layer)
    while layer.any():  # peeled layer by layer, also from the border of the image
        depth += layer
        layer = -torch.nn.functional.max_pool2d(-torch.nn.functional.pad(layer, (1, 1, 1, 1)), 3, stride=1)
    if not depth.any():
        return None
    rows, columns = np.nonzero(depth[0, 0].numpy() == depth.max().item())
    middle = np.argmin((rows - np.median(rows)) ** 2 + (columns - np.median(columns)) ** 2)
    return float(columns[middle] * step), float(rows[middle] * step)


def _draw_tags(image: Image.Image, tags: list, centered: bool = False, obstacles: Sequence = ()) -> None:
    """
    Draws names on colored ground at their points (x, y). A name without a free place is only in the legend.
    `obstacles` has one box for each tag, which the other tags must not cover.
    """
    draw = ImageDraw.Draw(image)
    font = _font(TEXT_SIZE - 1)
    taken: list[tuple[float, float, float, float]] = []
    height = TEXT_SIZE + 5
    for number, ((x, y), text, color) in enumerate(tags):
        others = [box for index, box in enumerate(obstacles) if index != number]
        text = _shorten(text, font, image.width - 10)
        width = font.getlength(text) + 8
        if centered:
            places = [(x - width / 2, y - height / 2)]
            places += [(x - width / 2, y - height / 2 + step * height) for step in (-1, 1)]
        else:
            places = [(x - 1, y - height + 1), (x - 1, y), (x - 1, y - 2 * height)]
        for left, top in places:
            left = min(max(0, left), image.width - width - 1)
            top = min(max(0, top), image.height - height - 1)
            box = (left, top, left + width, top + height)
            if not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                for other in (*taken, *others)
            ):
                taken.append(box)
                draw.rectangle(box, fill=color)
                draw.text((left + 4, top + height - 5), text, fill=_readable_on(color), font=font, anchor="ls")
                break


def _readable_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else (255, 255, 255)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """
    Cuts a text to a width in pixels. The font of Pillow has ASCII characters only. Accents are removed, a single sign
    is replaced by its name (▲ becomes "black up-pointing triangle"), and other scripts become boxes.
    """
    text = "".join(mark for mark in unicodedata.normalize("NFKD", text) if not unicodedata.combining(mark))
    if len(text) == 1 and not text.isascii():
        text = unicodedata.name(text, text).lower()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
