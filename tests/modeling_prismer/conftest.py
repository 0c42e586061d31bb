import copy
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration
from modeling_prismer.conversion.original_names import EXPERT_NAMES, original_names

from .tiny import tiny_model


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


@dataclass
class Golden:
    """One recording of the reference network: its inputs under our names, and what it gave."""

    name: str
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    recorded: dict
    loaded: PrismerForConditionalGeneration = field(repr=False)

    @property
    def config(self) -> PrismerConfig:
        return self.loaded.config

    def model(self) -> PrismerForConditionalGeneration:
        return copy.deepcopy(self.loaded)

    def original(self, expert: str) -> str:
        return EXPERT_NAMES.get(expert, expert)

    @property
    def text(self) -> dict[str, torch.Tensor]:
        return {key: self.inputs[key] for key in ("input_ids", "attention_mask", "labels")}

    def images(self, painted: bool = False) -> dict[str, torch.Tensor]:
        """The image and what the experts saw; label maps as ids, or painted to dense maps at their full size."""
        given = self.inputs
        images = {"pixel_values": given["pixel_values"]}
        for name in self.config.expert_names:
            if name in given:
                images[f"{name}_values"] = given[name]
        if "segmentation_class_ids" in given:
            images["segmentation_ids"] = given["segmentation_class_ids"][:, 0]
        if "detection_instance_ids" in given:
            images["detection_ids"] = given["detection_instance_ids"][:, 0]
            images["detection_classes"] = given["detection_instance_classes"]
            images["detection_rows"] = given["detection_instance_embedding_rows"][:, 0]
        if "ocr_word_ids" in given:
            images["ocr_ids"] = given["ocr_word_ids"][:, 0]
            images["ocr_features"] = given["ocr_word_features"]
        if not painted:
            return images
        for name in ("segmentation", "detection", "ocr"):
            if (ids := images.pop(f"{name}_ids", None)) is None:
                continue
            features = images.pop(f"{name}_features", None)
            if features is None:
                classes = images.pop(f"{name}_classes", None)
                table = given[f"{name}_class_features"]
                features = table[classes] if classes is not None else table.expand(len(ids), -1, -1)
            maps = []
            for sample_ids, sample_features in zip(ids.long(), features):
                painting = given["background_feature"].repeat(*sample_ids.shape, 1)
                known = sample_ids != 255
                painting[known] = sample_features[sample_ids[known]]
                maps.append(painting.permute(2, 0, 1))
            images[f"{name}_values"] = torch.stack(maps)
        return images


@lru_cache
def load_golden(name: str) -> Golden:
    folder = GOLDEN / name
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    recorded = json.loads((folder / "expected.json").read_text())
    spec = recorded["spec"]
    names = {original: name for name, original in EXPERT_NAMES.items()}
    experts = []
    for original, channels in spec["experts"].items():
        if original != "rgb":
            expert_name = names.get(original, original)
            experts.append({"name": expert_name, "kind": "label" if channels == 64 else "dense", "channels": channels})
            if f"{expert_name}_class_features" in inputs:
                experts[-1]["num_classes"] = len(inputs[f"{expert_name}_class_features"])
            if expert_name == "detection":
                experts[-1]["instances"] = True
    config = PrismerConfig(
        vision_config={
            "hidden_size": spec["vision_width"],
            "num_hidden_layers": spec["vision_layers"],
            "num_attention_heads": spec["vision_heads"],
            "patch_size": spec["patch_size"],
            "image_size": spec["image_size"],
        },
        text_config={**spec["text"], "num_hidden_layers": spec["text"]["num_hidden_layers"] + 1},
        experts=experts,
    )
    model = PrismerForConditionalGeneration(config)
    original = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state = model.state_dict()
    for key, source in original_names(config).items():
        tensor = original[source.name]
        state[key].copy_(tensor if source.third is None else tensor.chunk(3)[source.third])
    for expert in experts:
        if expert["kind"] == "label":
            features = inputs.get(f"{expert['name']}_class_features", torch.zeros(0, 64))
            model.set_class_features(expert["name"], features, inputs["background_feature"])
    return Golden(name, inputs, expected, recorded, model.eval())


@pytest.fixture
def load_recording():
    return load_golden


@pytest.fixture
def model() -> PrismerForConditionalGeneration:
    """A tiny Prismer with all six experts, in evaluation mode."""
    return tiny_model()


@pytest.fixture
def model_without_experts() -> PrismerForConditionalGeneration:
    """A tiny PrismerZ, in evaluation mode."""
    return tiny_model(experts=[])
