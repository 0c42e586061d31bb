"""PrismerProcessor under the library's common tests."""

import unittest

from parameterized import parameterized

from modeling_prismer import PrismerProcessor

from ...test_processing_common import ProcessorTesterMixin
from .small_prismer import EXPERTS, small_processor


class PrismerProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PrismerProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return small_processor(EXPERTS).tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return small_processor(EXPERTS).image_processor

    @staticmethod
    def _get_explicit_arguments(method):
        # The library allows its own processors no argument of that name beside an attribute. Here a call may leave out
        # some of the processor's experts, and may name the one of its tasks that a text is for.
        return ProcessorTesterMixin._get_explicit_arguments(method) - {"experts", "task"}

    @unittest.skip("PrismerProcessor refuses a text without a picture")
    def test_processor_text_has_no_visual(self):
        pass

    @unittest.skip("PrismerProcessor refuses a conversation without an image")
    def test_apply_chat_template_image_0(self):
        pass

    @unittest.skip("PrismerProcessor refuses a conversation without an image")
    def test_apply_chat_template_image_1(self):
        pass

    @unittest.skip("PrismerProcessor refuses a conversation without an image")
    def test_apply_chat_template_assistant_mask(self):
        pass

    @unittest.skip("A template gets every image as {'type': 'image'}, without its address")
    def test_chat_template_message_objects(self):
        pass

    @parameterized.expand(["images", "videos", "audio"])
    def test_subprocessor_defaults_preserved_by_kwargs(self, modality):
        if modality == "images":
            self.skipTest("Lengths and padding of a prompt are those of the task, not those saved with the tokenizer")
        super()._test_modality_processor_defaults_preserved_by_modality_kwargs(modality)
