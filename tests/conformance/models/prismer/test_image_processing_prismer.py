"""PrismerImageProcessor, with Pillow and with torchvision, under the library's common tests."""

import unittest

from modeling_prismer.processing.image_processing_prismer import (
    PrismerImageProcessor,
    PrismerImageProcessorKwargs,
    PrismerImageProcessorTorchvision,
)

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from .small_prismer import EXPERTS


class PrismerImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        kwargs.setdefault("experts", EXPERTS)
        kwargs.setdefault("expert_size", 16)
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        # the common one looks the names up among those of the library's own classes
        return {"pil": PrismerImageProcessor, "torchvision": PrismerImageProcessorTorchvision}


class PrismerImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = PrismerImageProcessingTester
    ignored_settings = ()

    def assertEqual(self, first, second, msg=None):
        if isinstance(first, dict) and isinstance(second, dict):
            first, second = (
                {key: value for key, value in settings.items() if key not in self.ignored_settings}
                for settings in (first, second)
            )
        super().assertEqual(first, second, msg)

    # What was saved by the torchvision back-end says so, and is loaded with torchvision again unless told otherwise;
    # the library's classes do not tell.
    def test_save_load_backends(self):
        self.ignored_settings = ("image_processor_type",)
        super().test_save_load_backends()

    def test_save_load_backends_auto(self):
        self.ignored_settings = ("image_processor_type",)
        super().test_save_load_backends_auto()

    def test_valid_kwargs_set(self):
        # The common one goes by the names of the library's classes, of which the one with Pillow is the `…Pil`.
        for image_processor_class in self.image_processing_classes.values():
            self.assertIs(image_processor_class.valid_kwargs, PrismerImageProcessorKwargs)

    @unittest.skip("The network reads three channels: every picture becomes RGB")
    def test_call_numpy_4_channels(self):
        pass
