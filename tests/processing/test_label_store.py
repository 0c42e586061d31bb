"""The label store returns the stored labels exactly, once per image, and refuses to mix different labels."""

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_prismer.processing import PrismerImageProcessor
from modeling_prismer.processing.experts import CannyEdges, ExpertError, ExpertSuite
from modeling_prismer.processing.labels import (
    LabelStore,
    LabelWriter,
    forget_failed,
    label_images,
    label_source,
    make_manifest,
    parse_shard,
)
from modeling_prismer.processing.many_images.key_index import KeyIndex, key_digests

from .label_experts import FailsOn, Rows, all_kinds, write_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    keys = write_images(folder, 40)
    return folder, keys


@pytest.fixture(scope="module")
def labelled(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("labels")
    report = label_images(photos[0], all_kinds(), output, batch_size=7, rows_per_shard=16, progress=False)
    return output, report


def stored_keys(folder):
    return [key for path in sorted(folder.glob("labels-*.parquet")) for key in pq.read_table(path)["key"].to_pylist()]


# ---- what is stored comes back ----


def test_labels_of_every_kind_are_read_back_exactly(photos, labelled):
    folder, keys = photos
    store = LabelStore(labelled[0])
    suite = all_kinds()
    for key in keys:
        (expected,) = suite([Image.open(folder / key)])
        np.testing.assert_equal(store[key], expected)
    labels = store[keys[1]]
    assert labels["edge"].dtype == labels["ocr"]["ids"].dtype == np.uint8 and labels["edge"].flags.writeable
    assert labels["ocr"]["features"].dtype == np.float32


def test_store_is_a_mapping_from_keys(photos, labelled):
    store = LabelStore(labelled[0])
    assert list(store) == photos[1] and len(store) == 40
    assert photos[1][0] in store and "part0/none.png" not in store and 3 not in store
    assert repr(store).endswith("40 images; edge, normal, flow, segmentation, detection, ocr")
    with pytest.raises(KeyError, match=r"has no 'none' \(1 of 2 keys\)"):
        store.labels_for([photos[1][0], "none"])


def test_shards_have_rows_per_shard_and_are_reported(labelled):
    output, report = labelled
    sizes = [pq.read_metadata(path).num_rows for path in sorted(output.glob("labels-*.parquet"))]
    assert sizes == [16, 16, 8]
    assert (report.images, report.failed) == (40, 0)
    assert report.bytes == sum(path.stat().st_size for path in output.glob("labels-*.parquet"))
    assert set(report.expert_seconds) == {"edge", "normal", "flow", "segmentation", "detection", "ocr"}
    assert report.images_per_second > 0


def test_second_run_labels_nothing_again(photos, labelled, tmp_path):
    output = shutil.copytree(labelled[0], tmp_path / "labels")
    assert label_images(photos[0], all_kinds(), output, progress=False).images == 0
    assert sorted(stored_keys(output)) == photos[1]


def test_only_new_images_are_labelled_later(tmp_path):
    write_images(tmp_path / "photos", 5)
    label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", progress=False)
    keys = write_images(tmp_path / "photos", 9)
    assert label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", progress=False).images == 4
    assert sorted(stored_keys(tmp_path / "labels")) == keys


def test_reduced_maps_give_the_same_tensors(photos, labelled, tmp_path):
    folder, keys = photos
    label_images(folder, all_kinds(), tmp_path, map_size=8, progress=False)
    full, reduced = LabelStore(labelled[0]), LabelStore(tmp_path)
    assert reduced[keys[0]]["normal"].shape == (8, 8, 3)
    image_processor = PrismerImageProcessor(experts=full.descriptions, expert_size=8, size={"height": 16, "width": 16})
    for key in keys[:6]:
        image = Image.open(folder / key)
        expected, inputs = image_processor(image, full[key]), image_processor(image, reduced[key])
        assert all((inputs[name] == expected[name]).all() for name in expected)


def test_store_can_be_pickled(photos, labelled):
    store = LabelStore(labelled[0])
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_equal(copy[photos[1][3]], store[photos[1][3]])


def test_a_million_keys_are_found():
    keys = [f"folder/{i}" for i in range(1000)]
    index = KeyIndex(key_digests(["folder/5", *keys, "folder/7"]))
    assert len(index) == 1000 and index.find(keys)[:7].tolist() == [1, 2, 3, 4, 5, 0, 7]
    assert index.find(["folder/1000", ""]).tolist() == [-1, -1]
    assert KeyIndex(key_digests([])).find(["a"]).tolist() == [-1]


# ---- damaged images, failing experts ----


def test_damaged_images_are_recorded_and_skipped(tmp_path):
    keys = write_images(tmp_path / "photos", 6)
    (tmp_path / "photos/empty.jpg").touch()
    (tmp_path / "photos/text.png").write_text("not an image")
    (tmp_path / "photos/cut.png").write_bytes((tmp_path / "photos" / keys[0]).read_bytes()[:200])
    report = label_images(
        tmp_path / "photos", [CannyEdges(), Rows()], tmp_path / "labels", batch_size=4, progress=False
    )
    assert (report.images, report.failed) == (9, 3)
    store = LabelStore(tmp_path / "labels")
    assert set(store.errors) == {"empty.jpg", "text.png", "cut.png"}
    assert "'empty.jpg' is empty" in store.errors["empty.jpg"] and "truncated" in store.errors["cut.png"]
    assert store["text.png"] == {"edge": None, "ocr": None}
    assert store[keys[5]]["edge"] is not None


def test_failed_images_can_be_labelled_again(tmp_path):
    write_images(tmp_path / "photos", 6)
    (tmp_path / "photos/late.png").touch()
    label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", rows_per_shard=3, progress=False)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/late.png")
    assert forget_failed(tmp_path / "labels") == 1
    assert "late.png" not in LabelStore(tmp_path / "labels")
    assert label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", progress=False).images == 1
    store = LabelStore(tmp_path / "labels")
    assert len(store) == 7 and not store.errors and len(stored_keys(tmp_path / "labels")) == 7


def test_failing_expert_only_loses_its_own_label(tmp_path):
    keys = write_images(tmp_path / "photos", 10)
    suite = ExpertSuite([FailsOn(width=20), Rows()])
    report = label_images(tmp_path / "photos", suite, tmp_path / "labels", batch_size=4, progress=False)
    store = LabelStore(tmp_path / "labels")
    failed = [key for key in keys if Image.open(tmp_path / "photos" / key).width == 20]
    assert report.failed == 2 and sorted(store.errors) == failed
    assert "no depth here" in store.errors[failed[0]]
    assert store[failed[0]]["depth"] is None and store[failed[0]]["ocr"] is not None
    with pytest.raises(ExpertError, match="no depth here"):
        label_images(tmp_path / "photos", suite, tmp_path / "others", on_expert_error="raise", progress=False)


def test_experts_get_labels_of_others_even_if_some_fail(tmp_path):
    class Doubled(Rows):
        type = "test_doubled"
        name, kind, channels = "doubled", "dense", 1
        needs = ("depth",)

        def run(self, images, depth):
            return [None if own is None else own // 2 for own in depth]

    keys = write_images(tmp_path / "photos", 10)
    suite = ExpertSuite([Doubled(), FailsOn(width=20)])
    label_images(tmp_path / "photos", suite, tmp_path / "labels", batch_size=4, progress=False)
    store = LabelStore(tmp_path / "labels")
    for key in set(keys) - set(store.errors):
        assert (store[key]["doubled"] == store[key]["depth"] // 2).all()
    assert len(store.errors) == 2 and all(store[key]["doubled"] is None for key in store.errors)
    assert make_manifest(suite.only("doubled"), [], {})["experts"].keys() == {"doubled", "depth"}


def test_expert_that_always_fails_ends_the_run(tmp_path):
    images = {str(i): Image.new("RGB", (20, 8)) for i in range(120)}
    with pytest.raises(ExpertError, match="no depth here"):
        label_images(images, [FailsOn(width=20)], tmp_path, progress=False)


def test_label_that_does_not_fit_is_an_error_of_its_image(tmp_path):
    class TooFewWords(Rows):
        type = "test_too_few_words"

        def run(self, images):
            return [{**label, "words": label["words"][:1]} for label in super().run(images)]

    write_images(tmp_path / "photos", 5)
    assert label_images(tmp_path / "photos", [TooFewWords()], tmp_path / "labels", progress=False).failed == 1
    (error,) = LabelStore(tmp_path / "labels").errors.values()
    assert error == "the label of 'ocr' has features of shape (2, 3) and 1 words; (words, 3) is needed"


# ---- nothing is mixed ----


def test_other_settings_are_refused_and_each_difference_is_named(tmp_path):
    write_images(tmp_path / "photos", 2)
    label_images(tmp_path / "photos", [CannyEdges(), Rows()], tmp_path / "labels", progress=False)
    with pytest.raises(ValueError) as error:
        label_images(tmp_path / "photos", [CannyEdges(sigma=2.0)], tmp_path / "labels", map_size=8, progress=False)
    for part in (
        "experts.edge.sigma is 1.0 there, 2.0 here",
        "experts.ocr is 'test_rows' there, absent here",
        "settings.map_size is absent there, 8 here",
    ):
        assert part in str(error.value)
    assert len(LabelStore(tmp_path / "labels")) == 2


def test_other_versions_are_refused_unless_allowed(tmp_path):
    write_images(tmp_path / "photos", 2)
    label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", progress=False)
    path = tmp_path / "labels/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"versions.torch is \"1.0\" there, .* allow_other_versions=True"):
        label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", progress=False)
    label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", allow_other_versions=True, progress=False)


def test_batch_size_and_threads_may_change(tmp_path):
    write_images(tmp_path / "photos", 2)
    label_images(tmp_path / "photos", [Rows()], tmp_path / "labels", progress=False)
    faster = Rows()
    faster.batch_size = 2
    assert label_images(tmp_path / "photos", [faster], tmp_path / "labels", progress=False).images == 0


def test_weights_are_compared_by_content(tmp_path):
    class WithWeights(Rows):
        type = "test_with_weights"
        file_settings = ("weights",)

        def __init__(self, weights):
            self.weights = weights

    def manifest(path):
        return make_manifest(ExpertSuite([WithWeights(str(path))]), [], {})

    (tmp_path / "a.safetensors").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.safetensors").write_bytes(b"1")
    first, folder = manifest(tmp_path / "a.safetensors"), manifest(tmp_path / "folder")
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert manifest(tmp_path / "b.safetensors") == first
    (tmp_path / "b.safetensors").write_bytes(b"2")
    assert manifest(tmp_path / "b.safetensors")["hash"] != first["hash"]
    (tmp_path / "folder/model.safetensors").write_bytes(b"2")
    assert manifest(tmp_path / "folder")["hash"] != folder["hash"]
    assert manifest("me/on-the-hub")["experts"]["ocr"]["weights"] == "me/on-the-hub"


def test_two_runs_at_once_are_refused(tmp_path):
    write_images(tmp_path / "photos", 2)
    suite = ExpertSuite([Rows()])
    manifest = make_manifest(suite, suite.descriptions, {"map_size": None, "max_image_pixels": 178_956_970})
    with LabelWriter(tmp_path / "labels", manifest, process=(1, 4)):
        with pytest.raises(RuntimeError, match="as process 1 of 4"):
            label_images(tmp_path / "photos", suite, tmp_path / "labels", shard=(1, 4), progress=False)
        with pytest.raises(RuntimeError, match="a run of 4 processes"):
            label_images(tmp_path / "photos", suite, tmp_path / "labels", progress=False)
        assert label_images(tmp_path / "photos", suite, tmp_path / "labels", shard=(0, 4), progress=False).images == 1


def test_newer_formats_and_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a label store"):
        LabelStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format 99"):
        LabelStore(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"engine": "spark"}, "accepted are 'local', 'ray'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"suite": []}, "the suite is empty"),
        ({"suite": "best"}, "no suite of experts 'best'"),
        ({"on_expert_error": "ignore"}, "accepted are 'record' and 'raise'"),
        ({"shard": (3, 3)}, "process 3 of 3"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
    ],
)
def test_wrong_arguments_are_named(photos, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        label_images(**{"source": photos[0], "suite": [Rows()], "output": tmp_path / "labels", **arguments})


def test_parse_shard():
    assert parse_shard("2/16") == (2, 16)
    for wrong in ("16/16", "1", "a/b", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="needed is i/n"):
            parse_shard(wrong)


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_progress_bar_shows_rate_and_time_left(photos, tmp_path, capsys, kind):
    source = photos[0]
    if kind == "tars":
        source = tmp_path / "tars"
        source.mkdir()
        for number in range(4):
            with tarfile.open(source / f"{number}.tar", "w") as tar:
                for key in photos[1][:10]:
                    tar.add(photos[0] / key, Path(key).name)
    label_images(source, [Rows()], tmp_path / "labels", batch_size=2)
    printed = capsys.readouterr().err
    assert "40/40" in printed and "image/s" in printed


# ---- a file is there whole or not at all ----


def test_labels_before_an_error_are_kept(tmp_path):
    suite = ExpertSuite([Rows()])
    with (
        pytest.raises(KeyboardInterrupt),
        LabelWriter(tmp_path, make_manifest(suite, suite.descriptions, {})) as writer,
    ):
        writer.write("a", {"ocr": None})
        raise KeyboardInterrupt
    assert list(LabelStore(tmp_path)) == ["a"]


def test_full_disk_leaves_no_broken_file(tmp_path, monkeypatch):
    def full(self, table, row_group_size):
        raise OSError(28, "No space left on device")

    suite = ExpertSuite([Rows()])
    with pytest.raises(OSError, match="No space"):
        with LabelWriter(tmp_path, make_manifest(suite, suite.descriptions, {}), rows_per_shard=2) as writer:
            for key in "abc":
                writer.write(key, {})
            monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
            writer.write("d", {})
    assert list(LabelStore(tmp_path)) == ["a", "b"]


def test_shard_is_finished_after_some_time(tmp_path):
    suite = ExpertSuite([Rows()])
    manifest = make_manifest(suite, suite.descriptions, {})
    with LabelWriter(tmp_path, manifest, seconds_per_shard=0) as writer:
        for row in range(40):
            writer.write(str(row), {})
        assert len(LabelStore(tmp_path)) == 32


# ---- with data sets, in training ----


def test_datasets_reads_a_store(photos, labelled, tmp_path):
    for dataset in (
        LabelStore(labelled[0]).as_dataset(cache_dir=str(tmp_path)),
        datasets.load_dataset(str(labelled[0]), split="train", cache_dir=str(tmp_path)),
    ):
        assert dataset["key"][:] == photos[1]
        assert dataset[0]["edge"].mode == "L" and dataset[0]["normal"].mode == "RGB"
        assert dataset[1]["ocr"]["ids"].size == dataset[1]["edge"].size


def test_labels_are_attached_to_a_data_set_without_a_copy(photos, labelled):
    store = LabelStore(labelled[0])
    keys = photos[1][::-3]
    dataset = datasets.Dataset.from_dict({"name": keys, "number": range(len(keys))})
    attached = store.attach(dataset, key_column="name")
    np.testing.assert_equal(attached[2]["expert_labels"], store[keys[2]])
    assert attached[2]["number"] == 2 and attached["number"][:2] == [0, 1]
    doubled = dataset.with_transform(lambda batch: {**batch, "number": [2 * number for number in batch["number"]]})
    assert store.attach(doubled, "name", column="labels")[3].keys() == {"name", "number", "labels"}
    assert store.attach(doubled, "name")[3]["number"] == 6
    row = next(iter(store.attach(dataset.to_iterable_dataset(), "name")))
    np.testing.assert_equal(row["expert_labels"], store[keys[0]])
    with pytest.raises(ValueError, match="no column 'key'; there are name, number"):
        store.attach(dataset)


def test_label_source_is_live_or_a_store(photos, labelled):
    keys = photos[1][:2]
    assert label_source("live")(keys) is None
    store = LabelStore(labelled[0])
    experts = [description for description in store.descriptions if description["name"] in ("edge", "ocr")]
    for labels in (str(labelled[0]), labelled[0], store):
        (first, _) = pickle.loads(pickle.dumps(label_source(labels, experts)))(keys)
        assert set(first) == {"edge", "ocr"}
    assert set(label_source(store)(keys)[0]) == {description["name"] for description in store.descriptions}
    with pytest.raises(ValueError, match="has no expert 'depth'; it has edge, normal"):
        label_source(store, [{"name": "depth", "kind": "dense", "channels": 1}])
    with pytest.raises(ValueError, match="has channels=3; the configured one has 64"):
        label_source(store, [{"name": "ocr", "kind": "label", "channels": 64}])


def test_failed_image_has_no_experts(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    label_images(tmp_path / "photos", [CannyEdges()], tmp_path / "labels", progress=False)
    store = LabelStore(tmp_path / "labels")
    image_processor = PrismerImageProcessor(experts=store.descriptions, size={"height": 8, "width": 8})
    inputs = image_processor(Image.new("RGB", (8, 8)), store.labels_for(["a.jpg"]))
    assert not inputs["expert_mask"].any()


def test_hidden_files_of_a_killed_run_are_removed(photos, labelled, tmp_path):
    output = shutil.copytree(labelled[0], tmp_path / "labels")
    left_over = output / ".labels-00000-of-00001-000003.parquet.unfinished"
    left_over.write_bytes(b"half")
    assert len(LabelStore(output)) == 40
    label_images(photos[0], all_kinds(), output, progress=False)
    assert not left_over.exists() and len(LabelStore(output)) == 40
