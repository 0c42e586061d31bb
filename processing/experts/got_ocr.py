"""The expert for lines of text that are hard to read: GOT-OCR2, which reads lines that RapidOCR has found."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .base import MAX_REGIONS
from .pretrained import autocast, place
from .text import RapidOcrText, TextExpert, Word, cut_out
from .word_features import HashedNgrams, WordFeatures


if TYPE_CHECKING:
    from transformers import GotOcr2ForConditionalGeneration

END = "<|im_end|>"  # of an answer


class GotOcrText(TextExpert):
    """
    Lines of text by GOT-OCR2. Use it where whole lines matter and are hard to read: formulas, dense print, Chinese.
    Like [`FlorenceText`], it gives one entry for each line, painted as its quadrilateral, with the feature of the
    whole line.

    GOT-OCR2 writes the text of an image and does not say where it stands. Its prompt takes a box but returns none. So
    the detector of [`RapidOcrText`] finds the lines and their direction, each line is cut out upright, and GOT-OCR2
    reads it alone. Slices of images are among the data that it was trained on. Lines that the detector misses are not
    read, and lines without text in the answer are left out. Each line takes one run of the model, resized to
    1024×1024 pixels, so pages take long.

    Label: `{"ids": uint8 (height, width), "words": [line, …], "features": float32 (lines, 64)}`, in lower case, at
    most 254 lines. Weights of the default: 561 million parameters, 2.2 GB in single precision (1.1 GB on the Hub),
    Apache-2.0. The detector's are in the wheel of rapidocr and run on the CPU.

    Args:
        word_features ([`WordFeatures`], *optional*, defaults to [`HashedNgrams`]): The encoder of the lines.
        model_id (`str`, *optional*, defaults to `"stepfun-ai/GOT-OCR-2.0-hf"`): Hub id or folder.
        max_new_tokens (`int`, *optional*, defaults to 128): the longest line.
        num_threads (`int`, *optional*):
            Threads of the detector for one image; by default one for each core.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import GotOcrText

    >>> expert = GotOcrText()  # loaded when it first runs
    >>> expert.description, expert.license
    ({'name': 'ocr', 'kind': 'label', 'channels': 64}, 'apache-2.0')
    ```
    """

    type = "got_ocr_text"
    model_id = "stepfun-ai/GOT-OCR-2.0-hf"
    license = "apache-2.0"
    size_in_bytes = 2_242_000_000
    source = "transformers.GotOcr2ForConditionalGeneration; lines by rapidocr"
    file_settings = ("model_id",)
    half_on_cuda = True
    lines_at_once = 4

    def __init__(
        self,
        word_features: WordFeatures | None = None,
        model_id: str | None = None,
        max_new_tokens: int = 128,
        num_threads: int | None = None,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
        self.word_features = HashedNgrams() if word_features is None else word_features
        self.model_id = str(type(self).model_id if model_id is None else model_id)
        self.max_new_tokens = max_new_tokens
        self.num_threads = num_threads
        self._detector = RapidOcrText(num_threads=num_threads)

    def load_model(self) -> "GotOcr2ForConditionalGeneration":
        from transformers import GotOcr2ForConditionalGeneration, GotOcr2Processor

        self.word_features.load()
        self._detector.load()
        self._processor = GotOcr2Processor.from_pretrained(self.model_id)
        return GotOcr2ForConditionalGeneration.from_pretrained(self.model_id, dtype=torch.float32)

    def unload(self) -> None:
        self._detector.unload()
        super().unload()

    def place_model(self) -> None:
        place(self.model, self.device, self.running_dtype)

    def read(self, image: Image.Image) -> list[Word]:
        quads = self._detector.find_lines(image)[:MAX_REGIONS]
        lines = [Word("", 1.0, np.asarray(quad)) for quad in quads]
        for first in range(0, len(lines), self.lines_at_once):
            members = lines[first : first + self.lines_at_once]
            for line, text in zip(members, self.answers([cut_out(image, line.corners) for line in members])):
                line.text = text
        return [line for line in lines if line.text]

    def answers(self, images: list[Image.Image]) -> list[str]:
        """The text of each image, on one line and in lower case."""
        vision = self.model.config.vision_config
        tokens = (vision.image_size // vision.patch_size // 4) ** 2  # two convolutions halve the grid of patches
        inputs: Any = self._processor(images=images, num_image_tokens=tokens, return_tensors="pt").to(self.device)
        tokenizer = self._processor.tokenizer
        with autocast(self.device, self.running_dtype):
            generated = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.convert_tokens_to_ids(END),
                pad_token_id=tokenizer.convert_tokens_to_ids(END),
            )
        texts = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split(END)[0].lower().split()) for text in texts]
