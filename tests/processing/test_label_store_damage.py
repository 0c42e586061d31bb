"""A full disk, damaged files and hostile content lose few labels, and the error names the file."""

import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.labels import (
    DamagedShardError,
    LabelStore,
    LabelWriter,
    forget_failed,
    label_images,
    make_manifest,
    read_manifest,
    set_aside_damaged,
)

from .label_experts import Halves, Rows, write_images


REPOSITORY = Path(__file__).resolve().parents[2]
EDGE = {"name": "edge", "kind": "dense", "channels": 1}


def suite():
    return ExpertSuite([Halves(), Rows()])


def label(photos, output, **settings):
    return label_images(photos, suite(), output, rows_per_shard=16, num_workers=1, progress=False, **settings)


def shards(folder):
    return sorted(folder.glob("labels-*.parquet"))


def stored_keys(folder):
    return Counter(key for path in shards(folder) for key in pq.read_table(path)["key"].to_pylist())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, write_images(folder, 40)


@pytest.fixture(scope="module")
def labelled(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    label(photos[0], folder)
    return folder


@pytest.fixture
def store(labelled, tmp_path):
    return shutil.copytree(labelled, tmp_path / "store")


# ---- a full disk ----

# The program forks. Each child may only write files up to a limit of bytes. The parent prints how each child ended.
PROGRAM = """
import os, resource, sys
from tests.processing.test_label_store_damage import RUNS, label

photos, folder, *limits = sys.argv[1:]
for run, settings in RUNS.items():
    for limit in map(int, limits):
        child = os.fork()
        if child == 0:
            status = 3
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                label(photos, f"{folder}/{run} {limit}", **settings)
                status = 0
            except OSError as error:
                status = 1 if f"{folder}/{run} {limit}" in str(error) and "File too large" in str(error) else 2
            finally:
                os._exit(status)
        print("ended:", run, limit, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
RUNS = {"whole": {}, "shard": {"shard": (1, 2)}}


@pytest.fixture(scope="module")
def full_disks(photos, labelled, tmp_path_factory):
    """A folder with a store for each run and disk, and the outcome of each run: {(run, limit): outcome}."""
    if not hasattr(os, "fork"):
        pytest.skip("forks processes")
    folder = tmp_path_factory.mktemp("disks")
    size = shards(labelled)[0].stat().st_size
    footer = int.from_bytes(shards(labelled)[0].read_bytes()[-8:-4], "little") + 8
    limits = {0, (labelled / "manifest.json").stat().st_size - 1, size - footer - 1, size - footer, size * 2}
    limits |= {size - footer // 2, size - 8, size - 4, size - 1, size}
    (folder / "program.py").write_text(PROGRAM)
    finished = subprocess.run(
        [sys.executable, folder / "program.py", photos[0], folder, *map(str, sorted(limits))],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        text=True,
        capture_output=True,
        timeout=180,
    )
    lines = [line.split()[1:] for line in finished.stdout.splitlines() if line.startswith("ended:")]
    ended = {(run, int(limit)): int(status) for run, limit, status in lines}
    assert len(ended) == len(RUNS) * len(limits), finished.stderr
    return folder, ended


@pytest.mark.parametrize("run", RUNS)
def test_full_disk_leaves_a_store_that_resumes(photos, full_disks, run):
    folder, ended = full_disks
    complete = 20 if run == "shard" else 40
    statuses = {limit: status for (name, limit), status in ended.items() if name == run}
    assert set(statuses.values()) == {0, 1}  # each error names the file or the store
    for limit, status in statuses.items():
        store = folder / f"{run} {limit}"
        assert not [path.name for path in store.iterdir() if path.name.endswith(".unfinished")]
        rows = len(LabelStore(store)) if (store / "manifest.json").exists() else 0
        assert (rows == complete) == (status == 0)
        assert label(photos[0], store).images == 40 - rows
        assert stored_keys(store) == Counter(photos[1])


def test_incomplete_shard_gets_no_name(tmp_path, monkeypatch):
    close = pq.ParquetWriter.close

    def lose_the_end(self):
        close(self)
        os.truncate(self.where, 100)

    manifest = make_manifest(None, [EDGE], {})
    with pytest.raises(Exception, match="Parquet|cannot be written"):
        with LabelWriter(tmp_path, manifest) as writer:
            writer.write("a", {"edge": np.zeros((4, 4), np.uint8)})
            monkeypatch.setattr(pq.ParquetWriter, "close", lose_the_end)
    monkeypatch.undo()
    assert len(LabelStore(tmp_path)) == 0 and not list(tmp_path.glob(".labels*"))


def test_failed_write_tells_how_many_labels_are_lost(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    with LabelWriter(tmp_path, make_manifest(None, [EDGE], {}), rows_per_shard=40) as writer:
        for key in range(80):
            writer.write(str(key), {})
        for key in range(80, 111):
            writer.write(str(key), {})
        with monkeypatch.context() as patch, pytest.raises(OSError) as error:
            patch.setattr(pq.ParquetWriter, "write_table", full)
            writer.write("111", {})
        assert error.value.errno == 28
        assert f"store {tmp_path} cannot be written: No space left on device. 32 labels of an unf" in str(error.value)
        writer.write("again", {})
    assert list(LabelStore(tmp_path)) == [*map(str, range(80)), "again"]


def test_full_disk_during_forget_failed_loses_no_shard(photos, tmp_path, monkeypatch):
    images = {"good": Image.new("RGB", (20, 8)), "bad": b"no image"}
    label(images, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forget_failed.__globals__["publish"].__globals__["os"], "replace", full)
    with pytest.raises(OSError, match="No space"):
        forget_failed(tmp_path)
    monkeypatch.undo()
    assert list(LabelStore(tmp_path)) == ["good", "bad"] and not list(tmp_path.glob(".labels*"))
    assert forget_failed(tmp_path) == 1


# ---- damaged shards ----


def flip(path):
    """Flips one bit of the numbers, which have no checksum."""
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    (features,) = [column for column in columns if "features" in column.path_in_schema]
    content = bytearray(path.read_bytes())
    content[features.data_page_offset - 10] ^= 1  # the end of their dictionary
    path.write_bytes(content)


def without_a_column(path):
    pq.write_table(pq.read_table(path).drop_columns("ocr"), path)


def with_another_type(path):
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "key", pa.array(range(len(table)))), path)


def with_null_keys(path):
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "key", pa.nulls(len(table), pa.string())), path)


DAMAGES = {
    "footer cut off": lambda path: os.truncate(path, path.stat().st_size - 20),
    "end cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "no Parquet": lambda path: path.write_bytes(b"PAR1" * 100),
    "a flipped bit": flip,
    "no column": without_a_column,
    "keys of numbers": with_another_type,
    "keys of nothing": with_null_keys,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_images_of_damaged_shards_are_repaired(photos, labelled, store, damage):
    damaged = shards(store)[1]
    others = {path: path.read_bytes() for path in shards(store) if path != damaged}
    DAMAGES[damage](damaged)
    content = damaged.read_bytes()
    with pytest.raises(DamagedShardError) as error:
        opened = LabelStore(store)
        opened.labels_for(list(opened))
    assert str(error.value).startswith(f"{damaged} is damaged: ") and "--repair" in str(error.value)
    assert "\n" not in str(error.value)

    report = label(photos[0], store, repair=True)
    assert report.images == 16
    assert all(path.read_bytes() == content for path, content in others.items())
    assert damaged.with_name(f"{damaged.name}.damaged").read_bytes() == content
    assert stored_keys(store) == Counter(photos[1])
    repaired, expected = LabelStore(store), LabelStore(labelled)
    np.testing.assert_equal(repaired.labels_for(photos[1]), expected.labels_for(photos[1]))


def test_damaged_shard_is_refused_without_repair(photos, store):
    os.truncate(shards(store)[0], 100)
    before = sorted(path.name for path in store.iterdir())
    with pytest.raises(DamagedShardError, match="000000.parquet is damaged: .* --repair"):
        label(photos[0], store)
    assert sorted(path.name for path in store.iterdir()) == before
    with pytest.raises(DamagedShardError, match="000000.parquet is damaged"):
        forget_failed(store)


def test_shards_set_aside_before_are_kept(photos, store):
    for _ in range(2):
        os.truncate(shards(store)[-1], 100)
        assert len(set_aside_damaged(store)) == 1
        label(photos[0], store)
    assert len(list(store.glob("*.damaged"))) == 2 and stored_keys(store) == Counter(photos[1])


def test_repair_does_not_change_a_sound_store(photos, store):
    before = {path: path.read_bytes() for path in shards(store)}
    assert label(photos[0], store, repair=True).images == 0
    assert {path: path.read_bytes() for path in shards(store)} == before


def test_repair_with_other_settings_changes_nothing(photos, store):
    os.truncate(shards(store)[0], 100)
    with pytest.raises(ValueError, match="settings.map_size"):
        label(photos[0], store, repair=True, map_size=8)
    assert not list(store.glob("*.damaged"))


# ---- damaged manifests ----


def changed(**fields):
    return lambda content: json.dumps({**json.loads(content), **fields}).encode()


def described(**fields):
    return changed(descriptions={"ocr": {"name": "ocr", "kind": "label", "channels": 3, **fields}})


MANIFESTS = {
    "cut off": (lambda content: content[:-30], "is damaged"),
    "empty": (lambda content: b"", "is damaged"),
    "binary": (lambda content: b"\x89PNG\xff\x00" + bytes(range(256)), "is damaged"),
    "nested": (lambda content: b"[" * 100_000, "is damaged"),
    "a list": (lambda content: b"[]", "it holds a list; a JSON object is needed"),
    "no version": (lambda content: b"{}", "its format_version is absent; a number"),
    "a text as version": (changed(format_version="1"), 'its format_version is "1"; a number'),
    "another version": (changed(format_version=99), "has the format 99"),
    "no descriptions": (lambda content: b'{"format_version": 1, "experts": {}}', "its descriptions is absent"),
    "descriptions of text": (changed(descriptions="ocr"), 'its descriptions is "ocr"; a JSON object'),
    "a list of descriptions": (changed(descriptions=[EDGE]), "its descriptions is"),
    "a description of text": (changed(descriptions={"edge": "dense"}), "its description of 'edge'"),
    "another name": (changed(descriptions={"ocr": EDGE}), "its description of 'ocr'"),
    "settings of text": (changed(settings="none"), "its settings is"),
    "negative channels": (described(channels=-3), "channels=-3"),
    "channels of text": (described(channels="3"), "channels='3'"),
    "negative classes": (described(num_classes=-1), "num_classes=-1"),
    "a path as name": (changed(descriptions={"../../x": {**EDGE, "name": "../../x"}}), "an identifier"),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_damaged_manifest_is_named_in_one_line(photos, store, damage):
    change, message = MANIFESTS[damage]
    path = store / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    for use in (read_manifest, LabelStore, lambda folder: label(photos[0], folder)):
        with pytest.raises(ValueError) as error:
            use(store)
        assert str(error.value).startswith(str(path)) and message in str(error.value)
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_labels_without_a_manifest_are_refused(photos, store):
    (store / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds labels \(labels-.*\) but no manifest.json"):
        label(photos[0], store)
    assert not (store / "manifest.json").exists()


def test_file_in_place_of_the_store_is_named(photos, tmp_path):
    (tmp_path / "labels").touch()
    with pytest.raises(NotADirectoryError, match="labels is a file"):
        label(photos[0], tmp_path / "labels")


# ---- hostile content ----


def png_header(width, height):
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def image_bytes(kind, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (4, 4)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        png_header(100_000, 100_000),
        png_header(2**31 - 1, 2**31 - 1),
        image_bytes("TIFF"),
        image_bytes("EPS"),
        image_bytes("PNG", "RGB"),
        image_bytes("PNG", "I;16"),
        b"",
    ],
    ids=["large", "largest", "TIFF", "EPS", "three channels", "16 bits", "empty"],
)
def test_hostile_maps_are_refused_by_key_and_shard(tmp_path, content):
    with LabelWriter(tmp_path, make_manifest(None, [EDGE], {})) as writer:
        writer.write_row({"key": "a.jpg", "error": None, "edge": {"bytes": content, "path": None}})
        writer.write_row({"key": "b.jpg", "error": None, "edge": {"bytes": image_bytes("PNG"), "path": None}})
    store = LabelStore(tmp_path)
    with pytest.raises(DamagedShardError, match=r"000000.parquet is damaged: the label of 'edge' for 'a.jpg'"):
        store["a.jpg"]
    assert store["b.jpg"]["edge"].shape == (4, 4)
    assert len(set_aside_damaged(tmp_path)) == 1


def test_invalid_expert_is_refused_before_writing():
    with pytest.raises(ValueError, match="an identifier"):
        make_manifest(None, [{**EDGE, "name": "../edge"}], {})


def test_keys_with_undecodable_bytes_are_found(tmp_path):
    images = dict.fromkeys(["\ud800.png", "\udcff.png"], Image.new("RGB", (20, 8)))
    assert label(images, tmp_path).failed == 0
    store = LabelStore(tmp_path)
    assert list(store) == [r"\xed\xa0\x80.png", r"\xff.png"]
    assert all(key in store for key in images) and store["\ud800.png"]["ocr"] is not None
    with LabelWriter(tmp_path / "own", make_manifest(None, [EDGE], {})) as writer:
        writer.write("\ud800", {}, error="about \udcff")
    assert LabelStore(tmp_path / "own").errors == {r"\xed\xa0\x80": r"about \xff"}
