"""The small Prismer that the common tests run on."""

import torch

from modeling_prismer import (
    PrismerConfig,
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    PrismerModel,
    PrismerProcessor,
)

from ...test_modeling_common import floats_tensor, ids_tensor
from ..small_tokenizers import VOCAB_SIZE, roberta_tokenizer


EXPERTS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "normal", "kind": "dense", "channels": 3},
    {"name": "segmentation", "kind": "label", "channels": 8, "num_classes": 10},
    {"name": "edge", "kind": "dense", "channels": 1},
    {"name": "detection", "kind": "label", "channels": 8, "num_classes": 12, "instances": True},
    {"name": "ocr", "kind": "label", "channels": 8},
]
IMAGE_SIZE = 32


def small_processor(experts: list[dict]) -> PrismerProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = PrismerImageProcessor(experts=experts, size=size, expert_size=16)
    return PrismerProcessor(image_processor, roberta_tokenizer())


class PrismerModelTester:
    base_model_class = PrismerModel
    causal_lm_class = conditional_generation_class = PrismerForConditionalGeneration
    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_states_types = 2  # of the decoder and of the vision encoder
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocab_size = VOCAB_SIZE

    def __init__(self, parent, experts):
        self.parent = parent
        self.experts = experts

    def get_config(self):
        return PrismerConfig(
            vision_config={
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "patch_size": 8,
                "image_size": IMAGE_SIZE,
            },
            text_config={
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "intermediate_size": 37,
                "max_position_embeddings": 128,
            },
            experts=[dict(expert) for expert in self.experts],
            num_latents=6,
            resampler_layers=2,
            # the common tests also give pixels without any other tensor
            strict_experts=False,
            # the mixin for training wants a loss near zero, which smoothed labels do not have
            label_smoothing=0.0,
        )

    def prepare_config_and_inputs(self):
        batch, size = self.batch_size, IMAGE_SIZE
        input_ids = ids_tensor([batch, self.seq_length], self.vocab_size).clamp(min=4)  # no padding, no end
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([batch, 3, size, size]),
        }
        for expert in self.experts:
            name, channels = expert["name"], expert["channels"]
            if expert["kind"] == "dense":
                inputs[f"{name}_values"] = floats_tensor([batch, channels, size, size])
                continue
            inputs[f"{name}_ids"] = ids_tensor([batch, size, size], 5).to(torch.uint8)
            if expert.get("instances"):
                inputs[f"{name}_classes"] = ids_tensor([batch, 6], expert["num_classes"])
            elif not expert.get("num_classes"):
                inputs[f"{name}_features"] = floats_tensor([batch, 6, channels])
        return self.get_config(), inputs

    prepare_config_and_inputs_for_common = prepare_config_and_inputs
