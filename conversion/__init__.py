"""Conversion between the published checkpoints and this package, and export to ONNX."""

from .clip_pca import convert_clip_pca, read_clip_pca
from .convert_checkpoint import convert_original_checkpoint, to_original_state_dict
from .export_onnx import export_onnx
from .feature_tables import (
    ClassTable,
    class_features_from_names,
    read_class_tables,
    read_feature_tables,
    save_class_features,
)
from .onnx_generation import OnnxPrismer
from .published import PUBLISHED_CHECKPOINTS, PublishedCheckpoint, convert_published, find_published
from .verification import Check, Verification, verify_model
