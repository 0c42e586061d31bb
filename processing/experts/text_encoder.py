"""The text parts of CLIP and SigLIP."""

from pathlib import Path
from typing import Any

import torch


# The text part by family, the output that is its embedding, and whether it was trained on texts of one fixed length.
FAMILIES = {
    "clip": ("CLIPTextModelWithProjection", "text_embeds", False),
    "metaclip_2": ("MetaClip2TextModelWithProjection", "text_embeds", False),
    "siglip": ("SiglipTextModel", "pooler_output", True),
    "siglip2": ("Siglip2TextModel", "pooler_output", True),
}
BATCH_SIZE = 64


class TextEncoder:
    """
    A frozen text encoder of the families CLIP, MetaCLIP 2, SigLIP and SigLIP 2. Only the text part of a complete model
    is loaded.

    Attributes:
        model (`torch.nn.Module`): the text part, in evaluation mode.
        width (`int`): length of an embedding.

    Args:
        model_id (`str` or `Path`): Hub id or folder of the model, with its tokenizer.

    Raises:
        ValueError: if the model belongs to another family.
    """

    def __init__(self, model_id: str | Path):
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(model_id)
        family = config.model_type.removesuffix("_text_model")
        if family not in FAMILIES:
            raise ValueError(
                f"{model_id} is of the family {config.model_type}; accepted text encoders are {', '.join(FAMILIES)}"
            )
        name, self._output, self._is_padded = FAMILIES[family]
        if hasattr(config, "text_config"):
            if hasattr(config, "projection_dim"):
                config.text_config.projection_dim = config.projection_dim
            config = config.text_config

        class TextPart(getattr(transformers, name)):  # type: ignore[misc]
            # a complete model has a vision model, too
            _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_"]

        self.model = TextPart.from_pretrained(model_id, config=config).eval().requires_grad_(False)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model_id)
        self.width: int = getattr(config, "projection_dim", config.hidden_size)

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """
        Args:
            texts (`list[str]`): at least one.

        Returns:
            `torch.FloatTensor` of shape `(texts, width)`: their embeddings, not normalised, on the CPU.
        """
        embeddings = []
        for first in range(0, len(texts), BATCH_SIZE):
            tokens = self._tokenizer(
                texts[first : first + BATCH_SIZE],
                padding="max_length" if self._is_padded else True,
                truncation=True,
                max_length=self.model.config.max_position_embeddings,
                return_tensors="pt",
            )
            # SigLIP reads the padding
            names = ("input_ids",) if self._is_padded else ("input_ids", "attention_mask")
            outputs = self.model(**{name: tokens[name].to(self.model.device) for name in names})
            embeddings.append(getattr(outputs, self._output).float().cpu())
        return torch.cat(embeddings)
