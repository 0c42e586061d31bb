"""PrismerConfig, PrismerModel and PrismerForConditionalGeneration under the library's common tests."""

import os
import unittest

import torch

from modeling_prismer import (
    PrismerConfig,
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    PrismerModel,
    PrismerProcessor,
)

from ... import test_pipeline_mixin
from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_expert_parallel_mixin import ExpertParallelTesterMixin
from ...test_fsdp_mixin import FSDPTesterMixin
from ...test_modeling_common import ModelTesterMixin
from ...test_pipeline_mixin import TRANSFORMERS_TINY_MODEL_PATH, PipelineTesterMixin
from ...test_tensor_parallel_mixin import TensorParallelTesterMixin
from ...test_training_mixin import TrainingTesterMixin
from .small_prismer import EXPERTS, PrismerModelTester, small_processor


# The pipelines' mixin looks for these in the library.
test_pipeline_mixin.transformers_module.PrismerProcessor = PrismerProcessor
test_pipeline_mixin.transformers_module.PrismerImageProcessor = PrismerImageProcessor


class PrismerModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
    PipelineTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (PrismerModel, PrismerForConditionalGeneration)
    pipeline_model_mapping = {"image-text-to-text": PrismerForConditionalGeneration}
    model_tester = None
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    experts = EXPERTS

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = os.path.join(TRANSFORMERS_TINY_MODEL_PATH, "prismer", PrismerForConditionalGeneration.__name__)
        torch.manual_seed(0)
        config = PrismerModelTester(None, cls.experts).get_config()
        PrismerForConditionalGeneration(config).save_pretrained(folder)
        small_processor(cls.experts).save_pretrained(folder)

    def setUp(self):
        self.model_tester = PrismerModelTester(self, self.experts)
        self.config_tester = ConfigTester(
            self, config_class=PrismerConfig, has_text_modality=False, common_properties=["label_smoothing"]
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_training_overfit(self):
        # The mixin asks the configuration itself for the size of the vocabulary, which is in its text_config, and
        # learns the tokens 1, 2, 3, …, of which RoBERTa's padding is one.
        get_config = self.model_tester.get_config

        def config_for_training():
            config = get_config()
            config.vocab_size = config.text_config.vocab_size
            special = {"pad_token_id": 0, "bos_token_id": 50, "eos_token_id": 51}
            for token, number in special.items():
                setattr(config, token, number)
                setattr(config.text_config, token, number)
            return config

        self.model_tester.get_config = config_for_training
        super().test_training_overfit()


class PrismerZModelTest(PrismerModelTest):
    """The same without experts, which the paper calls PrismerZ."""

    experts = []
