import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from modeling_prismer.processing.experts import ExpertError, HashedNgrams, RapidOcrText, expert_from_dict
from modeling_prismer.processing.experts.text import paint, reading_quad

from .conftest import LINES, draw_page


WORDS = [word for line in LINES for word in line.lower().split()]


def true_centres(angle, size=(420, 300)):
    """Where the words of `draw_page(angle)` are: x and y."""
    font = ImageFont.load_default(30)
    centres = {}
    for row, line in enumerate(LINES):
        left, y = size[0] / 2 - font.getlength(line) / 2, size[1] / 2 - 30 + 60 * row
        for word in line.split():
            start = left + font.getlength(line[: line.index(word)])
            x = start + font.getlength(word) / 2
            dx, dy, turn = x - size[0] / 2, y - size[1] / 2, math.radians(angle)
            centres[word.lower()] = (
                size[0] / 2 + dx * math.cos(turn) + dy * math.sin(turn),
                size[1] / 2 - dx * math.sin(turn) + dy * math.cos(turn),
            )
    return centres


@pytest.mark.parametrize("angle", [0, 20, 90, -90, 180])
def test_words_are_read_at_any_angle(ocr, angle):
    (label,) = ocr([draw_page(angle)])
    assert sorted(label["words"]) == sorted(WORDS)
    for word, centre in true_centres(angle).items():
        rows, columns = np.nonzero(label["ids"] == label["words"].index(word))
        assert (columns.mean(), rows.mean()) == pytest.approx(centre, abs=8), word


def test_a_label_has_ids_words_and_features(ocr, page):
    (label,) = ocr([page])
    assert label["ids"].shape == (300, 420)
    assert label["ids"].dtype == np.uint8
    assert label["words"] == WORDS  # line by line, in lower case
    assert set(np.unique(label["ids"])) == {*range(len(WORDS)), 255}
    assert np.array_equal(label["features"], HashedNgrams()(WORDS))
    # words, not lines: there is background between neighbours, and their boxes hold their letters
    dark = np.asarray(page.convert("L")) < 128
    assert (label["ids"][dark] != 255).mean() > 0.97
    assert (label["ids"] != 255).mean() < 0.25


def test_a_batch_equals_one_by_one(ocr, page):
    images = [page, Image.new("RGB", (100, 80), "white"), draw_page(20, size=(400, 280))]
    together = ocr(images)
    assert together[1]["words"] == []
    for image, label in zip(images, together):
        (alone,) = ocr([image])
        assert label["words"] == alone["words"]
        assert np.array_equal(label["ids"], alone["ids"])
        assert np.array_equal(label["features"], alone["features"])


def test_small_images_are_read(ocr):
    image = Image.new("RGB", (64, 64), (40, 90, 160))
    ImageDraw.Draw(image).text((6, 14), "Sale 20", "white", ImageFont.load_default(14))
    (label,) = ocr([image])
    assert label["words"] == ["sale", "20"]
    assert label["ids"].shape == (64, 64)
    rows, _ = np.nonzero(label["ids"] == 0)
    assert 8 <= rows.min() <= 18
    assert 24 <= rows.max() <= 36


def test_large_images_are_read(ocr, page):
    (label,) = ocr([page.resize((2100, 1500))])
    assert label["words"] == WORDS
    assert label["ids"].shape == (1500, 2100)
    rows, columns = np.nonzero(label["ids"] == 0)
    assert (columns.mean(), rows.mean()) == pytest.approx([5 * value for value in true_centres(0)["hello"]], abs=40)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (9, 9), (3000, 10)])
def test_images_without_text_have_no_words(ocr, size):
    (label,) = ocr([Image.new("RGB", size, "white")])
    assert label["words"] == []
    assert label["features"].shape == (0, 64)
    assert label["ids"].shape == (size[1], size[0])
    assert (label["ids"] == 255).all()


def test_a_very_long_strip_is_not_enlarged(ocr):
    seen = []
    engine, ocr.model = ocr.model, Recorder(ocr.model, seen)
    try:
        (label,) = ocr([Image.new("RGB", (20000, 20), "white")])
    finally:
        ocr.model = engine
    assert label["ids"].shape == (20, 20000)
    assert [math.prod(shape[:2]) <= 960 * 960 for shape in seen] == [True]


class Recorder:
    """Stands before RapidOCR and notes the shapes it is given; it finds nothing."""

    def __init__(self, engine, seen):
        self.engine, self.seen = engine, seen

    def run_ocr_steps(self, pixels, record):
        self.seen.append(pixels.shape)
        return self.engine.run_ocr_steps(np.zeros((64, 64, 3), np.uint8), record)


def test_min_score_drops_uncertain_words(ocr, page, monkeypatch):
    scores = {word.text: word.score for word in ocr.read(page)}
    assert all(0.8 < score <= 1 for score in scores.values())
    monkeypatch.setattr(ocr, "min_score", 1.0)
    assert len(ocr.read(page)) < len(scores) or set(scores.values()) == {1.0}
    monkeypatch.setattr(ocr, "min_score", sorted(scores.values())[2])
    assert {word.text for word in ocr.read(page)} == {w for w, score in scores.items() if score >= ocr.min_score}


def test_at_most_254_words_are_kept(ocr, monkeypatch):
    monkeypatch.setattr("modeling_prismer.processing.experts.text.MAX_REGIONS", 2)
    (label,) = ocr([draw_page()])
    assert label["words"] == WORDS[:2]
    assert set(np.unique(label["ids"])) == {0, 1, 255}


def test_earlier_words_paint_over_later_ones():
    box = np.array([[0, 0], [3, 0], [3, 3], [0, 3]])
    ids = paint([box, box + 2, box + 4], (10, 9))
    assert ids.shape == (9, 10)
    assert ids[3, 3] == 0
    assert ids[5, 5] == 1
    assert ids[7, 7] == 2
    assert ids[8, 9] == 255


def test_words_outside_or_without_area_are_painted_in_part():
    ids = paint([np.full((4, 2), 2.0), np.full((4, 2), 99.0)], (5, 5))
    assert ids[2, 2] == 0
    assert (ids == 255).sum() == 24


def test_vertical_lines_are_read_from_the_right_side():
    wide = np.array([[0, 0], [40, 0], [40, 10], [0, 10]])
    tall = np.array([[0, 0], [10, 0], [10, 40], [0, 40]])
    assert reading_quad(wide, False).tolist() == wide.tolist()
    assert reading_quad(wide, True)[0].tolist() == [40, 10]
    assert reading_quad(tall, False)[:2].tolist() == [[10, 0], [10, 40]]
    assert reading_quad(tall, True)[:2].tolist() == [[0, 40], [0, 0]]


def test_settings_are_restored_with_the_word_features():
    expert = RapidOcrText(HashedNgrams(channels=32), min_score=0.7, num_threads=2, params={"Det.box_thresh": 0.6})
    restored = expert_from_dict(expert.to_dict())
    assert restored.to_dict() == expert.to_dict()
    assert restored.word_features.channels == 32
    assert restored.description == {"name": "ocr", "kind": "label", "channels": 32}


def test_word_features_move_and_unload_with_the_expert():
    expert = RapidOcrText().to(dtype="bfloat16")
    assert str(expert.word_features.dtype) == "torch.bfloat16"
    expert.word_features.load()
    expert.unload()
    assert not expert.word_features.is_loaded


@pytest.mark.parametrize("settings", [{"min_score": 2}, {"min_side": 0}, {"max_pixels": 0}, {"num_threads": 0}])
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RapidOcrText(**settings)


def test_an_error_of_the_engine_names_the_image(ocr, page, monkeypatch):
    monkeypatch.setattr(ocr, "model", None)
    with pytest.raises(ExpertError, match=r"'ocr' failed on image 0 \(420×300, RGB\)"):
        ocr([page])


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    with pytest.raises(ImportError, match="pip install rapidocr onnxruntime"):
        RapidOcrText().load()
