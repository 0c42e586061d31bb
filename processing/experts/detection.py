"""Experts for objects: models of AutoModelForObjectDetection, whose boxes are painted as instances."""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ...expert_spec import BACKGROUND
from ..expert_labels import label_parts
from .base import MAX_REGIONS
from .look import ExpertLook
from .pretrained import ClassNames, KnownModel, PretrainedExpert


class Boxes(NamedTuple):
    """
    The objects of an image.

    Attributes:
        boxes (`np.ndarray` of shape `(objects, 4)`): left, top, right, bottom in pixels.
        scores (`np.ndarray` of shape `(objects,)`): how certain each is.
        classes (`np.ndarray` of shape `(objects,)`): their classes.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


class Detector(PretrainedExpert):
    """
    Paints the boxes of a detector as instances. See [`ObjectDetector`] and [`OpenVocabularyDetector`].

    Args:
        model_id (`str`, *optional*): Hub id or folder.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        min_score (`float`, *optional*, defaults to 0.5): boxes with a lower score are dropped.
        max_overlap (`float`, *optional*, defaults to 0.95):
            A box is dropped if its IoU with a box of a higher score is larger.
    """

    name, kind, channels, instances = "detection", "label", 64, True
    look = ExpertLook("Objects", "which objects there are, and where")
    uses = ("depth",)

    def __init__(
        self,
        model_id: str | None = None,
        image_processor: dict[str, Any] | None = None,
        min_score: float = 0.5,
        max_overlap: float = 0.95,
    ):
        if not (0 <= min_score <= 1 and 0 < max_overlap <= 1):
            raise ValueError(f"min_score is {min_score}, max_overlap {max_overlap}; numbers from 0 to 1 are needed")
        super().__init__(model_id, image_processor)
        self.min_score = min_score
        self.max_overlap = max_overlap

    def run(self, images: list[Image.Image], depth: list[Any] | None = None) -> list[dict[str, Any]]:
        labels = []
        for index, (found, image) in enumerate(zip(self.find(images), images)):
            own_depth = None if depth is None else depth[index]
            ids, kept = paint_boxes(found.boxes, found.scores, image.size, own_depth, self.max_overlap)
            labels.append({"ids": ids, "classes": found.classes[kept].tolist()})
        return labels

    def find(self, images: list[Image.Image]) -> list[Boxes]:
        """The objects of each image."""
        raise NotImplementedError

    @property
    def box_processor(self) -> Any:
        """The image processor that reads boxes from the model's output."""
        return self._image_processor

    def boxes_of(self, outputs: Any, images: list[Image.Image]) -> list[Boxes]:
        """The boxes of at least `min_score` in the model's output for these images."""
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        results = self.box_processor.post_process_object_detection(
            outputs,
            threshold=float(np.nextafter(np.float32(self.min_score), np.float32(-1))),  # scores must be above it
            target_sizes=[(image.height, image.width) for image in images],
        )
        return [Boxes(*(result[key].cpu().numpy() for key in ("boxes", "scores", "labels"))) for result in results]


class ObjectDetector(ClassNames, Detector):
    """
    Objects found by a detector. Every box with a score of at least 0.5 is painted as an instance, with its class.

    The default is the detector of transformers with the most classes of everyday objects, D-FINE-X trained on
    Objects365. Its authors release D-FINE trained on COCO alone under Apache-2.0 and set weights from Objects365
    apart; `"ustc-community/dfine-xlarge-coco"` has 80 classes. Any other detector whose classes have names works too,
    such as RF-DETR or RT-DETR. Boxes are painted as for the published checkpoints; see [`paint_boxes`]. If the suite
    has a depth expert, the labels of `"depth"` decide which of two objects is in front; otherwise the smaller one is.

    Label: `{"ids": uint8 (height, width), "classes": [class of instance 0, …]}`, at most 254 instances, highest score
    first. Weights of the default: 63 million parameters, 254 MB.

    Args:
        model_id (`str`, *optional*, defaults to `"ustc-community/dfine-xlarge-obj365"`):
            Hub id or folder; `"PekingU/rtdetr_v2_r18vd"` (80 classes of COCO) is small and quick.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        min_score (`float`, *optional*, defaults to 0.5): boxes with a lower score are dropped.
        max_overlap (`float`, *optional*, defaults to 0.95):
            A box is dropped if its IoU with a box of a higher score is larger.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import ObjectDetector

    >>> expert = ObjectDetector("PekingU/rtdetr_v2_r18vd", min_score=0.6)  # loaded when it first runs
    >>> expert.kind, expert.instances, expert.uses
    ('label', True, ('depth',))
    ```
    """

    type = "object_detector"
    model_id = "ustc-community/dfine-xlarge-obj365"
    license = "unclear (trained on Objects365)"
    size_in_bytes = 254_000_000
    source = "transformers.AutoModelForObjectDetection"
    auto_model = "AutoModelForObjectDetection"
    known_models = {
        "ustc-community/dfine-xlarge-obj365": KnownModel("unclear (trained on Objects365)", 254_000_000),
        "ustc-community/dfine-xlarge-coco": KnownModel("apache-2.0", 252_000_000),
        "PekingU/rtdetr_v2_r18vd": KnownModel("apache-2.0", 81_000_000),
        "Roboflow/rf-detr-base": KnownModel("apache-2.0", 129_000_000),
    }

    def find(self, images: list[Image.Image]) -> list[Boxes]:
        found: list[Any] = [None] * len(images)
        for indices, outputs in self.outputs(images):
            for index, boxes in zip(indices, self.boxes_of(outputs, [images[index] for index in indices])):
                found[index] = boxes
        return found


def paint_boxes(
    boxes: np.ndarray,
    scores: np.ndarray,
    size: tuple[int, int],
    depth: np.ndarray | None = None,
    max_overlap: float = 0.95,
    max_instances: int = MAX_REGIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Paints boxes as instances, front boxes over those behind them.

    1. From the highest score down, a box is dropped if its IoU with a kept box is larger than `max_overlap`. The first
       `max_instances` boxes are kept.
    2. A box inside another is in front of it.
    3. Otherwise the box with the larger mean inverse depth is in front; without a depth map, the one with the smaller
       area.

    Rule 2 always holds. If rules 2 and 3 form a cycle, the box that is farther away is painted first.

    Args:
        boxes (`np.ndarray` of shape `(boxes, 4)`): left, top, right, bottom in pixels; parts may be outside the map.
        scores (`np.ndarray` of shape `(boxes,)`): higher is more certain.
        size (`tuple[int, int]`): width and height of the map.
        depth (`np.ndarray` of shape `(height, width)`, *optional*): inverse depth, larger is nearer.
        max_overlap (`float`, *optional*, defaults to 0.95): see above.
        max_instances (`int`, *optional*, defaults to 254): see above.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the map (height, width), uint8, 255 where there is no box; and the row of
        `boxes` for each instance.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import paint_boxes

    >>> boxes, scores = np.array([[0, 0, 4, 4], [2, 2, 4, 4]]), np.array([0.9, 0.8])
    >>> ids, kept = paint_boxes(boxes, scores, size=(6, 4))
    >>> print(ids, kept)
    [[  0   0   0   0 255 255]
     [  0   0   0   0 255 255]
     [  0   0   1   1 255 255]
     [  0   0   1   1 255 255]] [0 1]
    ```
    """
    from torchvision.ops import nms

    width, height = size
    ids = np.full((height, width), BACKGROUND, np.uint8)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    rows = np.flatnonzero(np.isfinite(boxes).all(1))
    rows = rows[(boxes[rows, 2] > 0) & (boxes[rows, 3] > 0) & (boxes[rows, 0] < width) & (boxes[rows, 1] < height)]
    rows = rows[(boxes[rows, 2] > boxes[rows, 0]) & (boxes[rows, 3] > boxes[rows, 1])]
    clipped = np.clip(boxes[rows], 0, (width, height, width, height))
    kept = nms(torch.from_numpy(clipped), torch.from_numpy(np.asarray(scores, np.float64)[rows]), max_overlap).numpy()
    kept = kept[:max_instances]
    rows, clipped = rows[kept], clipped[kept]

    # whole pixels, at least one
    start = np.minimum(np.round(clipped[:, :2]).astype(int), np.array([width - 1, height - 1]))
    end = np.maximum(np.round(clipped[:, 2:]).astype(int), start + 1)
    if depth is not None:
        nearness = _mean_within(label_parts(depth, is_dense=True)["values"], start, end)
    else:
        nearness = -np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    for number in _back_to_front(clipped, nearness):
        ids[start[number, 1] : end[number, 1], start[number, 0] : end[number, 0]] = number
    return ids, rows


def _back_to_front(boxes: np.ndarray, nearness: np.ndarray) -> list[int]:
    """The order of painting: each time the farthest of the boxes that lie inside no unpainted box."""
    inside = np.all(boxes[:, None, :2] >= boxes[None, :, :2], axis=2)
    inside &= np.all(boxes[:, None, 2:] <= boxes[None, :, 2:], axis=2)
    inside &= ~inside.T  # neither of two equal boxes is inside the other
    waiting_for = inside.sum(1)  # number of unpainted boxes around each
    order: list[int] = []
    key = nearness.astype(np.float64)
    for _ in range(len(boxes)):
        number = int(np.argmin(np.where(waiting_for == 0, key, np.inf)))
        order.append(number)
        waiting_for = waiting_for - inside[:, number]
        waiting_for[number] = len(boxes) + 1  # painted
    return order


def _mean_within(depth: Any, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The mean of a map (height, width) within each box, from the integral image."""
    depth = np.asarray(depth)
    depth = depth[..., 0] if depth.ndim == 3 else depth
    sums = np.zeros((depth.shape[0] + 1, depth.shape[1] + 1), np.int64)
    sums[1:, 1:] = depth.astype(np.int64).cumsum(0).cumsum(1)
    (left, top), (right, bottom) = start.T, end.T
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return total / np.prod(end - start, axis=1)
