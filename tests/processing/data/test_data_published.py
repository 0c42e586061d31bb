"""Published annotation files, unchanged from their sites. COCO, VQAv2 and Visual Genome are in test_data.py."""

import json

import pytest

from modeling_prismer.processing.data import load_rows
from tests.processing.data.data_files import columns, write_csv, write_images, write_json


pytestmark = pytest.mark.usefixtures("cache")


def write_below(folder, directory, *names):
    """Writes images into a directory of the folder, or the folder itself, and returns their keys."""
    names = [f"{directory}{name}" for name in names]
    write_images(folder, *names)
    return names


@pytest.mark.parametrize("directory", ["", "train_images/"])
@pytest.mark.parametrize("streaming", [False, True])
def test_textvqa(folder, directory, streaming):
    (image,) = write_below(folder, directory, "0054c91397f2fe05.jpg")
    entry = {
        "question": "what is the brand?",
        "image_id": "0054c91397f2fe05",
        "image_classes": ["Phone"],
        "flickr_original_url": "https://example.org/o.jpg",
        "image_width": 1024,
        "answers": ["nokia"] * 9 + ["1.0"],
        "question_tokens": ["what"],
        "question_id": 0,
        "set_name": "train",
    }
    content = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [entry]}
    path = write_json(folder / "TextVQA_0.5.1_train.json", content)
    rows = load_rows(path, "vqa", streaming=streaming)
    found = [(row["image_id"], row["text"], row["suffix"], round(row["weight"], 3)) for row in rows]
    assert found == [(image, "what is the brand?", "nokia", 0.9), (image, "what is the brand?", "1.0", 0.1)]
    rows = load_rows(path, "vqa", train=False)
    assert columns(rows, "question_id", "references") == [(0, ["nokia"] * 9 + ["1.0"])]
    assert load_rows(str(folder), "vqa")["text"][0] == "what is the brand?"


def test_textvqa_test_questions_have_no_answers(folder):
    write_below(folder, "test_images/", "a.jpg")
    entry = {"question": "what?", "image_id": "a", "question_id": 7, "set_name": "test"}
    path = write_json(folder / "TextVQA_0.5.1_test.json", {"dataset_type": "test", "data": [entry]})
    rows = load_rows(path, "vqa", train=False)
    assert columns(rows, "image_id", "question_id") == [("test_images/a.jpg", 7)]
    assert "references" not in rows.column_names


@pytest.mark.parametrize("directory", ["", "images/"])
def test_gqa(folder, directory):
    images = write_below(folder, directory, "2405722.jpg", "n1.jpg")
    entries = {
        "02930152": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
            "entailed": ["02930160"],
            "question": "Is the sky dark?",
            "imageId": "2405722",
            "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"},
            "answer": "yes",
            "fullAnswer": "Yes, the sky is dark.",
        },
        "7": {"question": "Who?", "imageId": "n1", "answer": "man", "fullAnswer": "The man."},
    }
    path = write_json(folder / "val_balanced_questions.json", entries)
    rows = load_rows(path, "vqa")
    assert columns(rows, "image_id", "text", "suffix") == [
        (images[0], "Is the sky dark?", "yes"),
        (images[1], "Who?", "man"),
    ]
    rows = load_rows(str(folder), "vqa", train=False)
    assert columns(rows, "question_id", "references") == [("02930152", ["yes"]), ("7", ["man"])]


@pytest.mark.parametrize("directory", ["", "train2017/"])
def test_aokvqa(folder, directory):
    (image,) = write_below(folder, directory, "000000299207.jpg")
    entry = {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi"],
        "difficult_direct_answer": False,
        "rationales": ["A train would not be on the street"],
    }
    path = write_json(folder / "aokvqa_v1p0_train.json", [entry])
    rows = load_rows(path, "vqa")
    assert columns(rows, "image_id", "suffix", "weight") == [
        (image, "ride", 0.5),
        (image, "bus", 0.25),
        (image, "taxi", 0.25),
    ]
    rows = load_rows(path, "vqa", train=False)
    assert columns(rows, "question_id", "references") == [(entry["question_id"], entry["direct_answers"])]
    for name in ("correct_choice_idx", "direct_answers", "rationales"):
        del entry[name]
    path = write_json(folder / "aokvqa_v1p0_test.json", [{**entry, "split": "test"}])
    write_images(folder, "000000299207.jpg")
    assert "references" not in load_rows(path, "vqa", train=False).column_names


def test_okvqa_has_the_layout_of_vqa_v2(folder):
    write_below(folder, "val2014/", "COCO_val2014_000000297147.jpg")
    questions = [{"image_id": 297147, "question": "What sport?", "question_id": 2971475}]
    answers = [{"answer": "race", "raw_answer": "racing", "answer_id": i} for i in range(10)]
    annotations = [{"image_id": 297147, "question_id": 2971475, "answers": answers, "question_type": "four"}]
    path = write_json(folder / "OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    write_json(folder / "mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})
    assert columns(load_rows(path, "vqa"), "text", "suffix", "weight") == [("What sport?", "race", 1.0)]


def test_flickr30k_separated_by_bars(folder):
    write_images(folder, "1000092795.jpg", "2199200615.jpg")
    lines = [
        "image_name| comment_number| comment",
        '1000092795.jpg| 0| Two young guys , with "shaggy" hair , look at their hands .',
        "1000092795.jpg| 1| Two men .",
        "2199200615.jpg| 4   A dog runs across the grass .",  # the published list has this line
    ]
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"results\.csv, row 3: line 4 has 2 fields, but there are 3 columns"):
        load_rows(str(folder))
    rows = load_rows(str(folder), bad_rows="skip")
    assert rows["suffix"][:] == [
        'Two young guys , with "shaggy" hair , look at their hands .',
        "Two men .",
    ]


@pytest.mark.parametrize("source", ["", "captions.txt"])
def test_flickr8k_separated_by_commas(folder, source):
    write_images(folder, "1000268201_693b08cb0e.jpg")
    name = "1000268201_693b08cb0e.jpg"
    (folder / "captions.txt").write_text(f'image,caption\n{name},A child .\n{name},"A girl , in pink ."\n')
    (folder / "readme.txt").write_text("no list")
    rows = load_rows(str(folder / source))
    assert columns(rows, "image_id", "suffix") == [(name, "A child ."), (name, "A girl , in pink .")]


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_flickr_token_files(folder, name, in_folder):
    write_images(folder, "1000_69.jpg", "2.jpg")
    lines = ['1000_69.jpg#0\tA child in a "pink" dress', "1000_69.jpg#1\tA girl, alone", "2.jpg#0\tA dog"]
    (folder / name).write_text("\n".join(lines) + "\n")
    rows = load_rows(str(folder if in_folder else folder / name))
    assert columns(rows, "image_id", "suffix") == [
        ("1000_69.jpg", 'A child in a "pink" dress'),
        ("1000_69.jpg", "A girl, alone"),
        ("2.jpg", "A dog"),
    ]
    rows = load_rows(str(folder), train=False)
    assert columns(rows, "references") == [['A child in a "pink" dress', "A girl, alone"], ["A dog"]]


def test_coco_ids_can_be_texts(folder):
    write_images(folder, "p.jpg", "q.jpg")
    images = [{"id": "x1", "file_name": "p.jpg"}, {"id": 2, "file_name": "q.jpg"}]
    captions = [{"image_id": "x1", "caption": "p"}, {"image_id": "2", "caption": "2.50"}]
    path = write_json(folder / "captions.json", {"images": images, "annotations": captions})
    assert columns(load_rows(path), "image_id", "suffix") == [("p.jpg", "p"), ("q.jpg", "2.50")]
    rows = load_rows(path, train=False)
    assert columns(rows, "image_id") == ["p.jpg", "q.jpg"] and "image_number" not in rows.column_names


def test_ambiguous_and_unknown_coco_ids_are_named(folder):
    write_images(folder, "p.jpg", "q.jpg", "r.jpg")
    images = [{"id": 1, "file_name": "p.jpg"}, {"id": 1, "file_name": "q.jpg"}]
    images += [{"id": 2, "file_name": "r.jpg"}] * 2
    captions = [{"image_id": i, "caption": f"text {i}"} for i in (1, 2, 3)]
    path = write_json(folder / "captions.json", {"images": images, "annotations": captions})
    with pytest.raises(ValueError) as error:
        load_rows(path)
    error.match("row 1: id 1 names two images, p.jpg and q.jpg")
    error.match("row 3: the caption belongs to image 3, which the list does not have")
    assert columns(load_rows(path, bad_rows="skip"), "image_id", "suffix") == [("r.jpg", "text 2")]


def test_missing_field_of_a_published_list_is_named(folder):
    path = write_json(folder / "captions.json", {"images": [{"id": 1}], "annotations": []})
    with pytest.raises(ValueError, match="captions.json differs from the published list: an entry has no 'file_name'"):
        load_rows(path, train=False)


def test_image_folder_added_later_is_found(folder):
    entry = {"question": "what?", "image_id": "a", "answers": ["x"], "question_id": 1, "set_name": "train"}
    path = write_json(folder / "TextVQA_0.5.1_train.json", {"data": [entry]})
    write_images(folder, "a.jpg")
    assert load_rows(path, "vqa")["image_id"][:] == ["a.jpg"]
    (folder / "a.jpg").unlink()
    write_images(folder, "train_images/a.jpg")
    assert load_rows(path, "vqa")["image_id"][:] == ["train_images/a.jpg"]


def test_own_list_can_have_fields_of_published_lists(folder):
    write_images(folder, "a.png")
    record = {"image": "a.png", "image_id": 7, "question": "q?", "answer": "x", "choices": ["x", "y"]}
    for content in ([record], {"data": [record]}):
        path = write_json(folder / "mine.json", content)
        assert columns(load_rows(path, "vqa"), "image_id", "suffix") == [("a.png", "x")]
    path = write_json(folder / "mine.jsonl", [record], lines=True)
    assert columns(load_rows(path, "vqa"), "image_id", "suffix") == [("a.png", "x")]


def test_json_in_a_csv_cell_stays_text(folder):
    write_images(folder, "a.png")
    path = write_csv(folder / "c.csv", ("image", "caption"), ("a.png", json.dumps(["p", "q"])))
    assert load_rows(path)["suffix"][:] == ['["p", "q"]']
