"""Blip2Processor under the same common tests as PrismerProcessor, to compare."""

import unittest

from transformers import Blip2Processor

from ...test_processing_common import ProcessorTesterMixin
from ..small_tokenizers import gpt2_tokenizer


class Blip2ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = Blip2Processor

    @classmethod
    def _setup_tokenizer(cls):
        return gpt2_tokenizer()

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.image_token = ""  # the processor puts them before the text by itself

    @staticmethod
    def prepare_processor_dict():
        return {"num_query_tokens": 1}
