"""The small models and inputs that the tests of the network run on, made in one place."""

import pytest
import torch
from packaging.version import Version

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration


EXPERTS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "normal", "kind": "dense", "channels": 3},
    {"name": "segmentation", "kind": "label", "channels": 8, "num_classes": 10},
    {"name": "edge", "kind": "dense", "channels": 1},
    {"name": "detection", "kind": "label", "channels": 8, "num_classes": 12, "instances": True},
    {"name": "ocr", "kind": "label", "channels": 8},
]
IMAGE_SIZE = 32
MAP_SIZE = 32
VOCAB_SIZE = 60
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}

needs_traced_checks = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="before torch 2.13 a checked mask breaks a compiled graph"
)


def tiny_config(experts: list[dict] | None = None, image_size: int = IMAGE_SIZE, **kwargs) -> PrismerConfig:
    """Unlike widths of vision and text; the maps of both kinds of experts are really resized."""
    return PrismerConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "image_size": image_size,
        },
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        experts=[dict(expert) for expert in (EXPERTS if experts is None else experts)],
        num_latents=6,
        resampler_layers=2,
        **kwargs,
    )


@torch.no_grad()
def scatter_weights(model: torch.nn.Module) -> torch.nn.Module:
    """
    Moves every weight and statistic away from where initialisation put it, so that nothing is zero, one or equal, and
    so that what the model says depends on the image and on the place in the text.
    """
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        strong = "position_embeddings" in name or ("cross_attn." in name and name.endswith("weight"))
        parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.6 if strong else 0.15))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "class_features")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def tiny_model(config: PrismerConfig | None = None, **kwargs) -> PrismerForConditionalGeneration:
    """In evaluation mode, with scattered weights: each call gives the same."""
    torch.manual_seed(0)
    return scatter_weights(PrismerForConditionalGeneration(config or tiny_config(**kwargs))).eval()


def image_inputs(batch_size: int = 3, experts: list[dict] | None = None, map_size: int = MAP_SIZE, seed: int = 0):
    """Images of `IMAGE_SIZE` and what each expert saw, as the processor hands them over."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"pixel_values": torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    for expert in EXPERTS if experts is None else experts:
        name, channels = expert["name"], expert["channels"]
        if expert["kind"] == "dense":
            shape = (batch_size, channels, map_size, map_size)
            inputs[f"{name}_values"] = torch.rand(shape, generator=generator) * 2 - 1
            continue
        num_ids = 5 if expert.get("instances") else expert.get("num_classes") or 4
        blocks = torch.randint(num_ids + 1, (batch_size, map_size // 4, map_size // 4), generator=generator)
        ids = torch.where(blocks == num_ids, 255, blocks).to(torch.uint8)
        inputs[f"{name}_ids"] = ids.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        if expert.get("instances"):
            inputs[f"{name}_classes"] = torch.randint(expert["num_classes"], (batch_size, 8), generator=generator)
        elif not expert.get("num_classes"):
            inputs[f"{name}_features"] = torch.randn(batch_size, 6, channels, generator=generator)
    return inputs


def prompts(batch_size: int = 3, length: int = 5, seed: int = 0) -> torch.Tensor:
    """Prompts without padding: `<s>` and words."""
    words = torch.randint(4, VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))
    words[:, 0] = 0
    return words


def training_inputs(batch_size: int = 3, length: int = 7, **kwargs) -> dict[str, torch.Tensor]:
    """Images and texts of which all but the first two tokens are learned."""
    input_ids = prompts(batch_size, length)
    labels = input_ids.clone()
    labels[:, :2] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        **image_inputs(batch_size, **kwargs),
    }


def pick(inputs: dict[str, torch.Tensor], rows) -> dict[str, torch.Tensor]:
    """The same inputs of some samples only."""
    return {key: tensor[rows] for key, tensor in inputs.items()}


def without(inputs: dict[str, torch.Tensor], *experts: str) -> dict[str, torch.Tensor]:
    """The same inputs without the tensors of some experts."""
    return {key: tensor for key, tensor in inputs.items() if key.rpartition("_")[0] not in experts}
