"""Vision-language models of transformers, with a chat template or with plain prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from .arguments import CompareArguments
from .generative import GenerativeModel, batches
from .models import CannotDo, NamedImage, Query
from .prompts import CHAT, FAMILIES, PLAIN_TEXT, Prompts


class VisionLanguageModel(GenerativeModel):
    """Any model of `AutoModelForImageTextToText`."""

    kind = "vision-language"

    def __init__(self, path: str, args: CompareArguments):
        super().__init__(path, args)
        self.network = AutoModelForImageTextToText.from_pretrained(path, dtype=args.torch_dtype)
        self.network.to(args.torch_device).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.family = self.network.config.model_type
        self.is_chat = getattr(self.processor, "chat_template", None) is not None
        prompts = CHAT if self.is_chat else FAMILIES.get(self.family, PLAIN_TEXT)
        self.prompts: Prompts = prompts.changed_by(args)
        self.one_image = not self.is_chat and (self.prompts.one_image or self.family not in FAMILIES)
        # a chat template and PaliGemma end a prompt by a line of its own
        self.separator = "" if self.is_chat or self.family == "paligemma" else " "
        if self.family == "git":  # it counts positions without regard to padding
            self.max_batch_size = 1

    def prepare(self, queries: Sequence[Query]) -> BatchFeature:
        if self.is_chat:
            return self.processor.apply_chat_template(
                [self.conversation(query) for query in queries],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",  # SmolVLM's processor ignores it in `processor_kwargs`
                processor_kwargs={"padding": True},
            )
        images = [[image.open() for image in self.images_of(query)] for query in queries]
        if self.one_image and any(len(own) != 1 for own in images):
            raise CannotDo(f"a {self.family} reads one image in a prompt, and no examples")
        texts = [self.write(query) for query in queries]
        if self.family == "git":
            return self.prepare_git([image for (image,) in images], texts)
        given = [image for (image,) in images] if self.one_image else images
        inputs = self.processor(images=given, text=texts, padding=True, return_tensors="pt")
        inputs.pop("labels", None)  # PaliGemma's processor makes them always
        return inputs

    def prepare_git(self, images: list[Any], texts: list[str]) -> BatchFeature:
        """GIT continues its prompts, so that they have no end token."""
        ids = [self.tokenizer.cls_token_id, *self.tokenizer(texts[0], add_special_tokens=False)["input_ids"]]
        input_ids = torch.tensor([ids])
        pixels = self.processor.image_processor(images, return_tensors="pt")
        return BatchFeature({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels})

    def images_of(self, query: Query) -> list[NamedImage]:
        return [example.image for example in query.examples if example.image is not None] + list(query.images)

    def text_of(self, query: Query) -> str:
        return query.text if query.has_instruction and query.text is not None else self.prompts.of(query.text)

    def write(self, query: Query) -> str:
        """A prompt without a chat template. Several images have their places in the text."""
        place = "" if self.one_image else "<image>"
        shown = [
            f"{'' if example.image is None else place}{self.prompts.of(example.text)} {example.answer}\n"
            for example in query.examples
        ]
        return "".join([*shown, place * len(query.images), self.text_of(query)])

    def conversation(self, query: Query) -> list[dict[str, Any]]:
        messages = []
        for example in query.examples:
            shown = () if example.image is None else (example.image,)
            messages.append(_turn("user", shown, self.prompts.of(example.text)))
            messages.append(_turn("assistant", (), example.answer))
        return [*messages, _turn("user", query.images, self.text_of(query))]

    def embed(self, images: Sequence[NamedImage]) -> np.ndarray:
        """The mean of an image's features, which have as many tokens as the architecture makes of the image."""
        means = []
        for (image,) in batches(images, 1, "encoding"):
            pixels = self.processor.image_processor([image.open()], return_tensors="pt")
            pixels = pixels.to(self.network.device, self.network.dtype)
            with torch.inference_mode():
                if self.family == "git":
                    features = self.network.git.image_encoder(pixels["pixel_values"]).last_hidden_state
                else:
                    features = self.network.get_image_features(**pixels).pooler_output
            features = features[0] if isinstance(features, tuple | list) else features
            means.append(features.flatten(0, -2).float().mean(dim=0).cpu().numpy())
        return np.stack(means)


def _turn(role: str, images: Sequence[NamedImage], text: str) -> dict[str, Any]:
    shown = [{"type": "image", "image": image.open()} for image in images]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}
