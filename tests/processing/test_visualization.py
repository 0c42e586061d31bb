"""Panels and drawings of expert labels: colors, legends and texts."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from modeling_prismer.expert_spec import ExpertSpec, read_specs
from modeling_prismer.processing import visualization
from modeling_prismer.processing.experts import Expert, ExpertLook, ExpertSuite
from modeling_prismer.processing.experts.base import look_of
from modeling_prismer.processing.labels import LabelStore, label_images
from modeling_prismer.processing.visualization import (
    COLOR_MAP,
    PALETTE,
    draw_expert,
    experts_panel,
    label_in_words,
    value_color,
)


SIX = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "normal", "kind": "dense", "channels": 3},
    {"name": "segmentation", "kind": "label", "channels": 64, "num_classes": 133},
    {"name": "edge", "kind": "dense", "channels": 1},
    {"name": "detection", "kind": "label", "channels": 64, "num_classes": 80, "instances": True},
    {"name": "ocr", "kind": "label", "channels": 64},
]


@pytest.fixture
def image():
    return Image.new("RGB", (120, 90), (128, 128, 128))


@pytest.fixture
def labels():
    ids = np.full((90, 120), 255, np.uint8)
    ids[20:70, 10:50] = 0
    ids[30:80, 70:110] = 1
    ramp = np.tile(np.linspace(0, 255, 120).astype(np.uint8), (90, 1))
    return {
        "depth": ramp,
        "normal": np.stack([ramp, ramp.T.copy().T, ramp], -1),
        "segmentation": ids,
        "edge": np.where(ids == 0, 0, 255).astype(np.uint8),
        "detection": {"ids": ids, "classes": [7, 7]},
        "ocr": {"ids": ids, "words": ["stop", "exit"], "features": np.zeros((2, 64), np.float32)},
    }


@pytest.fixture
def written(monkeypatch):
    """Records every text that is drawn."""
    texts = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **kwargs):
        texts.append(text)
        return draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def colors_of(image):
    return {color for _, color in image.getcolors(1 << 24)}


def tile(panel, number, columns=4, size=400, height=300):
    """The image in a tile of the first row, if all images have the size `size` by `height`."""
    left = visualization.MARGIN + number % columns * (size + visualization.MARGIN)
    top = visualization.MARGIN + 30
    return panel.crop((left, top, left + size, top + height))


def test_panel_shows_the_image_and_every_expert(image, labels, written):
    panel = experts_panel(image, labels, SIX, {"segmentation": ["sky", "tree"], "detection": {7: "dog"}})
    assert panel.mode == "RGB"
    assert panel.width == 4 * 400 + 5 * 16
    for title in ("Image", "Depth", "Surface normals", "Segments", "Edges", "Objects", "Text"):
        assert title in written
    assert {"far", "near", "sky", "tree", "dog", "dog (2)", "stop", "exit", "2 words", "2 objects"} <= set(written)
    assert "missing" not in written
    assert set(PALETTE[:2]) <= colors_of(panel)


def test_class_names_are_read_from_the_descriptions(image, labels, written):
    named = {"num_classes": 2, "class_names": ["sky", "tree"]}
    described = [{**expert, **named} if expert["name"] == "segmentation" else expert for expert in SIX]
    experts_panel(image, labels, described)
    assert {"sky", "tree"} <= set(written)
    written.clear()
    experts_panel(image, labels, described, {"segmentation": ["air", "wood"]})
    assert {"air", "wood"} <= set(written) and "sky" not in written


def test_far_depth_is_dark_and_near_depth_is_light(image, labels, written):
    drawn = np.asarray(tile(experts_panel(image, {"depth": labels["depth"]}), 1, columns=2)).astype(int)
    assert np.abs(drawn[150, 1] - COLOR_MAP[0]).max() < 12
    assert np.abs(drawn[150, -2] - COLOR_MAP[-1]).max() < 12
    assert (np.diff(drawn[150].sum(-1)[::20]) > 0).all()
    assert written.index("far") < written.index("near")  # from left to right, like the colors of the scale


def test_edges_and_normals_keep_their_values(image, labels):
    panel = experts_panel(image, {name: labels[name] for name in ("edge", "normal")})
    edge = np.asarray(tile(panel, 1, columns=3))
    assert edge[150, 100].tolist() == [0, 0, 0]
    assert edge[20, 20].tolist() == [255, 255, 255]
    normal = np.asarray(tile(panel, 2, columns=3)).astype(int)
    assert normal[150, 300] == pytest.approx([191] * 3, abs=4)


def test_segments_are_drawn_over_the_image(image, labels, written):
    ids = labels["segmentation"]
    ids[75:85, 10:50] = 0  # the largest segment
    panel = experts_panel(image, {"segmentation": {"ids": ids}})
    drawn = np.asarray(tile(panel, 1, columns=2)).astype(int)
    assert drawn[10, 200].tolist() == [128, 128, 128]  # background
    expected = 0.55 * 128 + 0.45 * np.array(PALETTE[0])
    assert drawn[200, 60] == pytest.approx(expected, abs=2)
    assert drawn[200, 34].tolist() == list(PALETTE[0])  # the outline
    assert "class 0" in written
    assert "class 1" in written


def test_ids_can_have_any_integer_type(image):
    ids = np.tile(np.array([0, 1, -1], np.int64), (30, 10))
    expected = draw_expert(image, "segmentation", np.where(ids < 0, 255, ids).astype(np.uint8))
    for dtype in (np.int8, np.int16, np.int64):
        drawn = draw_expert(image, "segmentation", ids.astype(dtype))
        assert drawn.image == expected.image and drawn.legend == expected.legend


def test_missing_expert_has_a_tile_with_this_word(image, labels, written):
    experts_panel(image, {"depth": labels["depth"], "ocr": None}, SIX[:2])
    assert written.count("missing") == 2  # normal is not among the labels, and ocr is None
    assert "Text" in written


def test_empty_label_is_not_missing(image, written):
    nothing = np.full((90, 120), 255, np.uint8)
    labels = {
        "ocr": {"ids": nothing, "words": []},
        "detection": {"ids": nothing, "classes": []},
        "segmentation": nothing,
    }
    experts_panel(image, labels)
    assert {"no words", "no objects", "no classes"} <= set(written)
    assert "missing" not in written


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (9, 400), (3000, 20), (1600, 1200)])
def test_panel_is_readable_for_images_of_any_size(size, written):
    ids = np.zeros((size[1], size[0]), np.uint8)
    labels = {"depth": ids, "segmentation": ids, "ocr": {"ids": ids, "words": ["a"]}}
    panel = experts_panel(Image.new("RGB", size), labels)
    assert 500 <= panel.width <= 2000
    assert 60 <= panel.height <= 1200
    assert "Image" in written


def test_small_images_keep_their_pixels_visible():
    image = Image.new("RGB", (64, 64))
    image.putpixel((32, 32), (255, 255, 255))
    drawn = tile(experts_panel(image, {"edge": np.asarray(image.convert("L"))}), 0, columns=2, height=400)
    assert colors_of(drawn) == {(0, 0, 0), (255, 255, 255)}
    assert sum(count for count, color in drawn.getcolors() if color != (0, 0, 0)) == pytest.approx(6.25**2, abs=7)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_are_drawn(mode, labels):
    assert experts_panel(Image.new(mode, (120, 90)), {"depth": labels["depth"]}).mode == "RGB"


def test_unknown_expert_is_drawn_by_the_form_of_its_label(image, labels, written):
    own = {
        "thermal": torch.from_numpy(labels["depth"]),
        "flow": labels["normal"][..., :2],
        "parts": labels["segmentation"],
    }
    described = [ExpertSpec("parts", "label", 8, num_classes=2, class_names=["head", "tail"])]
    panel = experts_panel(image, own, described)
    assert {"Thermal", "Flow", "Parts", "low", "high", "head", "tail"} <= set(written)
    assert panel.width == 2 * 400 + 3 * 16


def test_long_legend_counts_the_words_left_out(image, written):
    ids = np.full((90, 120), 255, np.uint8)
    ids[: 80 * 90 // 90, :100] = (np.arange(100) // 5 + np.arange(80)[:, None] // 8 * 20).astype(np.uint8)
    words = [f"word{number}" for number in range(200)]
    panel = experts_panel(image, {"ocr": {"ids": ids, "words": words}})
    rest = [text for text in written if text.startswith("and ")]
    listed = [text for text in written if text.startswith("word")]
    assert rest == [f"and {200 - len(listed)} more"]
    assert listed == words[: len(listed)]
    assert panel.height < 700


def test_names_do_not_overlap(image):
    boxes = []
    draw_rectangle = ImageDraw.ImageDraw.rectangle

    class Watching(ImageDraw.ImageDraw):
        def rectangle(self, xy, fill=None, **kwargs):
            boxes.append(xy)
            draw_rectangle(self, xy, fill=fill, **kwargs)

    tags = [((40, 40), "one", PALETTE[0]), ((45, 42), "two", PALETTE[1]), ((50, 44), "three", PALETTE[2])]
    original, ImageDraw.ImageDraw = ImageDraw.ImageDraw, Watching
    try:
        visualization._draw_tags(image, tags)
    finally:
        ImageDraw.ImageDraw = original
    assert len(boxes) >= 2
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_text_is_shortened_and_loses_accents():
    font = ImageFont.load_default(14)
    assert visualization._shorten("café", font, 100) == "cafe"
    assert visualization._shorten("a very long name", font, 50).endswith("…")
    assert font.getlength(visualization._shorten("a very long name", font, 50)) <= 50
    assert visualization._shorten("name", font, 0) == "…"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros((4, 4), np.float32), "the map of 'depth' is float32"),
        (np.full((4, 4), 300), "the map of 'depth' is int64"),
        (np.zeros(4, np.uint8), r"the map of 'depth' has the shape \(4,\)"),
        ({"words": []}, "the label of 'depth' has words; 'ids' or a map is needed"),
    ],
)
def test_wrong_label_is_named(image, label, message):
    with pytest.raises(ValueError, match=message):
        experts_panel(image, {"depth": label})


def test_unreadable_tile_size_is_refused(image):
    with pytest.raises(ValueError, match="tile_size is 10; at least 64"):
        experts_panel(image, {}, tile_size=10)


def test_drawing_of_one_expert_has_a_legend(image, labels):
    drawn = draw_expert(image, "segmentation", labels["segmentation"], ["sky", "tree"], size=200)
    assert drawn.title == "Segments" and max(drawn.image.size) == 200
    assert {"sky", "tree"} <= {text for _, text in drawn.legend}
    assert draw_expert(image, "depth", labels["depth"]).scale[::2] == ("far", "near")
    assert draw_expert(image, "ocr", None).image is None


def test_labels_are_drawn_with_the_look_of_their_class(image, labels, written, tmp_path):
    class Heat(Expert):
        type = "heat_of_a_test"
        name, kind, channels = "heat", "dense", 1
        look = ExpertLook("Temperature", "how warm everything is", ends=("cold", "warm"))

        def run(self, images):
            return [np.asarray(image.convert("L")) for image in images]

    suite = ExpertSuite([Heat()])
    try:
        label_images({"one.png": image}, suite, tmp_path / "store", progress=False)
        store = LabelStore(tmp_path / "store")
        experts_panel(image, store["one.png"], store.descriptions)
        assert {"Temperature", "cold", "warm"} <= set(written)
        assert draw_expert(image, suite["heat"].spec, store["one.png"]["heat"]).title == "Temperature"
        assert value_color(255, Heat.look) == tuple(COLOR_MAP[-1])
    finally:
        del Expert.by_name["heat"], Expert.registry[Heat.type]
    assert draw_expert(image, "heat", labels["depth"]).title == "Heat"


def test_expert_without_a_look_has_its_name_as_title(image, labels):
    assert look_of("my_camera") == ExpertLook("My camera")
    assert draw_expert(image, "my_camera", labels["depth"]).scale[::2] == ("low", "high")


@pytest.mark.parametrize(
    "name, words",
    [("depth", None), ("segmentation", ["sky", "tree"]), ("detection", ["dog", "dog"]), ("ocr", ["stop", "exit"])],
)
def test_labels_have_words(labels, name, words):
    (spec,) = [spec for spec in read_specs(SIX) if spec.name == name]
    assert label_in_words(labels[name], spec, {0: "sky", 1: "tree", 7: "dog"}) == words
    assert label_in_words(None, spec) is None


def test_value_color_equals_the_drawn_color():
    assert value_color(0, ExpertLook("Depth")) == tuple(COLOR_MAP[0])
    assert value_color(128, ExpertLook("Edges", is_grey=True)) == (128, 128, 128)
    assert value_color((128, 0, 128), ExpertLook("Normals")) == (128, 0, 128)
    assert value_color([7, 7], ExpertLook("Flow")) == (7, 7, 7)
