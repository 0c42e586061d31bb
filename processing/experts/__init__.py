"""The frozen experts that run live, with a common base class."""

from .bae_normals import BaeNormals
from .base import Expert, ExpertError, expert_from_dict, look_of
from .depth import DepthEstimator
from .detection import ObjectDetector, paint_boxes
from .edge import CannyEdges, DexiNedEdges
from .florence import FlorenceText
from .given import GivenExpert, SensorDepth, UserRegions
from .got_ocr import GotOcrText
from .look import ExpertLook
from .normal import NormalEstimator, NormalsFromDepth
from .open_vocabulary import OpenVocabularyDetector
from .pretrained import PretrainedExpert
from .segment_anything import SegmentAnything
from .segmentation import SemanticSegmentation, UniversalSegmentation
from .suite import ExpertSuite
from .suite_table import suite_markdown, suite_rows
from .text import PpOcrText, RapidOcrText
from .vision_features import VisionFeatures, quantized
from .word_features import ClipTextFeatures, HashedNgrams, WordFeatures
