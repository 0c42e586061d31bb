"""From the command line or a data set to the network, an image is opened once, and labels are matched once."""

import sys
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_prismer import DataCollatorForPrismer, PrismerProcessor, pretrained_path, sample_image
from modeling_prismer.cli import app
from modeling_prismer.processing import JointAugmentation, load_image
from modeling_prismer.processing.expert_labels import match_expert_labels
from modeling_prismer.processing.labels import label_images, label_source


PATH = pretrained_path("prismer-easy-vqa")


@contextmanager
def counted_calls():
    """Counts opened files and calls of `load_image` in all threads, and how often labels are matched to images."""
    calls = Counter()
    counted = {Image.open.__code__: "files", load_image.__code__: "loads", match_expert_labels.__code__: "matches"}

    def profile(frame, event, arg):
        if event == "call" and frame.f_code in counted:
            name = counted[frame.f_code]
            calls[name] += name != "matches" or has_labels(frame.f_locals["expert_labels"])

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def has_labels(expert_labels):
    return any(label is not None for own in expert_labels or () for label in (own or {}).values())


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "shape.png"
    sample_image("shape").save(path)
    return str(path)


@pytest.fixture(scope="module")
def processor():
    return PrismerProcessor.from_pretrained(PATH)


@pytest.fixture(scope="module")
def labels_for(processor, shape, tmp_path_factory):
    """The stored labels of two images, in memory."""
    store = tmp_path_factory.mktemp("labels")
    label_images({"a": shape, "b": shape}, processor.experts, store, progress=False)
    labels = label_source(store, processor.image_processor.experts)(["a", "b"])
    return lambda image_ids: labels


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "what color is the shape?", "what shape is it?"],
        ["classify", "red", "teal", "--question", "what color is the shape?"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_opens_its_image_once(shape, arguments):
    command, *others = arguments
    with counted_calls() as calls:
        result = CliRunner().invoke(app, [command, shape, *others, "--model", PATH])
    assert result.exit_code == 0, result.output
    assert (calls["files"], calls["matches"]) == (1, 1)


def test_panel_of_the_experts_opens_its_file_once(shape, tmp_path):
    with counted_calls() as calls:
        result = CliRunner().invoke(app, ["experts", shape, "--out", str(tmp_path), "--model", PATH])
    assert result.exit_code == 0, result.output
    assert calls["files"] == 1


@pytest.mark.parametrize("is_augmented", [False, True])
def test_batch_opens_each_file_once(processor, shape, labels_for, is_augmented):
    experts = processor.image_processor.experts
    augmentation = JointAugmentation(experts, size=(64, 64), expert_size=64) if is_augmented else None
    collator = DataCollatorForPrismer(processor, labels_for, augmentation)
    with counted_calls() as calls:
        collator([{"image": shape, "image_id": name, "text": "what color?", "suffix": "teal"} for name in "ab"])
    assert (calls["files"], calls["matches"]) == (2, 1)
    assert calls["loads"] == 4  # each file, and each image of the batch after augmentation


def test_live_experts_do_not_open_files_again(processor, shape):
    with counted_calls() as calls:
        DataCollatorForPrismer(processor)([{"image": shape, "text": "what color?", "suffix": "teal"}] * 2)
    assert calls["files"] == 2
