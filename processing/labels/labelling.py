"""From an image to a row of labels. All engines run this."""

from concurrent.futures import Future
from typing import Any

import pyarrow as pa
from PIL import Image
from transformers.utils import logging

from ..experts.base import ExpertError
from ..experts.suite import ExpertSuite
from ..image_loading import MAX_IMAGE_PIXELS
from ..many_images.key_index import as_text
from ..many_images.worker import ImageWorker
from .encoding import encode_labels, label_features


logger = logging.get_logger(__name__)

# an expert that fails on this many images in a row is broken
MAX_FAILURES_IN_A_ROW = 100


class Labeller(ImageWorker):
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
        super().__init__(max_image_pixels)
        # another suite with the same experts, because this class handles their failures
        self.suite = suite.only(*suite)
        self.suite.on_error = "raise"
        self.specs = [expert.spec for expert in suite.values()]
        self.map_size = map_size
        self.on_expert_error = on_expert_error
        self._failures_in_a_row = dict.fromkeys(suite, 0)
        self._misfits_in_a_row = 0

    @property
    def schema(self) -> pa.Schema:
        return label_features(self.specs).arrow_schema

    def see_opened(self, images: list[Image.Image]) -> list[tuple[dict[str, Any], str | None]]:
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

    def encode(self, key: str, result: dict[str, Any], error: str | None) -> dict[str, Any]:
        """Makes a row for [`LabelWriter.write_row`]; see [`ImageWorker.encode`]."""
        error = error if error is None else as_text(error)
        return {"key": key, "error": error, **encode_labels(result, self.specs, self.map_size)}

    def encoded(self, key: str, future: Future) -> dict[str, Any]:
        try:
            row = future.result()
            self._misfits_in_a_row = 0
            return row
        except (ValueError, TypeError) as error:
            self._misfits_in_a_row += 1
            if self.on_expert_error == "raise" or self._misfits_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise
            return self.encode(key, {}, str(error))
