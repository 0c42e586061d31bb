"""Runs a PrismerLM for the page, like [`Reader`] runs a Prismer. It has no panel for attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from reader import Encoding, Reader

from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor
from modeling_prismer.processing.tasks import Task


QUESTION = Task("question", max_prompt_tokens=128)


@dataclass
class Look:
    """An encoded image, and the labels that a prompt writes as words."""

    features: Any
    image: Image.Image
    labels: dict[str, Any]


class LanguageReader(Reader):
    """
    A PrismerLM, whose question is a message of its chat template, if it has one.

    Args:
        path (`str`): a checkpoint: a folder or a Hub id.
        device (`str`, *optional*): by default a GPU, if there is one.
        language (`str`, *optional*):
            Folder or Hub id of the frozen language model. By default the one that the checkpoint names.

    Raises:
        ValueError: if the checkpoint is for a vision-language model, which this page cannot show.
    """

    _attention: dict[str, Any] = {}

    def _load(self, path: str, language: str | None = None) -> None:
        self.processor = PrismerLMProcessor.from_pretrained(path, expert_device=self.device)
        dtype = torch.float32 if self.device == "cpu" else "auto"
        self.model = PrismerLMForConditionalGeneration.from_pretrained(path, language=language, dtype=dtype)
        if self.model.config.has_vision_language_model:
            raise ValueError("the page cannot show a PrismerLM in front of a vision-language model")
        self.model.to(self.device).eval()
        self.familiarity = None

    def _tasks(self) -> list[Task]:
        return [QUESTION, Task("caption", prompt=self.processor.prompt_for("caption"))]

    @torch.inference_mode()
    def _encode(self, image: Image.Image, labels: dict[str, Any]) -> Encoding:
        inputs = self.processor.process_images(image, labels, return_tensors="pt").to(self.device)
        return Encoding(Look(self.model.get_image_features(**inputs), image, labels))

    def _inputs(self, encoding: Encoding, task: Task, text: str | None) -> dict[str, Any]:
        self.prompt(task, text)  # raises an error for a text that cannot be read
        look = encoding.states
        tokens = self._tokens(task, text, image=look.image, labels=look.labels)
        return {**tokens, "encoder_outputs": look.features}

    def _tokens(
        self,
        task: Task,
        text: str | None,
        image: Image.Image | None = None,
        labels: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, torch.Tensor]:
        """The tokens of a prompt. Without an image, only those of the text."""
        text = task.prompt or self.processor.prompt_for("vqa", (text or "").strip())
        images = [] if image is None else [image]
        given = {"images": images, "expert_labels": [dict(labels)] if labels else None}
        if self.processor.chat_template is None:
            token = self.processor.image_token
            text = text.replace(token, f"{token[0]} {token[1:]}")  # a visitor's text has no images
            inputs = self.processor(text=text, **given)
        else:
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                sanitize_control_tokens=True,
                **given,
            )
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _form_of_labels(self, task: Task, inputs: dict[str, Any]) -> str:
        return self.processor.task_for(self.processor.tokenizer.decode(inputs["input_ids"][0, -1:]))

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }

    def _cross_attention(self, outputs: Any, chosen: slice) -> None:
        return None
