"""Experts for text: RapidOCR, whose weights are in its wheel, and the PP-OCR models of transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ...expert_spec import BACKGROUND
from .base import MAX_REGIONS, Expert, size_within
from .look import ExpertLook
from .pretrained import autocast, place, within_aspect
from .word_features import HashedNgrams, WordFeatures


if TYPE_CHECKING:
    from typing import Self


# The settings of RapidOCR that cannot name a file, a folder or an engine.
SAVED_PARAMS = (
    *(f"{part}.{setting}" for part in ("Det", "Cls", "Rec") for setting in ("lang_type", "model_type", "ocr_version")),
    *(f"Det.{setting}" for setting in ("limit_side_len", "limit_type", "mean", "std", "thresh", "box_thresh")),
    *(f"Det.{setting}" for setting in ("max_candidates", "unclip_ratio", "use_dilation", "score_mode")),
    *("Cls.cls_batch_num", "Cls.cls_thresh", "Rec.rec_batch_num"),
    *("Global.text_score", "Global.use_cls"),
)


@dataclass
class Word:
    """A word: its text, the mean confidence of its letters, and its corners."""

    text: str
    score: float
    corners: np.ndarray  # (4, 2) float: x and y in pixels, in the order of `reading_quad`


class TextExpert(Expert):
    """
    The base class of experts for text. It paints the words of an image with their numbers and computes their
    features. A subclass implements `read`.
    """

    name, kind = "ocr", "label"
    look = ExpertLook("Text", "which words can be read")
    part_settings = {"word_features": WordFeatures}

    word_features: WordFeatures
    least_side = 8  # pixels; smaller images are not read

    @property
    def channels(self) -> int:
        return self.word_features.channels

    def to(self, device: str | torch.device | int | None = None, dtype: torch.dtype | str | None = None) -> "Self":
        self.word_features.to(device, dtype)
        return super().to(device, dtype)

    def unload(self) -> None:
        self.word_features.unload()
        super().unload()

    def run(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        found = [self.read(image) for image in images]
        # the encoder runs once for all images
        features = self.word_features([word.text for words in found for word in words])
        ends = np.cumsum([len(words) for words in found])[:-1]
        return [
            {
                "ids": paint([word.corners for word in words], image.size),
                "words": [word.text for word in words],
                "features": part,
            }
            for image, words, part in zip(images, found, np.split(features, ends))
        ]

    def read(self, image: Image.Image) -> list[Word]:
        """Returns the words of one RGB image, line by line from the top, at most 254. The model must be loaded."""
        raise NotImplementedError(f"{type(self).__name__} has no method `read`")


class RapidOcrText(TextExpert):
    """
    Words by RapidOCR: detection of lines, orientation and recognition (PP-OCRv6 small), run by onnxruntime.

    Each word's quadrilateral is filled with the number of the word, from 0 on, earlier words over later ones; 255 is
    background. Words are in lower case, line by line from the top, at most 254. Each has a feature from a
    [`WordFeatures`]. An image without words has an empty list and background everywhere.

    Images are reduced to `max_pixels`. Small images are enlarged towards a short side of `min_side` pixels, at most
    threefold. An image with a side of less than 8 pixels is not read.

    Label: `{"ids": uint8 (height, width), "words": [str, …], "features": float32 (words, 64)}`. Weights: three ONNX
    models, 31.7 MB, Apache-2.0, in the wheel of rapidocr; nothing is downloaded. They run on the CPU, in float32; `to`
    moves only the word features.

    Args:
        word_features ([`WordFeatures`], *optional*, defaults to [`HashedNgrams`]):
            The encoder of the words.
        min_score (`float`, *optional*, defaults to 0.5):
            Words with a lower mean confidence of their letters are dropped.
        min_side (`int`, *optional*, defaults to 320):
            Short side in pixels to which smaller images are enlarged.
        max_pixels (`int`, *optional*, defaults to 921600):
            Number of pixels (960×960) to which larger images are reduced.
        num_threads (`int`, *optional*):
            Threads of onnxruntime for one image; by default one for each core.
        params (`dict`, *optional*):
            Further settings of RapidOCR, such as `{"Rec.lang_type": "cyrillic"}`. Models that are not in the wheel are
            downloaded.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import RapidOcrText

    >>> (label,) = RapidOcrText()([image])
    >>> label["ids"].shape, label["words"], label["features"].shape
    ((64, 64), ['▲'], (1, 64))
    ```
    """

    type = "rapidocr"
    model_id = "rapidocr"
    license = "apache-2.0"
    size_in_bytes = 31_749_509
    source = "rapidocr: PP-OCRv6 small detection and recognition, PP-OCR mobile v2.0 orientation"

    max_enlargement = 3

    def __init__(
        self,
        word_features: WordFeatures | None = None,
        min_score: float = 0.5,
        min_side: int = 320,
        max_pixels: int = 960 * 960,
        num_threads: int | None = None,
        params: dict[str, Any] | None = None,
    ):
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score is {min_score}; a number from 0 to 1 is needed")
        if min_side < 1 or max_pixels < 1:
            raise ValueError(f"min_side is {min_side} and max_pixels {max_pixels}; both must be at least 1")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; at least 1, or None for all cores, is needed")
        self.word_features = HashedNgrams() if word_features is None else word_features
        self.min_score = min_score
        self.min_side = min_side
        self.max_pixels = max_pixels
        self.num_threads = num_threads
        self.params = params

    @classmethod
    def check_saved(cls, settings: Mapping[str, Any]) -> None:
        params = settings.get("params") or {}
        if not isinstance(params, Mapping):
            raise ValueError(f"params of the saved '{cls.type}' is {params!r}; a dict is needed")
        for key, value in params.items():
            # RapidOCR replaces "${…}", for example by an environment variable
            if key not in SAVED_PARAMS or "$" in json.dumps(value):
                raise ValueError(
                    f"params of the saved '{cls.type}' has {key!r}: {value!r}; a saved description may set "
                    f"{', '.join(SAVED_PARAMS)}. Set others in your own code, RapidOcrText(params=…)"
                )

    def load_model(self) -> Any:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                "RapidOcrText needs rapidocr and onnxruntime: pip install rapidocr onnxruntime"
            ) from error

        threads = -1 if self.num_threads is None else self.num_threads
        self.word_features.load()
        return RapidOCR(
            params={
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": threads,
                # we choose the sizes: RapidOCR would enlarge a thin strip to billions of pixels
                "Global.use_preprocess_img": False,
                "Global.use_vertical_padding": False,
                "Det.limit_side_len": 32,
                "Global.return_word_box": True,
                **(self.params or {}),
            }
        )

    def read(self, image: Image.Image) -> list[Word]:
        pixels = self._pixels(image)
        if pixels is None:
            return []
        detection, orientation, recognition, _ = self.model.run_ocr_steps(pixels, {})
        if detection.boxes is None or recognition.txts is None:
            return []
        words = []
        quads = self._quads(detection, orientation, image, pixels)
        for quad, text, line in zip(quads, recognition.txts, recognition.word_results):
            words += words_of_line(text, line, quad)
        words = [Word(word.text.lower(), word.score, word.corners) for word in words]
        return [word for word in words if word.score >= self.min_score][:MAX_REGIONS]

    def find_lines(self, image: Image.Image) -> list[np.ndarray]:
        """
        Finds the lines of text without reading them. The model must be loaded.

        Returns:
            `list[np.ndarray]`: the corners of each line as in [`reading_quad`], from the top.
        """
        pixels = self._pixels(image)
        if pixels is None:
            return []
        self.model.use_rec = False
        try:
            detection, orientation, *_ = self.model.run_ocr_steps(pixels, {})
        finally:
            self.model.use_rec = True
        return [] if detection.boxes is None else self._quads(detection, orientation, image, pixels)

    def _pixels(self, image: Image.Image) -> np.ndarray | None:
        """The resized image, (height, width, blue-green-red); `None` if it is too small to be read."""
        if min(image.size) < self.least_side:
            return None
        width, height = size_within(image.size, self.max_pixels)
        scale = min(self.max_enlargement, self.min_side / min(width, height))
        if scale > 1:
            width, height = size_within((round(width * scale), round(height * scale)), self.max_pixels)
        if min(width, height) < 2 * self.least_side:
            return None
        resized = image.resize((width, height), Image.Resampling.BICUBIC) if (width, height) != image.size else image
        return np.ascontiguousarray(np.asarray(resized)[:, :, ::-1])

    def _quads(self, detection: Any, orientation: Any, image: Image.Image, pixels: np.ndarray) -> list[np.ndarray]:
        """The corners of the lines in reading direction, in pixels of the image."""
        scales = np.array([image.width / pixels.shape[1], image.height / pixels.shape[0]])
        quads = []
        for box, (label, score) in zip(detection.boxes, orientation.cls_res):
            upside_down = "180" in label and score > self.model.text_cls.cls_thresh
            quads.append(reading_quad(np.asarray(box, np.float64), upside_down) * scales)
        return quads


class PpOcrText(TextExpert):
    """
    Words by the PP-OCR models of transformers: detection of lines, then recognition. Unlike [`RapidOcrText`] it runs
    on the expert's device, and its weights come from the Hub. It has no model for orientation, so it does not read
    text that is upside down.

    Labels are the same as those of [`RapidOcrText`]. Weights of the default: PP-OCRv6 small, 7.7 million parameters,
    31 MB, Apache-2.0. The detector's image processor needs OpenCV, which rapidocr installs.

    Args:
        word_features ([`WordFeatures`], *optional*, defaults to [`HashedNgrams`]): The encoder of the words.
        detector (`str`, *optional*, defaults to `"PaddlePaddle/PP-OCRv6_small_det_safetensors"`):
            Hub id or folder of a model of AutoModelForObjectDetection, of PP-OCR.
        recognizer (`str`, *optional*, defaults to `"PaddlePaddle/PP-OCRv6_small_rec_safetensors"`):
            Hub id or folder of a model of AutoModelForTextRecognition.
        min_score (`float`, *optional*, defaults to 0.5):
            Words with a lower mean confidence of their letters are dropped.
        min_line_score (`float`, *optional*, defaults to 0.6):
            Lines with a lower score of the detector are not read.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import PpOcrText

    >>> expert = PpOcrText(min_score=0.7)  # loaded when it first runs
    >>> expert.description, expert.license
    ({'name': 'ocr', 'kind': 'label', 'channels': 64}, 'apache-2.0')
    ```
    """

    type = "pp_ocr"
    model_id = "PaddlePaddle/PP-OCRv6_small_rec_safetensors"
    license = "apache-2.0"
    size_in_bytes = 31_142_860
    source = "transformers.AutoModelForObjectDetection and AutoModelForTextRecognition"
    file_settings = ("detector", "recognizer")
    half_on_cuda = True
    lines_at_once = 16

    def __init__(
        self,
        word_features: WordFeatures | None = None,
        detector: str = "PaddlePaddle/PP-OCRv6_small_det_safetensors",
        recognizer: str = "PaddlePaddle/PP-OCRv6_small_rec_safetensors",
        min_score: float = 0.5,
        min_line_score: float = 0.6,
    ):
        if not (0 <= min_score <= 1 and 0 <= min_line_score <= 1):
            raise ValueError(f"min_score is {min_score}, min_line_score {min_line_score}; numbers from 0 to 1 needed")
        self.word_features = HashedNgrams() if word_features is None else word_features
        self.detector = str(detector)
        self.recognizer = self.model_id = str(recognizer)
        self.min_score = min_score
        self.min_line_score = min_line_score

    def load_model(self) -> torch.nn.Module:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForTextRecognition

        self.word_features.load()
        self._detector_processor = AutoImageProcessor.from_pretrained(self.detector)
        self._recognizer_processor = AutoImageProcessor.from_pretrained(self.recognizer)
        return torch.nn.ModuleDict(
            {
                "detector": AutoModelForObjectDetection.from_pretrained(self.detector, dtype=torch.float32),
                "recognizer": AutoModelForTextRecognition.from_pretrained(self.recognizer, dtype=torch.float32),
            }
        )

    def place_model(self) -> None:
        place(self.model, self.device, self.running_dtype)

    def read(self, image: Image.Image) -> list[Word]:
        if min(image.size) < self.least_side:
            return []
        quads = [reading_quad(box, upside_down=False) for box in self._lines(image)]
        words: list[Word] = []
        for (text, line), quad in zip(self._recognize([cut_out(image, quad) for quad in quads]), quads):
            words += words_of_line(text, line, quad)
        words = [Word(word.text.lower(), word.score, word.corners) for word in words]
        return [word for word in words if word.score >= self.min_score][:MAX_REGIONS]

    def _lines(self, image: Image.Image) -> np.ndarray:
        """Corners of the lines, from the top: (lines, 4, 2), each from top left clockwise."""
        squashed = within_aspect(image, most=64)
        inputs = self._detector_processor(images=squashed, return_tensors="pt")
        with autocast(self.device, self.running_dtype):
            outputs = self.model["detector"](pixel_values=inputs["pixel_values"].to(self.device))
        (result,) = self._detector_processor.post_process_object_detection(
            SimpleNamespace(last_hidden_state=outputs.last_hidden_state.float()),
            target_sizes=torch.tensor([[image.height, image.width]]),
            box_threshold=self.min_line_score,
        )
        boxes = result["boxes"].cpu().numpy().astype(np.float64).reshape(-1, 4, 2)
        sides = np.linalg.norm(boxes - np.roll(boxes, -1, axis=1), axis=2)  # (lines, 4)
        boxes = boxes[(sides >= 1).all(1)]
        if not len(boxes):
            return boxes
        tops = boxes[:, :, 1].min(1)
        step = max(1.0, 0.5 * float(np.median(np.ptp(boxes[:, :, 1], axis=1))))
        return boxes[np.lexsort((boxes[:, :, 0].min(1), tops // step))]

    def _recognize(self, lines: list[Image.Image]) -> list[tuple[str, SimpleNamespace]]:
        """The text of each line, and the places of its words in the form that [`words_of_line`] takes."""
        processor = self._recognizer_processor
        by_width: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for number, line in enumerate(lines):
            pixels = processor(images=line, return_tensors="pt")["pixel_values"]
            by_width.setdefault(pixels.shape[-1], []).append((number, pixels))
        found: list[Any] = [None] * len(lines)
        for padded_width, members in by_width.items():
            for first in range(0, len(members), self.lines_at_once):
                numbers, pixels = zip(*members[first : first + self.lines_at_once])
                with autocast(self.device, self.running_dtype):
                    outputs = self.model["recognizer"](pixel_values=torch.cat(pixels).to(self.device))
                scores, indices = outputs.last_hidden_state.float().max(-1)  # (lines, steps)
                for number, own_scores, own_indices in zip(numbers, scores.tolist(), indices.tolist()):
                    # the steps of the line itself; the steps to the right are padding
                    width = processor.get_target_size([(lines[number].height, lines[number].width)]).width
                    steps = len(own_indices) * min(1.0, width / padded_width)
                    found[number] = _line(own_indices, own_scores, processor.character_list, steps)
        return found


def _line(
    indices: list[int], scores: list[float], character_list: list[str], steps: float
) -> tuple[str, SimpleNamespace]:
    """
    A line's text, and its letters by word in the form of RapidOCR.

    Args:
        indices (`list[int]`): the letter at each step; 0 is none, and a letter over several steps counts once.
        scores (`list[float]`): the confidence of each.
        character_list (`list[str]`): the letters.
        steps (`float`): the number of steps of the line.
    """
    columns = [
        column
        for column, index in enumerate(indices)
        if index and column < steps and (column == 0 or indices[column - 1] != index)
    ]
    letters = [character_list[indices[column]] for column in columns]
    words: list[list[str]] = [[]]
    word_columns: list[list[int]] = [[]]
    for column, letter in zip(columns, letters):
        if letter.isspace():
            words.append([])
            word_columns.append([])
        else:
            words[-1].append(letter)
            word_columns[-1].append(column)
    line = SimpleNamespace(
        words=[word for word in words if word],
        word_cols=[own for own in word_columns if own],
        line_txt_len=steps,
        confs=[scores[column] for column in columns],
    )
    return "".join(letters), line


def cut_out(image: Image.Image, quad: np.ndarray) -> Image.Image:
    """The quadrilateral of a line as an upright image."""
    width = max(np.linalg.norm(quad[1] - quad[0]), np.linalg.norm(quad[2] - quad[3]))
    height = max(np.linalg.norm(quad[3] - quad[0]), np.linalg.norm(quad[2] - quad[1]))
    size = (max(1, round(width)), max(1, round(height)))
    corners = np.concatenate([quad[0], quad[3], quad[2], quad[1]])  # PIL's order
    return image.transform(size, Image.Transform.QUAD, [float(value) for value in corners], Image.Resampling.BICUBIC)


def reading_quad(box: np.ndarray, upside_down: bool) -> np.ndarray:
    """
    The corners of a line in reading direction: top of its start, top of its end, bottom of its end, bottom of its
    start.

    Args:
        box (`np.ndarray` of shape `(4, 2)`): corners in the image: top left, top right, bottom right, bottom left.
        upside_down (`bool`): whether the crop of the line was turned by 180° before it was read.
    """
    width = max(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[2] - box[3]))
    height = max(np.linalg.norm(box[0] - box[3]), np.linalg.norm(box[1] - box[2]))
    # RapidOCR turns the crop of a tall box counter-clockwise, so its right side is up
    turns = 1 if int(height) >= 1.5 * int(width) else 0
    return np.roll(box, -turns - (2 if upside_down else 0), axis=0)


def words_of_line(text: str, line: Any, quad: np.ndarray) -> list[Word]:
    """
    Cuts a recognised line into its words.

    Args:
        text (`str`): the line's letters and spaces.
        line: RapidOCR's `WordInfo`: `words`, the letters of each word; `word_cols`, the step of the recogniser's
            sequence at about the middle of each letter; `line_txt_len`, the number of steps of the whole line;
            `confs`, the confidence of each character of `text`.
        quad (`np.ndarray` of shape `(4, 2)`): the line's corners, from [`reading_quad`].
    """
    if not line.words or not line.line_txt_len:
        return []
    steps = line.line_txt_len
    centres = [(np.asarray(columns) + 0.5) / steps for columns in line.word_cols]  # 0 to 1 along the line
    gaps = np.concatenate([np.diff(columns) for columns in centres])
    letter = gaps.mean() if len(gaps) else 1 / max(1, len(text))
    reach = 0.7 * letter  # more than half, because the first or last letter may be wide
    starts = [max(0.0, columns[0] - reach) for columns in centres]
    ends = [min(1.0, columns[-1] + reach) for columns in centres]
    for left in range(len(starts) - 1):
        if ends[left] > starts[left + 1]:
            ends[left] = starts[left + 1] = (ends[left] + starts[left + 1]) / 2

    scores = iter([score for character, score in zip(text, line.confs) if not character.isspace()])
    words = []
    for letters, start, end in zip(line.words, starts, ends):
        score = float(np.mean([next(scores, 0.0) for _ in letters]))
        (top_start, top_end, bottom_end, bottom_start) = quad
        corners = np.stack(
            [
                top_start + start * (top_end - top_start),
                top_start + end * (top_end - top_start),
                bottom_start + end * (bottom_end - bottom_start),
                bottom_start + start * (bottom_end - bottom_start),
            ]
        )
        words.append(Word("".join(letters), score, corners))
    return words


def paint(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """
    Fills polygons with their numbers, earlier ones over later ones.

    Args:
        polygons (`list[np.ndarray]`): of shape (corners, 2), x and y in pixels; at most 254.
        size (`tuple[int, int]`): width and height of the map.

    Returns:
        `np.ndarray` of shape `(height, width)`, uint8; 255 where there is no polygon.
    """
    ids = Image.new("L", size, BACKGROUND)
    draw = ImageDraw.Draw(ids)
    for number in reversed(range(len(polygons))):
        draw.polygon([(float(x), float(y)) for x, y in polygons[number]], fill=number)
    return np.array(ids)
