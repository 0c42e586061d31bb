"""`load_rows` reads folders, published lists, data sets and tars, with the keys of the label store."""

import importlib
import json
import logging
import shutil
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader

from modeling_prismer import TASKS, Task, processing, register_task
from modeling_prismer.processing import data
from modeling_prismer.processing.data import group_by_image, images_of, load_rows, read_class_names
from modeling_prismer.processing.data.rows import RowMaker
from modeling_prismer.processing.labels import open_source
from tests.processing.data.data_files import (
    captioned,
    columns,
    example_image,
    png,
    values_of,
    write_csv,
    write_images,
    write_json,
    write_tar,
)


pytestmark = pytest.mark.usefixtures("cache")


# ---- your own folder ----


def test_each_caption_of_a_folder_is_a_row(folder):
    rows = load_rows(captioned(folder), "caption")
    assert rows.column_names == ["image", "image_id", "suffix", "weight"]
    assert columns(rows, "image_id", "suffix", "weight") == [("a.png", "a cat", 1.0), ("b.png", "a dog, asleep", 1.0)]
    assert rows.features["image"] == datasets.Image()
    np.testing.assert_array_equal(np.asarray(rows[1]["image"]), np.asarray(example_image(1)))


def test_keys_are_those_of_prismer_label(folder):
    write_images(folder, "a.png", "summer/sea/b.png", "summer/c.png")
    names = ["a.png", "summer//sea/../sea/b.png", str(folder / "summer" / "c.png")]
    write_csv(folder / "captions.csv", ("image", "caption"), *((name, "x") for name in names))
    keys = [key for key, _ in open_source(str(folder))]
    assert sorted(load_rows(str(folder))["image_id"]) == sorted(keys)


@pytest.mark.parametrize("image", ["image", "file_name", "filename", "path", "Image"])
@pytest.mark.parametrize("caption", ["caption", "text", "description"])
def test_usual_column_names_are_known(folder, image, caption):
    assert len(load_rows(captioned(folder, (image, caption)))) == 2


def test_own_task_has_its_own_columns(folder):
    write_images(folder, "a.png")
    write_csv(
        folder / "places.csv", ("image", "phrase", "place"), ("a.png", "red cube", "left"), ("a.png", "it", "top")
    )
    with mock.patch.dict(TASKS):
        register_task(Task("pointing", prompt_column="phrase", suffix_column="place"))
        rows = load_rows(str(folder), "pointing")
        assert columns(rows, "text", "suffix", "weight") == [("red cube", "left", 1.0), ("it", "top", 1.0)]
        assert columns(load_rows(str(folder), "pointing", train=False), "text", "references")[1] == ("it", ["top"])
        renamed = load_rows(str(folder), "pointing", phrase_column="place", place_column="phrase")
        assert renamed["text"][:] == ["left", "top"]
    with pytest.raises(TypeError, match="load_rows got phrase_column; 'vqa' has the columns question, answer"):
        load_rows(str(folder), "vqa", phrase_column="place")


def test_other_columns_can_be_named(folder):
    captioned(folder, ("photo", "what it shows"))
    rows = load_rows(str(folder), image_column="photo", caption_column="what it shows")
    assert rows["suffix"][:] == ["a cat", "a dog, asleep"]


def test_path_can_combine_columns(folder):
    write_images(folder, "x/1.png", "y/1.png")
    write_json(folder / "list.json", [{"set": name, "number": 1, "caption": "p"} for name in "xy"])
    for source in (folder, folder / "list.json"):
        rows = load_rows(source, image_column="{set}/{number}.png")
        assert rows["image_id"][:] == ["x/1.png", "y/1.png"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_spreadsheets_is_read(folder, delimiter):
    captioned(folder, delimiter=delimiter)
    file = folder / "captions.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_rows(str(folder))["suffix"][:] == ["a cat", "a dog, asleep"]


@pytest.mark.parametrize("answers", [["007", "1.50"], ["None", "NA", "nan"], ["true", "2024-01-02", "1"]])
def test_texts_that_look_like_numbers_stay_texts(folder, answers):
    write_images(folder, "a.png")
    write_csv(folder / "q.csv", ("image", "question", "answer"), *(("a.png", "what?", answer) for answer in answers))
    assert load_rows(str(folder), "vqa")["suffix"][:] == answers


def test_tsv_needs_no_header_and_no_quotes(folder):
    write_images(folder, "a.png", "b.png")
    (folder / "list.tsv").write_text('"a cat\ta.png\na "dog\tb.png\n')
    rows = load_rows(str(folder))
    assert columns(rows, "image_id", "suffix") == [("a.png", '"a cat'), ("b.png", 'a "dog')]


def test_several_captions_are_rows_or_references(folder):
    write_images(folder, "a.png", "b.png")
    write_json(
        folder / "c.jsonl", [{"image": "a.png", "captions": ["p", "q"]}, {"image": "b.png", "captions": ["r"]}], True
    )
    assert columns(load_rows(str(folder)), "image_id", "suffix") == [("a.png", "p"), ("a.png", "q"), ("b.png", "r")]
    rows = load_rows(str(folder), train=False)
    assert rows.column_names == ["image", "image_id", "references"]
    assert columns(rows, "image_id", "references") == [("a.png", ["p", "q"]), ("b.png", ["r"])]


def test_image_with_several_lines_is_evaluated_once(folder):
    write_images(folder, "a.png", "b.png")
    lines = (("a.png", "p"), ("b.png", "q"), ("./a.png", "r"))
    write_csv(folder / "c.csv", ("image", "caption"), *lines)
    rows = load_rows(str(folder), train=False)
    assert columns(rows, "image_id", "references") == [("a.png", ["p", "r"]), ("b.png", ["q"])]


def test_distinct_answers_are_rows_weighted_by_share(folder):
    write_images(folder, "a.png")
    write_json(
        folder / "q.jsonl", [{"image": "a.png", "question": "How many?", "answer": ["2", "two", "2", "2"]}], True
    )
    rows = load_rows(str(folder), "vqa")
    assert columns(rows, "text", "suffix", "weight") == [("How many?", "2", 0.75), ("How many?", "two", 0.25)]
    rows = load_rows(str(folder), "vqa", train=False)
    assert columns(rows, "text", "references") == [("How many?", ["2", "two", "2", "2"])]


def test_answers_of_mixed_types_become_texts(folder):
    write_images(folder, "a.png")
    questions = [{"image": "a.png", "question": "How many?", "answer": answer} for answer in (2, "two", ["3", "3"])]
    write_json(folder / "q.jsonl", questions, lines=True)
    assert load_rows(str(folder), "vqa")["suffix"][:] == ["2", "two", "3"]


def test_question_id_defaults_to_the_row_number(folder):
    write_images(folder, "a.png")
    lines = [("a.png", "Who?", "cat"), ("a.png", "Where?", "bed"), ("a.png", "Who?", "pet")]
    write_csv(folder / "q.csv", ("image", "question", "answer"), *lines)
    rows = load_rows(str(folder), "vqa", train=False)
    assert columns(rows, "question_id", "text", "references") == [(0, "Who?", ["cat", "pet"]), (1, "Where?", ["bed"])]
    write_json(folder / "numbered.jsonl", [{"image": "a.png", "question": "Who?", "question_id": "x7"}], lines=True)
    rows = load_rows(str(folder / "numbered.jsonl"), "vqa", train=False)
    assert columns(rows, "question_id") == ["x7"]


@pytest.mark.parametrize("streaming", [False, True])
def test_further_columns_are_kept_as_texts(folder, streaming):
    write_images(folder, "a.png", "b.png")
    lines = [("a.png", "Who?", "cat", "7"), ("b.png", "Red?", "no", "yes/no"), ("b.png", "Red?", "pink", "other")]
    write_csv(folder / "q.csv", ("image", "question", "answer", "answer type"), *lines)
    settings = {"kept_columns": ["answer type"], "streaming": streaming}
    rows = load_rows(str(folder), "vqa", **settings)
    assert columns(rows, "suffix", "answer type") == [("cat", "7"), ("no", "yes/no"), ("pink", "other")]
    rows = load_rows(str(folder), "vqa", train=False, **settings)
    assert columns(rows, "answer type") == ["7", "yes/no", "other"][: 3 if streaming else 2]
    # a column can also be kept under a name that means something else
    settings["kept_columns"], settings["answer_column"] = ["answer"], "answer type"
    rows = load_rows(str(folder), "vqa", **settings)
    assert columns(rows, "suffix", "answer")[0] == ("7", "cat")


def test_kept_columns_must_exist_and_be_free(folder):
    with pytest.raises(ValueError, match="has no column 'kind'; it has image, caption"):
        load_rows(captioned(folder), "caption", kept_columns=["kind"])
    write_csv(folder / "captions.csv", ("image", "caption", "weight"), ("a.png", "a cat", "1"))
    with pytest.raises(ValueError, match="kept_columns has 'weight', which rows have with another content"):
        load_rows(str(folder), "caption", kept_columns=["weight"])
    write_csv(folder / "captions.csv", ("image", "caption", "kind"), ("a.png", "a cat", ""))
    with pytest.raises(ValueError, match="the kind is empty"):
        load_rows(str(folder), "caption", kept_columns=["kind"])


def test_each_task_finds_its_list_in_a_folder(folder):
    captioned(folder)
    write_json(folder / "questions.jsonl", [{"image": "a.png", "question": "Who?", "answer": "cat"}], lines=True)
    write_json(folder / "notes.json", {"a": 1})
    assert load_rows(str(folder), "caption")["suffix"][0] == "a cat"
    assert load_rows(str(folder), "vqa")["suffix"][:] == ["cat"]
    (folder / "captions.csv").unlink()
    with pytest.raises(ValueError, match="no list in .* known as image, caption: notes.json has .*; questions.jsonl"):
        load_rows(str(folder), "caption", train=False)


def test_file_names_tell_the_split(folder):
    write_images(folder, "a.png")
    for name in ("train", "val", "test"):
        write_csv(folder / f"captions_{name}.csv", ("image", "caption"), ("a.png", f"of {name}"))
    assert load_rows(str(folder))["suffix"][:] == ["of train"]
    assert load_rows(str(folder), train=False)["references"][:] == [["of val"]]
    assert load_rows(str(folder), split="train+val")["suffix"][:] == ["of train", "of val"]
    assert load_rows(str(folder / "captions_train.csv"))["suffix"][:] == ["of train"]
    with pytest.raises(ValueError, match="no split 'dev2'; accepted are test, train, validation"):
        load_rows(str(folder), split="dev2")


def test_lists_of_a_glob_are_joined(tmp_path):
    write_images(tmp_path / "photos", "a.png")
    for i in range(3):
        write_csv(tmp_path / "photos" / f"part{i}.csv", ("image", "caption"), ("a.png", f"text {i}"))
    for streaming in (False, True):
        rows = load_rows(f"{tmp_path}/photos/*.csv", streaming=streaming)
        assert columns(rows, "image_id", "suffix") == [("a.png", f"text {i}") for i in range(3)]


def test_column_tells_the_split(folder):
    write_images(folder, "a.png")
    lines = [("a.png", "p", "train"), ("a.png", "q", "val"), ("a.png", "r", "train")]
    write_csv(folder / "list.csv", ("image", "caption", "split"), *lines)
    assert load_rows(str(folder))["suffix"][:] == ["p", "r"]
    assert load_rows(str(folder), train=False)["references"][:] == [["q"]]
    assert columns(load_rows(str(folder), split="val", streaming=True), "suffix") == ["q"]


def test_part_of_a_split_can_be_read(folder):
    write_images(folder, "a.png")
    write_csv(folder / "list.csv", ("image", "caption"), *(("a.png", f"text {i}") for i in range(10)))
    assert load_rows(str(folder), split="train[:90%]")["suffix"][:] == [f"text {i}" for i in range(9)]
    assert load_rows(str(folder), split="train[90%:]", train=False)["references"][:] == [["text 9"]]


def test_list_without_captions_is_for_prediction_only(folder):
    write_images(folder, "a.png")
    write_csv(folder / "list.csv", ("image", "size"), ("a.png", "8"))
    assert load_rows(str(folder), train=False).column_names == ["image", "image_id"]
    with pytest.raises(ValueError, match="no column that is known as caption: it has image, size; known are caption,"):
        load_rows(str(folder))


def test_max_rows_reads_the_first_rows(folder):
    assert load_rows(captioned(folder), max_rows=1)["suffix"][:] == ["a cat"]
    assert columns(load_rows(str(folder), max_rows=1, streaming=True), "suffix") == ["a cat"]


def test_streamed_list_gives_the_same_rows(folder):
    captioned(folder)
    for train in (True, False):
        rows, streamed = load_rows(str(folder), train=train), load_rows(str(folder), train=train, streaming=True)
        assert isinstance(streamed, datasets.IterableDataset)
        for row, other in zip(rows, streamed, strict=True):
            assert other.pop("image_number", None) is None
            assert np.array_equal(row.pop("image"), other.pop("image")) and row == other


# ---- bad input ----


def test_missing_images_are_named_before_training(folder):
    captioned(folder)
    (folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 rows .*\n.*row 2: .*b\.png is missing or empty"):
        load_rows(str(folder))
    load_rows(str(folder), check_images=False)


def test_missing_and_empty_images_can_be_skipped(folder, caplog):
    captioned(folder)
    (folder / "b.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert load_rows(str(folder), bad_rows="skip")["image_id"][:] == ["a.png"]
    assert "1 of 2 rows" in caplog.text and "b.png is missing or empty" in caplog.text
    assert columns(load_rows(str(folder), streaming=True), "image_id") == ["a.png"]
    write_images(folder, "a.png", "b.png")  # the file has been added
    assert len(load_rows(str(folder), bad_rows="skip")) == 2


def test_images_in_a_subfolder_are_suggested(folder):
    captioned(folder)
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).rename(folder / "images" / name)
    with pytest.raises(FileNotFoundError, match=r"a\.png is in .*images: give that as image_folder"):
        load_rows(str(folder))
    assert load_rows(str(folder), image_folder=folder / "images")["image_id"][:] == ["a.png", "b.png"]


@pytest.mark.parametrize("caption", ["", "  "])
def test_empty_caption_is_named_with_its_row(folder, caption):
    write_images(folder, "a.png")
    write_csv(folder / "list.csv", ("image", "caption"), ("a.png", "x"), ("a.png", caption))
    with pytest.raises(ValueError, match="row 2: the caption is empty"):
        load_rows(str(folder))
    assert load_rows(str(folder), bad_rows="skip")["suffix"][:] == ["x"]
    assert columns(load_rows(str(folder), streaming=True), "suffix") == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"image,caption\na.png,a cat, asleep\n",
            "row 1: line 2 has 3 fields, but there are 2 columns.*double quotes",
        ),
        (
            b"image,caption\na.png,a cat\na.png,a cat, asleep\n",
            "row 2: line 3 has 3 fields, but there are 2 columns.*double quotes",
        ),
        ("image,caption\na.png,café\n".encode("latin-1"), "not in UTF-8"),
        (b"", "list.csv is empty"),
        (b"photo,words\na.png,x\n", "no list in .* known as image, caption: list.csv has .'photo', 'words'."),
    ],
)
def test_unreadable_csv_says_why(folder, content, message):
    write_images(folder, "a.png")
    (folder / "list.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(folder))


def test_bad_arguments_tell_what_is_accepted(folder):
    captioned(folder)
    write_csv(folder / "more.csv", ("image", "caption"), ("a.png", "x"))
    (folder / "broken.json").write_text('[{"image": "a.png", caption}]')
    for arguments, message in (
        (("nowhere.csv",), "accepted are a folder, lists"),
        ((str(folder / "nowhere"),), "is not a readable file|neither a file or folder"),
        ((str(folder / "broken.json"),), "broken.json cannot be read: Expecting"),
        ((str(folder),), "several lists fit: .*captions.csv.*more.csv"),
        ((str(folder), "painting"), "task is 'painting'; accepted are 'caption', 'vqa', 'classification'"),
        ((str(folder / "more.csv"), "vqa"), "no column that is known as question"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_rows(*arguments)
    with pytest.raises(ValueError, match="has no column 'words'; it has image, caption"):
        load_rows(str(folder / "more.csv"), caption_column="words")


def test_changed_code_does_not_use_cached_rows(folder, tmp_path, monkeypatch):
    captioned(folder)
    fingerprint = load_rows(str(folder))._fingerprint
    assert load_rows(str(folder))._fingerprint == fingerprint
    monkeypatch.setattr(RowMaker.__init__, "__defaults__", (None, False, False, "other code"))
    assert load_rows(str(folder))._fingerprint != fingerprint
    copy = shutil.copytree(Path(data.__file__).parent, tmp_path / "changed_data")
    (copy / "images.py").write_text((copy / "images.py").read_text() + "# changed\n")
    monkeypatch.setattr(processing, "__path__", [*processing.__path__, str(tmp_path)])
    changed = importlib.import_module("modeling_prismer.processing.changed_data.rows")
    assert changed.RowMaker.code != RowMaker.code


# ---- the published lists ----


def test_karpathy_list_of_coco(folder):
    names = ["COCO_val2014_000000000042.jpg", "COCO_train2014_000000000007.jpg", "COCO_val2014_000000000009.jpg"]
    write_images(folder, *(f"{name.split('_')[1]}/{name}" for name in names))
    images = [
        {
            "filepath": name.split("_")[1],
            "filename": name,
            "split": split,
            "cocoid": int(name[-16:-4]),
            "sentences": [{"raw": f"{split} {i}", "tokens": [split], "imgid": 0, "sentid": i} for i in range(2)],
        }
        for name, split in zip(names, ("test", "train", "restval"))
    ]
    path = write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    rows = load_rows(path, split="train+restval")
    assert columns(rows, "image_id", "suffix") == [
        (f"{name.split('_')[1]}/{name}", f"{split} {i}")
        for name, split in zip(names[1:], ("train", "restval"))
        for i in range(2)
    ]
    rows = load_rows(path, split="test", train=False)
    assert columns(rows, "image_number", "references") == [(42, ["test 0", "test 1"])]


def test_flat_karpathy_list_has_the_ids_of_coco(folder):
    write_images(folder, "val2014/COCO_val2014_000000000042.jpg")
    entry = {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["p", "q"], "image_id": "coco_42"}
    path = write_json(folder / "coco_karpathy_test.json", [entry])
    assert columns(load_rows(path, train=False), "image_number", "references") == [(42, ["p", "q"])]


def test_list_of_coco_or_nocaps(folder):
    write_images(folder, "p.jpg", "q.jpg")
    images = [{"id": 5, "file_name": "p.jpg", "width": 8}, {"id": 3, "file_name": "q.jpg", "width": 8}]
    captions = [{"id": i, "image_id": 5 - 2 * (i % 2), "caption": f"text {i}"} for i in range(4)]
    path = write_json(folder / "nocaps_val.json", {"info": {}, "images": images, "annotations": captions})
    assert columns(load_rows(path), "image_id", "suffix")[:2] == [("p.jpg", "text 0"), ("q.jpg", "text 1")]
    rows = load_rows(path, train=False)
    assert columns(rows, "image_id", "image_number", "references") == [
        ("p.jpg", 5, ["text 0", "text 2"]),
        ("q.jpg", 3, ["text 1", "text 3"]),
    ]
    path = write_json(folder / "nocaps_test_image_info.json", {"info": {}, "images": images})
    assert columns(load_rows(path, train=False), "image_number") == [5, 3]


def vqa_files(folder, split="train2014", answers=True):
    questions = [
        {"image_id": 9, "question": "Red?", "question_id": 91},
        {"image_id": 4, "question": "Who?", "question_id": 40},
    ]
    path = write_json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"info": {}, "questions": questions})
    given = {91: ["yes"] * 7 + ["no"] * 3, 40: ["cat"] * 10}
    annotations = [
        {
            "question_id": number,
            "multiple_choice_answer": given[number][0],
            "answer_type": "other" if number == 40 else "yes/no",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(texts)
            ],
        }
        for number, texts in given.items()
    ]
    if answers:
        write_json(folder / f"v2_mscoco_{split}_annotations.json", {"info": {}, "annotations": annotations})
    return path


def test_vqa_v2(folder):
    write_images(folder, *(f"train2014/COCO_train2014_{number:012d}.jpg" for number in (4, 9)))
    vqa_files(folder)
    rows = load_rows(str(folder), "vqa")
    assert columns(rows, "image_id", "text", "suffix") == [
        ("train2014/COCO_train2014_000000000004.jpg", "Who?", "cat"),
        ("train2014/COCO_train2014_000000000009.jpg", "Red?", "yes"),
        ("train2014/COCO_train2014_000000000009.jpg", "Red?", "no"),
    ]
    assert rows["weight"][:] == pytest.approx([1.0, 0.7, 0.3])
    rows = load_rows(str(folder), "vqa", train=False)
    assert columns(rows, "question_id", "image_number") == [(40, 4), (91, 9)]
    assert rows["references"][1] == ["yes"] * 7 + ["no"] * 3
    assert load_rows(str(folder), "vqa", kept_columns=["answer_type"])["answer_type"][:2] == ["other", "yes/no"]


def test_vqa_v2_test_questions_have_no_answers(folder):
    write_images(folder, *(f"COCO_test2015_{number:012d}.jpg" for number in (4, 9)))  # all in one folder
    rows = load_rows(vqa_files(folder, "test-dev2015", answers=False), "vqa", train=False)
    assert "references" not in rows.column_names
    assert columns(rows, "image_id", "question_id")[0] == ("COCO_test2015_000000000004.jpg", 40)


def test_vqa_v2_without_annotations_is_refused(folder):
    path = vqa_files(folder, answers=False)
    with pytest.raises(FileNotFoundError, match="v2_mscoco_train2014_annotations.json with the answers is missing"):
        load_rows(path, "vqa")
    write_json(folder / "v2_mscoco_train2014_annotations.json", {"annotations": [{"question_id": 1, "answers": []}]})
    with pytest.raises(ValueError, match="has 1 questions, other than the 2 of"):
        load_rows(path, "vqa")


def test_visual_genome_has_a_fifth_of_the_weight_of_vqa_v2(folder):
    write_images(folder, "VG_100K/1.jpg", "VG_100K_2/2.jpg", *(f"COCO_train2014_{i:012d}.jpg" for i in (4, 9)))
    entries = [
        {"id": 1, "qas": [{"qa_id": 1, "image_id": 1, "question": "What?", "answer": "A clock.", "a_objects": []}]},
        {"id": 2, "qas": [{"qa_id": 2, "image_id": 2, "question": "Where?", "answer": "There", "a_objects": []}]},
    ]
    path = write_json(folder / "question_answers.json", entries)
    rows = load_rows([vqa_files(folder), path], "vqa", image_folder=str(folder))
    assert columns(rows, "image_id", "text", "suffix")[3:] == [
        ("VG_100K/1.jpg", "What?", "A clock"),
        ("VG_100K_2/2.jpg", "Where?", "There"),
    ]
    assert rows["weight"][:] == pytest.approx([1.0, 0.7, 0.3, 0.2, 0.2])
    regions = [{"id": 2, "regions": [{"region_id": 1, "image_id": 2, "phrase": "the clock is green", "x": 1}]}]
    rows = load_rows(write_json(folder / "region_descriptions.json", regions), "caption", image_folder=str(folder))
    assert columns(rows, "image_id", "suffix") == [("VG_100K_2/2.jpg", "the clock is green")]


# ---- classes ----


@pytest.fixture
def classes(tmp_path):
    """Class folders with six and five images."""
    folder = tmp_path / "classes"
    write_images(folder, *(f"train/n01/{i}.png" for i in range(6)), *(f"train/n02/{i}.png" for i in range(5)))
    return folder / "train"


def test_class_folders(classes):
    rows = load_rows(str(classes), "classification")
    assert columns(rows, "image_id", "suffix")[5:7] == [("n01/5.png", "n01"), ("n02/0.png", "n02")]
    assert sorted(rows["image_id"]) == sorted(key for key, _ in open_source(str(classes)))
    row = load_rows(str(classes), "classification", train=False)[0]
    assert row["suffix"] == "n01" and row["references"] == ["n01"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.json", '{"n01": "tench", "n02": "great white_shark"}'),
        ("index.json", '{"0": ["n01", "tench"], "1": ["n02", "great_white_shark"]}'),
        ("names.txt", "n01 tench, Tinca tinca\nn02 great white shark, white shark\n"),
    ],
)
def test_class_names_in_words_are_used(classes, tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert read_class_names(tmp_path / file) == {"n01": "tench", "n02": "great white shark"}
    rows = load_rows(str(classes), "classification", class_names=str(tmp_path / file))
    assert set(rows["suffix"]) == {"tench", "great white shark"}


def test_class_without_a_name_is_an_error(classes):
    with pytest.raises(ValueError, match="class 'n02' is not among the 1 of class_names"):
        load_rows(str(classes), "classification", class_names={"n01": "tench"})


def test_shots_depend_on_the_seed_only(classes):
    first = load_rows(str(classes), "classification", shots=3, seed=1)
    assert [first["suffix"][:].count(name) for name in ("n01", "n02")] == [3, 3]
    assert first["image_id"][:] == load_rows(str(classes), "classification", shots=3, seed=1)["image_id"][:]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    paths = sorted(str(path) for path in classes.rglob("*.png"))
    draws = []
    for ordered in (paths, paths[::-1]):
        rows = {"image": ordered, "label": [path.split("/")[-2] for path in ordered]}
        rows = load_rows(datasets.Dataset.from_dict(rows, features), "classification", shots=2, image_folder=classes)
        draws.append(sorted(rows["image_id"]))
    assert draws[0] == draws[1]
    others = {tuple(load_rows(str(classes), "classification", shots=3, seed=seed)["image_id"]) for seed in range(4)}
    assert len(others) > 1
    with pytest.raises(ValueError, match="class 'n02' has 5 rows; each needs at least 6"):
        load_rows(str(classes), "classification", shots=6)


def test_class_numbers_of_a_data_set_become_names():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    dataset = datasets.Dataset.from_dict({"image": [example_image(0), example_image(1)], "label": [1, 0]}, features)
    assert load_rows(dataset, "classification")["suffix"][:] == ["dog", "cat"]


# ---- data sets ----


def data_set(captions, **more):
    """A data set that contains the bytes of its images."""
    texts = datasets.List(datasets.Value("string")) if isinstance(captions[0], list) else datasets.Value("string")
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(i)} for i in range(len(captions))], "caption": captions}
    )
    dataset = dataset.cast(datasets.Features({"image": datasets.Image(), "caption": texts}))
    for name, values in more.items():
        dataset = dataset.add_column(name, values)
    return dataset


@pytest.mark.parametrize("kind", ["object", "save_to_disk", "parquet", "parquet file"])
@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_with_images(tmp_path, kind, streaming):
    folder = tmp_path / "data"
    folder.mkdir()
    dataset = source = data_set(["p", "q", "r"], image_id=[7, 8, 9])
    if kind == "object" and streaming:
        source = dataset.to_iterable_dataset()
    elif kind == "save_to_disk":
        dataset.save_to_disk(folder)
    elif kind != "object":
        dataset.to_parquet(folder / "train-00000.parquet")
    if kind == "parquet file":
        source = str(folder / "train-00000.parquet")
    elif kind != "object":
        source = folder
    rows = load_rows(source, streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset) == streaming
    assert columns(rows, "image_id", "suffix") == [("7", "p"), ("8", "q"), ("9", "r")]
    assert values_of(rows) == [0, 1, 2]
    assert columns(load_rows(source, train=False, streaming=streaming), "image_number") == [7, 8, 9]


def test_saved_splits_are_chosen_by_the_syntax_of_datasets(folder):
    datasets.DatasetDict({"train": data_set(["p", "q"]), "test": data_set(["r"])}).save_to_disk(folder)
    assert load_rows(str(folder), split="train[1:]+test")["suffix"][:] == ["q", "r"]
    assert columns(load_rows(str(folder), split="train+test", streaming=True), "suffix") == ["p", "q", "r"]
    with pytest.raises(ValueError, match="a stream has whole splits only: train, test"):
        load_rows(str(folder), split="train[1:]", streaming=True)


def test_images_without_names_have_row_numbers_as_keys(tmp_path):
    dataset = data_set(["p", "q", "r"])
    keys = [key for key, _ in open_source(dataset)]
    assert load_rows(dataset)["image_id"][:] == keys
    assert load_rows(dataset, split="train[1:]")["image_id"][:] == keys[1:]
    assert "image_id" not in next(iter(load_rows(dataset, streaming=True)))


def test_images_with_several_texts_are_not_copied(tmp_path):
    dataset = data_set([["p", "q"], ["r"]], name=["x", "y"])
    rows = load_rows(dataset, key_column="name")
    assert "image" not in rows.column_names and "image_row" not in rows[0]
    assert columns(rows, "image_id", "suffix") == [("x", "p"), ("x", "q"), ("y", "r")]
    assert values_of(rows) == [0, 0, 1] and values_of(rows.select([2, 0])) == [1, 0]
    assert values_of(load_rows(dataset, max_rows=1)) == [0]
    loader = DataLoader(rows, batch_size=None, num_workers=1)
    assert values_of(loader) == [0, 0, 1]
    rows = load_rows(dataset, train=False)
    assert rows["references"][:] == [["p", "q"], ["r"]] and values_of(rows) == [0, 1]


def test_images_of_rows_can_be_labelled(folder):
    several = load_rows(data_set([["p", "q"], ["r"], ["s"]]))
    for rows in (several, several.select([3]), several.select([1, 0]), load_rows(captioned(folder))):
        images = images_of(rows)
        keys = [key for key, _ in open_source(images, key_column="image_id")]
        assert sorted(keys) == sorted(set(rows["image_id"]))
        assert set(images[0]["image"]) == {"bytes", "path"}


def test_data_set_with_an_empty_image_is_refused():
    dataset = data_set(["p", "q"]).map(lambda row, i: {"image": row["image"] if i else None}, with_indices=True)
    with pytest.raises((ValueError, FileNotFoundError), match="empty|missing"):
        load_rows(dataset)


def test_imagefolder_with_metadata_is_read(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has \* \? or \[ in its name"):
        load_rows(str(folder))
    folder = tmp_path / "photos"
    for split in ("train", "test"):
        write_images(folder / split, "a.png")
        write_csv(folder / split / "metadata.csv", ("file_name", "text"), ("a.png", f"of {split}"))
    rows = load_rows(str(folder))
    assert columns(rows, "image_id", "suffix") == [("train/a.png", "of train")]


def test_rows_of_an_image_can_be_grouped(folder):
    write_images(folder, "a.png", "b.png")
    entries = [("a.png", "p?", "1"), ("a.png", "r?", "3"), ("b.png", "q?", "2")]
    write_csv(folder / "q.csv", ("image", "question", "answer"), *entries)
    grouped = group_by_image(load_rows(str(folder), "vqa"))
    assert columns(grouped, "image_id", "text", "suffix", "weight") == [
        ("a.png", ["p?", "r?"], ["1", "3"], [1.0, 1.0]),
        ("b.png", ["q?"], ["2"], [1.0]),
    ]
    assert values_of(grouped) == [0, 1] and images_of(grouped)["image_id"][:] == ["a.png", "b.png"]
    grouped = group_by_image(load_rows(data_set([["p", "q"], ["r"]])))
    assert grouped["suffix"][:] == [["p", "q"], ["r"]] and values_of(grouped) == [0, 1]
    grouped = group_by_image(load_rows(data_set(["p", "q", "r"], image_id=["x", "y", "x"])))
    assert grouped["suffix"][:] == [["p", "r"], ["q"]] and values_of(grouped) == [0, 1]
    with pytest.raises(ValueError, match="rows of a stream cannot be grouped"):
        group_by_image(load_rows(str(folder), "vqa", streaming=True))


# ---- tars ----


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        members = {}
        for i in range(2):
            members[f"{i:04d}.png"] = png(2 * number + i)
            members[f"{i:04d}.txt"] = f"text {2 * number + i}".encode()
        write_tar(folder / f"{number:05d}.tar", members)
        write_json(folder / f"{number:05d}_stats.json", {"count": 2})
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_give_captions_and_keys_of_prismer_label(tars, streaming):
    for source in (str(tars), f"{tars}/*.tar"):
        rows = load_rows(source, streaming=streaming)
        assert columns(rows, "suffix") == [f"text {i}" for i in range(4)] and values_of(rows) == [0, 1, 2, 3]
        assert columns(rows, "image_id") == [key for key, _ in open_source(str(tars))]
    assert columns(load_rows(str(tars / "00001.tar"), streaming=streaming), "suffix") == ["text 2", "text 3"]


def test_streamed_tars_are_split_among_workers(tars):
    write_tar(tars / "00000.tar", {"0.png": png(0), "0.txt": b"text 0", "1.png": b"<html>", "1.txt": b"text 1"})
    rows = load_rows(str(tars), streaming=True)
    assert rows.num_shards == 2
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    assert sorted(columns(loader, "suffix")) == ["text 0", "text 2", "text 3"]


def test_questions_can_be_in_the_json_of_a_sample(folder):
    content = json.dumps({"question": "Who?", "answers": ["cat", "dog"]}).encode()
    write_tar(folder / "a.tar", {"0.png": png(0), "0.json": content})
    for streaming in (False, True):
        rows = load_rows(str(folder), "vqa", streaming=streaming)
        assert columns(rows, "text", "suffix", "weight") == [("Who?", "cat", 0.5), ("Who?", "dog", 0.5)]
        assert values_of(rows) == [0, 0]


def test_sources_of_different_kinds_can_be_joined(folder, tars):
    captioned(folder)
    rows = load_rows([str(folder), str(tars)], streaming=True)
    assert columns(rows, "suffix")[:3] == ["a cat", "a dog, asleep", "text 0"]
    rows = load_rows([str(folder), data_set(["p"])])
    assert rows["suffix"][:] == ["a cat", "a dog, asleep", "p"]
    with pytest.raises(ValueError, match="can only be joined with streaming=True"):
        load_rows([str(folder), data_set([["p", "q"]])])
    with pytest.raises(ValueError, match="3 image folders for 2 sources"):
        load_rows([str(tars), str(tars)], image_folder=["a", "b", "c"])


def test_rows_are_on_disk(folder):
    write_images(folder, "a.png")
    write_csv(folder / "list.csv", ("image", "caption"), *(("a.png", f"text {i}") for i in range(50_000)))
    before = pa.total_allocated_bytes()
    rows = load_rows(str(folder))
    assert len(rows) == 50_000 and rows.cache_files
    assert pa.total_allocated_bytes() - before < 100_000  # the texts alone have 500,000
