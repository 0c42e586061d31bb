"""Expert for depth: any model of AutoModelForDepthEstimation."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .look import ExpertLook
from .pretrained import KnownModel, PretrainedExpert, resize_bilinear


# These families return distances. The others return inverse distances, up to a scale and a shift.
METRIC_FAMILIES = ("glpn", "prompt_depth_anything", "tipsv2_dpt", "zoedepth")


class DepthEstimator(PretrainedExpert):
    """
    Relative inverse depth: 255 is the nearest point of the image, 0 the farthest.

    The default is the expert of the published checkpoints, DPT-Hybrid trained by MiDaS, with its settings: the image
    is resized to 480×480 and normalised with mean and standard deviation 0.5. The network's map is stretched to 0..1,
    resized bilinearly to the image's size and stored in 8 bits. The maps of models that return distances are
    inverted, so that near is always bright.

    Label: uint8 (height, width). Weights of the default: 122 million parameters, 490 MB, Apache-2.0.

    Args:
        model_id (`str`, *optional*, defaults to `"Intel/dpt-hybrid-midas"`):
            Hub id or folder. `"depth-anything/Depth-Anything-V2-Small-hf"` is small and quick, `"apple/DepthPro-hf"`
            has sharp outlines (its licence is for research), and `"facebook/dinov3-vitl16-chmv2-dpt-head"` gives the
            heights of trees in aerial images.
        image_processor (`dict`, *optional*):
            Settings of the image processor that differ from the model's own. By default those above for
            `"Intel/dpt-hybrid-midas"`, and none for other models.
        metric (`bool`, *optional*):
            Whether the model returns distances. By default its configuration decides.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import DepthEstimator

    >>> expert = DepthEstimator("depth-anything/Depth-Anything-V2-Small-hf")  # loaded when it first runs
    >>> expert.description, expert.license
    ({'name': 'depth', 'kind': 'dense', 'channels': 1}, 'apache-2.0')
    ```
    """

    type = "depth_estimator"
    name, kind, channels = "depth", "dense", 1
    look = ExpertLook("Depth", "how near everything is", ends=("far", "near"))
    model_id = "Intel/dpt-hybrid-midas"
    license = "apache-2.0"
    size_in_bytes = 490_000_000
    source = "transformers.AutoModelForDepthEstimation"
    auto_model = "AutoModelForDepthEstimation"
    known_models = {
        "Intel/dpt-hybrid-midas": KnownModel(
            "apache-2.0",
            490_000_000,
            {
                "size": {"height": 480, "width": 480},
                "keep_aspect_ratio": False,
                "ensure_multiple_of": 1,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
        ),
        "depth-anything/Depth-Anything-V2-Small-hf": KnownModel("apache-2.0", 99_200_000),
        "apple/DepthPro-hf": KnownModel("apple-amlr (research only)", 3_808_000_000),
        "facebook/dinov3-vitl16-chmv2-dpt-head": KnownModel("dinov3-license", 1_348_000_000),
    }

    def __init__(
        self,
        model_id: str | None = None,
        image_processor: dict[str, Any] | None = None,
        metric: bool | None = None,
    ):
        super().__init__(model_id, image_processor)
        self.metric = metric

    def load_model(self) -> torch.nn.Module:
        model = super().load_model()
        size = self._image_processor.size
        embeddings: Any = getattr(getattr(model, "dpt", None), "embeddings", None)
        if getattr(model.config, "is_hybrid", False) and hasattr(embeddings, "image_size") and "height" in size:
            # the hybrid resizes its position embeddings to any input, but checks the input for its training size
            embeddings.image_size = (size["height"], size["width"])
        return model

    def run(self, images: list[Image.Image]) -> list[np.ndarray]:
        labels: list[Any] = [None] * len(images)
        for indices, outputs in self.outputs(images):
            for index, depth in zip(indices, outputs.predicted_depth.float()):  # (height, width)
                depth = depth.clamp(min=1e-6).reciprocal() if self._is_metric() else depth
                low, high = depth.amin(), depth.amax()
                depth = (depth - low) / (high - low).clamp(min=1e-12)
                depth = resize_bilinear(depth[None], images[index].size)[0]
                labels[index] = depth.mul(255).round().clamp(0, 255).byte().cpu().numpy()
        return labels

    def _is_metric(self) -> bool:
        if self.metric is not None:
            return self.metric
        config = self.model_config
        return config.model_type in METRIC_FAMILIES or getattr(config, "depth_estimation_type", "") == "metric"
