"""Processor of PrismerLM: frozen experts, vision encoders' settings and the language model's tokenizer in one call."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AddedToken, AutoProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import TensorType, logging

from .backbone_parts import (
    as_list,
    load_text_processor,
    new_config,
    read_encoders,
    read_prismer_suite,
    read_suite,
    with_class_names,
)
from .chat import CALL_NAMES, as_batch, as_text, assistant_spans, read_messages, render, with_marker
from .expert_labels import read_experts
from .expert_words import POSITIONS, write_experts
from .experts_processor import ExpertsProcessor, Shared
from .image_processing_prismer import PrismerImageProcessor
from .prompts import (
    NOT_LEARNED,
    PADDING,
    Prompt,
    Row,
    expand,
    flatten_images,
    lay_out,
    pad_rows,
    take_marks_out,
    texts_of_images,
)


if TYPE_CHECKING:
    from typing import Self

logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"
EXPERTS_TOKEN = "<experts>"  # in front of a vision-language model, whose image tokens are its own
FUSIONS = ("prefix", "cross_attention")
EXPERTS_AS = ("tokens", "words", "both")
DEFAULT_PROMPTS = {"caption": "Describe the image in one sentence.", "vqa": "{}"}
NO_LIMIT = 10**9  # tokenizers without a limit have a larger one


class PrismerLMProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {"text_kwargs": {"padding": True}, "common_kwargs": {"return_tensors": "pt"}}


class PrismerLMProcessor(ExpertsProcessor):
    r"""
    Turns images and text into the inputs of [`PrismerLMForConditionalGeneration`]. It runs the frozen experts,
    prepares the images for each vision encoder, and puts placeholders of the images, or the experts' words, into the
    prompt. [`PrismerLMProcessor.from_backbones`] makes one from the parts of a model.

    The whole image is resized to the square that an encoder takes. It is not cropped, not even if the encoder's own
    image processor crops it: the experts' maps must lie over the image.

    Args:
        image_processor ([`PrismerImageProcessor`]):
            Prepares the experts' maps, and the images for the first vision encoder.
        tokenizer ([`PreTrainedTokenizerBase`]):
            That of the language model. It gets the token `image_token`, and `eos_token` for padding if it has no
            `pad_token`. The embeddings of the language model need no new row.
        experts ([`ExpertSuite`], `list[Expert]`, `str` or `dict`, *optional*):
            The experts that run live; see [`PrismerProcessor`].
        chat_template (`str`, *optional*): a chat template; that of the tokenizer unless given.
        vlm_processor ([`ProcessorMixin`], *optional*):
            The processor of a vision-language model. It prepares text and images as ever; the experts are added.
        image_token (`str`, *optional*):
            The text that stands for an image: `"<image>"`, or `"<experts>"` in front of a vision-language model.
        image_seq_length (`int`, *optional*, defaults to 64):
            Placeholders of one image in the prompt, `config.image_seq_length`. 0 if the experts come as words alone.
        fusion (`str`, *optional*, defaults to `"prefix"`): `"prefix"` or `"cross_attention"`, as in the model.
        experts_as (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"`: the network reads the experts' maps. `"words"`: the prompt has what they found as text.
            `"both"`.
        encoders (`list[dict]`, *optional*, defaults to `[{}]`):
            For each vision encoder the settings that differ from those of `image_processor`; `[]` without encoders.
        max_word_tokens (`int`, *optional*, defaults to 128): limit for the words about one image, in tokens.
        word_positions (`str`, *optional*, defaults to `"names"`):
            `"names"` such as `top left`, or `"boxes"`, in percent of the image's sides.
        prompts (`dict[str, str]`, *optional*):
            The prompts with which the model was trained, by task: `"caption"`, and `"vqa"` with `{}` for the question.
            See [`PrismerLMProcessor.prompt_for`].

    Raises:
        ValueError: if the tokenizer has neither `pad_token` nor `eos_token`, or a setting is not accepted.

    Example:

    ```python
    >>> from transformers import AutoTokenizer, SiglipVisionConfig
    >>> from modeling_prismer import PrismerLMProcessor

    >>> lm_processor = PrismerLMProcessor.from_backbones(
    ...     language=AutoTokenizer.from_pretrained(path),  # or "HuggingFaceTB/SmolLM2-135M-Instruct"
    ...     vision=SiglipVisionConfig(image_size=64),  # or ["google/siglip2-base-patch16-224", …]
    ...     experts="offline",
    ...     experts_as="both",
    ... )
    >>> inputs = lm_processor(image, "What shape is it?")
    >>> {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    {'input_ids': (1, 108), 'attention_mask': (1, 108), 'pixel_values': (1, 3, 64, 64),
     'edge_values': (1, 1, 224, 224), 'ocr_ids': (1, 224, 224), 'ocr_features': (1, 128, 64), 'expert_mask': (1, 2)}
    >>> lm_processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    'Text: "▲" (center).\nWhat shape is it?'
    ```
    """

    valid_processor_kwargs = PrismerLMProcessorKwargs
    _saved_folders = (*ExpertsProcessor._saved_folders, "vlm_processor")
    _vlm_processor: Shared

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        experts: Any = None,
        chat_template: str | None = None,
        vlm_processor: Any = None,
        image_token: str | None = None,
        image_seq_length: int = 64,
        fusion: str = "prefix",
        experts_as: str = "tokens",
        encoders: list[dict[str, Any]] | None = None,
        max_word_tokens: int = 128,
        word_positions: str = "names",
        prompts: dict[str, str] | None = None,
    ):
        if chat_template is None:
            chat_template = getattr(vlm_processor, "chat_template", None) or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        for name, value, accepted in (
            ("fusion", fusion, FUSIONS),
            ("experts_as", experts_as, EXPERTS_AS),
            ("word_positions", word_positions, POSITIONS),
        ):
            if value not in accepted:
                raise ValueError(f"{name}={value!r}; accepted are {', '.join(map(repr, accepted))}")
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has neither pad_token nor eos_token; one is needed for padding")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # as `generate` needs it; a pipeline pads its batches by that
        self.image_token = image_token or (IMAGE_TOKEN if vlm_processor is None else EXPERTS_TOKEN)
        if self.image_token not in tokenizer.added_tokens_encoder:
            tokenizer.add_tokens([AddedToken(self.image_token, special=True, normalized=False)], special_tokens=True)
        self._vlm_processor = Shared(vlm_processor)
        if isinstance(vlm_processor, ProcessorMixin):
            vlm_processor.tokenizer = tokenizer
        self.image_seq_length = image_seq_length
        self.fusion = fusion
        self.experts_as = experts_as
        self.encoders = [{}] if encoders is None else encoders
        self.max_word_tokens = max_word_tokens
        self.word_positions = word_positions
        self.prompts = prompts
        self.experts = experts

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder, `config.image_token_id`. It may lie beyond the language model's vocabulary."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def vlm_processor(self) -> Any:
        """The processor of the vision-language model, or `None`."""
        return None if isinstance(self._vlm_processor.value, str) else self._vlm_processor.value

    @property
    def class_names(self) -> dict[str, Sequence[str]]:
        """From an expert's name to the names of its classes, as far as they are known."""
        described = self.image_processor.experts
        known = {expert["name"]: expert["class_names"] for expert in described if expert.get("class_names")}
        unknown = [expert["name"] for expert in described if expert.get("num_classes") and expert["name"] not in known]
        return {**getattr(self.experts, "class_names", {}), **known} if unknown else known

    @property
    def model_input_names(self) -> list[str]:
        images = [name for name in self.image_processor.model_input_names if name != "pixel_values"]
        if self.experts_as == "words":
            images = []
        number = len(self.encoders)
        pixels = ["pixel_values", *(f"pixel_values_{index}" for index in range(1, number))][:number]
        names = getattr(self.vlm_processor, "model_input_names", pixels)
        return list(dict.fromkeys(["input_ids", "attention_mask", *names, *images]))

    # ---- from backbones ----

    @classmethod
    def from_backbones(
        cls,
        language: Any = None,
        vision: Any = None,
        experts: Any = None,
        fusion: str = "prefix",
        experts_as: str = "tokens",
        experts_config: dict[str, Any] | None = None,
        config: Any = None,
        max_word_tokens: int = 128,
        word_positions: str = "names",
        **kwargs: Any,
    ) -> "Self":
        """
        The processor for a model from [`PrismerLMForConditionalGeneration.from_backbones`].

        Args:
            language (`str`, `PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
                The language model, or the vision-language model: a Hub id or folder, or its tokenizer or processor. By
                default that of `config`.
            vision (`str`, `PreTrainedModel`, `ImageProcessingMixin`, `dict` or a list of them, *optional*):
                The vision encoders: Hub ids, folders, models or their configurations. With a `config`, also image
                processors, or settings such as `{"size": 224}`. By default those of `config`.
            experts (`ExpertSuite`, `list[Expert]`, `str` or `list[dict]`, *optional*):
                The experts that run live, such as `"offline"`. A list of descriptions if labels come as
                `expert_labels`. By default those of the Prismer whose encoder is `vision`.
            fusion, experts_as, experts_config: as for the model. `config` has priority.
            config ([`PrismerLMConfig`], *optional*):
                `model.config`, so that the numbers of placeholders and the names of the experts agree. Without it, it
                is made from the other arguments.
            max_word_tokens, word_positions: as in [`PrismerLMProcessor`].
            kwargs: further fields of [`PrismerLMConfig`], such as `grid_size`.

        Raises:
            ValueError: if the placeholder has another id in `config`, or if parts are missing.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_prismer import PrismerLMProcessor

        >>> tokenizer = AutoTokenizer.from_pretrained(path)  # of your language model
        >>> lm_processor = PrismerLMProcessor.from_backbones(tokenizer, experts="offline")  # no encoder
        >>> lm_processor.image_seq_length, lm_processor.image_token
        (64, '<image>')
        ```
        """
        suite, descriptions = read_suite(experts)
        is_given = config is not None
        if not is_given:
            kwargs.update(fusion=fusion, experts_config=experts_config)
            config = new_config(language, vision, descriptions, experts_as, **kwargs)
        elif kwargs:
            raise ValueError(f"config has all fields of the model; {', '.join(kwargs)} cannot be given beside it")
        language = language or (config.backbones or {}).get("language", {}).get("id")
        tokenizer, vlm_processor = load_text_processor(language, config.has_vision_language_model)
        settings = read_encoders(vision, config)
        first = settings[0] if settings else {}
        expert_size = 224 if config.experts_config is None else config.experts_config.image_size
        if config.has_prismer_encoder and experts is None:
            suite = read_prismer_suite(vision, config)
        processor = cls(
            PrismerImageProcessor(
                experts=with_class_names(config.experts or descriptions, suite),
                **{"expert_size": expert_size, **first},
            ),
            tokenizer,
            experts=suite,
            vlm_processor=vlm_processor,
            image_seq_length=config.image_seq_length if config.num_features else 0,
            fusion=config.fusion,
            experts_as=config.experts_as,
            encoders=[{name: own[name] for name in own if own[name] != first.get(name)} for own in settings],
            max_word_tokens=max_word_tokens,
            word_positions=word_positions,
        )
        if is_given and config.num_features and config.image_token_id != processor.image_token_id:
            raise ValueError(
                f"config.image_token_id is {config.image_token_id}, but the tokenizer gives {processor.image_token} "
                f"the id {processor.image_token_id}; set model.config.image_token_id = {processor.image_token_id} "
                "before you train the model"
            )
        longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if longest and tokenizer.model_max_length > NO_LIMIT and (is_given or isinstance(language, str)):
            tokenizer.model_max_length = longest
        return processor

    # ---- calls ----

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | list[list[str]] | None = None,
        expert_labels: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        suffix: str | list[str] | list[list[str]] | None = None,
        experts: list[str] | str | None = None,
        task: str | None = None,
        vlm_kwargs: dict[str, Any] | None = None,
        budget_ms: float | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepares the inputs of `forward` and `generate`.

        Args:
            images:
                One or many images: paths, URLs, PIL images, arrays, tensors; see [`load_images`]. A list of lists has
                the images of each prompt. Without images, the text runs alone.
            text (`str`, `list[str]` or `list[list[str]]`, *optional*):
                The prompts. `<image>` stands for an image, so that a prompt can have several, with text in between.
                Without it, a prompt is about one image, or those of its list, which come first. One string is used for
                every image. A list of lists has the prompts of each image: the model encodes an image once for all of
                them.
            expert_labels (`dict` or `list[dict]`, *optional*):
                For each image a dict from an expert's name to its label; see [`PrismerProcessor.__call__`].
            suffix (`str`, `list[str]` or `list[list[str]]`, *optional*):
                For training: the text that follows each prompt, in the layout of `text`. `labels` come with it: the
                suffix and the tokenizer's `eos_token` are learned.
            experts (`list[str]` or `"auto"`, *optional*):
                Names of the experts to use in this call; `[]` means none. The others are masked out. With `"auto"`,
                `processor.router` chooses for each image from its texts.
            task (`str`, *optional*):
                `"text"` puts a space before the suffix, `"chat"` does not. By default there is one unless the prompt
                ends with white space or with a special token.
            vlm_kwargs (`dict`, *optional*): arguments for the processor of the vision-language model.
            budget_ms (`float`, *optional*): for `experts="auto"`; see [`PrismerProcessor.__call__`].
            kwargs:
                `return_tensors` (defaults to `"pt"`), `padding` (`True`), `padding_side` (`"left"`, with `suffix`
                `"right"`), `pad_to_multiple_of`, `max_length` (tokens of a row with its placeholders; by default
                the tokenizer's `model_max_length`), `truncation` (cuts longer rows at the end, else they are an
                error), `add_special_tokens` (`True`), and what the image processor takes.

        Returns:
            [`BatchFeature`] with

            - `input_ids`, `attention_mask` (rows, length) int64;
            - `labels` (rows, length) int64, with `suffix`: -100 where nothing is learned;
            - `pixel_values`, and `pixel_values_1`, … for further vision encoders, (images, 3, height, width) float32;
            - the experts' tensors and `expert_mask`, with one row for each image; see
              [`PrismerImageProcessor.preprocess`];
            - what the processor of a vision-language model returns.

        Raises:
            ValueError: if images and prompts do not fit together, a text is too long, an expert is unknown, and as the
                image processor.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_prismer import PrismerLMProcessor

        >>> tokenizer = AutoTokenizer.from_pretrained(path)  # of your language model
        >>> lm_processor = PrismerLMProcessor.from_backbones(tokenizer, experts="offline")
        >>> few_shot = "<image>It is a circle. <image>It is a"
        >>> inputs = lm_processor([image, image], few_shot, experts=["edge"])
        >>> inputs["input_ids"].shape, inputs["edge_values"].shape
        (torch.Size([1, 141]), torch.Size([2, 1, 224, 224]))
        >>> inputs = lm_processor(image, [["Is it red?", "What shape is it?"]], suffix=[["no", "triangle"]])
        >>> inputs["input_ids"].shape, inputs["edge_values"].shape  # two rows, one image
        (torch.Size([2, 75]), torch.Size([1, 1, 224, 224]))
        ```
        """
        merged = self._merge_kwargs(**kwargs)
        images, groups = flatten_images(images)
        images, labels = self._open(images, expert_labels, merged["images_kwargs"])
        prompts = lay_out(text, suffix, len(images), groups, self.image_token, self.fusion)
        rows, tensors = self.encode(
            prompts,
            images,
            labels,
            experts,
            task=task,
            vlm_kwargs=vlm_kwargs,
            budget_ms=budget_ms,
            images_kwargs=merged["images_kwargs"],
            **merged["text_kwargs"],
        )
        return self.pad(rows, tensors, with_labels=suffix is not None, **merged["text_kwargs"])

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | TensorType | None = "auto",
        return_dict: bool = False,
        images: Any = None,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        The text of a conversation by the chat template of the language model, or its tensors.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                One or many conversations. A content is a text or a list of items, `{"type": "text", "text": …}` and
                `{"type": "image", "image": …}` (or `url`, `path`, `base64`). A language model's template gets
                `<image>` for an image, which also stands for one in a content that is a text.
            chat_template (`str`, *optional*): a template, or the name of one.
            tools, documents, add_generation_prompt, continue_final_message: as in every processor of transformers.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`):
                Whether to add `assistant_masks`: 1 at the tokens of the assistant's turns. The template needs no
                `{% generation %}` markers.
            tokenize (`bool`, *optional*, defaults to `False`): whether to return tensors instead of text.
            return_tensors (`str`, *optional*): `"pt"` (the default), `"np"`, or `None`.
            return_dict (`bool`, *optional*, defaults to `False`):
                Whether to return all inputs of the model, in place of `input_ids` alone.
            images (`list` or `list[list]`, *optional*):
                The images of items that have none: of the conversation, or for each of many conversations.
            processor_kwargs (`dict`, *optional*):
                Arguments of [`PrismerLMProcessor.__call__`], such as `expert_labels`, `experts` or `padding`.
            sanitize_control_tokens (`bool`, *optional*, defaults to `False`):
                Whether to break up control tokens in the contents, such as `<|im_end|>`, by a space. Placeholders of
                images are always broken up in a content that is a list.
            kwargs: variables of the template; also `processor_kwargs`.

        Returns:
            `str`, `list[str]`, tensors, or [`BatchFeature`].

        Raises:
            ValueError: if there is no template, or the images do not fit the conversation.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_prismer import PrismerLMProcessor

        >>> tokenizer = AutoTokenizer.from_pretrained(path)  # of your language model
        >>> lm_processor = PrismerLMProcessor.from_backbones(tokenizer, experts="offline")
        >>> lm_processor.chat_template = (
        ...     "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
        ...     "{% if add_generation_prompt %}assistant: {% endif %}"
        ... )
        >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "What shape is it?"}]
        >>> messages = [{"role": "user", "content": content}]
        >>> lm_processor.apply_chat_template(messages, add_generation_prompt=True)
        'user: <image>What shape is it?</s>assistant: '
        >>> inputs = lm_processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        >>> list(inputs)
        ['input_ids', 'attention_mask', 'edge_values', 'ocr_ids', 'ocr_features', 'expert_mask']
        ```
        """
        call_kwargs = {name: kwargs.pop(name) for name in CALL_NAMES.intersection(kwargs)} | (processor_kwargs or {})
        if images is None:
            images = call_kwargs.pop("images", None)
        if return_tensors != "auto":
            call_kwargs["return_tensors"] = return_tensors
        if return_assistant_tokens_mask and (add_generation_prompt or continue_final_message):
            raise ValueError(
                "return_assistant_tokens_mask is for finished conversations, without add_generation_prompt and "
                "continue_final_message"
            )
        kwargs.update(tools=tools, documents=documents)
        if not return_assistant_tokens_mask:
            kwargs.update(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        conversations, is_batch = as_batch(conversation)
        prompts, images = self.read_conversations(
            conversations,
            images if images is None or is_batch else [images],
            self._resolve_chat_template(chat_template),
            find_turns=return_assistant_tokens_mask,
            sanitize_control_tokens=sanitize_control_tokens,
            **kwargs,
        )
        texts = ["".join(prompt.pieces) for prompt in prompts]
        if not tokenize:
            return texts if is_batch else texts[0]

        if missing := sum(image is None for image in images):
            raise ValueError(
                f"{missing} of {len(images)} images of the conversation are missing: give {{'type': 'image', "
                "'image': …}, or images=…"
            )
        bos_token = self.tokenizer.bos_token
        if self.vlm_processor is None or (bos_token is not None and texts[0].startswith(bos_token)):
            call_kwargs["add_special_tokens"] = False  # the template has written them
        expert_labels = call_kwargs.pop("expert_labels", None)
        own_kwargs = {name: call_kwargs.pop(name, None) for name in ("experts", "vlm_kwargs", "budget_ms")}
        merged = self._merge_kwargs(**call_kwargs)
        opened, labels = self._open(images, expert_labels, merged["images_kwargs"])
        rows, tensors = self.encode(
            prompts, opened, labels, **own_kwargs, images_kwargs=merged["images_kwargs"], **merged["text_kwargs"]
        )
        inputs = self.pad(rows, tensors, with_mask=return_assistant_tokens_mask, **merged["text_kwargs"])
        return inputs if return_dict else inputs["input_ids"]

    def prepare_conversations(self, conversation: Sequence[Any], images: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Conversations for training: the assistant's turns are learned, with the token that ends each of them.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                One or many; see [`PrismerLMProcessor.apply_chat_template`]. Messages of LLaVA's files,
                `{"from": "human", "value": "<image>…"}`, are read as well.
            images (`list` or `list[list]`, *optional*):
                The images of the conversation, or of each of many. If it has no places for them, they come before the
                first message of the user.
            kwargs: as in [`PrismerLMProcessor.apply_chat_template`] and [`PrismerLMProcessor.__call__`].

        Returns:
            [`BatchFeature`] as from [`PrismerLMProcessor.__call__`], with `labels`; padded on the right.

        Raises:
            ValueError: if the images do not fit, or if no turn of an assistant is found.
        """
        kwargs.setdefault("padding_side", "right")
        inputs = self.apply_chat_template(
            conversation, images=images, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
        )
        mask, ids = inputs.pop("assistant_masks"), inputs["input_ids"]
        for number, learned in enumerate(mask):
            if not learned.any():
                raise ValueError(f"conversation {number} has no turn of an assistant, or max_length cuts it off")
        where = torch.where if isinstance(ids, torch.Tensor) else np.where
        inputs["labels"] = where(mask == 1, ids, NOT_LEARNED)
        return inputs

    def read_conversations(
        self,
        conversations: Sequence[Any],
        images: Any = None,
        template: str | None = None,
        find_turns: bool = True,
        sanitize_control_tokens: bool = False,
        **variables: Any,
    ) -> tuple[list[Prompt], list[Any]]:
        """
        Conversations as prompts for [`PrismerLMProcessor.encode`], and their images one after the other.

        Args:
            conversations (`list[list[dict]]`): the messages of each.
            images (`list`, *optional*): for each conversation the images of items that have none.
            template (`str`, *optional*): a chat template; the processor's own unless given.
            find_turns (`bool`, *optional*, defaults to `True`): whether the assistant's turns are learned.
            sanitize_control_tokens (`bool`, *optional*, defaults to `False`): see `apply_chat_template`.
            variables: those of the template.
        """
        images = [None] * len(conversations) if images is None else as_list(images)
        if len(images) != len(conversations):
            raise ValueError(
                f"images has {len(images)} entries for {len(conversations)} conversations; one list for each is needed"
            )
        template = template or self._resolve_chat_template(None)
        controls = self._control_pattern
        broken_up = controls if sanitize_control_tokens else re.compile(re.escape(self.image_token))
        clean = partial(self._break_up, pattern=broken_up)
        for_template = as_text if self.vlm_processor is None else with_marker
        variables = {**self.tokenizer.special_tokens_map, **variables}
        prompts: list[Prompt] = []
        flat_images: list[Any] = []
        for messages, own in zip(conversations, images):
            messages, found = read_messages(messages, None if own is None else as_list(own))
            messages = for_template(messages, self.image_token, clean)
            if find_turns:
                text, spans = assistant_spans(messages, template, controls, **variables)
            else:
                text, spans = render(messages, template, **variables), []
            ends = [0, *(end for span in spans for end in span), len(text)]
            numbers = range(len(flat_images), len(flat_images) + len(found))
            prompts.append(Prompt([text[start:end] for start, end in zip(ends, ends[1:])], list(numbers)))
            flat_images += found
        return prompts, flat_images

    # ---- images, texts and words ----

    def _image_inputs(self, images: list[Image.Image], labels: list[dict[str, Any]], **kwargs: Any) -> BatchFeature:
        for_first: dict[str, Any] = {"experts": []} if self.experts_as == "words" else {}
        encoders = self.encoders or [{}]
        data = super()._image_inputs(images, labels, **{**kwargs, **encoders[0], **for_first})
        for number, settings in enumerate(encoders[1:], start=1):
            none: list[dict[str, Any]] = [{} for _ in images]
            more = super()._image_inputs(images, none, **{**kwargs, **settings, "experts": []})
            data[f"pixel_values_{number}"] = more["pixel_values"]
        if not self.encoders:
            del data["pixel_values"]
        return data

    def write_experts(self, labels: list[dict[str, Any]]) -> list[str]:
        """
        Writes the experts' labels as text, which `experts_as="words"` puts into the prompt.

        Args:
            labels (`list[dict]`): for each image the labels, from [`PrismerLMProcessor.run_experts`].

        Returns:
            `list[str]`: one text for each image, of at most `max_word_tokens` tokens. Dense maps, experts whose
            classes have no names, and missing experts are not written. Control tokens in words that were read are
            broken up by a space: `<|im_end|>` becomes `< |im_end|>`.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_prismer import PrismerLMProcessor

        >>> tokenizer = AutoTokenizer.from_pretrained(path)  # of your language model
        >>> lm_processor = PrismerLMProcessor.from_backbones(tokenizer, experts="offline")
        >>> lm_processor.write_experts(lm_processor.run_experts(image))
        ['Text: "▲" (center).']
        ```
        """
        experts, names = read_experts(self.image_processor.experts), self.class_names
        clean = partial(self._break_up, pattern=self._control_pattern)
        return [
            write_experts(
                own,
                experts,
                names,
                self.max_word_tokens,
                lambda text: len(self.tokenizer(text, add_special_tokens=False)["input_ids"]),
                self.word_positions,
                clean,
            )
            for own in labels
        ]

    @property
    def _control_pattern(self) -> re.Pattern[str] | None:
        """Matches the tokens that a text from elsewhere must not contain."""
        tokens = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if len(token.content) > 1 and (token.special or token.content[0] in "<[")
        ]
        tokens.sort(key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def _break_up(self, text: str, pattern: re.Pattern[str] | None) -> str:
        """The text with a space in each token that the pattern matches."""
        while pattern and pattern.search(text):
            text = pattern.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)
        return text

    def _open(
        self, images: Any, expert_labels: Any, settings: dict[str, Any]
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        if images is None or (isinstance(images, list | tuple) and not images):
            if expert_labels:
                raise ValueError("expert_labels is given without images")
            return [], []
        return super()._open(images, expert_labels, settings)

    # ---- tokens ----

    def encode(
        self,
        prompts: list[Prompt],
        images: list[Image.Image],
        labels: list[dict[str, Any]],
        experts: list[str] | str | None = None,
        task: str | None = None,
        vlm_kwargs: dict[str, Any] | None = None,
        budget_ms: float | None = None,
        images_kwargs: dict[str, Any] | None = None,
        **text_kwargs: Any,
    ) -> tuple[list[Row], dict[str, Any]]:
        """
        Rows of tokens before they are padded, and the tensors of the images. [`DataCollatorForPrismerLM`] packs them.

        Args:
            prompts (`list[Prompt]`): the texts.
            images (`list[PIL.Image.Image]`): opened images.
            labels (`list[dict]`): their given labels; live experts run for the others.

        Returns:
            `tuple[list[dict], dict]`: for each prompt `input_ids` and what goes with them, and `learned`: 1 at the
            tokens to learn.
        """
        tokenize = partial(self._tokenize, prompts, images, task=task, vlm_kwargs=vlm_kwargs, **text_kwargs)
        if self.experts_as == "tokens":  # texts first: a mistake there is found before the experts run
            rows, tensors = tokenize(words=[""] * len(images))
        if images:
            texts = texts_of_images(prompts, len(images), self.image_token)
            labels = self._run_experts(images, labels, *self._choose_experts(images, experts, texts, budget_ms))
        if self.experts_as != "tokens":
            rows, tensors = tokenize(words=[text and f"{text}\n" for text in self.write_experts(labels)])
        if images:
            tensors.update(self._image_inputs(images, labels, **(images_kwargs or {})))
            if experts == "auto":
                self.without_missing(tensors)
        return rows, tensors

    def _tokenize(
        self,
        prompts: list[Prompt],
        images: list[Image.Image],
        words: list[str],
        task: str | None,
        vlm_kwargs: dict[str, Any] | None,
        add_special_tokens: bool = True,
        max_length: int | None = None,
        truncation: bool | str | None = None,
        **_: Any,
    ) -> tuple[list[Row], dict[str, Any]]:
        token, each = self.image_token, self.image_seq_length
        texts, marks = zip(*(expand(prompt, words, token, each) for prompt in prompts))
        tensors: dict[str, Any] = {}
        if self.vlm_processor is None:
            rows = [
                {"input_ids": ids, "attention_mask": [1] * len(ids)}
                for ids in self.tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
            ]
        else:
            own_images = [[images[number] for number in prompt.images] for prompt in prompts]
            tensors = dict(
                self.vlm_processor(
                    text=list(texts),
                    images=own_images if images else None,
                    add_special_tokens=add_special_tokens,
                    padding=True,
                    return_tensors="pt",
                    **(vlm_kwargs or {}),
                )
            )
            text_tensors = {name: tensors.pop(name) for name in ("input_ids", *PADDING) if name in tensors}
            text_tensors.pop("labels", None)
            masks = text_tensors["attention_mask"].bool()
            rows = [
                {name: tensor[number][mask].tolist() for name, tensor in text_tensors.items()}
                for number, mask in enumerate(masks)
            ]
        rows = [take_marks_out(row, own, self.image_token_id) for row, own in zip(rows, marks)]
        for row, prompt in zip(rows, prompts):
            if prompt.suffix is not None:
                self._append_suffix(row, prompt.suffix, task)
        for number, row in enumerate(rows):
            self._check_length(number, row, max_length, truncation)
        return rows, tensors

    def _append_suffix(self, row: Row, suffix: str, task: str | None) -> None:
        ids = [
            *self._following_ids(suffix, task or self.task_for(self.tokenizer.decode(row["input_ids"][-1:]))),
            self.tokenizer.eos_token_id,
        ]
        # PaliGemma's token types tell suffixes from prompts, those of other models tell images from text
        of_type = {"token_type_ids": int(self._is_paligemma), "mm_token_type_ids": 0}
        for name, values in row.items():
            values += ids if name == "input_ids" else [of_type.get(name, 1)] * len(ids)

    @property
    def _is_paligemma(self) -> bool:
        """Whether the prompts get a line break at the end."""
        return type(self.vlm_processor).__name__ == "PaliGemmaProcessor"

    def _check_length(self, number: int, row: Row, max_length: int | None, truncation: bool | str | None) -> None:
        length, limit = len(row["input_ids"]), max_length or self.tokenizer.model_max_length
        if not length:
            raise ValueError(f"text {number} is empty; with fusion={self.fusion!r} it needs text")
        if length <= limit:
            return
        if truncation in (None, False, "do_not_truncate") or self.image_token_id in row["input_ids"][limit:]:
            placeholders = row["input_ids"].count(self.image_token_id)
            raise ValueError(
                f"text {number} has {length} tokens, {placeholders} of them placeholders of images; "
                f"{'max_length' if max_length else 'model_max_length of the tokenizer'} is {limit}. Shorten the text, "
                "or pass truncation=True, which cuts the end but no image"
            )
        was_learned = any(row.get("learned", ()))
        for values in row.values():
            del values[limit:]
        if was_learned and not any(row["learned"]):
            logger.warning_once(
                f"text {number} has {length} tokens; cut to {limit}, it has none to learn. Pass a larger max_length, "
                "or shorten the prompt"
            )

    def _following_ids(self, text: str, task: str) -> list[int]:
        """The tokens of a text after other text. Control tokens in it are text."""
        if task not in ("text", "chat"):
            raise ValueError(f"task is {task!r}; accepted are 'text' and 'chat'")
        start, text = (":", " " + text.strip()) if task == "text" else ("\n", text.strip())
        settings = {"add_special_tokens": False, "split_special_tokens": True}
        whole, before = (self.tokenizer(own, **settings)["input_ids"] for own in (start + text, start))
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.tokenizer(text, **settings)["input_ids"]

    def pad(
        self,
        rows: list[Row],
        tensors: dict[str, Any] | None = None,
        with_labels: bool = False,
        with_mask: bool = False,
        padding: bool | str | None = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        return_tensors: str | TensorType | None = "pt",
        **_: Any,
    ) -> BatchFeature:
        """
        Rows of tokens from [`PrismerLMProcessor.encode`] as a batch.

        Args:
            rows (`list[dict]`): the rows.
            tensors (`dict`, *optional*): those of the images.
            with_labels, with_mask (`bool`, *optional*, defaults to `False`):
                Whether to return `learned` as `labels`, or as `assistant_masks`.
            padding, padding_side, pad_to_multiple_of, max_length, return_tensors:
                As in [`PrismerLMProcessor.__call__`].
        """
        batch = [{name: values for name, values in row.items() if name != "learned"} for row in rows]
        for own, row in zip(batch, rows):
            if with_labels:
                pairs = zip(row["input_ids"], row["learned"])
                own["labels"] = [number if is_learned else NOT_LEARNED for number, is_learned in pairs]
            if with_mask:
                own["assistant_masks"] = row["learned"]
        on_right = (padding_side or ("right" if with_labels else "left")) == "right"
        if padding == "max_length" and max_length is None:
            max_length = self.tokenizer.model_max_length
            if max_length > NO_LIMIT:
                raise ValueError("padding='max_length' needs max_length: the tokenizer has no limit of its own")
        pad_token_id = self.tokenizer.pad_token_id
        data = pad_rows(batch, pad_token_id, on_right, padding, pad_to_multiple_of, max_length)
        return BatchFeature({**data, **(tensors or {})}, tensor_type=return_tensors)

    # ---- ranking and answers ----

    def task_for(self, text: Any) -> str:
        """
        How a suffix or candidate follows a text: `"chat"` after white space, a special token or an image, such as at
        the beginning of an assistant's turn, else `"text"`, with a space in front.
        """
        if text is not None and not isinstance(text, str):
            tasks = sorted({self.task_for(own) for own in text})
            if len(tasks) > 1:
                raise ValueError("some texts end with white space or a special token and some do not; name the task=…")
            return tasks[0]
        special = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        is_apart = self._is_paligemma or not text or text[-1].isspace() or text.endswith(special)
        return "chat" if is_apart else "text"

    def prompt_for(self, task: str, text: str | None = None) -> str:
        """
        The user's turn for a task, as the model was trained: `prompts` of the processor.

        Args:
            task (`str`): `"caption"` or `"vqa"`.
            text (`str`, *optional*): the question.
        """
        prompts = {**DEFAULT_PROMPTS, **(self.prompts or {})}
        if task not in prompts:
            raise ValueError(f"task is {task!r}; accepted are {', '.join(map(repr, prompts))}")
        prompt = prompts[task]
        return prompt if text is None else prompt.replace("{}", text)

    def prepare_candidates(
        self,
        answers: list[str],
        return_tensors: str | TensorType | None = "pt",
        padding: bool | str = True,
        task: str | None = None,
    ) -> BatchFeature:
        """
        Tokenises the candidates among which `model.rank_candidates` chooses.

        Args:
            answers (`list[str]`): the candidates.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"`, or `None` for lists.
            padding (`bool` or `str`, *optional*, defaults to `True`): as for a tokenizer.
            task (`str`, *optional*, defaults to `"text"`):
                `"text"` puts a space in front of each, `"chat"` does not; see [`PrismerLMProcessor.task_for`].

        Returns:
            [`BatchFeature`] with `candidate_ids` and `candidate_mask` (number of answers, length) int64, each closed
            by `eos_token`; padded on the right.

        Raises:
            ValueError: if there are no answers, or an empty one.
        """
        answers = [answers] if isinstance(answers, str) else list(answers)
        if not answers or not all(answer.strip() for answer in answers):
            raise ValueError("answers is empty or holds an empty text; at least one, and text in each, is needed")
        rows = [[*self._following_ids(answer, task or "text"), self.tokenizer.eos_token_id] for answer in answers]
        padded = self.pad(
            [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows],
            padding=padding,
            padding_side="right",
            return_tensors=return_tensors,
        )
        return BatchFeature({"candidate_ids": padded["input_ids"], "candidate_mask": padded["attention_mask"]})

    def post_process_generation(
        self, generated_ids: torch.Tensor | np.ndarray | list[list[int]], prompt_length: int = 0, task: Any = None
    ) -> list[str]:
        """
        The texts that `model.generate` returned, without special tokens and white space around them.

        Args:
            generated_ids (`torch.Tensor` of shape `(rows, length)`): prompt and continuation.
            prompt_length (`int`, *optional*, defaults to 0): columns to cut off, `inputs["input_ids"].shape[1]`.
        """
        rows = [row if isinstance(row, list) else row.tolist() for row in generated_ids]
        return [self.tokenizer.decode(row[prompt_length:], skip_special_tokens=True).strip() for row in rows]

    # ---- saving and loading ----

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self._vlm_processor.value is not None:
            output["vlm_processor"] = "vlm_processor"  # its folder
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As [`PrismerProcessor.save_pretrained`]; the processor of a vision-language model in `vlm_processor/`."""
        if self.vlm_processor is not None:
            self.vlm_processor.save_pretrained(Path(save_directory, "vlm_processor"))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "Self":
        """As [`PrismerProcessor.from_pretrained`]."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if isinstance(processor._vlm_processor.value, str):
            folder = pretrained_model_name_or_path
            if not os.path.isdir(folder):
                names = ("revision", "token", "cache_dir", "local_files_only")
                hub_kwargs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
                folder = snapshot_download(str(folder), allow_patterns="vlm_processor/*", **hub_kwargs)
            vlm_processor = AutoProcessor.from_pretrained(Path(folder, "vlm_processor"), trust_remote_code=False)
            vlm_processor.tokenizer = processor.tokenizer
            processor._vlm_processor = Shared(vlm_processor)
        return processor


__all__ = ["PrismerLMProcessor"]
