"""Experts for objects: models of AutoModelForObjectDetection, whose boxes are painted as instances."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ...expert_spec import BACKGROUND
from ..expert_labels import label_parts
from .base import MAX_REGIONS
from .look import ExpertLook
from .pretrained import ClassNames, KnownModel, PretrainedExpert


class ObjectDetector(ClassNames, PretrainedExpert):
    """
    Objects found by a detector. Every box with a score of at least 0.5 is painted as an instance, with its class.

    The published checkpoints were trained with UniDet, whose label space joins several data sets; transformers has no
    such model. The default is the detector of transformers with the most classes of everyday objects, D-FINE-X trained
    on Objects365. Any other detector whose classes have names works too. Boxes are painted as for the published
    checkpoints; see [`paint_boxes`]. If the suite has a depth expert, the labels of `"depth"` decide which of two
    objects is in front; otherwise the smaller one is.

    Label: `{"ids": uint8 (height, width), "classes": [class of instance 0, …]}`, at most 254 instances, highest score
    first. Weights of the default: 63 million parameters, 254 MB, Apache-2.0.

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
    name, kind, channels, instances = "detection", "label", 64, True
    look = ExpertLook("Objects", "which objects there are, and where")
    model_id = "ustc-community/dfine-xlarge-obj365"
    license = "apache-2.0"
    size_in_bytes = 254_000_000
    source = "transformers.AutoModelForObjectDetection"
    auto_model = "AutoModelForObjectDetection"
    known_models = {
        "ustc-community/dfine-xlarge-obj365": KnownModel("apache-2.0", 254_000_000),
        "PekingU/rtdetr_v2_r18vd": KnownModel("apache-2.0", 81_000_000),
    }
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
        labels: list[Any] = [None] * len(images)
        for indices, outputs in self.outputs(images):
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            results = self._image_processor.post_process_object_detection(
                outputs,
                threshold=float(np.nextafter(np.float32(self.min_score), np.float32(-1))),  # scores must be above it
                target_sizes=[(images[index].height, images[index].width) for index in indices],
            )
            for index, result in zip(indices, results):
                ids, kept = paint_boxes(
                    result["boxes"].cpu().numpy(),
                    result["scores"].cpu().numpy(),
                    images[index].size,
                    None if depth is None else depth[index],
                    self.max_overlap,
                )
                labels[index] = {"ids": ids, "classes": result["labels"].cpu().numpy()[kept].tolist()}
        return labels


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
