"""The expert for masks without classes: SAM and its successors, models of AutoModelForMaskGeneration."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ...expert_spec import BACKGROUND
from .base import MAX_REGIONS, size_within
from .look import ExpertLook
from .pretrained import KnownModel, PretrainedExpert, autocast


class SegmentAnything(PretrainedExpert):
    """
    Everything that belongs together, as instances without classes, by SAM 2, SAM, SAM-HQ, EdgeTAM or the tracker of
    SAM 3.

    The model is asked for masks at a grid of points. Masks with a low score and masks that depend on the threshold are
    dropped, as in `MaskGenerationPipeline` of transformers, which does this. Large masks are painted first, so that
    parts lie over the whole. All instances have the class 0, `"object"`: the map says what belongs together, and the
    other experts say what it is.

    Label: `{"ids": uint8 (height, width), "classes": [0, …]}`, at most 254 instances, highest score first. Weights of
    the default: 39 million parameters, 156 MB, Apache-2.0.

    Args:
        model_id (`str`, *optional*, defaults to `"facebook/sam2.1-hiera-tiny"`):
            Hub id or folder. `"facebook/sam3"` has a licence of its own; of its weights, those of the tracker and of
            the image encoder are loaded.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        points_per_side (`int`, *optional*, defaults to 16): the points of the grid in each direction.
        min_score (`float`, *optional*, defaults to 0.8): masks with a lower predicted IoU are dropped.
        min_stability (`float`, *optional*, defaults to 0.9):
            Masks whose area changes more with the threshold are dropped.
        max_pixels (`int`, *optional*, defaults to 262144):
            Larger images are reduced to this many pixels (512×512), and their map is enlarged by nearest neighbour.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import SegmentAnything

    >>> expert = SegmentAnything()  # loaded when it first runs
    >>> expert.description
    {'name': 'masks', 'kind': 'label', 'channels': 64, 'num_classes': 1, 'instances': True}
    ```
    """

    type = "segment_anything"
    name, kind, channels, num_classes, instances = "masks", "label", 64, 1, True
    look = ExpertLook("Masks", "what belongs together")
    model_id = "facebook/sam2.1-hiera-tiny"
    license = "apache-2.0"
    size_in_bytes = 156_000_000
    source = "transformers.AutoModelForMaskGeneration"
    auto_model = "AutoModelForMaskGeneration"
    known_models = {
        "facebook/sam2.1-hiera-tiny": KnownModel("apache-2.0", 156_000_000),
        "facebook/sam3": KnownModel("sam-license", 1_833_000_000),
    }
    class_names = ("object",)

    points_per_batch = 64

    def __init__(
        self,
        model_id: str | None = None,
        image_processor: dict[str, Any] | None = None,
        points_per_side: int = 16,
        min_score: float = 0.8,
        min_stability: float = 0.9,
        max_pixels: int = 512 * 512,
    ):
        if points_per_side < 1 or max_pixels < 1:
            raise ValueError(f"points_per_side is {points_per_side}, max_pixels {max_pixels}; at least 1 is needed")
        if not (0 <= min_score <= 1 and 0 <= min_stability <= 1):
            raise ValueError(
                f"min_score is {min_score}, min_stability {min_stability}; numbers from 0 to 1 are needed"
            )
        super().__init__(model_id, image_processor)
        self.points_per_side = points_per_side
        self.min_score = min_score
        self.min_stability = min_stability
        self.max_pixels = max_pixels

    def load_model(self) -> torch.nn.Module:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as FAMILIES

        family = self.model_config.model_type
        if family not in FAMILIES:
            raise ValueError(
                f"{self.model_id} is of the family {family}; the installed transformers makes masks from points with "
                f"{', '.join(sorted(FAMILIES))}"
            )
        return super().load_model()

    def run(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        from transformers import MaskGenerationPipeline

        generate = MaskGenerationPipeline(model=self.model, image_processor=self._image_processor, device=self.device)
        labels = []
        for image in images:
            reduced = image.resize(size_within(image.size, self.max_pixels), Image.Resampling.BILINEAR)
            with autocast(self.device, self.running_dtype):
                found = generate(
                    reduced,
                    points_per_batch=self.points_per_batch,
                    points_per_crop=self.points_per_side,
                    pred_iou_thresh=self.min_score,
                    stability_score_thresh=self.min_stability,
                )
            masks = [torch.as_tensor(mask).cpu().numpy().astype(bool) for mask in found["masks"]]
            ids = paint_masks(masks, np.array([float(score) for score in found["scores"]]), reduced.size)
            number = min(len(masks), MAX_REGIONS)
            if reduced.size != image.size:
                ids = np.array(Image.fromarray(ids).resize(image.size, Image.Resampling.NEAREST))
            labels.append({"ids": ids, "classes": [0] * number})
        return labels


def paint_masks(masks: list[np.ndarray], scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    Paints masks as instances, numbered from the highest score, the small ones over the large ones.

    Args:
        masks (`list[np.ndarray]`): bool (height, width).
        scores (`np.ndarray` of shape `(masks,)`): higher is more certain. The first 254 are kept.
        size (`tuple[int, int]`): width and height of the map.

    Returns:
        `np.ndarray` of shape `(height, width)`: uint8, 255 where there is no mask.
    """
    ids = np.full((size[1], size[0]), BACKGROUND, np.uint8)
    kept = [masks[index] for index in np.argsort(-scores, kind="stable")[:MAX_REGIONS]]
    for number in sorted(range(len(kept)), key=lambda number: -int(kept[number].sum())):
        ids[kept[number]] = number
    return ids
