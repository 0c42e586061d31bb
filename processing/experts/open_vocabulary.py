"""The expert for objects with any names: models of AutoModelForZeroShotObjectDetection, prompted with the names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from .detection import Boxes, Detector
from .pretrained import KnownModel


# These families read one text with all names.
GROUNDING_FAMILIES = ("grounding-dino", "mm-grounding-dino")
# These read one text for each name.
OWL_FAMILIES = ("owlvit", "owlv2")
OWL_PROMPT = "a photo of a {}"
# This one reads one text for each name, and one with all of them.
OMDET_FAMILY = "omdet-turbo"
OMDET_TASK = "Detect {}."


@dataclass
class Prompt:
    """
    The names that the model reads at once.

    Attributes:
        inputs (`dict[str, torch.Tensor]`): the text for one image, `(texts, tokens)`, and `(1,)` for their number.
        classes (`np.ndarray` of shape `(names,)`): the class of each name.
        spans (`list[slice]`, *optional*): the tokens of each name in a text of several names.
    """

    inputs: dict[str, torch.Tensor]
    classes: np.ndarray
    spans: list[slice] | None = None


class OpenVocabularyDetector(Detector):
    """
    Objects with the names that you give, found by a model that reads names: MM-Grounding-DINO, LLMDet, Grounding DINO,
    OWLv2, OWL-ViT or OmDet-Turbo.

    With the names of a published table of class features, it fills that table, so a checkpoint that was trained with
    another detector of these classes can read its labels. The published checkpoints were trained with UniDet, which
    transformers does not have. A converted checkpoint knows the names of its 722 classes. If the names repeat, the
    first class of a name is used.

    Grounding DINO reads a text of at most 256 tokens, so many names are read in several texts, and the model runs once
    for each. The score of a name is the mean over its tokens. OWL reads each name alone, as `"a photo of a …"`.
    OmDet-Turbo reads each name alone, too, and the names together as a task of at most 77 tokens, `"Detect …, …."`.
    Two texts may name the same object, so a box is dropped if its IoU with a box of a higher score is larger than
    `same_object`. Boxes are then painted as for [`ObjectDetector`].

    Label: `{"ids": uint8 (height, width), "classes": [class of instance 0, …]}`, at most 254 instances, highest score
    first. Weights of the default: 172 million parameters, 689 MB, Apache-2.0.

    Args:
        class_names (`Sequence[str]`, *optional*):
            The names of the classes in order. By default those of the checkpoint whose processor the expert belongs
            to, if they are known, and the 80 of COCO otherwise.
        model_id (`str`, *optional*, defaults to `"openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det"`):
            Hub id or folder, with the tokenizer.
        image_processor (`dict`, *optional*): settings of the image processor that differ from the model's own.
        min_score (`float`, *optional*, defaults to 0.5):
            Boxes with a lower score are dropped. The score that is right for UniDet is high for these models; 0.3
            gives more objects.
        max_overlap (`float`, *optional*, defaults to 0.95): see [`paint_boxes`].
        same_object (`float`, *optional*, defaults to 0.7): see above.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import OpenVocabularyDetector

    >>> expert = OpenVocabularyDetector(["traffic light", "bicycle lane"], min_score=0.3)  # loaded when it first runs
    >>> expert.num_classes, expert.license
    (2, 'apache-2.0')
    ```
    """

    type = "open_vocabulary_detector"
    model_id = "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det"
    license = "apache-2.0"
    size_in_bytes = 689_000_000
    source = "transformers.AutoModelForZeroShotObjectDetection"
    auto_model = "AutoModelForZeroShotObjectDetection"
    known_models = {
        "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det": KnownModel("apache-2.0", 689_000_000),
        "IDEA-Research/grounding-dino-tiny": KnownModel("apache-2.0", 689_000_000),
        "google/owlv2-base-patch16-ensemble": KnownModel("apache-2.0", 620_000_000),
        "iSEE-Laboratory/llmdet_tiny": KnownModel("apache-2.0", 689_000_000),
        "omlab/omdet-turbo-swin-tiny-hf": KnownModel("apache-2.0", 462_000_000),
    }
    batch_size = 4

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        model_id: str | None = None,
        image_processor: dict[str, Any] | None = None,
        min_score: float = 0.5,
        max_overlap: float = 0.95,
        same_object: float = 0.7,
    ):
        super().__init__(model_id, image_processor, min_score, max_overlap)
        if not 0 < same_object <= 1:
            raise ValueError(f"same_object is {same_object}; a number from 0 to 1 is needed")
        self.has_default_names = class_names is None
        self._class_names = coco_names()
        if class_names is not None:
            self.class_names = class_names
        self.same_object = same_object

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in order; can be set."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or not names or not all(isinstance(name, str) and spoken(name) for name in names):
            raise ValueError(f"class_names is {names!r}; a list of names, none of them empty, is needed")
        self._class_names, self.has_default_names = list(names), False
        if self.is_loaded:
            self._prompts = list(self._make_prompts())

    @property
    def num_classes(self) -> int:
        return len(self._class_names)

    def load_model(self) -> torch.nn.Module:
        from transformers import AutoTokenizer

        family, families = self.model_config.model_type, (*GROUNDING_FAMILIES, *OWL_FAMILIES, OMDET_FAMILY)
        if family not in families:
            accepted = ", ".join(families)
            raise ValueError(f"{self.model_id} is of the family {family}; accepted are {accepted}")
        model = super().load_model()
        self._tokenizer = AutoTokenizer.from_pretrained(self.model_id)
        self._prompts = list(self._make_prompts())
        return model

    def place_model(self) -> None:
        super().place_model()
        if self.model_config.model_type == OMDET_FAMILY:  # it keeps the features of texts where they were made
            for known in (self.model.language_cache_class, self.model.language_cache_prompt):
                known.cache.clear()
                known.current_load = 0

    def find(self, images: list[Image.Image]) -> list[Boxes]:
        found: list[list[Boxes]] = [[] for _ in images]
        for indices, inputs in self.prepared(images):
            for prompt in self._prompts:
                texts = {
                    name: torch.cat([text] * len(indices)).to(self.device) for name, text in prompt.inputs.items()
                }
                outputs = self.forward({**inputs, **texts})
                if self.model_config.model_type == OMDET_FAMILY:
                    outputs = SimpleNamespace(
                        logits=outputs.decoder_class_logits, pred_boxes=outputs.decoder_coord_logits
                    )
                outputs.logits = name_logits(outputs.logits.float(), prompt.spans)
                results = self.boxes_of(outputs, [images[index] for index in indices])
                for index, (boxes, scores, names) in zip(indices, results):
                    found[index].append(Boxes(boxes, scores, prompt.classes[names]))
        return [self._distinct(Boxes(*map(np.concatenate, zip(*own)))) for own in found]

    def _distinct(self, found: Boxes) -> Boxes:
        """The boxes that are not those of an object with a higher score."""
        from torchvision.ops import nms

        kept = nms(torch.from_numpy(found.boxes), torch.from_numpy(found.scores), self.same_object).numpy()
        return Boxes(*(part[kept] for part in found))

    @property
    def box_processor(self) -> Any:
        if self.model_config.model_type == OMDET_FAMILY:  # that of the model, DETR's, expects a class for nothing
            from transformers import GroundingDinoImageProcessor

            return GroundingDinoImageProcessor()
        return super().box_processor

    # ---- names as texts ----

    def _make_prompts(self) -> Iterator[Prompt]:
        first_class: dict[str, int] = {}
        for number, name in enumerate(self._class_names):
            first_class.setdefault(spoken(name), number)
        names, classes = list(first_class), list(first_class.values())
        if self.model_config.model_type in OWL_FAMILIES:
            texts = self._tokenizer(
                [OWL_PROMPT.format(name) for name in names],
                padding="max_length",
                truncation=True,
                max_length=self.model_config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            inputs = {name: texts[name] for name in ("input_ids", "attention_mask")}
            yield Prompt(inputs, np.array(classes))
            return
        if self.model_config.model_type == OMDET_FAMILY:
            yield from self._tasks(names, classes)
            return
        limit = min(self.model_config.max_text_len, self.model_config.text_config.max_position_embeddings) - 2
        tokens = self._tokenizer(names, add_special_tokens=False)["input_ids"]
        for first, last in _parts([len(own) + 1 for own in tokens], limit, names):
            yield self._joined(tokens[first:last], classes[first:last])

    def _tasks(self, names: list[str], classes: list[int]) -> Iterator[Prompt]:
        """Each name as a text, and a task with as many of them as it has room for."""
        limit = self.model_config.text_config.max_position_embeddings
        room = limit - len(self._tokenizer(OMDET_TASK.format(""))["input_ids"])
        tokens = self._tokenizer(names, add_special_tokens=False)["input_ids"]
        for first, last in _parts([len(own) + 1 for own in tokens], room, names):
            texts = self._tokenizer(
                [OMDET_TASK.format(", ".join(names[first:last])), *names[first:last]],
                padding="max_length",
                max_length=limit,
                return_tensors="pt",
            )
            inputs = {"classes_structure": torch.tensor([last - first])}
            for name in ("input_ids", "attention_mask"):
                inputs |= {f"tasks_{name}": texts[name][:1], f"classes_{name}": texts[name][1:]}
            yield Prompt(inputs, np.array(classes[first:last]))

    def _joined(self, tokens: list[list[int]], classes: list[int]) -> Prompt:
        """One text with all names, a full stop after each."""
        stop = self._tokenizer.convert_tokens_to_ids(".")
        ids, spans = [self._tokenizer.cls_token_id], []
        for own in tokens:
            spans.append(slice(len(ids), len(ids) + len(own)))
            ids += [*own, stop]
        ids.append(self._tokenizer.sep_token_id)
        return Prompt({"input_ids": torch.tensor([ids])}, np.array(classes), spans)


def name_logits(logits: torch.Tensor, spans: list[slice] | None) -> torch.Tensor:
    """The logits of each name (batch, queries, names), whose sigmoid is the mean over the tokens of the name."""
    if spans is None:
        return logits
    probabilities = logits.sigmoid()
    return torch.stack([probabilities[..., span].mean(-1) for span in spans], dim=-1).logit(eps=1e-6)


def spoken(name: str) -> str:
    """A class name as the models read it. A full stop would end the name."""
    return " ".join(name.lower().replace(".", " ").replace("_", " ").split())


def coco_names() -> list[str]:
    """The 80 names of COCO's objects."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return [name for name in names if name not in ("__background__", "N/A")]


def _parts(lengths: list[int], limit: int, names: list[str]) -> Iterator[tuple[int, int]]:
    """Splits names of these lengths into parts of at most `limit` in all: the first of each, and the one after it."""
    first, total = 0, 0
    for index, length in enumerate(lengths):
        if length > limit:
            raise ValueError(f"the name '{names[index]}' has {length} tokens; the model reads at most {limit}")
        if total + length > limit:
            yield first, index
            first, total = index, 0
        total += length
    yield first, len(lengths)
