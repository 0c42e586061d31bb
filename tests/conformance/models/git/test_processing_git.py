"""GitProcessor under the same common tests as PrismerProcessor, to compare."""

import unittest

from transformers import GitProcessor

from ...test_processing_common import ProcessorTesterMixin
from ..small_tokenizers import bert_tokenizer


class GitProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = GitProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return bert_tokenizer()
