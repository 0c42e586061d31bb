"""The three steps from an image to a row of results: open, see, encode. All engines run them."""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from ..image_loading import MAX_IMAGE_PIXELS, load_image


if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")


class ImageWorker(ABC):
    """
    What an engine does with each image: it opens the image, sees it with experts and networks, and encodes the result
    as a row. It can be pickled; loaded models are then left out.

    Args:
        max_image_pixels (`int`, *optional*): images with more pixels count as damaged.
    """

    def __init__(self, max_image_pixels: int | None = MAX_IMAGE_PIXELS):
        self.max_image_pixels = max_image_pixels

    @property
    @abstractmethod
    def schema(self) -> "pyarrow.Schema":
        """The columns of a row, for engines that send tables from one process to another."""

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
            return self.describe(error)

    def describe(self, error: Exception) -> str:
        """The error message of an image that could not be opened."""
        return f"{type(error).__name__}: {error}"

    def see(self, images: list[Image.Image | str]) -> list[tuple[dict[str, Any], str | None]]:
        """
        Runs the models.

        Args:
            images (`list`): from [`ImageWorker.open`]; strings stand for images that could not be opened.

        Returns:
            `list[tuple]`: for each image a dict with the result, and an error message or `None`.
        """
        opened = [image for image in images if not isinstance(image, str)]
        seen = iter(self.see_opened(opened) if opened else [])
        return [({}, image) if isinstance(image, str) else next(seen) for image in images]

    @abstractmethod
    def see_opened(self, images: list[Image.Image]) -> list[tuple[dict[str, Any], str | None]]:
        """As [`ImageWorker.see`], for at least one image, all of them opened."""

    @abstractmethod
    def encode(self, key: str, result: dict[str, Any], error: str | None) -> dict[str, Any]:
        """Makes a row; the arguments are an image's key and its result of [`ImageWorker.see`]."""

    def rows(self, images: Iterable[tuple[str, Any]], batch_size: int, pool: ThreadPoolExecutor) -> Iterator[dict]:
        """
        Runs all three steps. While the models run on a batch, the threads of the pool open the next batch and encode
        the results of the previous one.

        Args:
            images (`Iterable[tuple[str, Any]]`): pairs of a key and anything that [`ImageWorker.open`] takes.
            batch_size (`int`): number of images that the models get at a time.
            pool (`ThreadPoolExecutor`): the threads.

        Returns:
            `Iterator[dict]`: rows from [`ImageWorker.encode`], in the order of the images.
        """
        opened = _ahead(((key, pool.submit(self.open, key, image)) for key, image in images), batch_size)
        encoding: deque[list[tuple[str, Future]]] = deque()
        while batch := list(itertools.islice(opened, batch_size)):
            seen = self.see([future.result() for _, future in batch])
            encoding.append([(key, pool.submit(self.encode, key, *own)) for (key, _), own in zip(batch, seen)])
            if len(encoding) > 1:
                yield from (self.encoded(*waiting) for waiting in encoding.popleft())
        for batch in encoding:
            yield from (self.encoded(*waiting) for waiting in batch)

    def encoded(self, key: str, future: Future) -> dict[str, Any]:
        """The row of an image whose encoding has begun."""
        return future.result()


def _ahead(items: Iterable[T], number: int) -> Iterator[T]:
    """Yields the same items, but takes `number` items in advance."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting
