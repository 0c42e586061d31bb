"""The label store: the labels of frozen experts for many images, made once, kept compactly, and read back."""

try:
    import datasets
except ImportError as error:
    raise ImportError(f"the label store needs datasets ({error}): pip install 'modeling-prismer[train]'") from error

from .engines import LabelEngine, LocalEngine
from .label_images import LabelReport, label_images, parse_shard
from .manifest import make_manifest, read_manifest
from .published_layout import read_published_layout, write_published_layout
from .ray_engine import RayEngine
from .shards import DamagedShardError, LabelWriter, StoreInUseError, forget_failed, set_aside_damaged
from .sources import (
    KEY_COLUMNS,
    DatasetImages,
    ImageSource,
    ListedImages,
    StreamedImages,
    TarImages,
    open_source,
)
from .store import LabelStore, label_source
from .tars import IMAGE_SUFFIXES, TAR_SUFFIXES
