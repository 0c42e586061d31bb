"""CLIP, SigLIP and other models that compare images with texts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel, AutoProcessor

from .arguments import CompareArguments
from .generative import batches
from .models import Model, NamedImage


class ContrastiveModel(Model):
    """A model with an encoder for images and one for texts. A score is the cosine of their vectors."""

    kind = "contrastive"

    def __init__(self, path: str, args: CompareArguments):
        super().__init__(path, args)
        self.network = AutoModel.from_pretrained(path, dtype=args.torch_dtype).to(args.torch_device).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        # SigLIP was trained on texts of a fixed length
        is_padded = self.network.config.model_type.startswith("siglip")
        self.padding = "max_length" if is_padded else True
        self.max_length = self.network.config.text_config.max_position_embeddings

    def embed(self, images: Sequence[NamedImage]) -> np.ndarray:
        vectors = []
        for batch in batches(images, self.args.batch_size, "encoding"):
            pixels = self.processor(images=[image.open() for image in batch], return_tensors="pt")
            with torch.inference_mode():
                outputs = self.network.get_image_features(**pixels.to(self.network.device, self.network.dtype))
            vectors.append(_unit(outputs.pooler_output))
        return np.concatenate(vectors)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        vectors = []
        for batch in batches(texts, self.args.batch_size, "encoding"):
            tokens = self.processor(
                text=list(batch),
                padding=self.padding,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            with torch.inference_mode():
                outputs = self.network.get_text_features(**tokens.to(self.network.device))
            vectors.append(_unit(outputs.pooler_output))
        return np.concatenate(vectors)

    def match(self, images: Sequence[NamedImage], texts: Sequence[str]) -> np.ndarray:
        return self.embed(images) @ self.embed_texts(texts).T

    def classify(self, images: Sequence[NamedImage], names: Sequence[str]) -> np.ndarray:
        return self.match(images, [self.args.class_prompt.replace("{}", name) for name in names])


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return functional.normalize(vectors.float(), dim=-1).cpu().numpy()
