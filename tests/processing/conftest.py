"""A small tokenizer like RoBERTa's, descriptions of experts, and simulated experts."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaTokenizer

from modeling_prismer.processing import PrismerImageProcessor, PrismerProcessor


SENTENCES = [
    "A picture of a man riding a wave on top of a surfboard",
    "A photo of a golden retriever",
    "What color is the shape? Is there a blue circle in the picture? How many people are there?",
    " a dog a cat yes no red green blue Yes No Red Green Blue Two dogs playing in the park",
]
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

EXPERTS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "normal", "kind": "dense", "channels": 3},
    {"name": "segmentation", "kind": "label", "channels": 8, "num_classes": 133},
    {"name": "edge", "kind": "dense", "channels": 1},
    {"name": "detection", "kind": "label", "channels": 8, "num_classes": 722, "instances": True},
    {"name": "ocr", "kind": "label", "channels": 8},
]


class PretendExpert:
    """Returns the same label for every image, in its size, and records the sizes of the images."""

    def __init__(self, name, label, channels=1, kind="dense"):
        self.description = {"name": name, "kind": kind, "channels": channels}
        self.label = label
        self.seen = []

    def __call__(self, images):
        self.seen.append([image.size for image in images])
        return [self.label(image.height, image.width) for image in images]


def pretend_experts():
    def text(height, width):
        ids = np.zeros((height, width), np.uint8)
        return {"ids": ids, "words": ["stop"], "features": np.ones((1, 8), np.float32)}

    return {
        "depth": PretendExpert("depth", lambda h, w: np.tile(np.arange(w, dtype=np.uint8), (h, 1))),
        "edge": PretendExpert("edge", lambda h, w: np.tile(np.arange(h, dtype=np.uint8)[:, None], (1, w))),
        "ocr": PretendExpert("ocr", text, channels=8, kind="label"),
        "motion": PretendExpert("motion", lambda h, w: np.zeros((h, w), np.uint8)),
    }


class PretendSuite(dict):
    """The interface of an ExpertSuite."""

    def __init__(self, *names, experts=None):
        experts = pretend_experts() if experts is None else experts
        super().__init__({name: experts[name] for name in names})
        self.moved_to = None

    def __call__(self, images):
        outputs = {name: expert(images) for name, expert in self.items()}
        return [{name: labels[i] for name, labels in outputs.items()} for i in range(len(images))]

    def only(self, *names):
        return PretendSuite(*names, experts=self)

    def to(self, device=None, dtype=None):
        self.moved_to = (device, dtype)

    def to_dict(self):
        return {"experts": [{"type": "pretend", "name": name, "weights": f"/home/me/{name}"} for name in self]}

    def save_pretrained(self, folder):
        description = {"experts": [{"type": "pretend", "name": name, "weights": name} for name in self]}
        (Path(folder) / "experts").mkdir(parents=True, exist_ok=True)
        (Path(folder) / "experts" / "suite.json").write_text(json.dumps(description))

    @classmethod
    def from_dict(cls, description, folder=None):
        suite = cls(*(entry["name"] for entry in description["experts"]))
        suite.folder = folder
        return suite

    def __deepcopy__(self, memo):
        raise AssertionError("live experts must never be copied")


@pytest.fixture(scope="session")
def vocabulary():
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(SENTENCES, vocab_size=400, min_frequency=1, special_tokens=SPECIAL_TOKENS)
    return json.loads(trainer.to_str())["model"]


@pytest.fixture
def tokenizer(vocabulary):
    merges = [tuple(merge) for merge in vocabulary["merges"]]
    return RobertaTokenizer(vocab=dict(vocabulary["vocab"]), merges=merges)


@pytest.fixture
def experts():
    return [dict(expert) for expert in EXPERTS]


@pytest.fixture
def image_processor(experts):
    return PrismerImageProcessor(experts=experts, size={"height": 32, "width": 32}, expert_size=16)


@pytest.fixture
def make_processor(image_processor, tokenizer):
    def make(task="caption", experts=None):
        return PrismerProcessor(image_processor, tokenizer, experts=experts, task=task)

    return make


@pytest.fixture
def pretend_suite():
    return PretendSuite


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


@pytest.fixture
def warnings_once(caplog):
    """Returns the warnings of this package. Resets `warning_once`, so that earlier tests do not matter."""
    logging.Logger.warning_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("modeling_prismer.")]
