"""Conversations with images: their messages, their text by a chat template, and the assistant's turns in it."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


IMAGE_MARKER = "<image>"  # an image in the text of a message, as in LLaVA's files
ROLES = {"human": "user", "gpt": "assistant"}  # of LLaVA's files
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")

# Arguments of a processor's call that `apply_chat_template` takes beside the variables of a template.
CALL_NAMES = {
    *("expert_labels", "experts", "vlm_kwargs", "padding", "padding_side", "pad_to_multiple_of", "max_length"),
    *("truncation", "add_special_tokens", "text_kwargs", "images_kwargs", "max_image_pixels", "budget_ms"),
}

QUESTION_TEMPLATE = """\
{#- Prismer answers each question by itself: the prompt is the last text of the user, followed by the beginning of the
    answer if the assistant has the last turn. The prompt is empty, which asks for a caption, if there is only an image
    or if the user asks for a description. -#}
{%- macro text_of(message) -%}
    {%- set content = message.content -%}
    {%- if content is string -%}{{ content | trim }}
    {%- else -%}{{ content | selectattr("type", "equalto", "text") | map(attribute="text") | join(" ") | trim }}
    {%- endif -%}
{%- endmacro -%}
{%- set question = text_of((messages | selectattr("role", "equalto", "user") | list)[-1]) -%}
{%- if question | lower | replace(".", "") not in [
    "describe this image", "describe the image", "describe this picture", "describe the picture", "caption this image"
] -%}{{ question }}{%- endif -%}
{%- if messages[-1].role == "assistant" %} {{ text_of(messages[-1]) }}{%- endif -%}
"""


def read_messages(messages: Sequence[Any], images: Sequence[Any] | None = None) -> tuple[list[dict], list[Any]]:
    """
    Brings a conversation to one form.

    Args:
        messages (`list[dict]`):
            `{"role": …, "content": …}`, or `{"from": "human", "value": …}` as in LLaVA's files. A content is a text,
            in which `<image>` stands for an image, or a list of `{"type": "text", "text": …}` and
            `{"type": "image", "image": …}` (also `url`, `path`, `base64` or nothing).
        images (`list`, *optional*):
            The images of those items that have none, in their order. Without such an item and without `<image>`, they
            come before the first message of the user.

    Returns:
        `tuple[list[dict], list]`: messages whose contents are lists of items, and the images in their order. The image
        of an item that has none is `None` if no `images` are given.

    Raises:
        ValueError: if a message is not a message, or if the number of images is wrong.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages is {messages!r}; a list of messages {{'role': …, 'content': …}} is needed")
    read = [_read_message(message) for message in messages]
    missing = [item for message in read for item in _image_items(message) if item["image"] is None]
    if images is not None and images and not missing:
        first = next((message for message in read if message["role"] == "user"), None)
        if first is None:
            raise ValueError(f"the messages have no 'user' turn for the {len(images)} images")
        missing = [{"type": "image", "image": None} for _ in images]
        first["content"] = [*missing, *first["content"]]
    if images is not None:
        if len(missing) != len(images):
            raise ValueError(
                f"the messages have places for {len(missing)} images, but {len(images)} images are given: one "
                f"'{IMAGE_MARKER}' or {{'type': 'image'}} for each image is needed"
            )
        for item, image in zip(missing, images):
            item["image"] = image
    return read, [item["image"] for message in read for item in _image_items(message)]


def as_batch(conversation: Any) -> tuple[list[Any], bool]:
    """One or many conversations as a list of them, and whether they are many."""
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError("the conversation is empty; a list of messages {'role': …, 'content': …} is needed")
    conversation = [getattr(own, "messages", own) for own in conversation]
    is_batch = isinstance(conversation[0], list | tuple)
    return (conversation if is_batch else [conversation]), is_batch


def as_text(messages: Sequence[dict], image_token: str, clean: Callable[[str], str]) -> list[dict]:
    """Messages of texts alone, `image_token` in place of the images. `clean` breaks up such tokens in other texts."""
    converted = []
    for message in messages:
        if isinstance(message.get("content"), list):
            parts = [image_token if item["type"] == "image" else clean(item["text"]) for item in message["content"]]
            message = {**message, "content": "".join(parts)}
        converted.append(message)
    return converted


def with_marker(messages: Sequence[dict], token: str, clean: Callable[[str], str]) -> list[dict]:
    """Messages of a vision-language model, in which the text `token` follows each image."""
    converted = []
    for message in messages:
        if isinstance(message.get("content"), list):
            items: list[dict] = []
            for item in message["content"]:
                if item["type"] == "image":
                    items += [{"type": "image"}, {"type": "text", "text": token}]
                else:
                    items.append({**item, "text": clean(item["text"])} if item["type"] == "text" else item)
            message = {**message, "content": items}
        converted.append(message)
    return converted


def render(messages: Sequence[dict], template: str, **kwargs: Any) -> str:
    """The text of a conversation by a chat template. `kwargs` are those of `apply_chat_template`."""
    texts, _ = render_jinja_template([list(messages)], chat_template=template, **kwargs)
    return texts[0]


def assistant_spans(
    messages: Sequence[dict], template: str, stop_tokens: re.Pattern[str] | None, **kwargs: Any
) -> tuple[str, list[tuple[int, int]]]:
    """
    The text of a conversation, and where the assistant's turns are in it: by the template's `{% generation %}` markers
    if it has them. Otherwise the conversation is rendered up to each of these turns. A turn ends with the token that
    ends it, white space after it left out.

    Args:
        messages (`list[dict]`): the conversation.
        template (`str`): the chat template.
        stop_tokens (`re.Pattern`, *optional*): matches tokens that can end a turn.
        kwargs: variables of the template.

    Raises:
        ValueError: if the turns cannot be found.
    """
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        texts, spans = render_jinja_template(
            [list(messages)], chat_template=template, return_assistant_tokens_mask=True, **kwargs
        )
        return texts[0], [(start, end) for start, end in spans[0] if end > start]
    text = render(messages, template, **kwargs)
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:number], template, add_generation_prompt=True, **kwargs)
            after = render(messages[: number + 1], template, **kwargs).rstrip()
            start = len(before)
            end = len(after) if text.startswith(after) else _end_of_turn(text, start, message, stop_tokens)
            if not text.startswith(before) or end is None or end <= start:
                raise ValueError(
                    f"the assistant's turn {number} is not found in the text of the chat template, which changes with "
                    "the turns that follow; mark it in the template by {% generation %} and {% endgeneration %}"
                )
            found.append((start, end))
    return text, found


def _end_of_turn(text: str, start: int, message: dict, stop_tokens: re.Pattern[str] | None) -> int | None:
    """Where a turn's content and the token that ends it are over. Templates leave out thoughts of earlier turns."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(item.get("text", "") for item in content)
    content = (content or "").strip()
    place = text.find(content, start)
    if not content or place < 0:
        return None
    end = place + len(content)
    stop = stop_tokens and stop_tokens.match(text, end)
    return stop.end() if stop else end


def _as_dict(value: Any) -> Any:
    """Dataclasses and models of pydantic, such as the messages of openai, as dicts; other values as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else value


def _read_message(message: Any) -> dict[str, Any]:
    message = _as_dict(message)
    if not isinstance(message, dict):
        raise ValueError(f"a message is {message!r}; a dict {{'role': …, 'content': …}} is needed")
    if "from" in message and "value" in message:
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if "role" not in message:
        raise ValueError(f"a message has no 'role'; its keys are: {', '.join(map(str, message)) or 'none'}")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, str):
        texts = content.split(IMAGE_MARKER)
        content = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            content += [{"type": "image", "image": None}, {"type": "text", "text": text}]
        message["content"] = [item for item in content if item["type"] == "image" or item["text"]]
        if not message["content"]:
            message["content"] = [{"type": "text", "text": ""}]
    elif isinstance(content, list | tuple):
        message["content"] = [_read_item(item) for item in content]
    elif content is not None:
        raise ValueError(f"a message has a content of type {type(content).__name__}; a text or a list is needed")
    return message


def _read_item(item: Any) -> dict[str, Any]:
    item = _as_dict(item)
    if isinstance(item, str):
        return {"type": "text", "text": item}
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind in ("image", "image_url"):
        key = next((key for key in IMAGE_KEYS if item.get(key) is not None), "image")
        image: Any = item.get(key)
        if key == "image_url" and isinstance(image, dict):
            image = image.get("url")
        elif key == "base64" and not image.startswith("data:"):
            image = f"data:;base64,{image}"
        return {"type": "image", "image": image}
    raise ValueError(f"a message has the item {item!r}; accepted are texts {{'type': 'text', 'text': …}} and images")


def _image_items(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [item for item in content if item["type"] == "image"] if isinstance(content, list) else []
