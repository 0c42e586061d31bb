"""Generation with a PrismerLM: images are encoded once, and assistants and drafts are told about them."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerationMixin

from .cache import CACHE_NAME
from .configuration_prismer_lm import PrismerLMConfig
from .image_features import pad_types, see_images


_IMAGE_KWARGS = ("encoder_outputs", "mm_token_type_ids")


class PrismerLMGenerationMixin(GenerationMixin):
    """The `generate` of transformers, for images and the experts' tensors."""

    if TYPE_CHECKING:
        config: PrismerLMConfig
        model: Any
        language_model: Any
        get_image_features: Any

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in every model of transformers. Images are encoded once for the whole generation, and shared by all beams
        and by all rows of text about them.

        Args:
            inputs (`torch.LongTensor` of shape `(rows, length)`, *optional*): the prompts, also as `input_ids`.
            args, kwargs:
                The inputs of `forward`, and those of `generate`.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        image_inputs = self.model.pop_image_inputs(kwargs)
        images = kwargs.pop("encoder_outputs", None)
        if image_inputs:
            if images is not None:
                raise ValueError(f"give {', '.join(image_inputs)} or encoder_outputs, not both")
            images = self.get_image_features(**image_inputs)
        is_vlm = self.config.has_vision_language_model  # its own `generate` prepares its own inputs
        if is_vlm:
            self.language_model.generation_config = self.generation_config
        if images is None:
            if not is_vlm:
                return super().generate(input_ids, *args, **kwargs)
            if kwargs.get(CACHE_NAME) is None:
                self.model.check_no_placeholders(input_ids)
            return self.language_model.generate(input_ids, *args, **kwargs)

        inputs_embeds = kwargs.get("inputs_embeds")
        mask = self.model.placeholders(input_ids, inputs_embeds, kwargs.get("mm_token_type_ids"))
        images = self.model.ask(images.copy(), input_ids, inputs_embeds, mask, kwargs.get("attention_mask"))
        if kwargs.get(CACHE_NAME) is not None and self.config.fusion == "cross_attention":  # it has the prompt already
            images.visible = see_images(images.pooler_output, self.model.assign(images, mask), mask)
        prompts = input_ids
        if input_ids is not None:
            input_ids = self.model.without_placeholders(input_ids, mask)
        if is_vlm:
            with self.model.running(images, mask):
                generated = self.language_model.generate(input_ids, *args, **kwargs)
        else:
            images.inputs = image_inputs
            kwargs |= {"encoder_outputs": images, "mm_token_type_ids": mask.long()}
            generated = super().generate(input_ids, *args, **kwargs)
        if prompts is not None:  # as they were given, with placeholders
            sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
            repeats = sequences.shape[0] // prompts.shape[0]
            sequences[:, : prompts.shape[1]] = prompts.repeat_interleave(repeats, dim=0).to(sequences)
        return generated

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads its signature
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Assisted decoding adds drafts to `input_ids` alone.
        if kwargs.get("mm_token_type_ids") is not None:
            kwargs["mm_token_type_ids"] = pad_types(kwargs["mm_token_type_ids"], input_ids.shape[1])
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _get_candidate_generator(self, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # An assistant has other encoders, so it encodes the images itself, once. An assistant for text gets none.
        text_kwargs = {key: value for key, value in model_kwargs.items() if key not in _IMAGE_KWARGS}
        generator = super()._get_candidate_generator(generation_config, model_kwargs=text_kwargs, **kwargs)
        images, assistant = model_kwargs.get("encoder_outputs"), kwargs.get("assistant_model")
        if images is not None and assistant is not None and assistant.config.model_type == self.config.model_type:
            if not images.inputs:
                raise ValueError("assisted decoding needs the image inputs, not encoder_outputs")
            inputs = {name: tensor.to(assistant.device) for name, tensor in images.inputs.items()}
            generator.assistant_kwargs |= {
                "encoder_outputs": assistant.get_image_features(**inputs),
                "mm_token_type_ids": model_kwargs["mm_token_type_ids"].to(assistant.device),
            }
        return generator
