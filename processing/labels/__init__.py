"""The label store: the labels of frozen experts for many images, made once, kept compactly, and read back."""

try:
    import datasets
except ImportError as error:
    raise ImportError(f"the label store needs datasets ({error}): pip install 'modeling-prismer[train]'") from error

from ..many_images.engines import LabelEngine, LocalEngine
from ..many_images.processes import parse_shard
from ..many_images.ray_engine import RayEngine
from ..many_images.sources import IMAGE_SUFFIXES, TAR_SUFFIXES, ImageSource, ListedImages
from .label_images import LabelReport, label_images
from .manifest import make_manifest, read_manifest
from .published_conversion import convert_published_labels
from .published_layout import read_published_layout, write_published_layout
from .shards import DamagedShardError, LabelWriter, StoreInUseError, forget_failed, set_aside_damaged
from .sources import (
    KEY_COLUMNS,
    DatasetImages,
    StreamedImages,
    TarImages,
    open_source,
)
from .store import LabelStore, label_source
