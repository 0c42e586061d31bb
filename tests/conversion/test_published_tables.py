"""The published tables of class features and the published analysis: files of the same containers, made here."""

import copyreg
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration
from modeling_prismer.conversion import (
    convert_clip_pca,
    convert_original_checkpoint,
    read_class_tables,
    read_clip_pca,
    save_class_features,
)
from modeling_prismer.processing import PrismerImageProcessor


EXPERTS = PrismerConfig.from_variant("prismer_base").experts
COCO = [f"thing {i}" for i in range(133)]
ADE = [f"stuff {i}" for i in range(150)]
OBJECTS = [f"object {i % 677}" for i in range(722)]  # 677 distinct names


def published(names: list[str]) -> dict:
    generator = torch.Generator().manual_seed(len(names))
    return {"labels": names, "features": torch.randn(len(names), 64, generator=generator)}


@pytest.fixture(scope="module")
def analysis():
    return PCA(n_components=64).fit(np.random.default_rng(0).normal(size=(100, 768)) + 3)


@pytest.fixture
def dataset(tmp_path, analysis):
    """A folder with the five published files."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    torch.save(published(COCO), folder / "coco_features.pt")
    torch.save(published(ADE), folder / "ade_features.pt")
    torch.save(published(OBJECTS), folder / "detection_features.pt")
    torch.save(torch.linspace(-1, 1, 64), folder / "background_features.pt")
    (folder / "clip_pca.pkl").write_bytes(as_of_0_24(analysis))
    return folder


def as_of_0_24(analysis) -> bytes:
    """As scikit-learn 0.24.2 and the numpy of that time pickled it, in protocol 4."""
    data = pickle.dumps(analysis, protocol=4)
    new, old = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    assert data.count(new) == 1
    data = data.replace(new, old)
    return data[:3] + struct.pack("<Q", struct.unpack("<Q", data[3:11])[0] - 1) + data[11:]


# ---- tables


def test_published_tables_are_read_with_their_names(dataset, caplog):
    tables = read_class_tables(dataset, EXPERTS)
    assert tables.keys() == {"segmentation", "detection", "background"}
    assert tables["segmentation"].class_names == COCO and tables["detection"].class_names == OBJECTS
    assert torch.equal(tables["segmentation"].features, published(COCO)["features"])
    assert torch.equal(tables["detection"].features, published(OBJECTS)["features"])
    assert torch.equal(tables["background"].features[0], torch.linspace(-1, 1, 64))
    assert caplog.text == ""


def test_the_number_of_classes_tells_coco_from_ade(dataset):
    experts = [{**EXPERTS[2], "num_classes": 150}, EXPERTS[4]]
    assert read_class_tables(dataset, experts)["segmentation"].class_names == ADE


def test_a_model_converted_without_tables_takes_those_of_coco(dataset):
    experts = [{name: value for name, value in expert.items() if name != "num_classes"} for expert in EXPERTS]
    tables = read_class_tables(dataset, experts)
    assert tables["segmentation"].class_names == COCO and tables["detection"].class_names == OBJECTS


def test_a_converted_model_has_the_published_features_and_names(dataset, prismer, tokenizer, tmp_path):
    config = prismer.config
    for expert in config.experts:
        expert.pop("num_classes", None)
    model = convert_original_checkpoint(
        prismer.checkpoint, config, tmp_path / "out", feature_tables=dataset, tokenizer=tokenizer
    )
    stems = model.model.vision_model.expert_stems
    background = torch.linspace(-1, 1, 64)
    for name, names in {"segmentation": COCO, "detection": OBJECTS}.items():
        assert torch.equal(stems[name].class_features[:-1], published(names)["features"])
        assert torch.equal(stems[name].class_features[-1], background)
    assert torch.equal(stems["ocr"].class_features, background[None])

    loaded = PrismerForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.config.class_names == {"segmentation": COCO, "detection": OBJECTS}
    image_processor = PrismerImageProcessor.from_pretrained(tmp_path / "out")
    assert image_processor.experts == loaded.config.experts


@pytest.mark.parametrize("name", ["coco_features.pt", "detection_features.pt", "background_features.pt"])
def test_an_incomplete_published_table_is_named(dataset, name):
    content = (dataset / name).read_bytes()
    (dataset / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} (could not be read|was refused)"):
        read_class_tables(dataset, EXPERTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "coco_features.pt",
            published(COCO[:100]),
            r"segmentation \(133 classes\): .*coco_features.pt has 100",
        ),
        (
            "detection_features.pt",
            published(OBJECTS[:700]),
            "has 700 rows; .*'detection' has num_classes=722",
        ),
        ("coco_features.pt", published(COCO) | {"labels": COCO[1:]}, "coco_features.pt has 133 rows and 132 names"),
        ("coco_features.pt", published(COCO) | {"labels": [*COCO[1:], 7]}, "a string for each row is needed"),
        (
            "detection_features.pt",
            {"labels": OBJECTS, "features": torch.full((722, 64), torch.nan)},
            "detection_features.pt has numbers that are not finite, first in row 0",
        ),
        ("background_features.pt", torch.zeros(3, 64), "'background' has 3 rows; the background is one vector"),
        ("background_features.pt", torch.zeros(32), "has 32 channels; the config's expert 'segmentation' has 64"),
        (
            "coco_features.pt",
            {"labels": COCO, "features": torch.zeros(1).expand(133, 10**9)},
            "coco_features.pt would take 532,000,000,000 bytes",
        ),
    ],
)
def test_a_published_table_that_does_not_fit_is_named(dataset, name, content, message):
    torch.save(content, dataset / name)
    with pytest.raises(ValueError, match=message):
        read_class_tables(dataset, EXPERTS)


def test_a_missing_published_table_is_named(dataset, prismer, caplog):
    (dataset / "detection_features.pt").unlink()
    read_class_tables(dataset, EXPERTS)
    assert "no table of class features for detection (722 classes)" in caplog.text
    (dataset / "background_features.pt").unlink()
    with pytest.raises(ValueError, match="feature_tables has no 'background'"):
        read_class_tables(dataset, EXPERTS)


def test_a_file_that_is_not_a_table_is_named_in_a_warning(dataset, caplog):
    torch.save({"epoch": "three"}, dataset / "log.pt")
    (dataset / "empty.pt").write_bytes(b"")
    assert read_class_tables(dataset, EXPERTS).keys() == {"segmentation", "detection", "background"}
    assert "log.pt" in caplog.text and "empty.pt" in caplog.text and "ade_features" not in caplog.text


def test_a_table_with_other_names_than_the_configs_is_refused(dataset):
    experts = [{**EXPERTS[2], "class_names": ["thing 0", "thing 2", *COCO[2:]]}]
    with pytest.raises(ValueError, match="class 1 'thing 1'; .* expert 'segmentation' calls it 'thing 2'"):
        read_class_tables(dataset, experts)


def test_class_names_are_read_from_every_form_of_a_table(tmp_path):
    experts = [{"name": "parts", "kind": "label", "channels": 4, "num_classes": 2}]
    names, background = ["head", "tail"], torch.zeros(4)
    save_class_features({"parts": names}, lambda texts: np.eye(4)[: len(texts)], tmp_path / "tables.safetensors")
    assert read_class_tables(tmp_path / "tables.safetensors", experts)["parts"].class_names == names
    by_name = {"parts": {"head": torch.ones(4), "tail": torch.zeros(4)}, "background": background}
    assert read_class_tables(by_name, experts)["parts"].class_names == names
    plain = {"parts": torch.ones(2, 4), "background": background}
    assert read_class_tables(plain, experts)["parts"].class_names is None


# ---- the analysis


@pytest.mark.parametrize("dump", [as_of_0_24, lambda pca: pickle.dumps(pca, 4), lambda pca: pickle.dumps(pca, 3)])
def test_the_published_analysis_is_read(dump, analysis, tmp_path):
    (tmp_path / "clip_pca.pkl").write_bytes(dump(analysis))
    read = read_clip_pca(tmp_path / "clip_pca.pkl")
    np.testing.assert_array_equal(read["mean"], analysis.mean_.astype(np.float32))
    np.testing.assert_array_equal(read["components"], analysis.components_.astype(np.float32))
    embeddings = np.random.default_rng(1).normal(size=(5, 768))
    features = (torch.tensor(embeddings).float() - read["mean"]) @ read["components"].T
    np.testing.assert_allclose(features, analysis.transform(embeddings), atol=1e-4)


def test_reading_the_analysis_imports_nothing(analysis, tmp_path, monkeypatch):
    (tmp_path / "clip_pca.pkl").write_bytes(as_of_0_24(analysis))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    read_clip_pca(tmp_path / "clip_pca.pkl")
    assert "sklearn" not in sys.modules


def test_the_converted_analysis_works_in_the_text_expert(analysis, tmp_path):
    (tmp_path / "clip_pca.pkl").write_bytes(as_of_0_24(analysis))
    path = convert_clip_pca(tmp_path / "clip_pca.pkl", tmp_path / "new" / "clip_pca.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == {
        "mean": (768,),
        "components": (64, 768),
    }
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_conversion_saves_the_analysis_next_to_the_model(dataset, prismer, tokenizer, tmp_path):
    config = prismer.config
    for expert in config.experts:
        expert.pop("num_classes", None)
    out = tmp_path / "out"
    convert_original_checkpoint(prismer.checkpoint, config, out, feature_tables=dataset, tokenizer=tokenizer)
    saved, read = load_file(out / "clip_pca.safetensors"), read_clip_pca(dataset / "clip_pca.pkl")
    assert all(torch.equal(saved[name], tensor) for name, tensor in read.items())


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def with_state(analysis, **changes) -> bytes:
    changed = PCA()
    changed.__dict__.update(vars(analysis) | changes)
    return pickle.dumps(changed, protocol=4)


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


PCA_CLASS = text("sklearn.decomposition._pca") + text("PCA") + b"\x93"
RUN = text("mkdir -p ran") + b"\x85R"  # the text as the only argument, called
HOSTILE = {
    "a function of the system": opcodes(text("os"), text("system"), b"\x93", RUN),
    "in protocol 0": b"cos\nsystem\n(S'mkdir -p ran'\ntR.",
    "by INST": b"(S'mkdir -p ran'\nios\nsystem\n.",
    "builtins": opcodes(text("builtins"), text("eval"), b"\x93", RUN),
    "a nested name": opcodes(text("sklearn.decomposition._pca"), text("PCA.__init__"), b"\x93", RUN),
    "globals of a function": opcodes(text("sklearn.decomposition._pca"), text("PCA.fit.__globals__"), b"\x93"),
    "another class of the module": opcodes(text("sklearn.decomposition._pca"), text("linalg.os.system"), b"\x93", RUN),
    "numpy's loader": opcodes(text("numpy"), text("load"), b"\x93", RUN),
    "copyreg": opcodes(text("copyreg"), text("_reconstructor"), b"\x93", PCA_CLASS, b"\x85R"),
    "state for a class": opcodes(PCA_CLASS, b"}", text("arguments"), b"Nsb"),
    "state for a function": opcodes(
        text("numpy.core.multiarray"), text("_reconstruct"), b"\x93", b"N}", text("__defaults__"), b"Ns\x86b"
    ),
    "a persistent id": opcodes(b"K\x01Q"),
    "no analysis": opcodes(b"}"),
    "an analysis without state": opcodes(PCA_CLASS, b")\x81"),
    "a state that is no dict": opcodes(PCA_CLASS, b")\x81K\x01b"),
    "a huge memo": opcodes(b"Nr\xff\xff\xff\xff"),
    "bytes that are not there": opcodes(b"\x8e" + struct.pack("<Q", 1 << 42)),
    "an empty buffer of a terabyte": opcodes(b"\x96" + struct.pack("<Q", 1 << 40)),
    "a very deep list": opcodes(b"]" * 100_000, b"a" * 99_999),
    "no pickle": b"version https://git-lfs.github.com/spec/v1\n",
    "nothing": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_analysis_is_refused_without_running_it(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip_pca.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="clip_pca.pkl was refused, and nothing in it was run"):
        read_clip_pca(tmp_path / "clip_pca.pkl")
    assert os.listdir(tmp_path) == ["clip_pca.pkl"]


def test_the_error_names_the_function_in_a_hostile_analysis(tmp_path):
    (tmp_path / "clip_pca.pkl").write_bytes(pickle.dumps(Call(os.system, "true"), protocol=4))
    with pytest.raises(ValueError, match=f"it names {os.system.__module__}.system"):
        read_clip_pca(tmp_path / "clip_pca.pkl")


def test_a_call_inside_the_analysis_is_refused(analysis, tmp_path):
    target = tmp_path / "ran"
    (tmp_path / "clip_pca.pkl").write_bytes(with_state(analysis, noise_variance_=Call(os.mkdir, str(target))))
    with pytest.raises(ValueError, match="it names .*mkdir"):
        read_clip_pca(tmp_path / "clip_pca.pkl")
    assert not target.exists()


def test_an_object_registered_elsewhere_is_refused(tmp_path):
    copyreg.add_extension("os", "getcwd", 0xEF)
    try:
        pickle.loads(opcodes(b"\x82\xef"))  # from now on without asking for its name
        (tmp_path / "clip_pca.pkl").write_bytes(opcodes(b"\x82\xef", b")R"))
        with pytest.raises(ValueError, match="it has the instruction EXT1"):
            read_clip_pca(tmp_path / "clip_pca.pkl")
    finally:
        copyreg.remove_extension("os", "getcwd", 0xEF)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whiten": True}, "it has whiten=True; False is needed"),
        ({"mean_": None}, "its mean_ is not an array"),
        ({"mean_": np.zeros(5)}, "its mean has 5 numbers, its components have 768"),
        ({"components_": np.zeros(768)}, r"its components_ has the shape \(768,\); 2 dimensions"),
        ({"components_": np.full((64, 768), np.nan)}, "its components_ has numbers that are not finite"),
        ({"components_": np.full((64, 768), 1e300)}, "its components_ has numbers that are not finite"),
        ({"components_": np.zeros((64, 768), int)}, "its components_ has the type <i8; f4 or f8 is needed"),
        ({"components_": np.full((64, 768), None)}, "its components_ has the type"),
    ],
)
def test_other_pickled_objects_are_refused(changes, message, analysis, tmp_path):
    (tmp_path / "clip_pca.pkl").write_bytes(with_state(analysis, **changes))
    with pytest.raises(ValueError, match=message):
        read_clip_pca(tmp_path / "clip_pca.pkl")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_arrays_of_every_order_and_precision_are_read(order, dtype, analysis, tmp_path):
    components = np.asarray(np.arange(64 * 768).reshape(64, 768), dtype, order=order)
    (tmp_path / "clip_pca.pkl").write_bytes(with_state(analysis, components_=components))
    np.testing.assert_array_equal(read_clip_pca(tmp_path / "clip_pca.pkl")["components"], components)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "clip_pca.pkl", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes; an analysis has at most"):
        read_clip_pca(tmp_path / "clip_pca.pkl")


def test_a_missing_analysis_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*clip_pca.pkl"):
        read_clip_pca(tmp_path / "clip_pca.pkl")
