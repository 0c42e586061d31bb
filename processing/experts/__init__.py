"""The frozen experts that run live, one file each on a common base."""

from .base import Expert, ExpertError, expert_from_dict
from .edge import CannyEdges, DexiNedEdges
from .suite import ExpertSuite
from .text import RapidOcrText
from .word_features import ClipTextFeatures, HashedNgrams, WordFeatures
