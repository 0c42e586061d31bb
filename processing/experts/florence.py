"""The expert for lines of text: Florence-2, which reads and locates text in one answer."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .base import MAX_REGIONS
from .pretrained import autocast, place
from .text import TextExpert, Word
from .word_features import HashedNgrams, WordFeatures


TASK = "<OCR_WITH_REGION>"


class FlorenceText(TextExpert):
    """
    Lines of text by Florence-2. Use it where whole lines matter, such as on signs and pages: each line is one entry of
    the label, painted as its quadrilateral, with the feature of the whole line. [`RapidOcrText`] gives single words.

    Label: `{"ids": uint8 (height, width), "words": [line, …], "features": float32 (lines, 64)}`, in lower case, at
    most 254 lines. Weights of the default: 232 million parameters, 927 MB, MIT.

    Args:
        word_features ([`WordFeatures`], *optional*, defaults to [`HashedNgrams`]): The encoder of the lines.
        model_id (`str`, *optional*, defaults to `"florence-community/Florence-2-base"`): Hub id or folder.
        max_new_tokens (`int`, *optional*, defaults to 1024): the longest answer.
        num_beams (`int`, *optional*, defaults to 3): beams of the search.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import FlorenceText

    >>> expert = FlorenceText()  # loaded when it first runs
    >>> expert.description, expert.license
    ({'name': 'ocr', 'kind': 'label', 'channels': 64}, 'mit')
    ```
    """

    type = "florence_text"
    model_id = "florence-community/Florence-2-base"
    license = "mit"
    size_in_bytes = 927_000_000
    source = "transformers.Florence2ForConditionalGeneration"
    file_settings = ("model_id",)
    half_on_cuda = True
    batch_size = 4

    def __init__(
        self,
        word_features: WordFeatures | None = None,
        model_id: str | None = None,
        max_new_tokens: int = 1024,
        num_beams: int = 3,
    ):
        if max_new_tokens < 1 or num_beams < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, num_beams {num_beams}; at least 1 is needed")
        self.word_features = HashedNgrams() if word_features is None else word_features
        self.model_id = str(type(self).model_id if model_id is None else model_id)
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams

    def load_model(self) -> torch.nn.Module:
        from transformers import AutoProcessor, Florence2ForConditionalGeneration

        self.word_features.load()
        self._processor = AutoProcessor.from_pretrained(self.model_id)
        return Florence2ForConditionalGeneration.from_pretrained(self.model_id, dtype=torch.float32)

    def place_model(self) -> None:
        place(self.model, self.device, self.running_dtype)

    def read(self, image: Image.Image) -> list[Word]:
        if min(image.size) < self.least_side:
            return []
        found = self._processor.post_process_generation(text=self.answer(image), task=TASK, image_size=image.size)[
            TASK
        ]
        lines = []
        for text, corners in zip(found["labels"], found["quad_boxes"]):
            text = " ".join(text.replace("</s>", "").replace("<s>", "").lower().split())
            if text:
                lines.append(Word(text, 1.0, np.asarray(corners, np.float64).reshape(4, 2)))
        return lines[:MAX_REGIONS]

    def answer(self, image: Image.Image) -> str:
        """The model's answer: the lines, each followed by eight tokens for the places of its corners."""
        inputs: Any = self._processor(images=image, text=TASK, return_tensors="pt").to(self.device)
        with autocast(self.device, self.running_dtype):
            generated = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, do_sample=False
            )
        return self._processor.tokenizer.decode(generated[0], skip_special_tokens=False)
