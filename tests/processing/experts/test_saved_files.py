"""A checkpoint from a stranger names its own files and models on the Hub; no other file is opened or copied."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForDepthEstimation

from modeling_prismer import PrismerProcessor, pretrained_path
from modeling_prismer.processing.experts import (
    CannyEdges,
    ClipTextFeatures,
    DepthEstimator,
    DexiNedEdges,
    Expert,
    ExpertSuite,
    PpOcrText,
    RapidOcrText,
)


SECRET = "the secret of this machine"
DEPTH = {"type": "depth_estimator", "name": "depth"}


class Weighed(Expert):
    """Stands for an expert with files of its own."""

    type = "test_saved_weighed"
    name, kind, channels = "weighed", "dense", 1
    file_settings = ("weights", "names")

    def __init__(self, weights="me/on-the-hub", names=None):
        self.weights = str(weights)
        self.names = names


@pytest.fixture
def secret(tmp_path):
    """A folder of this machine's, which no checkpoint knows."""
    folder = tmp_path / "home" / "secret"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(SECRET)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint as a stranger would, with these descriptions of experts."""

    def write(*experts, folder=tmp_path / "theirs"):
        (folder / "experts").mkdir(parents=True, exist_ok=True)
        (folder / "experts" / "suite.json").write_text(json.dumps({"experts": experts}))
        return folder

    return write


def contents(folder):
    return "".join(file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file())


# ---- what a description may name


@pytest.mark.parametrize(
    "value",
    [
        "{secret}",
        "{secret}/config.json",
        "~",
        "~/secret",
        "..",
        ".",
        "",
        "../../secret",
        "network/../../../../home/secret",
        "file://{secret}",
        "http://127.0.0.1/model",
        "C:\\Users\\me\\secret",
        "C:secret",
        "..\\..\\secret",
        "\\\\server\\share",
        "//server/share",
        "/dev/zero",
        "a/b/c",
        "name\0",
        5,
        ["{secret}"],
        {"path": "{secret}"},
        True,
    ],
)
@pytest.mark.parametrize("setting", ["model_id", "checkpoint", "pca", "model_name", "detector", "recognizer"])
def test_a_path_of_this_machine_is_refused(checkpoint, secret, monkeypatch, value, setting):
    monkeypatch.setenv("HOME", str(secret.parent))
    value = value.format(secret=secret) if isinstance(value, str) else value
    clip = {"type": "clip_text", "pca": "me/pca", "model_name": "me/clip", setting: value}
    experts = {
        "model_id": {**DEPTH, "model_id": value},
        "checkpoint": {"type": "dexined", "name": "edge", "checkpoint": value},
        "pca": {"type": "rapidocr", "name": "ocr", "word_features": clip},
        "model_name": {"type": "rapidocr", "name": "ocr", "word_features": clip},
        "detector": {"type": "pp_ocr", "name": "ocr", "detector": value},
        "recognizer": {"type": "pp_ocr", "name": "ocr", "recognizer": value},
    }
    with pytest.raises(ValueError, match=f"{setting} of the saved '.*' is .*, which is neither a file inside"):
        ExpertSuite.from_pretrained(checkpoint(experts[setting]))


def test_a_processor_from_a_stranger_leaks_nothing(secret, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(pretrained_path("prismer-easy-vqa"), theirs)
    for file, path in (("processor_config.json", ("experts", "experts")), ("experts/suite.json", ("experts",))):
        config = json.loads((theirs / file).read_text())
        entries = config
        for key in path:
            entries = entries[key]
        entries.append({**DEPTH, "model_id": str(secret)})
        (theirs / file).write_text(json.dumps(config))
    processor = PrismerProcessor.from_pretrained(theirs)
    with pytest.raises(ValueError, match="set another path in your own code"):
        processor.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="model_id of the saved 'depth_estimator'"):
        processor.experts  # noqa: B018
    assert not (tmp_path / "mine").exists() or SECRET not in contents(tmp_path / "mine")
    without = PrismerProcessor.from_pretrained(theirs, experts=None)
    without.save_pretrained(tmp_path / "mine")
    assert SECRET not in contents(tmp_path / "mine")


@pytest.mark.parametrize(
    "link",
    ["experts/depth/network/config.json", "experts/depth/network/deeper", "experts/depth/network", "experts/depth"],
)
def test_a_link_out_of_the_checkpoint_is_refused(checkpoint, secret, link):
    theirs = checkpoint({**DEPTH, "model_id": "network"})
    (theirs / link).parent.mkdir(parents=True, exist_ok=True)
    (theirs / link).symlink_to(secret / "config.json" if link.endswith("json") else secret)
    if link == "experts/depth":
        (secret / "network").mkdir()
    with pytest.raises(ValueError, match="lies outside|is a link to a folder"):
        ExpertSuite.from_pretrained(theirs)


def test_a_description_that_is_a_link_is_refused(checkpoint, secret):
    theirs = checkpoint()
    (theirs / "experts" / "suite.json").unlink()
    (theirs / "experts" / "suite.json").symlink_to(secret / "config.json")
    with pytest.raises(ValueError, match="the suite's description .* lies outside"):
        ExpertSuite.from_pretrained(theirs)


def test_a_link_made_after_loading_is_not_followed(checkpoint, secret, tmp_path):
    theirs = checkpoint({"type": "test_saved_weighed", "name": "weighed", "weights": "network"})
    (theirs / "experts" / "weighed" / "network").mkdir(parents=True)
    suite = ExpertSuite.from_pretrained(theirs)
    (theirs / "experts" / "weighed" / "network" / "config.json").symlink_to(secret / "config.json")
    with pytest.raises(ValueError, match="weights of the saved 'test_saved_weighed' .* lies outside"):
        suite.save_pretrained(tmp_path / "mine")
    assert SECRET not in contents(tmp_path / "mine")


def test_a_pipe_is_not_opened(checkpoint):
    theirs = checkpoint({"type": "test_saved_weighed", "name": "weighed", "weights": "network"})
    (theirs / "experts" / "weighed" / "network").mkdir(parents=True)
    os.mkfifo(theirs / "experts" / "weighed" / "network" / "config.json")
    with pytest.raises(ValueError, match="is not a regular file"):
        ExpertSuite.from_pretrained(theirs)


def test_links_inside_the_checkpoint_are_followed(checkpoint, tmp_path):
    theirs = checkpoint({"type": "test_saved_weighed", "name": "weighed", "weights": "a.txt", "names": "b.txt"})
    (theirs / "experts" / "weighed").mkdir()
    (theirs / "shared.txt").write_text("shared")
    for name in ("a.txt", "b.txt"):
        (theirs / "experts" / "weighed" / name).symlink_to("../../shared.txt")
    (tmp_path / "alias").symlink_to(theirs)  # the user's own link
    ExpertSuite.from_pretrained(tmp_path / "alias").save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "experts" / "weighed" / "b.txt").read_text() == "shared"


def test_links_in_the_cache_of_the_hub_are_followed(checkpoint, tmp_path):
    cache = tmp_path / "models--them--prismer"
    theirs = checkpoint({"type": "test_saved_weighed", "name": "weighed", "weights": "a.txt"}, folder=cache / "1")
    (cache / "blobs").mkdir()
    (cache / "snapshots").mkdir()
    theirs = theirs.rename(cache / "snapshots" / "1")
    (theirs / "experts" / "weighed").mkdir()
    (cache / "blobs" / "0a1b").write_text("weights")
    (theirs / "experts" / "weighed" / "a.txt").symlink_to("../../../../blobs/0a1b")
    ExpertSuite.from_pretrained(theirs).save_pretrained(tmp_path / "mine")
    saved = tmp_path / "mine" / "experts" / "weighed" / "a.txt"
    assert saved.read_text() == "weights" and not saved.is_symlink()


def test_a_hub_id_is_never_a_local_folder(checkpoint, secret, tmp_path, monkeypatch):
    theirs = checkpoint({"type": "test_saved_weighed", "name": "weighed", "weights": "home/secret"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="but there is a local file or folder of that name"):
        ExpertSuite.from_pretrained(theirs)
    monkeypatch.chdir(theirs)
    suite = ExpertSuite.from_pretrained(theirs)
    monkeypatch.chdir(tmp_path)
    suite.save_pretrained(tmp_path / "mine")
    assert SECRET not in contents(tmp_path / "mine")
    assert json.loads((tmp_path / "mine/experts/suite.json").read_text())["experts"][0]["weights"] == "home/secret"
    with pytest.raises(ValueError, match="which would be opened instead"):
        suite["weighed"].load()


def test_the_configuration_of_a_hub_id_is_never_local(checkpoint, secret, tmp_path, monkeypatch):
    theirs = checkpoint({"type": "object_detector", "name": "detection", "model_id": "home/secret"})
    monkeypatch.chdir(theirs)
    suite = ExpertSuite.from_pretrained(theirs)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="which would be opened instead"):
        suite["detection"].class_names  # noqa: B018


def test_published_ids_are_accepted(checkpoint, tmp_path):
    suite = ExpertSuite.from_name("published")
    suite["ocr"] = PpOcrText()
    suite.save_pretrained(tmp_path / "mine")
    assert ExpertSuite.from_pretrained(tmp_path / "mine").to_dict() == suite.to_dict()


# ---- what a user's own code may name


def test_paths_from_your_own_code_are_copied(tmp_path, secret, checkpoint):
    save_file({"mean": torch.zeros(4)}, tmp_path / "pca.safetensors")
    suite = ExpertSuite([Weighed(secret), RapidOcrText(ClipTextFeatures(tmp_path / "pca.safetensors"))])
    suite.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "experts" / "weighed" / "secret" / "config.json").read_text() == SECRET
    assert (tmp_path / "mine" / "experts" / "ocr" / "pca.safetensors").is_file()
    again = ExpertSuite.from_pretrained(tmp_path / "mine")
    assert again["weighed"].weights == str(tmp_path / "mine" / "experts" / "weighed" / "secret")

    theirs = ExpertSuite.from_pretrained(checkpoint({"type": "test_saved_weighed", "name": "weighed"}))
    theirs["weighed"].weights = str(secret)
    theirs.save_pretrained(tmp_path / "set_later")
    assert SECRET in contents(tmp_path / "set_later")


def test_your_own_description_may_name_any_path(secret):
    suite = ExpertSuite([Weighed(secret)])
    assert ExpertSuite.from_dict(suite.to_dict())["weighed"].weights == str(secret)


def test_two_files_with_the_same_name_are_both_kept(tmp_path):
    for number in "12":
        (tmp_path / number / "network").mkdir(parents=True)
        (tmp_path / number / "network" / "config.json").write_text(number)
    suite = ExpertSuite([Weighed(tmp_path / "1" / "network", tmp_path / "2" / "network")])
    for _ in range(2):  # also over what is there
        suite.save_pretrained(tmp_path / "mine")
        saved = ExpertSuite.from_pretrained(tmp_path / "mine")["weighed"]
        assert [Path(folder, "config.json").read_text() for folder in (saved.weights, saved.names)] == ["1", "2"]


def test_a_copy_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "config.json").write_text("old")
    suite = ExpertSuite([Weighed(tmp_path / "network")])
    suite.save_pretrained(tmp_path / "mine")
    before = contents(tmp_path / "mine")
    (tmp_path / "network" / "config.json").write_text("new")

    def full(source, target, **kwargs):
        Path(target).mkdir()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(OSError, match="no space"):
            suite.save_pretrained(tmp_path / "mine")
    assert contents(tmp_path / "mine") == before
    (tmp_path / "network" / "other.json").write_text("more")
    (tmp_path / "network" / "config.json").unlink()
    suite.save_pretrained(tmp_path / "mine")
    assert sorted(os.listdir(tmp_path / "mine" / "experts" / "weighed" / "network")) == ["other.json"]
    with pytest.raises(ValueError, match="cannot be copied into .*, which lies inside it"):
        suite.save_pretrained(tmp_path / "network" / "inside")


# ---- other settings from a stranger


@pytest.mark.parametrize(
    "params",
    [
        {"Rec.model_path": "/home/me/secret.onnx"},
        {"Rec.rec_keys_path": "/home/me/secret.txt"},
        {"Det.model_dir": "../.."},
        {"Det.engine_type": "torch"},
        {"Global.model_root_dir": "/home/me"},
        {"Global.font_path": "/home/me/secret.ttf"},
        {"EngineConfig.onnxruntime.coreml_ep_cfg.ModelCacheDirectory": "/home/me"},
        {"Rec": {"model_path": "/home/me/secret.onnx"}},
        {"Rec.lang_type": "${oc.env:SECRET}"},
        ["Rec.model_path"],
    ],
)
def test_settings_of_rapidocr_cannot_name_files(checkpoint, params):
    with pytest.raises(ValueError, match="params of the saved 'rapidocr'"):
        ExpertSuite.from_pretrained(checkpoint({"type": "rapidocr", "name": "ocr", "params": params}))


def test_settings_of_rapidocr_without_files_are_restored(tmp_path):
    suite = ExpertSuite([RapidOcrText(params={"Rec.lang_type": "cyrillic", "Det.thresh": 0.4})])
    suite.save_pretrained(tmp_path)
    assert ExpertSuite.from_pretrained(tmp_path)["ocr"].params == suite["ocr"].params


def test_settings_of_an_image_processor_run_no_code(tmp_path):
    """They were arguments of from_pretrained, of which `trust_remote_code` is one."""
    scenes = Path(pretrained_path("prismer-scenes"))
    network = tmp_path / "theirs" / "experts" / "depth" / "network"
    shutil.copytree(scenes / "experts" / "depth" / "network", network)
    config = json.loads((network / "preprocessor_config.json").read_text())
    config["auto_map"] = {"AutoImageProcessor": "evil.Evil"}
    config["image_processor_type"] = "Evil"
    (network / "preprocessor_config.json").write_text(json.dumps(config))
    (network / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...")
    settings = {"type": "depth_estimator", "name": "depth", "model_id": "network"}
    settings["image_processor"] = {"trust_remote_code": True}
    suite = ExpertSuite.from_dict({"experts": [settings]}, tmp_path / "theirs")
    with pytest.raises(ValueError):
        suite["depth"].load()
    assert not (tmp_path / "ran").exists()


def test_an_unknown_setting_of_an_image_processor_is_named():
    network = Path(pretrained_path("prismer-scenes")) / "experts" / "depth" / "network"
    with pytest.raises(ValueError, match="'depth' has sice, trust_remote_code; .*Processor.* has .*size"):
        DepthEstimator(network, {"sice": 1, "trust_remote_code": True}).load()
    expert = DepthEstimator(network, {"size": {"height": 48, "width": 32}})
    expert.load()
    assert dict(expert._image_processor.size) == {"height": 48, "width": 32}
    assert isinstance(expert.model, AutoModelForDepthEstimation._model_mapping[type(expert.model.config)])


# ---- names


BAD_NAMES = ["../../x", "..", "", "a/b", "a\\b", "C:", "depth ", "my-depth", "2d", None, 5, ["depth"]]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_the_name_of_an_expert_is_never_a_path(checkpoint, tmp_path, name):
    message = "the name of an expert is .*; a name is an identifier such as 'depth'"
    with pytest.raises(ValueError, match=message):
        ExpertSuite.from_pretrained(checkpoint({"type": "canny", "name": name}))
    with pytest.raises(ValueError, match=message):
        ExpertSuite.from_dict({"experts": [{"type": "canny", "name": name}]})
    expert = CannyEdges()
    expert.name = name
    with pytest.raises((ValueError, TypeError)):
        ExpertSuite([expert])
    suite = ExpertSuite([DexiNedEdges(pretrained=False)])
    suite["edge"].name = name
    with pytest.raises(ValueError, match="the expert 'edge' calls itself"):
        suite.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    "description, message",
    [
        ([], "it has no list of 'experts'"),
        ({"experts": {"edge": {}}}, "it has no list of 'experts'"),
        ({"experts": ["canny"]}, "the name of an expert is None"),
        ({"experts": [{"type": "canny", "name": "edge", "batch_size": 0}]}, "batch_size of the saved expert is 0"),
        ({"experts": [{"type": "canny", "name": "edge", "batch_size": "8"}]}, "batch_size of the saved expert is '8'"),
        ({"experts": [{"type": ["canny"], "name": "edge"}]}, r"type is \['canny'\]; known are"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, description, message):
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "suite.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        ExpertSuite.from_pretrained(tmp_path)


def test_a_description_that_is_not_json_is_named(tmp_path):
    (tmp_path / "experts").mkdir()
    for text in ("{", "[" * 100_000):
        (tmp_path / "experts" / "suite.json").write_text(text)
        with pytest.raises(ValueError, match="suite.json is damaged"):
            ExpertSuite.from_pretrained(tmp_path)
