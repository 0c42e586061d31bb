"""BLIP-2 under the same common tests as Prismer, to compare; not that of training, which gives no picture."""

import os
import unittest

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Model,
    Blip2Processor,
    BlipImageProcessor,
    OPTConfig,
)

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_expert_parallel_mixin import ExpertParallelTesterMixin
from ...test_fsdp_mixin import FSDPTesterMixin
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from ...test_pipeline_mixin import TRANSFORMERS_TINY_MODEL_PATH, PipelineTesterMixin
from ...test_tensor_parallel_mixin import TensorParallelTesterMixin
from ..small_tokenizers import VOCAB_SIZE, gpt2_tokenizer


class Blip2ModelTester:
    base_model_class = Blip2Model
    conditional_generation_class = Blip2ForConditionalGeneration
    batch_size, is_training = 3, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocab_size, image_size, num_query_tokens = VOCAB_SIZE + 8, 32, 4
    image_token_index = VOCAB_SIZE
    seq_length = 7 + num_query_tokens

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        layers = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        return Blip2Config(
            vision_config={**layers, "intermediate_size": 37, "image_size": self.image_size, "patch_size": 16},
            qformer_config={**layers, "intermediate_size": 37, "vocab_size": self.vocab_size},
            text_config=OPTConfig(
                **layers,
                ffn_dim=37,
                vocab_size=self.vocab_size,
                max_position_embeddings=128,
                word_embed_proj_dim=self.hidden_size,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=self.vocab_size - 1,
            ).to_dict(),
            num_query_tokens=self.num_query_tokens,
            image_token_index=self.image_token_index,
            image_text_hidden_size=16,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], VOCAB_SIZE).clamp(min=4)
        input_ids[:, : self.num_query_tokens] = self.image_token_index
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        return self.get_config(), inputs


class Blip2ModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
    PipelineTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (Blip2ForConditionalGeneration,)
    additional_model_inputs = ["input_ids"]
    pipeline_model_mapping = {"image-text-to-text": Blip2ForConditionalGeneration}
    model_tester = None
    _is_composite = True

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = os.path.join(TRANSFORMERS_TINY_MODEL_PATH, "blip-2", Blip2ForConditionalGeneration.__name__)
        torch.manual_seed(0)
        tester = Blip2ModelTester(None)
        processor = Blip2Processor(
            BlipImageProcessor(size={"height": 32, "width": 32}), gpt2_tokenizer(), tester.num_query_tokens
        )
        processor.save_pretrained(folder)
        config = tester.get_config()
        config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
        Blip2ForConditionalGeneration(config).save_pretrained(folder)

    def setUp(self):
        self.model_tester = Blip2ModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=Blip2Config, has_text_modality=False, common_properties=["num_query_tokens"]
        )

    @unittest.skip("The output holds those of three parts, each with its own attentions")
    def test_attention_outputs(self):
        pass

    @unittest.skip("The output holds those of three parts, each with its own hidden states")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("The output holds those of three parts, each with its own hidden states")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("The language model inside has embeddings, Blip2ForConditionalGeneration itself has none")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("The head is inside the language model: there is no base model with a head on top")
    def test_model_base_model_prefix(self):
        pass

    def test_config(self):
        self.config_tester.run_common_tests()
