"""Loads a Prismer or a PrismerLM as the command line names it, and prepares their inputs in the same way."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import logging

from modeling_prismer.configuration_prismer_lm import PrismerLMConfig
from modeling_prismer.expert_spec import read_specs
from modeling_prismer.familiarity import Familiarity, image_features
from modeling_prismer.pretrained import find_checkpoint, shipped_checkpoints
from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.experts.suite import SUITES
from modeling_prismer.processing.tasks import find_task

from .arguments import checkpoint_path, model_type
from .console import first_line


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint and how it runs, as named on the command line. It can be pickled.

    Args:
        model (`str`, *optional*): a folder, a Hub id or the name of a shipped checkpoint.
        device (`str`): where experts and network run.
        dtype (`str`, *optional*, defaults to `"auto"`): the network's precision.
        experts (`str`, *optional*): see [`read_experts`]; or `"auto"`, and the checkpoint's router chooses.
        language (`str`, *optional*): where the language model of a PrismerLM lies.
        budget_ms (`float`, *optional*): with `"auto"`, the mean time of the experts for an image in milliseconds.
    """

    model: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    experts: str | None = None
    language: str | None = None
    budget_ms: float | None = None

    @property
    def is_auto(self) -> bool:
        """Whether the checkpoint's router chooses the experts."""
        return self.experts == "auto"

    @property
    def path(self) -> str:
        return checkpoint_path(self.model)

    @property
    def name(self) -> str:
        return self.model or Path(self.path).name

    def load(self) -> "Reader":
        """Loads the processor; the network is loaded on first use."""
        kind = model_type(self.model)
        if kind not in READERS:
            raise ValueError(f"model {self.name!r} is a {kind}; accepted are {' and '.join(READERS)}")
        if self.language is not None and kind != "prismer_lm":
            raise ValueError("--language is for checkpoints of PrismerLM; this one has its own language model")
        if self.budget_ms is not None and not self.is_auto:
            raise ValueError("--budget-ms needs --experts auto, which chooses the experts of each image")
        return READERS[kind](self)

    def load_experts(self) -> "ExpertsReader":
        """Loads the experts alone: the suite that `experts` names, or those of the checkpoint."""
        if self.is_auto:
            raise ValueError("--experts auto chooses by a text about the image, and this command has none")
        suite, names = read_experts(self.experts)
        return self.load() if suite is None else ExpertsReader(suite.to(self.device), suite.descriptions)


class ExpertsReader:
    """
    Loaded experts.

    Args:
        suite ([`ExpertSuite`]): the experts that run.
        descriptions (`list[dict]`): of these, and of experts that do not run.
    """

    def __init__(self, suite: ExpertSuite, descriptions: list[dict[str, Any]]):
        self.suite = suite
        self.specs = read_specs(descriptions)

    def run_experts(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """For each image the label of each expert, `None` if it is missing."""
        return self.suite(images)

    @property
    def loading_seconds(self) -> float:
        """The time that loading took so far."""
        return sum(expert.loading_seconds for expert in self.suite.values())


class Reader(ExpertsReader, ABC):
    """
    A loaded checkpoint.

    Attributes:
        processor: its processor.
        expert_names (`list[str]`, *optional*): the experts to use; `None` means all.
    """

    processor_class: str
    network_class: str
    network_seconds = 0.0

    def __init__(self, checkpoint: Checkpoint):
        import modeling_prismer

        logging.disable_progress_bar()
        self.checkpoint = checkpoint
        suite, self.expert_names = read_experts(None if checkpoint.is_auto else checkpoint.experts)
        processor_class = getattr(modeling_prismer, self.processor_class)
        kwargs = {} if suite is None else {"experts": suite}
        self.processor = processor_class.from_pretrained(checkpoint.path, expert_device=checkpoint.device, **kwargs)
        configured = [expert["name"] for expert in self.processor.image_processor.experts]
        if unknown := [name for name in self.expert_names or () if name not in configured]:
            raise ValueError(
                f"--experts: there is no {unknown[0]!r}; the experts of {checkpoint.name} are "
                f"{', '.join(configured) or 'none'}. Or else, {accepted_suites()}"
            )
        if checkpoint.is_auto and self.processor.router is None:
            raise ValueError(
                f"--experts auto: {checkpoint.name} has no router, which training_examples/train_router.py trains"
            )
        wanted, live = self.processor.check_experts(self.expert_names)
        specs = [expert for expert in self.processor.image_processor.experts if expert["name"] in wanted]
        super().__init__(self.processor.experts.only(*live) if live else ExpertSuite(), specs)

    @property
    def experts_of_calls(self) -> list[str] | str | None:
        """`experts` for calls of the processor that run them."""
        return "auto" if self.checkpoint.is_auto else self.expert_names

    def run_experts(
        self, images: list[Image.Image], texts: Sequence[str | None] = (None,), task: str = "caption"
    ) -> list[dict[str, Any]]:
        """
        For each image the label of each expert, `None` if it is missing or if the router left the expert out.

        Args:
            images (`list[PIL.Image.Image]`): the images.
            texts (`Sequence[str | None]`): the texts that will be asked about each of them.
            task (`str`): the task of the texts.
        """
        if not self.checkpoint.is_auto:
            return self.processor.run_experts(images, experts=self.expert_names)
        self.network  # noqa: B018  the router sees the images through its encoder
        budget = {"experts": "auto", "budget_ms": self.checkpoint.budget_ms}
        return self.processor.run_experts(images, text=[self.write_prompts(texts, task)] * len(images), **budget)

    @abstractmethod
    def write_prompts(self, texts: Sequence[str | None], task: str) -> list[str]:
        """The prompts for texts about an image, as the processor gets them."""

    def find_task(self, task: str) -> str:
        """The checkpoint's name of a task. Raises a `ValueError` if it was not made for this task."""
        return task

    def check_texts(self, texts: Sequence[str | None], task: str) -> None:
        """Raises a `ValueError` if the processor refuses the texts. No expert runs."""
        missing = {expert["name"]: None for expert in self.processor.image_processor.experts}
        self.prepare([Image.new("RGB", (8, 8))], texts, task, [missing])

    @property
    def dtype(self) -> Any:
        if self.checkpoint.dtype != "auto":
            return getattr(torch, self.checkpoint.dtype)
        # half precision on a CPU is slower than float32
        return torch.float32 if self.checkpoint.device == "cpu" else "auto"

    @cached_property
    def network(self) -> Any:
        start = time.perf_counter()
        network = self.load_network()
        self.network_seconds = time.perf_counter() - start
        if self.checkpoint.is_auto:
            self.processor.router.encoder = network
        return network

    @property
    def loading_seconds(self) -> float:
        return super().loading_seconds + self.network_seconds

    def load_network(self, **kwargs: Any) -> Any:
        import modeling_prismer

        network_class = getattr(modeling_prismer, self.network_class)
        network = network_class.from_pretrained(self.checkpoint.path, dtype=self.dtype, **kwargs)
        return network.to(self.checkpoint.device).eval()

    @abstractmethod
    def prepare(
        self, images: list[Image.Image], texts: Sequence[str | None], task: str, labels: list[dict[str, Any]]
    ) -> Any:
        """The network's inputs for the same texts about each image. `labels` are those of the experts that ran."""

    @abstractmethod
    def prepare_candidates(self, candidates: list[str], text: str | None) -> Any:
        """The inputs of `rank_candidates` for candidates that follow a text."""

    def prepare_to_rank(self, images: list[Image.Image], text: str | None, labels: list[dict[str, Any]]) -> Any:
        """As `prepare`, for the text that candidates follow."""
        return self.prepare(images, [text], self.processor.task_for(text), labels)

    def encode(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[float] | None]:
        """
        The inputs with encoded images, and the distance of each image from those of the training if the checkpoint
        knows them.
        """
        return inputs, None

    @property
    def familiar_distance(self) -> float | None:
        """The largest distance of images like those of the training."""
        return None


class PrismerReader(Reader):
    """A Prismer."""

    processor_class = "PrismerProcessor"
    network_class = "PrismerForConditionalGeneration"

    def load_network(self, optimize: bool = True, **kwargs: Any) -> Any:
        from modeling_prismer import optimize_for_cpu

        network = super().load_network(**kwargs)
        is_fast = optimize and self.checkpoint.device == "cpu" and network.dtype == torch.float32
        return optimize_for_cpu(network) if is_fast else network

    @cached_property
    def familiarity(self) -> Familiarity | None:
        return Familiarity.from_pretrained(self.checkpoint.path)

    @property
    def familiar_distance(self) -> float | None:
        return None if self.familiarity is None else self.familiarity.limit

    def find_task(self, task: str) -> str:
        tasks = self.processor.tasks or [self.processor.task]
        # a published checkpoint that was only pre-trained captions images, too
        found = [name for name in tasks if name in (task, f"zero_shot_{task}")]
        if not found:
            raise ValueError(f"this checkpoint was made for {', '.join(tasks)}; this command needs one for {task!r}")
        return found[0]

    def write_prompts(self, texts: Sequence[str | None], task: str) -> list[str]:
        return [text if text is not None else find_task(task).prompt or "" for text in texts]

    def prepare(
        self, images: list[Image.Image], texts: Sequence[str | None], task: str, labels: list[dict[str, Any]]
    ) -> Any:
        text = None if texts == [None] else [list(texts)] * len(images)
        inputs = self.processor(
            images, text, expert_labels=labels, experts=self.expert_names, task=task, return_tensors="pt"
        )
        return self.processor.without_missing(inputs).to(self.checkpoint.device)

    def prepare_candidates(self, candidates: list[str], text: str | None) -> Any:
        task = self.processor.task_for(text)
        if text is None and find_task(task).prompt is None:
            raise ValueError("this checkpoint needs a question that the labels answer: --question")
        return self.processor.prepare_candidates(candidates, task=task).to(self.checkpoint.device)

    def encode(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[float] | None]:
        texts = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        encoded = self.network.get_image_features(**inputs, return_dict=True)
        distances = None
        if self.familiarity is not None:
            distances = self.familiarity.distance(image_features(self.network, encoded)).tolist()
        return {**texts, "encoder_outputs": encoded}, distances


class PrismerLMReader(Reader):
    """A PrismerLM. Questions go through the chat template of the language model if it has one."""

    processor_class = "PrismerLMProcessor"
    network_class = "PrismerLMForConditionalGeneration"

    def load_network(self, **kwargs: Any) -> Any:
        language = self.checkpoint.language
        if language is not None:
            return super().load_network(language=language, **kwargs)
        try:
            return super().load_network(**kwargs)
        except OSError as error:
            backbones = PrismerLMConfig.from_pretrained(self.checkpoint.path).backbones or {}
            if not backbones.get("trained_only"):
                raise
            raise OSError(
                f"the language model {backbones['language']['id'] or 'of this checkpoint'} cannot be loaded: "
                f"{first_line(error)}. If you have it, name its folder: --language FOLDER"
            ) from error

    def prepare(
        self, images: list[Image.Image], texts: Sequence[str | None], task: str, labels: list[dict[str, Any]]
    ) -> Any:
        prompts = self._prompts_for(texts, task)
        settings: dict[str, Any] = {"expert_labels": labels, "experts": self.expert_names, "return_tensors": "pt"}
        if self.processor.chat_template is None:
            inputs = self.processor(images, [prompts] * len(images), **settings)
        elif self.processor.vlm_processor is None:
            written = self.write_prompts(texts, task)
            inputs = self.processor(images, [written] * len(images), add_special_tokens=False, **settings)
        else:  # a vision-language model has its own places for images
            conversations = [_turn(prompt, image) for image in images for prompt in prompts]
            settings["expert_labels"] = [own for own in labels for _ in prompts]
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                sanitize_control_tokens=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs=settings,
            )
        return self.processor.without_missing(inputs).to(self.checkpoint.device)

    def _prompts_for(self, texts: Sequence[str | None], task: str) -> list[str]:
        """The user's turn for each text."""
        is_caption, prompt_for = task == "caption", self.processor.prompt_for
        return [text if is_caption and text is not None else prompt_for(task, text) for text in texts]

    def write_prompts(self, texts: Sequence[str | None], task: str) -> list[str]:
        prompts = self._prompts_for(texts, task)
        if self.processor.chat_template is None:
            return prompts
        return [self._apply_template(prompt) for prompt in prompts]

    def _apply_template(self, prompt: str) -> str:
        return self.processor.apply_chat_template(
            _turn(prompt), add_generation_prompt=True, sanitize_control_tokens=True
        )

    def prepare_to_rank(self, images: list[Image.Image], text: str | None, labels: list[dict[str, Any]]) -> Any:
        return self.prepare(images, [text], "vqa", labels)

    def prepare_candidates(self, candidates: list[str], text: str | None) -> Any:
        if text is None:
            raise ValueError("a PrismerLM needs a question that the labels answer: --question")
        is_chat = self.processor.chat_template is not None
        prompt = self.processor.prompt_for("vqa", text)
        task = self.processor.task_for(self._apply_template(prompt) if is_chat else prompt)
        return self.processor.prepare_candidates(candidates, task=task).to(self.checkpoint.device)


def load_prismer(checkpoint: Checkpoint, what: str) -> tuple[Any, Any]:
    """
    The network of a Prismer, not optimised for a CPU, and its processor.

    Args:
        checkpoint ([`Checkpoint`]): the checkpoint.
        what (`str`): what a PrismerLM cannot be, for the error message, such as `"exported"`.
    """
    reader = checkpoint.load()
    if not isinstance(reader, PrismerReader):
        raise ValueError(f"model {checkpoint.name!r} is a PrismerLM; only a Prismer can be {what}")
    return reader.load_network(optimize=False), reader.processor


def _turn(prompt: str, image: Image.Image | None = None) -> list[dict[str, Any]]:
    item = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [item, {"type": "text", "text": prompt}]}]


READERS: dict[str, type[Reader]] = {"prismer": PrismerReader, "prismer_lm": PrismerLMReader}


# ---- experts ----


def read_experts(value: str | None) -> tuple[ExpertSuite | None, list[str] | None]:
    """
    Reads `--experts`.

    Args:
        value (`str`, *optional*):
            - a suite that comes with the package, `fast`;
            - a checkpoint with experts: a folder, a Hub id or the name of a shipped one;
            - names of experts, `depth,ocr`, of the default suite; or with a suite, `fast:depth,ocr`;
            - `none`.

    Returns:
        `tuple`: the suite, `None` for the default one; and the names of the experts to use, `None` for all.

    Raises:
        ValueError: if there is no such suite, or if it lacks one of the experts.
    """
    if value is None:
        return None, None
    if value == "none":
        return None, []
    suite = _find_suite(value)
    if suite is not None:
        return suite, None
    source, _, listed = value.rpartition(":")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not source:
        return None, names
    suite = _find_suite(source)
    if suite is None:
        raise ValueError(f"--experts: there is no suite {source!r}; {accepted_suites()}")
    if unknown := [name for name in names if name not in suite]:
        raise ValueError(f"--experts: {source} has no {unknown[0]!r}; it has {', '.join(suite)}")
    return suite.only(*names), None


def read_suite(value: str, default: str) -> ExpertSuite:
    """
    The experts that `--experts` names, as a suite of their own.

    Args:
        value (`str`): as in [`read_experts`].
        default (`str`): the suite of which names alone choose experts.
    """
    suite, names = read_experts(value)
    if suite is None:
        suite = ExpertSuite.from_name(default)
    if names is None:
        return suite
    if unknown := [name for name in names if name not in suite]:
        raise ValueError(f"--experts: there is no {unknown[0]!r}; {accepted_suites()}")
    if not names:
        raise ValueError("--experts: none leaves no expert to run")
    return suite.only(*names)


def _find_suite(name: str) -> ExpertSuite | None:
    if name in SUITES:
        return ExpertSuite.from_name(name)
    is_hub_id = name.count("/") == 1 and ":" not in name and "," not in name
    if Path(name).is_dir() or name in shipped_checkpoints() or is_hub_id:
        return ExpertSuite.from_pretrained(find_checkpoint(name))
    return None


def accepted_suites() -> str:
    return (
        f"accepted are {', '.join(SUITES)}, a checkpoint with experts: a folder, a Hub id or a shipped one ("
        f"{', '.join(shipped_checkpoints())}), names of experts such as depth,ocr or fast:depth,ocr, and none"
    )
