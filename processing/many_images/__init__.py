"""Work on many images: sources of images, workers that turn an image into a row, and engines that run them."""

from .engines import LabelEngine, LocalEngine
from .processes import launched_place, parse_shard, progress_bar, wait_for_others
from .ray_engine import RayEngine
from .sources import IMAGE_SUFFIXES, TAR_SUFFIXES, ImageSource, JoinedImages, ListedImages
from .worker import ImageWorker
