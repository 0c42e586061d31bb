"""The three steps from an image to a row of labels: open, see, encode. All engines run them."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image
from transformers.utils import logging

from ..experts.base import ExpertError
from ..experts.suite import ExpertSuite
from ..image_loading import MAX_IMAGE_PIXELS, load_image
from .encoding import encode_labels
from .key_index import as_text


logger = logging.get_logger(__name__)

# an expert that fails on this many images in a row is broken
MAX_FAILURES_IN_A_ROW = 100

T = TypeVar("T")


class Labeller:
    """
    Opens images, runs the experts and encodes their labels. A pickled labeller has the settings of the experts, but no
    loaded models.

    Args:
        suite ([`ExpertSuite`]): the experts.
        map_size (`int`, *optional*): reduce every map to this many pixels square; see [`encode_labels`].
        on_expert_error (`str`, *optional*, defaults to `"record"`):
            If an expert fails on an image, `"record"` leaves its label out and stores the `error`, `"raise"` raises.
        max_image_pixels (`int`, *optional*): images with more pixels count as damaged.
    """

    def __init__(
        self,
        suite: ExpertSuite,
        map_size: int | None = None,
        on_expert_error: str = "record",
        max_image_pixels: int | None = MAX_IMAGE_PIXELS,
    ):
        if on_expert_error not in ("record", "raise"):
            raise ValueError(f"on_expert_error is {on_expert_error!r}; accepted are 'record' and 'raise'")
        # another suite with the same experts, because this class handles their failures
        self.suite = suite.only(*suite)
        self.suite.on_error = "raise"
        self.specs = [expert.spec for expert in suite.values()]
        self.map_size = map_size
        self.on_expert_error = on_expert_error
        self.max_image_pixels = max_image_pixels
        self._failures_in_a_row = dict.fromkeys(suite, 0)
        self._misfits_in_a_row = 0

    def open(self, key: str, image: Any) -> Image.Image | str:
        """
        Opens an image.

        Args:
            key (`str`): its name in error messages.
            image: anything that [`load_image`] takes, or an exception that says why there is no image.

        Returns:
            `PIL.Image.Image` in RGB, or the error message (`str`).
        """
        if isinstance(image, Exception):
            return str(image)
        try:
            return load_image(image, max_pixels=self.max_image_pixels, name=key)
        except Exception as error:  # one image must not end a run of a month
            return f"{type(error).__name__}: {error}"

    def see(self, images: list[Image.Image | str]) -> list[tuple[dict[str, Any], str | None]]:
        """
        Runs the experts.

        Args:
            images (`list`): from [`Labeller.open`]; strings stand for images that could not be opened.

        Returns:
            `list[tuple]`: for each image, a dict from each expert's name to its label, and an error message or `None`.

        Raises:
            ExpertError: if an expert fails and `on_expert_error` is `"raise"`, or if it fails on 100 images in a row.
        """
        opened = [image for image in images if not isinstance(image, str)]
        seen = iter(self._see(opened) if opened else [])
        return [({}, image) if isinstance(image, str) else next(seen) for image in images]

    def _see(self, images: list[Image.Image]) -> list[tuple[dict[str, Any], str | None]]:
        try:
            labels = self.suite(images)
        except ExpertError:
            if self.on_expert_error == "raise":
                raise
            return [self._see_one(image) for image in images]
        self._failures_in_a_row = dict.fromkeys(self.suite, 0)
        return [(own, None) for own in labels]

    def _see_one(self, image: Image.Image) -> tuple[dict[str, Any], str | None]:
        labels: dict[str, Any] = {}
        errors: list[str] = []
        for name in self.suite:
            try:  # an expert gets the labels of the earlier ones, because it may need them
                (own,) = self.suite.only(name)([image], [labels])
                labels[name] = own[name]
                self._failures_in_a_row[name] = 0
            except ExpertError as error:
                labels[name] = None
                self._failures_in_a_row[name] += 1
                if self._failures_in_a_row[name] >= MAX_FAILURES_IN_A_ROW:
                    raise
                logger.warning_once(f"The expert '{name}' fails on some images; the store has their errors.")
                errors.append(str(error))
        return labels, "; ".join(dict.fromkeys(errors)) or None

    def encode(self, key: str, labels: dict[str, Any], error: str | None) -> dict[str, Any]:
        """Makes a row for [`LabelWriter.write_row`]; the arguments are an image's key and its result of [`see`]."""
        error = error if error is None else as_text(error)
        return {"key": key, "error": error, **encode_labels(labels, self.specs, self.map_size)}

    def rows(self, images: Iterable[tuple[str, Any]], batch_size: int, pool: ThreadPoolExecutor) -> Iterator[dict]:
        """
        Runs all three steps. While the experts run on a batch, the threads of the pool open the next batch and encode
        the labels of the previous one.

        Args:
            images (`Iterable[tuple[str, Any]]`): pairs of a key and anything that [`Labeller.open`] takes.
            batch_size (`int`): number of images that the experts get at a time.
            pool (`ThreadPoolExecutor`): the threads.

        Returns:
            `Iterator[dict]`: rows for [`LabelWriter.write_row`], in the order of the images.

        Raises:
            ExpertError: see [`Labeller.see`].
            ValueError: if labels do not fit their expert's description, under the same conditions.
        """
        opened = _ahead(((key, pool.submit(self.open, key, image)) for key, image in images), batch_size)
        encoding: deque[list[tuple[str, Future]]] = deque()
        while batch := list(itertools.islice(opened, batch_size)):
            seen = self.see([future.result() for _, future in batch])
            encoding.append([(key, pool.submit(self.encode, key, *own)) for (key, _), own in zip(batch, seen)])
            if len(encoding) > 1:
                yield from (self._encoded(*waiting) for waiting in encoding.popleft())
        for batch in encoding:
            yield from (self._encoded(*waiting) for waiting in batch)

    def _encoded(self, key: str, future: Future) -> dict[str, Any]:
        try:
            row = future.result()
            self._misfits_in_a_row = 0
            return row
        except (ValueError, TypeError) as error:
            self._misfits_in_a_row += 1
            if self.on_expert_error == "raise" or self._misfits_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise
            return self.encode(key, {}, str(error))


def _ahead(items: Iterable[T], number: int) -> Iterator[T]:
    """Yields the same items, but takes `number` items in advance."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting
