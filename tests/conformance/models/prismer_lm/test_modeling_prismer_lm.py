"""PrismerLMConfig, PrismerLMModel and PrismerLMForConditionalGeneration under the library's common tests."""

import tempfile
import unittest

import torch
from transformers import LlamaConfig, SiglipVisionConfig

from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration, PrismerLMModel

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_expert_parallel_mixin import ExpertParallelTesterMixin
from ...test_fsdp_mixin import FSDPTesterMixin
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from ...test_tensor_parallel_mixin import TensorParallelTesterMixin
from ...test_training_mixin import TrainingTesterMixin


EXPERTS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "segmentation", "kind": "label", "channels": 8, "num_classes": 10},
]
IMAGE_SIZE, PATCH_SIZE = 16, 8


class PrismerLMModelTester:
    base_model_class = PrismerLMModel
    causal_lm_class = conditional_generation_class = PrismerLMForConditionalGeneration
    batch_size, text_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocab_size = 99

    def __init__(self, parent, has_vision_encoder, fusion):
        self.parent = parent
        self.has_vision_encoder = has_vision_encoder
        self.fusion = fusion
        config = self.get_config()
        self.num_placeholders = config.image_seq_length if fusion == "prefix" else 0
        self.seq_length = self.num_placeholders + self.text_length

    def get_config(self):
        sizes = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
        }
        vision_config = SiglipVisionConfig(
            **sizes, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, vision_use_head=False
        )
        return PrismerLMConfig(
            vision_config=[vision_config] if self.has_vision_encoder else [],
            text_config=LlamaConfig(
                **sizes, vocab_size=self.vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2
            ),
            experts_config={
                "experts": [dict(expert) for expert in EXPERTS],
                "hidden_size": self.hidden_size,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "num_latents": 3,
                "resampler_layers": 1,
                "resampler_attention_heads": 4,
            },
            fusion=self.fusion,
            cross_attention_every=1,
            cross_attention_intermediate_size=37,
            image_token_id=4,
            # the common tests also give pixels without any other tensor
            strict_experts=False,
        )

    def prepare_config_and_inputs(self):
        config, batch = self.get_config(), self.batch_size
        text = ids_tensor([batch, self.text_length], self.vocab_size).clamp(min=5)  # no special token
        images = torch.full((batch, self.num_placeholders), config.image_token_id, device=text.device)
        input_ids = torch.cat([images, text], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "depth_values": floats_tensor([batch, 1, IMAGE_SIZE, IMAGE_SIZE]),
            "segmentation_ids": ids_tensor([batch, IMAGE_SIZE, IMAGE_SIZE], 10).to(torch.uint8),
        }
        if self.has_vision_encoder:
            inputs["pixel_values"] = floats_tensor([batch, 3, IMAGE_SIZE, IMAGE_SIZE])
        return config, inputs

    prepare_config_and_inputs_for_common = prepare_config_and_inputs


class PrismerLMModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (PrismerLMModel, PrismerLMForConditionalGeneration)
    model_tester = None
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    skip_test_image_features_output_shape = True  # the test expects a single vision encoder
    has_vision_encoder, fusion = True, "prefix"

    def setUp(self):
        self.model_tester = PrismerLMModelTester(self, self.has_vision_encoder, self.fusion)
        self.config_tester = ConfigTester(
            self, config_class=PrismerLMConfig, has_text_modality=False, common_properties=["fusion"]
        )

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs()
        return config, {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_sdpa_can_dispatch_composite_models(self):
        # The library's own looks for a single vision encoder.
        for model_class in self.all_model_classes:
            with tempfile.TemporaryDirectory() as folder:
                model_class(self.model_tester.get_config()).save_pretrained(folder)
                for kwargs, expected in (({}, "sdpa"), ({"attn_implementation": "eager"}, "eager")):
                    model = model_class.from_pretrained(folder, **kwargs)
                    configs = [module.config for module in model.modules() if hasattr(module, "config")]
                    self.assertEqual({config._attn_implementation for config in configs}, {expected})

    @unittest.skip("The features of several encoders are joined")
    def test_get_image_features_hidden_states(self):
        pass

    @unittest.skip("The features of several encoders are joined")
    def test_get_image_features_attentions(self):
        pass


class PrismerLMWithoutVisionModelTest(PrismerLMModelTest):
    """Experts alone."""

    has_vision_encoder = False


class PrismerLMCrossAttentionModelTest(PrismerLMModelTest):
    """Gated cross-attention in place of placeholders."""

    fusion = "cross_attention"
