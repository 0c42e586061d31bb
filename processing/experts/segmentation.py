"""Experts for segmentation: models of AutoModelForUniversalSegmentation or AutoModelForSemanticSegmentation."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ...expert_spec import BACKGROUND
from .base import size_within
from .look import ExpertLook
from .pretrained import ClassNames, KnownModel, PretrainedExpert, resize_bilinear, within_aspect


PADDED_FAMILIES = ("eomt", "eomt_dinov3")
PUBLISHED_SIZE = {"size": {"shortest_edge": 479, "longest_edge": 480}}


class Segmentation(ClassNames, PretrainedExpert):
    """
    The class with the highest score at every pixel. See [`UniversalSegmentation`] and [`SemanticSegmentation`].

    Scores are resized bilinearly to the image's size, but at most to `max_pixels`; the map of classes of a larger
    image is then enlarged by nearest neighbour. The scores of all classes for a photograph would take gigabytes.

    Args:
        model_id (`str`, *optional*): Hub id or folder.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        max_pixels (`int`, *optional*, defaults to 262144): the most pixels (512×512) of the scores.
    """

    name, kind, channels = "segmentation", "label", 64
    look = ExpertLook("Segments", "what each point belongs to")
    batch_size = 4

    def __init__(
        self,
        model_id: str | None = None,
        image_processor: dict[str, Any] | None = None,
        max_pixels: int = 512 * 512,
    ):
        if max_pixels < 1:
            raise ValueError(f"max_pixels is {max_pixels}; at least 1 is needed")
        super().__init__(model_id, image_processor)
        self.max_pixels = max_pixels

    def load_model(self) -> torch.nn.Module:
        if self.num_classes > BACKGROUND:
            raise ValueError(f"{self.model_id} has {self.num_classes} classes; maps of ids hold at most {BACKGROUND}")
        return super().load_model()

    def run(self, images: list[Image.Image]) -> list[np.ndarray]:
        labels: list[Any] = [None] * len(images)
        for indices, outputs in self.outputs(images):
            for place, index in enumerate(indices):
                size = size_within(images[index].size, self.max_pixels)
                # (height, width); on a CPU, `argmax` takes three times as long
                classes = self.scores(outputs, place, images[index], size).max(0).indices.byte().cpu().numpy()
                if size != images[index].size:
                    enlarged = Image.fromarray(classes).resize(images[index].size, Image.Resampling.NEAREST)
                    classes = np.array(enlarged)
                labels[index] = classes
        return labels

    def scores(self, outputs: Any, place: int, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        """
        Args:
            outputs: the model's output for a batch.
            place (`int`): the number of the image in the batch.
            image (`PIL.Image.Image`): the image.
            size (`tuple[int, int]`): width and height of the scores.

        Returns:
            `torch.Tensor` of shape `(classes, height, width)`.
        """
        raise NotImplementedError


class UniversalSegmentation(Segmentation):
    """
    Segmentation by a model that returns masks with their classes: Mask2Former, MaskFormer, OneFormer, EoMT.

    The default is the expert of the published checkpoints, Mask2Former Swin-L trained on COCO panoptic, with its
    settings: a short side of 479 pixels and a long side of at most 480. The score of a class at a pixel is the sum,
    over all masks, of the probability of the class times that of the mask.

    Label: uint8 (height, width), 133 classes of COCO panoptic. Weights of the default: 216 million parameters, 866 MB.
    Their licence is "other" on the Hub. The authors' list of models says CC BY-NC 4.0, which excludes commercial use;
    their code is MIT by now. `"facebook/mask2former-swin-large-ade-panoptic"` has the 150 classes of ADE20K, and
    `"facebook/mask2former-swin-tiny-coco-panoptic"` is small. The licence of both is the same. EoMT, a plain vision
    transformer with the 133 classes of COCO panoptic, and OneFormer have the MIT licence.

    Args:
        model_id (`str`, *optional*, defaults to `"facebook/mask2former-swin-large-coco-panoptic"`): Hub id or folder.
        image_processor (`dict`, *optional*):
            Settings of the image processor that differ from the model's own. By default the published size for the
            three models above, and none for other models.
        max_pixels (`int`, *optional*, defaults to 262144): see [`Segmentation`].

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import UniversalSegmentation

    >>> expert = UniversalSegmentation("facebook/mask2former-swin-tiny-coco-panoptic")  # loaded when it first runs
    >>> expert.kind, expert.channels, expert.license
    ('label', 64, "other (cc-by-nc-4.0 by the authors' list of models)")
    ```
    """

    type = "universal_segmentation"
    model_id = "facebook/mask2former-swin-large-coco-panoptic"
    license = "other (cc-by-nc-4.0 by the authors' list of models)"
    size_in_bytes = 866_000_000
    source = "transformers.AutoModelForUniversalSegmentation"
    auto_model = "AutoModelForUniversalSegmentation"
    known_models = {
        "facebook/mask2former-swin-large-coco-panoptic": KnownModel(license, size_in_bytes, PUBLISHED_SIZE),
        "facebook/mask2former-swin-large-ade-panoptic": KnownModel(license, size_in_bytes, PUBLISHED_SIZE),
        "facebook/mask2former-swin-tiny-coco-panoptic": KnownModel(license, 190_000_000, PUBLISHED_SIZE),
        "tue-mps/coco_panoptic_eomt_large_640": KnownModel("mit", 1_267_000_000),
        "shi-labs/oneformer_ade20k_swin_tiny": KnownModel("mit", 203_000_000),
    }

    def load_model(self) -> torch.nn.Module:
        model = super().load_model()
        family = self.model_config.model_type
        self._task: torch.Tensor | None = None
        if family == "oneformer":
            self._task = self._tokenized_task()
        self._is_padded = family in PADDED_FAMILIES
        if self._is_padded:  # one size, because the position embeddings are of this size
            self._image_processor.do_split_image, self._image_processor.do_pad = False, True
        return model

    def _tokenized_task(self) -> torch.Tensor:
        """The tokens of OneFormer's task, 0 after the last: `(1, length)`."""
        from transformers import AutoTokenizer

        length = self.model_config.task_seq_len
        tokens = AutoTokenizer.from_pretrained(self.model_id)(
            ["the task is semantic"], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens["input_ids"] * tokens["attention_mask"]

    def forward(self, inputs: dict[str, Any]) -> Any:
        if self._task is not None:
            inputs = {**inputs, "task_inputs": self._task.to(self.device).expand(len(inputs["pixel_values"]), -1)}
        return super().forward(inputs)

    def scores(self, outputs: Any, place: int, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        probabilities = outputs.class_queries_logits[place].float().softmax(-1)[:, :-1]  # (queries, classes)
        masks = outputs.masks_queries_logits[place].float()
        if self._is_padded:
            masks = self._without_padding(masks, within_aspect(image))
        masks = resize_bilinear(masks, size).sigmoid()
        return torch.einsum("qc,qhw->chw", probabilities, masks)

    def _without_padding(self, masks: torch.Tensor, image: Image.Image) -> torch.Tensor:
        """The part of (queries, height, width) that shows the image, which was enlarged into the upper left corner."""
        side = self._image_processor.size.shortest_edge
        scale = side / max(image.size)
        width, height = (max(1, round(length * scale)) for length in image.size)
        return resize_bilinear(masks, (side, side))[:, :height, :width]


class SemanticSegmentation(Segmentation):
    """
    Segmentation by a model that returns scores of classes for every pixel: SegFormer, UperNet, DPT, …

    Label: uint8 (height, width), with 150 classes of ADE20K for the default. Weights of the default: 3.8 million
    parameters, 15 MB, NVIDIA's licence for research ("other" on the Hub).

    Args:
        model_id (`str`, *optional*, defaults to `"nvidia/segformer-b0-finetuned-ade-512-512"`): Hub id or folder.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        max_pixels (`int`, *optional*, defaults to 262144): see [`Segmentation`].

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import SemanticSegmentation

    >>> expert = SemanticSegmentation()  # loaded when it first runs
    >>> expert.model_id, expert.size_in_bytes
    ('nvidia/segformer-b0-finetuned-ade-512-512', 15000000)
    ```
    """

    type = "semantic_segmentation"
    model_id = "nvidia/segformer-b0-finetuned-ade-512-512"
    license = "other (see the model card)"
    size_in_bytes = 15_000_000
    source = "transformers.AutoModelForSemanticSegmentation"
    auto_model = "AutoModelForSemanticSegmentation"
    known_models = {"nvidia/segformer-b0-finetuned-ade-512-512": KnownModel(license, size_in_bytes)}

    def scores(self, outputs: Any, place: int, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        return resize_bilinear(outputs.logits[place].float(), size)
