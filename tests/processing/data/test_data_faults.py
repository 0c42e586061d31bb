"""Faulty rows are reported together before the training, or skipped."""

import logging
import os
import re

import datasets
import pytest
from PIL import Image

from modeling_prismer.processing import data
from modeling_prismer.processing.data import load_rows
from tests.processing.data.data_files import (
    columns,
    png,
    write_csv,
    write_images,
    write_json,
)


pytestmark = pytest.mark.usefixtures("cache")


def truncate(path):
    """Cuts a file with a noisy image in the middle, so that its header stays whole."""
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def faulty(folder):
    """A folder with a fault of every kind, and the expected message for each row."""
    write_images(folder, "good.png")
    truncate(folder / "torn.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_bytes(b"<html>not found</html>")
    (folder / "c.csv").write_bytes(
        b"image,caption\ngood.png,fine\ntorn.png,a\nmissing.png,b\nempty.png,c\npage.png,d\n,e\ngood.png, \n"
        b"good.png,a cat, asleep\ngood.png\ngood.png,caf\xe9\n.,f\ngood.png,also fine\n"
    )
    return {
        2: r"torn\.png' is truncated or damaged",
        3: r"missing\.png is missing or empty",
        4: r"empty\.png is missing or empty",
        5: r"page\.png' is not an image",
        6: r"the name of the image is empty",
        7: r"the caption is empty",
        8: r'line 9 has 3 fields, but there are 2 columns: image, caption.*","',
        9: r"line 10 has 1 fields",
        10: r"the caption .* is not in UTF-8; save the file as UTF-8",
        11: r"is a folder",
    }


def test_faults_of_all_kinds_are_reported_together(folder):
    expected = faulty(folder)
    with pytest.raises(ValueError) as error:
        load_rows(str(folder))
    lines = str(error.value).splitlines()
    assert lines[0].endswith(f"{len(expected)} of 12 rows cannot be used")
    for line, (row, message) in zip(lines[1:], expected.items()):
        assert re.search(rf"c\.csv, row {row}: .*{message}", line), (line, message)
    assert "bad_rows='skip'" in lines[-1] and len(lines) == len(expected) + 2


def test_skipped_rows_are_reported_in_the_same_way(folder, caplog):
    expected = faulty(folder)
    with caplog.at_level(logging.WARNING):
        assert load_rows(str(folder), bad_rows="skip")["suffix"][:] == ["fine", "also fine"]
    for row, message in expected.items():
        assert re.search(rf"row {row}: .*{message}", caplog.text)


def test_stream_skips_the_same_rows(folder, caplog):
    expected = faulty(folder)
    with caplog.at_level(logging.WARNING):
        assert columns(load_rows(str(folder), streaming=True), "suffix") == ["fine", "also fine"]
    for row, message in expected.items():
        assert re.search(rf"c\.csv, row {row}: .*{message}", caplog.text)
    with pytest.raises(ValueError, match="row 2: .*truncated"):
        list(load_rows(str(folder), streaming=True, bad_rows="error"))


def test_ten_faults_are_shown_and_all_are_counted(folder):
    write_images(folder, "a.png")
    write_csv(folder / "c.csv", ("image", "caption"), *(("a.png", "" if i else "x") for i in range(26)))
    with pytest.raises(ValueError) as error:
        load_rows(str(folder))
    lines = str(error.value).splitlines()
    assert "25 of 26 rows" in lines[0] and "row 11:" in lines[10] and lines[11].strip() == "… and 15 more"


def test_faults_of_several_sources_are_reported_together(folder):
    write_images(folder, "a.png")
    first = write_csv(folder / "first.csv", ("image", "caption"), ("a.png", ""))
    second = write_csv(folder / "second.csv", ("image", "caption"), ("b.png", "x"))
    with pytest.raises(
        ValueError, match=r"(?s)first\.csv, row 1: the caption.*second\.csv, row 1: .*b\.png is missing"
    ):
        load_rows([first, second])


def test_damaged_image_in_a_data_set_is_named_by_its_key(tmp_path):
    truncate(tmp_path / "torn.png")
    images = [{"bytes": png(0)}, {"bytes": (tmp_path / "torn.png").read_bytes()}, {"bytes": b""}]
    rows = {"image": images, "caption": [["p", "q"], ["r"], ["s"]], "id": ["x", "y", "z"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"(?s)2 of 4 rows.*row 2: 'y' is truncated.*row 3: the image is empty"):
        load_rows(dataset)
    assert load_rows(dataset, bad_rows="skip")["suffix"][:] == ["p", "q"]


def test_name_of_two_images_is_warned_about(caplog):
    rows = {"image": [{"bytes": png(i)} for i in (0, 0, 1)], "caption": ["p", "q", "r"], "id": [7, 7, 7]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    with caplog.at_level(logging.WARNING):
        load_rows(dataset)
    assert "1 images share their name with a different image, and so its labels: '7'" in caplog.text


def test_name_in_two_folders_is_refused(folder):
    for number, name in enumerate("xy"):
        (folder / name).mkdir()
        Image.effect_noise((8, 8), number + 1).save(folder / name / "a.png")
        write_csv(folder / name / "c.csv", ("image", "caption"), ("a.png", name))
    sources = [f"{folder}/x/c.csv", f"{folder}/y/c.csv"]
    with pytest.raises(ValueError, match=r"'a\.png' is an image of two data sets; give an image_folder above both"):
        load_rows(sources)
    write_csv(folder / "y" / "c.csv", ("image", "caption"), ("../y/a.png", "y"))
    assert len(load_rows([sources[0], sources[0]])) == 2
    write_csv(folder / "x" / "c.csv", ("image", "caption"), ("x/a.png", "x"))
    write_csv(folder / "y" / "c.csv", ("image", "caption"), ("y/a.png", "y"))
    assert load_rows(sources, image_folder=folder)["image_id"][:] == ["x/a.png", "y/a.png"]


def test_file_of_many_rows_is_opened_once(folder, monkeypatch):
    write_images(folder, "a.png", "b.png")
    write_csv(
        folder / "c.csv", ("image", "caption"), *((name, str(i)) for i in range(50) for name in ("a.png", "b.png"))
    )
    opened = []
    monkeypatch.setattr(data.images, "load_image", lambda image, name=None: opened.append(os.path.basename(image)))
    load_rows(str(folder))
    assert sorted(opened) == ["a.png", "b.png"]


def test_unclosed_quote_is_reported(folder):
    write_images(folder, "a.png", "b.png")
    (folder / "c.csv").write_text('image,caption\na.png,fine\na.png,"a cat\nb.png,a dog\n')
    with pytest.raises(ValueError, match="row 2: line 3 cannot be read: a double quote is never closed"):
        load_rows(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption\n", "c.csv, row 1: the file has no records"),
        ("image,l\xe9gende\na.png,x\n", "c.csv: the line of column names .* is not in UTF-8"),
    ],
)
def test_unreadable_table_is_named(folder, content, message):
    (folder / "c.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_rows(str(folder / "c.csv"), caption_column=None)


def test_two_columns_with_one_name_are_refused(folder):
    (folder / "c.csv").write_text("image,caption,caption\na.png,x,y\n")
    with pytest.raises(ValueError, match="two columns called 'caption'"):
        load_rows(str(folder / "c.csv"))


def test_faulty_lines_of_json_are_named(folder):
    write_images(folder, "a.png")
    lines = ['{"image": "a.png", "caption": "p"}', '{"image": "a.png", caption}', "[1]", "", '{"image": "a.png"}']
    lines += ['{"image": "a.png", "caption": "\\ud83d"}', '{"image": "a.png", "caption": ' + "[" * 100_000]
    lines += ['{"image": "a.png", "caption": "q", "weight": "much"}', '{"image": "a\\u0000.png", "caption": "x"}']
    (folder / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        load_rows(str(folder))
    for line in (
        "row 2: line 2 cannot be read: Expecting",
        "row 3: .*not an object",
        "row 4: the caption is empty",
        "row 5: .*half a character",
        "row 6: line 7 cannot be read: it is nested",
        "row 7: the weight is 'much'",
        "row 8: .*missing or empty",
    ):
        error.match(line)
    assert load_rows(str(folder), bad_rows="skip")["suffix"][:] == ["p"]


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("vqa", {"question": ["a?", "b?"], "answer": "x"}, "2 texts for the question; accepted is one per row"),
        (
            "vqa",
            {"question": "a?", "answers": [{"text": "x"}]},
            "the answer is an object with text; accepted",
        ),
        ("vqa", {"question": "a?", "answers": ["x", ""]}, "one of the 2 answers is empty"),
        ("classification", {"label": ["x", "y"]}, "2 texts for the class"),
        ("caption", {"caption": []}, "the caption is empty"),
    ],
)
def test_texts_are_not_dropped_silently(folder, task, record, message):
    write_images(folder, "a.png")
    path = write_json(folder / "c.jsonl", [{"image": "a.png", **record}], lines=True)
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        load_rows(path, task)


def test_json_without_records_is_named(folder):
    for content in ("{}", "[]", "3", '{"a": [{}], "b": [{}]}', '["a.png"]', "[" * 100_000):
        (folder / "c.json").write_text(content)
        with pytest.raises(ValueError, match="c.json"):
            load_rows(str(folder / "c.json"))


@pytest.mark.parametrize("hostile", ["/etc/passwd", "../../../etc/passwd", "/proc/self/fd/1", "/dev/zero", "a.png/x"])
def test_paths_outside_the_folder_that_are_no_images_fail(folder, hostile):
    write_images(folder, "a.png")
    write_csv(folder / "c.csv", ("image", "caption"), ("a.png", "x"), (hostile, "y"))
    with pytest.raises((ValueError, FileNotFoundError), match="row 2: "):
        load_rows(str(folder))
