"""From rows of a data set to a batch of PrismerLM: prompts, conversations, and texts packed into one row."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch

from .backbone_parts import as_list
from .chat import read_messages
from .data_collator import DataCollatorForPrismer
from .packing import pack_rows
from .processing_prismer_lm import PrismerLMProcessor
from .prompts import Prompt, lay_out


TEXTS = ("text", "suffix")


class DataCollatorForPrismerLM(DataCollatorForPrismer):
    """
    Makes a batch for [`PrismerLMForConditionalGeneration`] from rows of prompts or conversations. It opens the images,
    reads their labels from a label store or runs the experts, augments each image with its maps, and calls the
    processor.

    A row has these columns:

    | column | type | meaning |
    | --- | --- | --- |
    | `image`, or `images` | any input of [`load_image`], or a list | the images; a row of text alone has none |
    | `image_id`, or `image_ids` | `str`, or a list | the keys in the label store; not needed for live experts |
    | `text` | `str` or `list[str]`, *optional* | the prompt; `<image>` stands for an image |
    | `suffix` | `str` or `list[str]` | the text to learn |
    | `messages`, or `conversations` | `list[dict]` | in place of `text` and `suffix`: a conversation |

    The assistant's turns of a conversation are learned. Its messages are `{"role": …, "content": …}`, or those of
    LLaVA's files, `{"from": "human", "value": …}`. If they have no places for the images, these come before the first
    message of the user.

    With `Trainer`, set `remove_unused_columns=False`. `SFTTrainer` of trl takes this collator as `data_collator` and
    rows with `messages` and `images`.

    Args:
        processor ([`PrismerLMProcessor`]): The processor.
        labels_for, augmentation, expert_dropout, texts_per_image, experts, seed (*optional*):
            See [`DataCollatorForPrismer`]. An expert that is dropped is not written in words either.
        with_suffix (`bool`, *optional*, defaults to `True`):
            Whether to return `labels`. Pass `False` for generation: prompts are then padded on the left.
        as_chat (`bool`, *optional*, defaults to `False`):
            Whether to put `text` and `suffix` into the chat template of the language model, as the turns of user and
            assistant.
        pack (`bool`, *optional*, defaults to `False`):
            Whether to put all texts of a row (lists in `text` and `suffix`, or a list of conversations) into one row
            after the image, whose tokens are then computed once. Each text sees the image and itself. The loss is that
            of the texts in rows of their own. Not for vision-language models, `question_queries=True` or flash
            attention. A sliding window does not apply.
        max_length (`int`, *optional*): The limit of tokens in a row. Longer texts are cut, but no image is.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from modeling_prismer import DataCollatorForPrismerLM, PrismerLMProcessor

    >>> tokenizer = AutoTokenizer.from_pretrained(path)  # of your language model
    >>> lm_processor = PrismerLMProcessor.from_backbones(tokenizer, experts="offline")
    >>> collator = DataCollatorForPrismerLM(lm_processor, pack=True)
    >>> row = {"image": image, "text": ["What shape is it?", "Is it red?"], "suffix": ["a triangle", "no"]}
    >>> batch = collator([row])
    >>> batch["input_ids"].shape, batch["attention_mask"].shape
    (torch.Size([1, 83]), torch.Size([1, 1, 83, 83]))
    >>> batch["position_ids"][0, -4:].tolist()
    [69, 70, 71, 72]
    ```
    """

    processor: PrismerLMProcessor

    def __init__(
        self,
        processor: PrismerLMProcessor,
        labels_for: Callable[[list[Any]], list[dict[str, Any]] | None] | None = None,
        augmentation: Callable[..., tuple[Any, dict[str, Any]]] | None = None,
        expert_dropout: float = 0.0,
        texts_per_image: int | None = None,
        with_suffix: bool = True,
        experts: list[str] | None = None,
        seed: int = 0,
        as_chat: bool = False,
        pack: bool = False,
        max_length: int | None = None,
    ):
        super().__init__(
            processor,
            labels_for,
            augmentation,
            expert_dropout,
            texts_per_image,
            with_suffix,
            experts,
            seed,
        )
        if pack and not with_suffix:
            raise ValueError("pack=True is for training; with_suffix=False needs rows of their own")
        if pack and processor.vlm_processor is not None:
            raise ValueError("pack=True is not for vision-language models, which count positions by themselves")
        self.as_chat = as_chat
        self.pack = pack
        self.max_length = max_length

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`list[dict]`): The rows; see above.

        Returns:
            `dict[str, torch.Tensor]`: the inputs of [`PrismerLMForConditionalGeneration.forward`]; see
            [`PrismerLMProcessor.__call__`]. With `pack=True`, `attention_mask` is (rows, 1, length, length) bool, and
            there are `position_ids`.

        Raises:
            ValueError: if a row has neither texts nor a conversation, its images do not fit them, an image cannot be
                read, or a label is wrong.
        """
        return super().__call__(rows)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        conversations = [_read_conversations(row, number) for number, row in enumerate(rows)]
        entries: list[dict[str, Any]] = []  # one for each image
        numbers: list[list[int]] = []  # the images of each row
        for number, (row, own) in enumerate(zip(rows, conversations)):
            added = _image_entries(row, own, number)
            numbers.append(list(range(len(entries), len(entries) + len(added))))
            entries += added
        images, labels, keep = self._open(entries) if entries else ([], [], torch.ones(0, 0))
        names = [expert["name"] for expert in self.processor.image_processor.experts]
        for place, kept in enumerate(keep.tolist()):
            dropped = {name: None for name, is_kept in zip(names, kept) if not is_kept}
            labels[place] = {**(labels[place] or {}), **dropped}

        prompts: list[Prompt] = []
        lengths = []
        for row, own, places in zip(rows, conversations, numbers):
            if places:  # the texts that were drawn
                row = {**row, **{column: entries[places[0]].get(column) for column in TEXTS}}
            made = self._prompts(row, own, len(places))
            prompts += [prompt._replace(images=[places[number] for number in prompt.images]) for prompt in made]
            lengths.append(len(made))
        if not self.pack and len(set(lengths)) > 1:
            raise ValueError(
                f"the rows have {', '.join(map(str, lengths))} texts; each needs equally many (texts_per_image), or "
                "pass pack=True"
            )
        tokens, tensors = self.processor.encode(
            self._place_missing(prompts),
            images,
            labels,
            self.experts,
            images_kwargs={"return_tensors": "pt"},
            add_special_tokens=not (self.as_chat or any(conversations)),
            max_length=self.max_length,
            truncation=self.max_length is not None,
        )
        if not self.pack:
            return dict(self.processor.pad(tokens, tensors, with_labels=self.with_suffix))
        remaining = iter(tokens)
        groups = [list(islice(remaining, length)) for length in lengths]
        pad_token_id = self.processor.tokenizer.pad_token_id
        return {**pack_rows(groups, self.processor.image_token_id, pad_token_id), **tensors}

    def _prompts(self, row: dict[str, Any], conversations: list[Any], num_images: int) -> list[Prompt]:
        """The prompts of one row; its images count from 0."""
        texts, suffixes = as_list(row.get("text")), as_list(row.get("suffix")) if self.with_suffix else []
        if not conversations and not self.as_chat:
            groups = [list(range(num_images))]
            arguments = (num_images, groups, self.processor.image_token, self.processor.fusion)
            return lay_out([texts] if texts else None, [suffixes] if suffixes else None, *arguments)
        if not conversations:
            conversations = _as_conversations(texts, suffixes, num_images)
        if self.with_suffix:
            prompts, _ = self.processor.read_conversations(conversations)
        else:
            conversations = [_until_answer(messages) for messages in conversations]
            prompts, _ = self.processor.read_conversations(conversations, find_turns=False, add_generation_prompt=True)
        return [prompt._replace(images=list(range(num_images))) for prompt in prompts]

    def _place_missing(self, prompts: list[Prompt]) -> list[Prompt]:
        """If some texts have placeholders, all that are about images need them."""
        token = self.processor.image_token
        missing = [bool(prompt.images) and not any(token in piece for piece in prompt.pieces) for prompt in prompts]
        if not all(missing):
            for prompt, is_missing in zip(prompts, missing):
                if is_missing:
                    prompt.pieces[0] = token * len(prompt.images) + prompt.pieces[0]
        return prompts


def _read_conversations(row: dict[str, Any], number: int) -> list[list[dict[str, Any]]]:
    """The conversations of a row with the images in them; none if it has texts."""
    if row.get("weight") is not None:
        raise ValueError(f"row {number} has a 'weight', which PrismerLM does not read")
    messages = row.get("messages") or row.get("conversations")
    if messages is None:
        if row.get("text") is None and row.get("suffix") is None:
            columns = ", ".join(map(str, row)) or "none"
            raise ValueError(
                f"row {number} has neither 'messages' nor 'text' or 'suffix'; its columns are: {columns}. With "
                "Trainer, set remove_unused_columns=False, because Trainer drops columns that the model does not name"
            )
        return []
    images = _images_of(row) or None
    several = messages if isinstance(messages[0], list | tuple) else [messages]
    return [read_messages(own, images)[0] for own in several]


def _images_of(row: dict[str, Any]) -> list[Any]:
    images = row.get("images")
    return as_list(row.get("image")) if images is None or not len(images) else list(images)


def _image_entries(row: dict[str, Any], conversations: list[Any], number: int) -> list[dict[str, Any]]:
    """`image` and `image_id` of each image of a row, which are in its columns or in its first conversation."""
    images = _images_of(row)
    if not images and conversations:
        images = read_messages(conversations[0])[1]
    ids = as_list(row.get("image_ids", row.get("image_id"))) or [None] * len(images)
    if len(ids) != len(images):
        raise ValueError(f"row {number} has {len(ids)} image_ids for {len(images)} images")
    entries = [{"image": image, "image_id": image_id} for image, image_id in zip(images, ids)]
    if entries:  # from which some texts may be drawn
        entries[0] |= {column: row[column] for column in TEXTS if row.get(column) is not None}
    return entries


def _as_conversations(texts: list[str], suffixes: list[str], num_images: int) -> list[list[dict[str, Any]]]:
    """Each text as the user's turn, which begins with the images, and its suffix as the assistant's."""
    texts = texts or [""] * max(1, len(suffixes))
    if suffixes and len(suffixes) != len(texts):
        raise ValueError(f"{len(suffixes)} suffixes for {len(texts)} prompts; one for each prompt is needed")
    conversations = [[{"role": "user", "content": text}] for text in texts]
    for messages, suffix in zip(conversations, suffixes):
        messages.append({"role": "assistant", "content": suffix})
    return [read_messages(messages, [None] * num_images)[0] for messages in conversations]


def _until_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation without the assistant's last turn."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
