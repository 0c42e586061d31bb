"""The golden checkpoints, what configures them, and a tokenizer that fits them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import RobertaTokenizer

from modeling_prismer import PrismerConfig
from modeling_prismer.conversion.original_names import EXPERT_NAMES


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


class Golden:
    """A checkpoint of the reference network with random weights, stored in half precision."""

    def __init__(self, name: str):
        self.folder = GOLDEN / name
        self.checkpoint = self.folder / "pytorch_model.bin"

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return torch.load(self.checkpoint, weights_only=True)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @property
    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @property
    def config(self) -> PrismerConfig:
        spec = json.loads((self.folder / "expected.json").read_text())["spec"]
        ours = {original: name for name, original in EXPERT_NAMES.items()}
        experts = []
        for original, channels in spec["experts"].items():
            if original == "rgb":
                continue
            name = ours.get(original, original)
            experts.append({"name": name, "kind": "label" if channels == 64 else "dense", "channels": channels})
            if name in ("segmentation", "detection"):
                experts[-1]["num_classes"] = len(self.inputs[f"{name}_class_features"])
            if name == "detection":
                experts[-1]["instances"] = True
        vision = {field: spec[f"vision_{short}"] for field, short in VISION_FIELDS.items()}
        vision |= {"patch_size": spec["patch_size"], "image_size": spec["image_size"]}
        text = {**spec["text"], "num_hidden_layers": spec["text"]["num_hidden_layers"] + 1}
        return PrismerConfig(vision_config=vision, text_config=text, experts=experts)

    @property
    def tables(self) -> dict[str, torch.Tensor]:
        inputs, names = self.inputs, [expert["name"] for expert in self.config.experts if expert.get("num_classes")]
        tables = {name: inputs[f"{name}_class_features"] for name in names}
        return tables | {"background": inputs["background_feature"]} if self.config.experts else {}


VISION_FIELDS = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}


@pytest.fixture
def prismer() -> Golden:
    """All six experts, patches of 16 pixels."""
    return Golden("tiny_prismer")


@pytest.fixture
def prismerz() -> Golden:
    """No experts."""
    return Golden("tiny_prismerz")


@pytest.fixture
def patch14() -> Golden:
    """Depth, segmentation and ocr, patches of 14 pixels."""
    return Golden("tiny_patch14")


@pytest.fixture(params=["prismer", "prismerz", "patch14"])
def golden(request) -> Golden:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def original_state_dicts() -> dict[str, dict]:
    """For each published variant its configuration and the shape of every tensor."""
    return json.loads((GOLDEN / "original_state_dicts.json").read_text())


@pytest.fixture
def save_checkpoint(tmp_path):
    """Writes a state dict as a checkpoint and returns its path."""

    def save(state, **kwargs) -> Path:
        path = tmp_path / "checkpoint.bin"
        torch.save(state, path, **kwargs)
        return path

    return save


@pytest.fixture
def tokenizer() -> RobertaTokenizer:
    """Letters only, within the 120 tokens of the golden models."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *map(chr, range(ord("!"), ord("z")))]
    return RobertaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
