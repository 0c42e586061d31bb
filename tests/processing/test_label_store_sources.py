"""The sources of the label store: folders, globs, lists, data sets and tars, and the keys of their images."""

import io
import os
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_prismer.processing import load_image
from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.labels import LabelStore, ListedImages, label_images, open_source
from modeling_prismer.processing.many_images.key_index import KeyIndex, key_digests

from .label_experts import Rows, write_images


def photo(i):
    return Image.fromarray(np.full((6, 7 + i % 3, 3), 5 * i, np.uint8))


def jpeg(i):
    file = io.BytesIO()
    photo(i).save(file, "JPEG")
    return file.getvalue()


def jpeg_row(i):
    return {"bytes": jpeg(i), "path": None}


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    for number in range(3):
        members = {}
        for i in range(4):
            members[f"{i:03d}.jpg"] = jpeg(4 * number + i)
            members[f"{i:03d}.json"] = b'{"url": null}' if i < 2 else b'{"url": "there"}'
        write_tar(tmp_path / "tars" / ("a.tar", "b.tar.gz", "more/a.tar")[number], members)
    return tmp_path / "tars"


TAR_KEYS = [f"{name}/{i:03d}" for name in ("a", "b", "more/a") for i in range(4)]


def keys_of(source):
    return [key for key, _ in source]


# ---- files ----


def test_keys_of_a_folder_are_relative_paths_in_order(tmp_path):
    keys = write_images(tmp_path, 7)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/a.png").touch()
    (tmp_path / "UPPER.JPG").touch()
    (tmp_path / "link").symlink_to(tmp_path)  # a circle
    for folder in (tmp_path, f"{tmp_path}/"):
        source = open_source(folder)
        assert keys_of(source) == ["UPPER.JPG", *keys] and source.num_images == 8
    assert keys_of(open_source(tmp_path / "part1", root=tmp_path)) == [key for key in keys if key.startswith("part1")]


def test_keys_of_globs_and_lists(tmp_path, monkeypatch):
    write_images(tmp_path / "photos", 4)
    assert keys_of(open_source(f"{tmp_path}/photos/part[01]/*.png")) == [
        "part0/0000.png",
        "part0/0003.png",
        "part1/0001.png",
    ]
    assert keys_of(open_source(f"{tmp_path}/photos/part*/0001.*")) == ["part1/0001.png"]
    assert keys_of(open_source(str(tmp_path / "photos/part1/0001.png"))) == ["0001.png"]
    monkeypatch.chdir(tmp_path)
    assert keys_of(open_source(["photos/part1/0001.png"])) == ["photos/part1/0001.png"]
    assert keys_of(open_source([tmp_path / "photos/part1/0001.png"], root=tmp_path)) == ["photos/part1/0001.png"]


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_undecodable_file_name_has_a_key(tmp_path):
    write_images(tmp_path / "photos", 1)
    try:
        os.rename(tmp_path / "photos/part0/0000.png", os.fsencode(tmp_path) + b"/photos/part0/\xff.png")
    except OSError:
        pytest.skip("the file system takes no such name")
    label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", progress=False)
    assert list(LabelStore(tmp_path / "labels")) == ["part0/\\xff.png"] and not LabelStore(tmp_path / "labels").errors


def test_wrong_source_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        open_source(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no file or folder 'coco'"):
        open_source("coco")
    with pytest.raises(ValueError, match="matches no files"):
        open_source(f"{tmp_path}/*.jpg")
    with pytest.raises(TypeError, match="source is a int"):
        open_source(3)
    with pytest.raises(TypeError, match="source is a list"):
        open_source([photo(0)])
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match="holds images and tars"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="files of different kinds"):
        open_source([str(tmp_path / "a.jpg"), str(tmp_path / "a.tar")])


def test_images_in_memory_have_the_keys_of_their_dict(tmp_path):
    label_images({"a": photo(1), 7: np.zeros((4, 4), np.uint8)}, [Rows()], tmp_path, progress=False)
    assert list(LabelStore(tmp_path)) == ["a", "7"]


# ---- data sets ----


def test_data_set_is_read_by_its_columns(tmp_path):
    features = datasets.Features({"image_id": datasets.Value("int64"), "photo": datasets.Image()})
    rows = [{"image_id": i, "photo": photo(i)} for i in (5, 3, 5, 9)]
    dataset = datasets.Dataset.from_list(rows, features)
    source = open_source(dataset)
    assert keys_of(source.share(0, 1)) == ["5", "3", "9"]
    assert keys_of(open_source(dataset.remove_columns("image_id"))) == [f"{i:012d}" for i in range(4)]
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "tables/0.parquet")
    assert keys_of(open_source(tmp_path / "saved", image_column="photo", key_column="image_id")) == list("5359")
    for source in (tmp_path / "saved", tmp_path / "tables", dataset.to_iterable_dataset(), dataset.with_format("np")):
        output = tmp_path / f"labels {len(list(tmp_path.iterdir()))}"
        assert label_images(source, [Rows()], output, progress=False).failed == 0
        assert list(LabelStore(output)) == ["5", "3", "9"]
        assert LabelStore(output)["9"]["ocr"]["ids"].shape == (6, 7)


def test_column_of_paths_can_be_the_image_column(tmp_path):
    keys = write_images(tmp_path / "photos", 3)
    dataset = datasets.Dataset.from_dict({"file_name": keys, "path": [str(tmp_path / "photos" / key) for key in keys]})
    report = label_images(dataset, [Rows()], tmp_path / "labels", image_column="path", progress=False)
    assert list(LabelStore(tmp_path / "labels")) == keys and report.failed == 0


def test_damaged_image_of_a_data_set_is_recorded(tmp_path):
    rows = {
        "id": ["good", "bad", "none"],
        "image": [{"bytes": jpeg(1), "path": None}, {"bytes": b"x", "path": None}, None],
    }
    dataset = datasets.Dataset.from_dict(
        rows, datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    )
    label_images(dataset, [Rows()], tmp_path, progress=False)
    assert set(LabelStore(tmp_path).errors) == {"bad", "none"}


def test_damaged_parquet_file_is_named(tmp_path):
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})
    for number in range(3):
        rows = [{"id": 10 * number + i, "image": photo(i)} for i in range(2)]
        datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / f"tables/{number}.parquet")
    for number in (0, 2):
        damaged = tmp_path / f"tables/{number}.parquet"
        damaged.write_bytes(damaged.read_bytes()[:100])
    report = label_images(tmp_path / "tables", [Rows()], tmp_path / "labels", progress=False)
    assert set(report.errors) == {"0.parquet", "2.parquet"} and report.images == 4
    assert {"10", "11"} < set(LabelStore(tmp_path / "labels"))


def test_rows_without_a_key_are_not_merged(tmp_path):
    rows = {"id": ["a", None, None], "image": [jpeg_row(i) for i in range(3)]}
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict(rows, features)
    with pytest.raises(ValueError, match=r"column 'id' names no image in row 1 \(2 of 3 rows\)"):
        open_source(dataset)
    report = label_images(dataset.to_iterable_dataset(), [Rows()], tmp_path / "labels", progress=False)
    assert report.images == 3 and list(report.errors) == [f"part 0 of the data set, row {row}" for row in (1, 2)]


def test_missing_columns_and_splits_are_named(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ValueError, match="no column holds images; give image_column, one of text"):
        open_source(dataset)
    with pytest.raises(ValueError, match="no column 'image'; there are text"):
        open_source(dataset, image_column="image")
    with pytest.raises(ValueError, match="no column 'name'"):
        open_source(dataset, image_column="text", key_column="name")
    with pytest.raises(ValueError, match="has the splits train, test"):
        open_source(datasets.DatasetDict({"train": dataset, "test": dataset}))
    with pytest.raises(ValueError, match="no column names the images"):
        open_source(dataset.to_iterable_dataset(), image_column="text")


# ---- tars ----


def test_webdataset_tars_are_labelled_and_resumed(tars, tmp_path):
    report = label_images(tars, [Rows()], tmp_path / "labels", rows_per_shard=5, batch_size=2, progress=False)
    store = LabelStore(tmp_path / "labels")
    assert list(store) == TAR_KEYS and report.failed == 0
    np.testing.assert_equal(store["b/002"], {"ocr": Rows()([Image.open(io.BytesIO(jpeg(6)))])[0]})
    sorted((tmp_path / "labels").glob("labels-*"))[1].unlink()
    assert label_images(tars, [Rows()], tmp_path / "labels", progress=False).images == 5
    assert sorted(LabelStore(tmp_path / "labels")) == sorted(TAR_KEYS)
    assert keys_of(open_source(f"{tars}/*.tar")) == TAR_KEYS[:4]


def test_broken_tar_is_recorded_and_others_are_labelled(tars, tmp_path):
    content = (tars / "a.tar").read_bytes()
    (tars / "a.tar").write_bytes(content[:2500])  # the first image and a half
    (tars / "b.tar.gz").write_bytes(b"no tar")
    assert label_images(tars, [Rows()], tmp_path / "labels", progress=False).failed == 2
    store = LabelStore(tmp_path / "labels")
    assert set(store.errors) == {"a.tar", "b.tar.gz"} and set(store) >= set(TAR_KEYS[8:])
    assert label_images(tars, [Rows()], tmp_path / "labels", progress=False).images == 0


def test_damaged_image_in_a_tar_is_recorded(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(1), "y.jpg": b"broken", "z.jpg": jpeg(2)})
    label_images(tmp_path / "a.tar", [Rows()], tmp_path / "labels", progress=False)
    assert list(LabelStore(tmp_path / "labels").errors) == ["a/y"] and len(LabelStore(tmp_path / "labels")) == 3


@pytest.mark.parametrize(
    "members",
    [
        {"0.jpg": jpeg(0), "0.json": b"{", "1.jpg": jpeg(1), "1.json": b"{}"},
        {"0.jpg": jpeg(0), "0.json": b"\xff\xfe", "1.jpg": jpeg(1)},
        {"0.json": b"[]", "0.jpg": jpeg(0), "1.txt": b"", "1.jpg": jpeg(1)},
        {"0.jpg": jpeg(0), "1.jpg": jpeg(1), "0.json": b"{}", "1.json": b"{}"},
        {"0.jpg": jpeg(0), "1.png": jpeg(1)},
        {"0.JPG": jpeg(0), "0.png": jpeg(5), "1.Jpeg": jpeg(1)},
        {"0.seg.png": jpeg(5), "0.jpg": jpeg(0), "0.seg.jpg": jpeg(5), "1.jpg": jpeg(1)},
        {
            "0.jpg": jpeg(0),
            "._0.jpg": b"x",
            "__MACOSX/._1.jpg": b"x",
            ".DS_Store": b"x",
            "README": b"",
            "1.jpg": jpeg(1),
        },
        {"0.jpg": jpeg(0), "0.npy": b"no array", "1.jpg": jpeg(1), "1.cls": b"?", "1.jpg.json": b"{"},
    ],
    ids=["bad json", "bytes", "order", "far apart", "png and jpg", "several", "maps", "hidden", "other files"],
)
def test_other_files_of_a_sample_are_not_read(tmp_path, members):
    write_tar(tmp_path / "a.tar", members)
    report = label_images(tmp_path / "a.tar", [Rows()], tmp_path / "labels", progress=False)
    assert (report.images, report.failed) == (2, 0)
    store = LabelStore(tmp_path / "labels")
    for i in range(2):
        np.testing.assert_equal(store[f"a/{i}"], ExpertSuite([Rows()])([load_image(jpeg(i))])[0])


def test_sample_without_an_image_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(0), "1.json": b"{}", "1.txt": b"", "2.jpg": jpeg(2)})
    report = label_images(tmp_path / "a.tar", [Rows()], tmp_path / "labels", progress=False)
    assert (report.images, report.errors) == (3, {"a/1": "the sample '1' has no image; it has json, txt"})
    assert list(LabelStore(tmp_path / "labels")) == ["a/0", "a/2", "a/1"]


def test_names_with_dots_are_separate_samples(tmp_path):
    names = [f"v1.0/photo.{i:02d}.2024" for i in range(40)]
    write_tar(tmp_path / "a.tar", {f"{name}.{end}": jpeg(3) for name in names for end in ("jpg", "json")})
    assert keys_of(open_source(tmp_path / "a.tar")) == [f"a/{name}" for name in names]
    write_tar(tmp_path / "b.tar", {"x.1.jpg": jpeg(1), "y.jpg": jpeg(1), "x.2.jpg": jpeg(1), "x.1.json": b"{"})
    assert keys_of(open_source(tmp_path / "b.tar")) == ["b/x.1", "b/y", "b/x.2"]


def test_image_type_in_a_tar_can_be_chosen(tmp_path):
    members = {"0.jpg": jpeg(0), "0.seg.png": jpeg(1), "1.seg.PNG": jpeg(1), "2.jpg": jpeg(2)}
    write_tar(tmp_path / "a.tar", members)
    images = dict(open_source(tmp_path / "a.tar", image_column="seg.png"))
    assert list(images) == ["a/0", "a/1", "a/2"] and images["a/0"] == images["a/1"] == jpeg(1)
    assert str(images["a/2"]) == "the sample '2' has no seg.png; it has jpg"
    ((key, error),) = open_source(tmp_path / "a.tar", image_column="webp")
    assert key == "a.tar" and str(error).endswith("it has no webp; there are jpg, seg.PNG, seg.png")
    with pytest.raises(ValueError, match="key_column is 'id'; the images of tars are named by their files"):
        open_source(tmp_path / "a.tar", key_column="id")


@pytest.mark.parametrize("damage", ["a bit", "zeros"])
def test_damaged_header_in_a_tar_loses_one_sample(tmp_path, damage):
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": jpeg(i) for i in range(5)})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        start = tar.getmember("2.jpg").offset
    if damage == "a bit":
        content[start + 100] ^= 1
    else:
        content[start : start + 512] = bytes(512)
    (tmp_path / "a.tar").write_bytes(content)
    images = dict(open_source(tmp_path / "a.tar"))
    assert list(images) == ["a/0", "a/1", "a/3", "a/4", "a.tar"] and images["a/4"] == jpeg(4)
    assert f"it is damaged at byte {start + 512 * (damage == 'zeros'):,}" in str(images["a.tar"])


def test_tar_cut_between_two_samples_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": jpeg(i) for i in range(5)})
    with tarfile.open(tmp_path / "a.tar") as tar:
        end = tar.getmember("3.jpg").offset
    os.truncate(tmp_path / "a.tar", end)
    images = dict(open_source(tmp_path / "a.tar"))
    assert list(images) == ["a/0", "a/1", "a/2", "a.tar"] and "it is cut off" in str(images["a.tar"])


def test_concatenated_tars_are_read_to_the_end(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.jpg": jpeg(0)})
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert keys_of(open_source(tmp_path / "c.tar")) == ["c/a", "c/b"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_cut_tar_names_the_cut_image(tmp_path, name):
    keys = write_images(tmp_path / "photos", 2)
    write_tar(tmp_path / name, {f"{i}.png": (tmp_path / "photos" / key).read_bytes() for i, key in enumerate(keys)})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 3 // 4 if name == "a.tar.gz" else 2600])
    report = label_images(tmp_path / name, [Rows()], tmp_path / "labels", progress=False)
    assert set(report.errors) == {"a/1", name} and report.images == 3
    assert "'1.png' is cut off or damaged" in report.errors["a/1"]
    assert f"{name} cannot be read to its end" in report.errors[name]


def test_too_large_image_in_a_tar_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_prismer.processing.labels.tars.MAX_IMAGE_BYTES", 2000)
    write_tar(tmp_path / "a.tar.gz", {"0.jpg": jpeg(0), "1.jpg": bytes(3000), "2.jpg": jpeg(2)})
    images = dict(open_source(tmp_path / "a.tar.gz"))
    assert str(images["a/1"]) == "'1.jpg' has 3,000 bytes; at most 2,000 are read" and images["a/2"] == jpeg(2)


def test_links_and_undecodable_names_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        entry = tarfile.TarInfo("\udcff.jpg")
        entry.size = len(jpeg(0))
        tar.addfile(entry, io.BytesIO(jpeg(0)))
    label_images(tmp_path / "a.tar", [Rows()], tmp_path / "labels", progress=False)
    assert list(LabelStore(tmp_path / "labels")) == [r"a/\xff"] and not LabelStore(tmp_path / "labels").errors


# ---- stores among the images ----


@pytest.mark.parametrize("output", ["labels", "more/labels", "."])
@pytest.mark.parametrize("source", [".", "**/*"])
def test_store_inside_its_input_folder_is_left_out(tmp_path, output, source):
    keys = write_images(tmp_path, 5)
    arguments = (f"{tmp_path}/{source}", [Rows()], tmp_path / output)
    for images in (5, 0):
        report = label_images(*arguments, progress=False)
        assert (report.images, report.failed) == (images, 0)
    label_images(tmp_path, [Rows()], tmp_path / "second", map_size=4, progress=False)
    next((tmp_path / output).glob("labels-*")).write_bytes(b"damaged")
    assert label_images(*arguments, progress=False, repair=True).images == 5
    assert list(LabelStore(tmp_path / output)) == keys == list(LabelStore(tmp_path / "second"))


def test_unreadable_folder_is_named(tmp_path, monkeypatch, warnings_once):
    keys = write_images(tmp_path, 6)
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("part1"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert keys_of(open_source(tmp_path)) == [key for key in keys if "part1" not in key]
    assert warnings_once() == [f"The folder {tmp_path}/part1 is left out: Permission denied"]


# ---- shares ----


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 40])
def test_processes_share_the_images(tars, tmp_path, processes):
    write_images(tmp_path / "photos", 10)
    for folder in (tars, tmp_path / "photos"):
        shares = [keys_of(open_source(folder).share(i, processes)) for i in range(processes)]
        together = [key for share in shares for key in share]
        assert sorted(together) == sorted(keys_of(open_source(folder))) and len(set(together)) == len(together)


def test_parts_cover_the_source_without_finished_images(tars, tmp_path):
    write_images(tmp_path / "photos", 10)
    for folder, number in ((tars, 3), (tmp_path / "photos", 4)):
        done = keys_of(open_source(folder))[:2]
        source = open_source(folder).without(KeyIndex(key_digests(done)))
        parts = source.parts(images=2)
        assert len(parts) == number
        assert [key for part in parts for key in keys_of(part)] == keys_of(open_source(folder))[2:]


def test_keys_and_images_must_have_equal_length():
    with pytest.raises(ValueError, match="2 keys for 1 images"):
        ListedImages(["a", "b"], ["a.jpg"])
