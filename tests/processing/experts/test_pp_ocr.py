import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5ServerDetImageProcessor,
    PPOCRV6SmallRecConfig,
    PPOCRV6SmallRecForTextRecognition,
    PPOCRV6SmallRecImageProcessor,
)

from modeling_prismer.processing.experts import ExpertSuite, HashedNgrams, PpOcrText, expert_from_dict
from modeling_prismer.processing.experts.text import _line, cut_out, words_of_line

from .models import photograph


LETTERS = ["", *"abcdefghijklmnopqrstuvwxyzABC", " "]


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pp_ocr")
    torch.manual_seed(0)
    PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig()).save_pretrained(folder / "det")
    PPOCRV5ServerDetImageProcessor(limit_side_len=96).save_pretrained(folder / "det")
    config = PPOCRV6SmallRecConfig(head_out_channels=len(LETTERS))
    recognizer = PPOCRV6SmallRecForTextRecognition(config)
    with torch.no_grad():  # a random one sees the same everywhere
        for parameter in recognizer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    recognizer.save_pretrained(folder / "rec")
    PPOCRV6SmallRecImageProcessor(character_list=LETTERS).save_pretrained(folder / "rec")
    # a random detector finds one line, the whole image, and is not sure of it
    return PpOcrText(detector=folder / "det", recognizer=folder / "rec", min_line_score=0.3, min_score=0)


def test_lines_are_found_cropped_and_read(expert):
    image = photograph((120, 60))
    (label,) = expert([image])
    assert label["ids"].shape == (60, 120)
    assert len(label["words"]) > 0
    assert all(word == word.lower() and " " not in word for word in label["words"])
    assert np.array_equal(label["features"], HashedNgrams()(label["words"]))
    assert not expert.model.training


def test_a_batch_of_mixed_sizes_equals_one_by_one(expert):
    images = [photograph((120, 60)), photograph((50, 90), 1), Image.new("RGB", (4, 4))]
    together = expert(images)
    assert together[2]["words"] == []
    for image, label in zip(images, together):
        (alone,) = expert([image])
        assert label["words"] == alone["words"]
        assert np.array_equal(label["ids"], alone["ids"])


@pytest.mark.parametrize("size", [(1, 1), (9, 9), (8, 400), (20000, 20)])
def test_images_of_any_size_are_read(expert, size):
    assert expert([photograph(size)])[0]["ids"].shape == (size[1], size[0])


def test_lines_and_words_with_low_scores_are_dropped(expert, monkeypatch):
    image = photograph((120, 60))
    monkeypatch.setattr(expert, "_recognize", lambda lines: [_line([1, 30, 2], [0.9, 0.1, 0.4], LETTERS, 3)])
    assert expert([image])[0]["words"] == ["a", "b"]
    monkeypatch.setattr(expert, "min_score", 0.5)
    assert expert([image])[0]["words"] == ["a"]
    monkeypatch.undo()
    monkeypatch.setattr(expert, "min_line_score", 0.9)
    assert expert([image])[0]["words"] == []


def test_it_runs_in_half_precision(expert):
    half = PpOcrText(detector=expert.detector, recognizer=expert.recognizer, min_line_score=0.3, min_score=0)
    assert half.to("cuda").running_dtype == torch.float16
    (label,) = half.to("cpu", "bfloat16")([photograph((120, 60))])
    assert label["ids"].shape == (60, 120)


def test_letters_become_words_with_their_positions():
    # "ab c" over the left half of a line: the right half is padding
    a, b, c, space = (LETTERS.index(letter) for letter in "abc ")
    indices = [0, 0, a, a, b, 0, space, 0, 0, 0, c, c, 0, 0, 0, 0, 0, 0, 0, 0] + [0] * 20
    scores = [{2: 0.9, 4: 0.7, 6: 0.2, 10: 0.8}.get(step, 0.5) for step in range(40)]
    text, line = _line(indices, scores, LETTERS, steps=20)
    assert text == "ab c"
    quad = np.array([[100, 50], [300, 50], [300, 70], [100, 70]], float)
    first, second = words_of_line(text, line, quad)
    assert (first.text, second.text) == ("ab", "c")
    assert first.score == pytest.approx(0.8)
    assert second.score == pytest.approx(0.8)
    assert first.corners[:, 0].mean() == pytest.approx(100 + 200 * 3.5 / 20)
    assert second.corners[:, 0].mean() == pytest.approx(100 + 200 * 10.5 / 20, abs=1)
    assert _line([a, 0, a, a], [1] * 4, LETTERS, 4)[0] == "aa"
    assert _line([0, 0], [1, 1], LETTERS, 2)[1].words == []


def test_padding_to_the_right_of_a_line_is_ignored(expert):
    expert.load()
    with torch.inference_mode():
        (_, short), (_, long) = expert._recognize([photograph((100, 30)), photograph((400, 30))])
    assert short.line_txt_len == 20  # 160 of 320 pixels, at 8 pixels a step
    assert long.line_txt_len == 80


def test_a_slanted_line_is_straightened():
    image = Image.new("RGB", (100, 100), "white")
    ImageDraw.Draw(image).rectangle((20, 40, 80, 60), fill="red")
    quad = np.array([[20, 40], [81, 40], [81, 61], [20, 61]], float)
    flat = cut_out(image, quad)
    assert flat.size == (61, 21)
    assert np.asarray(flat)[3:-3, 3:-3].reshape(-1, 3).tolist() == [[255, 0, 0]] * (55 * 15)
    upright = cut_out(image, np.roll(quad, -1, axis=0))
    assert upright.size == (21, 61)


def test_it_is_saved_and_restored_with_its_models(expert, tmp_path):
    image = photograph((120, 60))
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["ocr"]
    assert restored.detector == str(tmp_path / "experts" / "ocr" / "det")
    assert restored([image])[0]["words"] == expert([image])[0]["words"]
    default = PpOcrText()
    assert expert_from_dict(default.to_dict()).to_dict() == default.to_dict()
    with pytest.raises(ValueError, match="min_line_score 2"):
        PpOcrText(min_line_score=2)
