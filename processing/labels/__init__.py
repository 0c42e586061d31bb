"""The label store: what frozen experts saw in many images, made once, kept compactly, and read back."""

try:
    import datasets
except ImportError as error:
    raise ImportError(f"the label store needs datasets ({error}): pip install 'modeling-prismer[train]'") from error

from .label_images import LabelReport, label_images, parse_shard
from .manifest import make_manifest, read_manifest
from .published_layout import read_published_layout, write_published_layout
from .shards import LabelWriter, forget_failed
from .sources import (
    IMAGE_SUFFIXES,
    KEY_COLUMNS,
    TAR_SUFFIXES,
    DatasetImages,
    ImageSource,
    ListedImages,
    StreamedImages,
    open_source,
)
from .store import LabelStore, label_source
