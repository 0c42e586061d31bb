"""BLIP-2's image processor, which is BLIP's, under the same common tests as PrismerImageProcessor, to compare."""

import unittest

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin


class Blip2ImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)


class Blip2ImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Blip2ImageProcessingTester
