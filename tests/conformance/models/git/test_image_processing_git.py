"""GIT's image processor, which is CLIP's, under the same common tests as PrismerImageProcessor, to compare."""

import unittest

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin


class GitImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)


class GitImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = GitImageProcessingTester
