"""What a model of a comparison can be asked, and how it is opened."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

import modeling_prismer.public  # noqa: F401  registers the Auto classes
from modeling_prismer.command_line.arguments import model_type
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing import load_image

from .arguments import CompareArguments, ModelName


CLASS_QUESTION = "What is in the image?"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PRISMERS = ("prismer", "prismer_lm")
KINDS = (
    PRISMERS,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)


class CannotDo(Exception):
    """A model cannot do a task. The message gives the reason."""


@dataclass(frozen=True)
class NamedImage:
    """An image that is opened when it is needed. `content` is any input of `load_image`."""

    image_id: str
    content: Any

    def open(self) -> Image.Image:
        return load_image(self.content, name=self.image_id)


@dataclass(frozen=True)
class Example:
    """An example in context. Without an image, it shows the form of an answer only."""

    text: str | None
    answer: str
    image: NamedImage | None = None


@dataclass(frozen=True)
class Query:
    """
    A request.

    Args:
        images (`tuple[NamedImage]`): the images, in order.
        text (`str`, *optional*): the question. Without it, a caption is wanted.
        examples (`tuple[Example]`): examples that come first.
        has_instruction (`bool`): whether the text says what form the answer must have.
    """

    images: tuple[NamedImage, ...] = ()
    text: str | None = None
    examples: tuple[Example, ...] = ()
    has_instruction: bool = False

    @property
    def content(self) -> list[Any]:
        """For [`Trial`]: the ids of the images, the text, and the examples."""
        shown = [[own.text, own.answer, own.image and own.image.image_id] for own in self.examples]
        return [[image.image_id for image in self.images], self.text, shown]


class Model(ABC):
    """
    A model of a comparison. A method that a kind of model does not have raises [`CannotDo`].

    Args:
        path (`str`): a folder or a Hub id.
        args ([`CompareArguments`]): device, precision, prompts and batch size.

    Attributes:
        network (`nn.Module`): the network.
        experts (`list[str]`): the experts that it uses.
        expert_bytes (`int`): the size of their weights.
    """

    kind: str
    network: nn.Module
    experts: list[str] = []
    expert_bytes: int = 0

    def __init__(self, path: str, args: CompareArguments):
        self.path = path
        self.args = args

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def num_trained(self) -> int:
        """The number of weights that are trained while the backbones stay frozen."""
        return self.num_parameters

    def answer(self, queries: Sequence[Query], max_new_tokens: int) -> list[str]:
        """The text that the model writes for each query."""
        raise CannotDo(f"{self.kind} models do not write texts")

    def rank(self, queries: Sequence[Query], candidates: Sequence[str]) -> np.ndarray:
        """The score of each candidate as the answer to each query, `(queries, candidates)`."""
        raise CannotDo(f"{self.kind} models do not rank answers to questions")

    def match(self, images: Sequence[NamedImage], texts: Sequence[str]) -> np.ndarray:
        """How well each text describes each image, `(images, texts)`."""
        return self.rank([Query((image,)) for image in images], texts)

    def classify(self, images: Sequence[NamedImage], names: Sequence[str]) -> np.ndarray:
        """The score of each class for each image, `(images, classes)`."""
        question = self.args.class_question or CLASS_QUESTION
        return self.rank([Query((image,), question) for image in images], names)

    def embed(self, images: Sequence[NamedImage]) -> np.ndarray:
        """A vector for each image, `(images, width)`."""
        raise CannotDo(f"{self.kind} models do not encode images")

    def choose(self, queries: Sequence[Query], options: Sequence[Sequence[str]]) -> list[str]:
        """The text with which the model chooses among options that have letters."""
        asked = [
            replace(query, text=with_letters(query.text or "", own), has_instruction=True)
            for query, own in zip(queries, options, strict=True)
        ]
        return self.answer(asked, max_new_tokens=16)


def with_letters(question: str, options: Sequence[str]) -> str:
    """The question with a line for each option, and the instruction of LLaVA-1.5 for multiple choice."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    return "\n".join([question, *lines, "Answer with the option's letter from the given choices directly."])


def kind_of(name: ModelName) -> str:
    """
    The `model_type` of a model; of an adapter that of its base model.

    Raises:
        ValueError: if there is no such model, if it is of another kind, or if it has no experts to choose from.
    """
    kind = model_type(name.path)
    if not any(kind in kinds for kinds in KINDS):
        raise ValueError(
            f"--models {name.path} is a {kind}; accepted are Prismer, PrismerLM, models of "
            "AutoModelForImageTextToText, of AutoModelForZeroShotImageClassification and of AutoModelForCausalLM"
        )
    if name.experts is not None and kind not in PRISMERS:
        raise ValueError(f"--models {name.path}@{name.experts}: a {kind} has no experts")
    return kind


def open_model(name: ModelName, args: CompareArguments) -> Model:
    """
    Opens a model of any kind.

    Raises:
        ValueError: see [`kind_of`].
    """
    path, kind = find_checkpoint(name.path), kind_of(name)
    if kind in PRISMERS:
        from .prismer_model import PrismerModel

        return PrismerModel(path, args, name.experts)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        from .vision_language import VisionLanguageModel

        return VisionLanguageModel(path, args)
    if kind in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        from .contrastive import ContrastiveModel

        return ContrastiveModel(path, args)
    from .language import LanguageModel

    return LanguageModel(path, args)
