"""Generation: images are encoded once, and what transformers cannot know about prompts and assistants."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.generation import GenerationMixin

from .cache import name_cache_for_peft
from .configuration_prismer import PrismerConfig
from .expert_stems import pop_expert_inputs


class PrismerGenerationMixin(GenerationMixin):
    """The `generate` of transformers, for images and the experts' tensors."""

    if TYPE_CHECKING:
        config: PrismerConfig
        model: nn.Module
        device: torch.device
        get_image_features: Any

    @functools.wraps(GenerationMixin.generate)
    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        # Encodes the images once. The `mm_encoder_outputs` of transformers cannot: it takes only tensors that the
        # signature of `get_image_features` names, not those of your own experts, and it finds the images of each beam
        # by placeholder tokens, which Prismer's prompts do not have. Here all beams share one output object.
        images = pop_expert_inputs(kwargs, self.config.expert_names)
        pixel_values, expert_mask = kwargs.pop("pixel_values", None), kwargs.pop("expert_mask", None)
        encoder_outputs = kwargs.get("encoder_outputs")
        self.model.check_inputs(pixel_values, images, encoder_outputs)
        if pixel_values is not None:
            images |= {"pixel_values": pixel_values, "expert_mask": expert_mask}
            kwargs["encoder_outputs"] = self.get_image_features(**images, return_dict=True)
            kwargs["encoder_outputs"].images = images  # for an assistant, which encodes them itself
        elif isinstance(encoder_outputs, torch.Tensor):  # a tensor would be repeated for every beam
            kwargs["encoder_outputs"] = (encoder_outputs,)

        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        labels = kwargs.pop("labels", None)
        if kwargs.get("inputs_embeds") is None:
            if inputs is None and pixel_values is not None:
                inputs = torch.full((len(pixel_values), 1), self.generation_config.bos_token_id, device=self.device)
            if inputs is not None and labels is not None:
                inputs, kwargs["attention_mask"] = self.remove_answers(inputs, kwargs.get("attention_mask"), labels)
        self.check_padding(inputs, kwargs.get("attention_mask"))
        return super().generate(inputs, *args, **kwargs)

    def check_padding(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        """Raises a `ValueError` if prompts are padded on the right, where the answer is to follow."""
        if attention_mask is None and input_ids is not None:
            attention_mask = input_ids.ne(self.config.pad_token_id)
        if attention_mask is not None and attention_mask.ndim == 2 and bool((attention_mask[:, -1] == 0).any()):
            raise ValueError(
                "generate needs prompts padded on the left (padding_side='left'): this attention_mask ends in padding"
            )

    def remove_answers(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts without the tokens to learn. Seq2SeqTrainer gives both to `generate`."""
        is_prompt = input_ids.ne(self.config.pad_token_id) if attention_mask is None else attention_mask.bool()
        is_prompt = is_prompt & (labels == -100)
        order = is_prompt.long().argsort(dim=-1, stable=True)  # prompts move to the right
        input_ids = input_ids.masked_fill(~is_prompt, self.config.pad_token_id).gather(1, order)
        return input_ids, is_prompt.gather(1, order).long()

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads its signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # peft's prompt learning puts its own method in place of this one while it generates, and calls this one.
        called_by_peft = getattr(self.prepare_inputs_for_generation, "__self__", self) is not self
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return name_cache_for_peft(inputs) if called_by_peft else inputs

    def _get_candidate_generator(self, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # An assistant has another encoder, so it encodes the images itself, once. An assistant for text gets none.
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit needs a model that was trained for it, which Prismer is not")
        text_kwargs = {key: value for key, value in model_kwargs.items() if key != "encoder_outputs"}
        generator = super()._get_candidate_generator(generation_config, model_kwargs=text_kwargs, **kwargs)
        assistant_model: Any = kwargs.get("assistant_model")
        encoder_outputs = model_kwargs.get("encoder_outputs")
        if encoder_outputs is not None and hasattr(assistant_model, "get_image_features"):
            images = getattr(encoder_outputs, "images", None)
            if images is None:
                raise ValueError(
                    "assisted decoding needs pixel_values and the experts' tensors, not encoder_outputs: the "
                    "assistant encodes the images by itself"
                )
            images = {key: tensor.to(assistant_model.device) for key, tensor in images.items() if tensor is not None}
            generator.assistant_kwargs["encoder_outputs"] = assistant_model.get_image_features(**images)
        return generator
