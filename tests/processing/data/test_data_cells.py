"""Cells of a data set: texts keep their form, and images come in every usual form."""

import base64
import json
import unicodedata

import datasets
import fsspec
import numpy as np
import pandas
import pytest
from datasets import ClassLabel, Features, List, Value
from PIL import Image

from modeling_prismer.processing.data import (
    load_rows,
    read_candidates,
    read_class_names,
)
from modeling_prismer.processing.labels import open_source
from tests.processing.data.data_files import (
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

# texts that a reader with type inference would change
WRITTEN = [
    "2",
    "2.5",
    "2.50",
    "1e5",
    "1.0",
    "007",
    "NaN",
    "None",
    "null",
    "true",
    "2023-05-04",
    "12:30",
    "-0",
    "1_000",
]


# ---- texts ----


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_answers_in_a_table_keep_their_text(folder, suffix):
    write_images(folder, "a.png")
    lines = [("image", "question", "answer"), *(("a.png", f"q{i}", answer) for i, answer in enumerate(WRITTEN))]
    write_csv(folder / f"list{suffix}", *lines, delimiter="\t" if suffix == ".tsv" else ",")
    assert load_rows(str(folder), "vqa")["suffix"][:] == WRITTEN


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_in_json_keep_their_text(folder, streaming):
    write_images(folder, "a.png")
    written = ["2", "2.5", "2.50", "1e5", "NaN", "true", '"2023-05-04"', '"007"', '"b"', "[1, 1.0]", '{"answer": 3}']
    line = '{{"image": "a.png", "question": "q{}", "answer": {}}}\n'
    (folder / "q.jsonl").write_text("".join(line.format(i, answer) for i, answer in enumerate(written)))
    rows = columns(load_rows(str(folder), "vqa", streaming=streaming), "suffix")
    assert rows == ["2", "2.5", "2.50", "1e5", "NaN", "true", "2023-05-04", "007", "b", "1", "1.0", "3"]


def test_question_ids_keep_their_text(folder):
    write_images(folder, "a.png")
    for ids, expected in (([1, "b2"], ["1", "b2"]), (["007", "8"], ["007", "8"]), ([7, 8], [7, 8])):
        lines = [{"image": "a.png", "question": str(value), "question_id": value} for value in ids]
        path = write_json(folder / "q.jsonl", lines, lines=True)
        assert columns(load_rows(path, "vqa", train=False), "question_id") == expected


def test_records_can_have_different_fields(folder):
    write_images(folder, "a.png")
    lines = [{"image": "a.png", "note": 1}, {"image": "a.png", "caption": "p", "note": [{"deep": 1}]}]
    path = write_json(folder / "c.jsonl", lines, lines=True)
    assert load_rows(path, bad_rows="skip")["suffix"][:] == ["p"]


CLASSES = ClassLabel(names=["no", "yes"])


def class_answers(feature, values):
    features = Features({"image": datasets.Image(), "question": Value("string"), "answers": feature})
    rows = {
        "image": [example_image(i) for i in range(len(values))],
        "question": ["q?"] * len(values),
        "answers": values,
    }
    return datasets.Dataset.from_dict(rows, features)


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (CLASSES, [1, 0]),
        (List(CLASSES), [[1], [0]]),
        (List({"answer": CLASSES}), [[{"answer": 1}], [{"answer": 0}]]),
        ({"answer": List(CLASSES)}, [{"answer": [1]}, {"answer": [0]}]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_class_numbers_as_answers_become_names(feature, values, streaming):
    dataset = class_answers(feature, values)
    assert columns(load_rows(dataset, "vqa", streaming=streaming), "suffix") == ["yes", "no"]


def test_class_numbers_as_captions_become_names():
    dataset = class_answers(CLASSES, [1, 0]).rename_column("answers", "caption")
    assert load_rows(dataset, "caption")["suffix"][:] == ["yes", "no"]


def test_missing_class_number_is_a_fault():
    dataset = class_answers(CLASSES, [1, -1])
    with pytest.raises(ValueError, match="row 2: the answer is empty"):
        load_rows(dataset, "vqa")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("list.json", '["yes", "no", 2, "yes"]', ["yes", "no", "2"]),
        ("list.json", json.dumps(["yes", "no"], indent=1), ["yes", "no"]),
        ("index.json", '{"yes": 0, "no": 1}', ["yes", "no"]),
        ("list.txt", '["yes", "no"]', ["yes", "no"]),
        ("list.txt", "\ufeffyes\r\nno\r\n\r\n", ["yes", "no"]),
    ],
)
def test_candidates_are_read_from_json_and_from_text(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_candidates(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "cannot be read"), ('["a", null]', "answer 2 is None"), ("[]", "has no answers"), ("null", "is None")],
)
def test_invalid_candidates_are_named(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=f"list.json.*{message}"):
        read_candidates(tmp_path / "list.json")


@pytest.mark.parametrize("content", ['["cat", "dog"]', '{"n01": 3}', '{"n01": [1, 2]}'])
def test_invalid_class_names_are_named(tmp_path, content):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match="names.json"):
        read_class_names(tmp_path / "names.json")


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table", "list"])
def test_every_orientation_of_pandas_is_read(folder, orient):
    write_images(folder, "a.png", "b.png")
    frame = pandas.DataFrame({"image": ["a.png", "b.png"], "caption": ["p", "q"]})
    content = json.dumps(frame.to_dict("list")) if orient == "list" else frame.to_json(orient=orient)
    (folder / "c.json").write_text(content)
    assert columns(load_rows(str(folder)), "image_id", "suffix") == [("a.png", "p"), ("b.png", "q")]


@pytest.mark.parametrize("orient", ["columns", "index"])
def test_pandas_orientation_is_found_with_other_column_names(folder, orient):
    write_images(folder, "a.png", "b.png")
    frame = pandas.DataFrame({"bild": ["a.png", "b.png"], "titel": ["p", "q"]})
    (folder / "c.json").write_text(frame.to_json(orient=orient))
    rows = load_rows(str(folder / "c.json"), image_column="bild", caption_column="titel")
    assert rows["suffix"][:] == ["p", "q"]


def test_content_tells_json_lines_from_json(folder):
    write_images(folder, "a.png")
    records = [{"image": "a.png", "caption": "p"}, {"image": "a.png", "caption": "q"}]
    write_json(folder / "lines.json", records, lines=True)
    write_json(folder / "list.jsonl", records)
    for name in ("lines.json", "list.jsonl"):
        assert load_rows(str(folder / name))["suffix"][:] == ["p", "q"]


def test_utf16_with_a_byte_order_mark_is_read(folder):
    write_images(folder, "a.png")
    (folder / "c.csv").write_bytes("image,caption\na.png,café\n".encode("utf-16"))
    assert load_rows(str(folder))["suffix"][:] == ["café"]


# ---- images ----


def encoded(number):
    return base64.b64encode(png(number)).decode()


def data_uri(number):
    return f"data:image/png;base64,{encoded(number)}"


def lines_of_base64(number):
    return base64.encodebytes(png(number)).decode()


def url_safe(number):
    return base64.urlsafe_b64encode(png(number)).decode().rstrip("=")


def in_object(number):
    return {"bytes": encoded(number), "path": f"{number}.png"}


def in_list(number):
    return [encoded(number)]


@pytest.mark.parametrize("write", [encoded, data_uri, lines_of_base64, url_safe, in_object, in_list])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_cells_of_json_lines(folder, write, streaming):
    lines = [{"image": write(i), "caption": f"text {i}", "id": f"n{i}"} for i in range(2)]
    rows = load_rows(write_json(folder / "c.jsonl", lines, lines=True), streaming=streaming)
    assert columns(rows, "image_id", "suffix") == [("n0", "text 0"), ("n1", "text 1")]
    assert values_of(rows) == [0, 1]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("write", [encoded, data_uri])
def test_images_in_cells_of_tables(folder, suffix, write):
    lines = [("image", "caption"), *((write(i), f"text {i}") for i in range(2))]
    rows = load_rows(write_csv(folder / f"c{suffix}", *lines, delimiter="\t" if suffix == ".tsv" else ","))
    assert values_of(rows) == [0, 1] and len(set(rows["image_id"])) == 2


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_cells_can_be_longer_than_a_megabyte(folder, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    cell = base64.b64encode((folder / "noise.png").read_bytes()).decode()
    assert len(cell) > 1 << 20
    if suffix in (".csv", ".tsv"):
        source = write_csv(
            folder / f"c{suffix}", ("image", "caption"), (cell, "p"), delimiter="\t" if suffix == ".tsv" else ","
        )
    else:
        source = write_json(folder / f"c{suffix}", [{"image": cell, "caption": "p"}], lines=suffix == ".jsonl")
    (row,) = load_rows(source)
    np.testing.assert_array_equal(np.asarray(row["image"]), noise)


IMAGE_FEATURES = {
    "binary": (Value("binary"), png),
    "large_binary": (Value("large_binary"), png),
    "struct": ({"bytes": Value("binary"), "path": Value("string")}, lambda i: {"bytes": png(i), "path": None}),
    "base64": (Value("string"), encoded),
    "list of images": (List(datasets.Image()), lambda i: [example_image(i)]),
    "list of bytes": (List(Value("binary")), lambda i: [png(i)]),
}


@pytest.mark.parametrize("kind", IMAGE_FEATURES)
@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_cells_of_parquet(folder, kind, streaming):
    feature, cell = IMAGE_FEATURES[kind]
    features = Features({"image": feature, "caption": Value("string"), "id": Value("string")})
    rows = {"image": [cell(i) for i in range(2)], "caption": ["p", "q"], "id": ["x", "y"]}
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    rows = load_rows(str(folder / "train.parquet"), streaming=streaming)
    assert columns(rows, "image_id", "suffix") == [("x", "p"), ("y", "q")] and values_of(rows) == [0, 1]


def test_bytes_in_parquet_have_row_numbers_as_keys(folder):
    pandas.DataFrame({"image": [png(0), png(1)], "caption": ["p", "q"]}).to_parquet(folder / "train.parquet")
    rows = load_rows(str(folder / "train.parquet"))
    assert rows["image_id"][:] == ["000000000000", "000000000001"] and values_of(rows) == [0, 1]


def test_stream_can_decode_its_images():
    features = Features({"image": datasets.Image(), "caption": Value("string")})
    dataset = datasets.Dataset.from_dict(
        {"image": [example_image(0), example_image(1)], "caption": ["p", "q"]}, features
    )
    stream = dataset.to_iterable_dataset().filter(lambda row: row["caption"] == "q")
    assert values_of(load_rows(stream)) == [1]


def test_urls_of_files_and_other_storage(folder):
    write_images(folder, "a.png")
    with fsspec.open("memory://b.png", "wb") as file:
        file.write(png(1))
    lines = [{"image": f"file://{folder}/a.png", "caption": "p"}, {"image": "memory://b.png", "caption": "q"}]
    path = write_json(folder / "c.jsonl", lines, lines=True)
    rows = load_rows(path, streaming=True)
    assert columns(rows, "image_id") == ["a.png", "memory://b.png"] and values_of(rows) == [0, 1]
    with pytest.raises(
        ValueError, match=r"1 of 2 rows.*\n.*row 2: memory://b\.png cannot be opened; accepted are files"
    ):
        load_rows(path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (["a.png", "b.png"], "the cell has 2 images; accepted is one"),
        ([], "the cell has 0 images"),
        ([[0, 1], [2, 3]], "the image is a list of numbers"),
        ({"url": "x"}, "an object with url"),
        ({"bytes": None, "path": None}, "the image is empty"),
        (None, "is empty"),
        (7, "the image is 7"),
        ("data:image/png,xy", "is not base64"),
        ("data:image/png;base64,%%%", "damaged base64"),
        ("data:image/png;base64,AAAA", "not an image"),
        ("iVBORw0KGgo" + "A" * 100, "damaged|not an image|truncated|Broken"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_cell_without_a_usable_image_is_named(folder, cell, message, streaming):
    write_images(folder, "a.png", "b.png")
    lines = [{"image": "a.png", "caption": "p"}, {"image": cell, "caption": "q"}]
    path = write_json(folder / "c.jsonl", lines, lines=True)
    with pytest.raises(ValueError, match=rf"c\.jsonl, row 2: .*({message})"):
        list(load_rows(path, streaming=streaming, bad_rows="error"))
    assert columns(load_rows(path, streaming=streaming, bad_rows="skip"), "suffix") == ["p"]


# ---- names of files ----


@pytest.mark.parametrize("streaming", [False, True])
def test_file_names_match_in_any_case_and_unicode_form(folder, streaming):
    on_disk, written = unicodedata.normalize("NFD", "Été"), unicodedata.normalize("NFC", "Été")
    write_images(folder, f"{on_disk}/café.JPG".replace("é", "e\u0301"), "B.Png")
    write_csv(folder / "c.csv", ("image", "caption"), (f"{written}/café.jpg", "p"), ("b.png", "q"))
    rows = load_rows(str(folder), streaming=streaming)
    assert values_of(rows) == [0, 1]
    assert sorted(columns(rows, "image_id")) == sorted(key for key, _ in open_source(str(folder)))


def test_ambiguous_file_name_is_not_guessed(folder):
    write_images(folder, "a.png", "A.png")
    write_csv(folder / "c.csv", ("image", "caption"), ("a.PNG", "p"))
    with pytest.raises(FileNotFoundError, match=r"a\.PNG is missing"):
        load_rows(str(folder))


# ---- splits and columns ----


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("feature", [Value("string"), ClassLabel(names=["train", "val", "test"])])
def test_split_column_of_a_data_set_is_used(feature, streaming):
    features = Features({"image": datasets.Image(), "caption": Value("string"), "split": feature})
    rows = {
        "image": [example_image(i) for i in range(4)],
        "caption": list("pqrs"),
        "split": ["train", "val", "test", "train"],
    }
    dataset = datasets.Dataset.from_dict(rows, features)
    assert columns(load_rows(dataset, streaming=streaming), "suffix") == ["p", "s"]
    assert values_of(load_rows(dataset, streaming=streaming)) == [0, 3]
    assert columns(load_rows(dataset, split="test", streaming=streaming), "suffix") == ["r"]
    assert columns(load_rows(dataset, train=False), "references") == [["q"]]
    with pytest.raises(ValueError, match="no split 'dev2'; accepted are test, train, validation"):
        load_rows(dataset, split="dev2")


def test_rows_of_a_split_keep_their_numbers_as_keys():
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": png(i)} for i in range(3)], "caption": list("pqr")})
    dataset = dataset.cast_column("image", datasets.Image()).add_column("split", ["test", "train", "train"])
    keys = [key for key, _ in open_source(dataset)]
    assert load_rows(dataset)["image_id"][:] == keys[1:]


def test_saved_split_has_precedence_over_the_column(folder):
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": png(0)}], "caption": ["p"], "split": ["test"]})
    dataset = dataset.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder)
    assert load_rows(str(folder))["suffix"][:] == ["p"]


def test_stream_with_a_split_column_needs_a_split():
    features = Features({"image": datasets.Image(), "caption": Value("string"), "split": Value("string")})
    rows = {"image": [example_image(0), example_image(1)], "caption": ["p", "q"], "split": ["train", "val"]}
    stream = datasets.Dataset.from_dict(rows, features).to_iterable_dataset()
    assert columns(load_rows(stream), "suffix") == ["p"]
    assert columns(load_rows(stream, split="val", train=False), "references") == [["q"]]
    with pytest.raises(ValueError, match="pass the split to evaluate on"):
        load_rows(stream, train=False)


def test_row_without_a_split_is_named(folder):
    write_images(folder, "a.png")
    lines = [("a.png", "p", "train"), ("a.png", "q", ""), ("a.png", "r", "val")]
    path = write_csv(folder / "c.csv", ("image", "caption", "split"), *lines)
    with pytest.raises(ValueError, match="row 2: the split is empty"):
        load_rows(path)
    assert load_rows(path, bad_rows="skip")["suffix"][:] == ["p"]


def test_columns_with_other_names_can_be_given(folder):
    write_images(folder, "a.png")
    lines = [("a.png", "q?", "x", "train"), ("a.png", "r?", "y", "held out")]
    path = write_csv(folder / "c.csv", ("bild", "frage", "antwort", "teil"), *lines)
    names = {"image_column": "bild", "question_column": "frage", "answer_column": "antwort", "split_column": "teil"}
    assert columns(load_rows(path, "vqa", **names), "text", "suffix") == [("q?", "x")]
    assert columns(load_rows(path, "vqa", "held out", **names), "suffix") == ["y"]
    with pytest.raises(ValueError, match="no column 'part'"):
        load_rows(path, "vqa", **{**names, "split_column": "part"})


# ---- tars ----


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_of_a_tar_can_differ(folder, streaming):
    jpg = png  # the suffix is jpg; the bytes decide
    members = {
        "a.png": png(0),
        "a.txt": b"text 0",
        "b.jpg": jpg(1),
        "b.json": b'{"caption": "no txt"}',
        "b.txt": b"text 1",
        "c.txt": b"no image",
        "d.png": png(3),
        "e.PNG": png(4),
        "e.seg.png": png(9),
        "e.txt": b"text 4",
    }
    write_tar(folder / "x.tar", members)
    with pytest.raises(ValueError, match=r"2 of 5 rows .*\n.*sample c has no image, only txt.*\n.*row 4: the caption"):
        list(load_rows(str(folder), bad_rows="error"))
    rows = load_rows(str(folder), streaming=streaming, bad_rows="skip")
    assert columns(rows, "image_id", "suffix") == [("x/a", "text 0"), ("x/b", "text 1"), ("x/e", "text 4")]
    assert values_of(rows) == [0, 1, 4]


def test_dots_in_tar_names_give_the_keys_of_prismer_label(folder):
    members = {}
    for i in range(20):
        members |= {f"photo.{i:02}.png": png(i), f"photo.{i:02}.txt": f"text {i}".encode()}
    write_tar(folder / "x.tar", {**members, "v1.0/a.b.png": png(20), "v1.0/a.b.txt": b"text 20"})
    rows = load_rows(str(folder))
    assert rows["suffix"][:] == [f"text {i}" for i in range(21)] and values_of(rows) == list(range(21))
    assert rows["image_id"][:] == [key for key, _ in open_source(str(folder))]


def test_damage_in_a_tar_is_named(folder):
    members = {"a.png": png(0), "a.txt": b"p", "b.png": png(1), "b.json": b'{"caption": ', "c.png": png(2)[:40]}
    write_tar(folder / "x.tar", {**members, "c.txt": b"r", "d.png": png(3), "d.txt": "café".encode("latin-1")})
    with pytest.raises(ValueError) as error:
        load_rows(str(folder))
    for line in ("3 of 4 rows", "row 2: sample b: json", "row 3: 'x/c' is", "row 4: the caption .* not in UTF-8"):
        error.match(line)
    content = (folder / "x.tar").read_bytes()
    (folder / "x.tar").write_bytes(content[:3000])
    with pytest.raises(ValueError, match="cannot be read after sample a"):
        load_rows(str(folder))
    (folder / "x.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="x.tar cannot be read"):
        load_rows(str(folder))
