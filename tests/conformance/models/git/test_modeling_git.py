"""GIT under the same common tests as Prismer, to compare; not that of training, which gives no picture."""

import os
import unittest

import torch
from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitModel, GitProcessor

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_expert_parallel_mixin import ExpertParallelTesterMixin
from ...test_fsdp_mixin import FSDPTesterMixin
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from ...test_pipeline_mixin import TRANSFORMERS_TINY_MODEL_PATH, PipelineTesterMixin
from ...test_tensor_parallel_mixin import TensorParallelTesterMixin
from ..small_tokenizers import bert_tokenizer


class GitModelTester:
    base_model_class = GitModel
    causal_lm_class = GitForCausalLM
    batch_size, text_seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocab_size, image_size, patch_size = 99, 32, 16
    seq_length = text_seq_length + (image_size // patch_size) ** 2 + 1

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return GitConfig(
            vision_config={
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "image_size": self.image_size,
                "patch_size": self.patch_size,
            },
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=128,
            pad_token_id=98,
            bos_token_id=97,
            eos_token_id=96,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.text_seq_length], self.vocab_size - 3)
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": pixel_values,
        }
        return self.get_config(), inputs


class GitModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
    PipelineTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (GitModel, GitForCausalLM)
    pipeline_model_mapping = {"image-text-to-text": GitForCausalLM}
    model_tester = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = os.path.join(TRANSFORMERS_TINY_MODEL_PATH, "git", GitForCausalLM.__name__)
        torch.manual_seed(0)
        GitForCausalLM(GitModelTester(None).get_config()).save_pretrained(folder)
        size = {"height": 32, "width": 32}
        GitProcessor(CLIPImageProcessor(size=size, crop_size=size), bert_tokenizer()).save_pretrained(folder)

    def setUp(self):
        self.model_tester = GitModelTester(self)
        self.config_tester = ConfigTester(self, config_class=GitConfig, hidden_size=36)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs:  # of the text alone, while the sequence begins with the picture
            inputs["labels"] = inputs["labels"][:, : self.model_tester.text_seq_length]
        return inputs

    @unittest.skip("The test's labels are as long as the sequence, of which the picture's part has none")
    def test_causal_lm_loss_honors_shift_labels(self):
        pass

    def test_config(self):
        self.config_tester.run_common_tests()
