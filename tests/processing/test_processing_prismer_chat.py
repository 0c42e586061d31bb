"""Conversations about images for PrismerProcessor: the chat template, its tensors, and saving it."""

import base64
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoProcessor

from modeling_prismer import PrismerProcessor, pretrained_path, sample_image
from modeling_prismer.pretrained import shipped_checkpoints
from modeling_prismer.processing.chat import QUESTION_TEMPLATE


SHAPE = sample_image("shape")
COLOR = "What color is the shape?"
FIRST = {"role": "user", "content": [{"type": "image", "image": SHAPE}, {"type": "text", "text": COLOR}]}
TEAL = {"role": "assistant", "content": [{"type": "text", "text": "teal"}]}
SECOND = {"role": "user", "content": "Is it red?"}
TENSORS = {"tokenize": True, "return_dict": True, "experts": []}


@pytest.fixture(scope="module")
def processor():
    return PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"), experts=None)


@pytest.fixture(scope="module")
def scenes():
    return PrismerProcessor.from_pretrained(pretrained_path("prismer-scenes"), experts=None)


def user(*content):
    return {"role": "user", "content": list(content)}


def assert_same(inputs, expected):
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


# ---- text ----


@pytest.mark.parametrize("name", shipped_checkpoints())
def test_shipped_checkpoints_have_the_template(name):
    path = pretrained_path(name)
    with open(f"{path}/chat_template.jinja", encoding="utf-8") as file:
        assert file.read() == QUESTION_TEMPLATE
    assert AutoProcessor.from_pretrained(path, experts=None).chat_template == QUESTION_TEMPLATE


def test_messages_may_be_objects(processor):
    @dataclass
    class Message:
        role: str
        content: list | str

    message = Message("user", FIRST["content"])
    assert processor.apply_chat_template([message]) == COLOR
    inputs = processor.apply_chat_template([[message], [message]], **TENSORS)
    assert_same(inputs, processor.apply_chat_template([[FIRST], [FIRST]], **TENSORS))


def test_the_template_is_saved_and_loaded(processor, tmp_path):
    own = PrismerProcessor(processor.image_processor, processor.tokenizer, task="vqa", chat_template="a template")
    own.save_pretrained(tmp_path)
    assert PrismerProcessor.from_pretrained(tmp_path).chat_template == "a template"
    (tmp_path / "chat_template.jinja").unlink()  # saved before there was one
    assert PrismerProcessor.from_pretrained(tmp_path).chat_template == QUESTION_TEMPLATE


def test_the_prompt_is_the_last_text_of_the_user(processor):
    assert processor.apply_chat_template([FIRST]) == COLOR
    assert processor.apply_chat_template([FIRST, TEAL, SECOND], add_generation_prompt=True) == "Is it red?"
    assert processor.apply_chat_template([{"role": "system", "content": "Be brief."}, FIRST]) == COLOR
    assert processor.apply_chat_template([[FIRST], [FIRST, TEAL, SECOND]]) == [COLOR, "Is it red?"]
    assert processor.apply_chat_template([FIRST, TEAL]) == f"{COLOR} teal"


@pytest.mark.parametrize("text", [None, "", "Describe this image.", "describe the picture", " Caption this image "])
def test_a_description_is_the_task_of_captions(scenes, text):
    items = [] if text is None else [{"type": "text", "text": text}]
    assert scenes.apply_chat_template([user({"type": "image", "image": SHAPE}, *items)]) == "A picture of"
    question = user({"type": "text", "text": "Describe this image of a cat"})
    assert scenes.apply_chat_template([question]) == "Describe this image of a cat"


def test_a_checkpoint_for_questions_needs_one(processor):
    with pytest.raises(ValueError, match="the task 'vqa' needs a question"):
        processor.apply_chat_template([user({"type": "image", "image": SHAPE})])


# ---- tensors ----


def test_tensors_are_those_of_the_question(processor):
    expected = processor(SHAPE, COLOR, experts=[])
    assert_same(processor.apply_chat_template([FIRST], **TENSORS), expected)
    assert torch.equal(processor.apply_chat_template([FIRST], tokenize=True, experts=[]), expected["input_ids"])
    batch = processor.apply_chat_template([[FIRST], [FIRST, TEAL, SECOND]], **TENSORS)
    assert_same(batch, processor([SHAPE, SHAPE], [COLOR, "Is it red?"], experts=[]))


def test_the_last_image_is_read(processor):
    other = sample_image("scene")
    messages = [FIRST, TEAL, user({"type": "image", "image": other}, {"type": "text", "text": COLOR})]
    assert_same(processor.apply_chat_template(messages, **TENSORS), processor(other, COLOR, experts=[]))


@pytest.mark.parametrize("key", ["image", "path", "url", "base64", "image_url"])
def test_images_of_all_kinds_are_opened(processor, key, tmp_path):
    SHAPE.save(tmp_path / "a.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    uri = f"data:image/png;base64,{encoded}"
    values = {"image": SHAPE, "path": str(tmp_path / "a.png"), "url": uri, "base64": encoded}
    item = (
        {"type": "image_url", "image_url": {"url": uri}} if key == "image_url" else {"type": "image", key: values[key]}
    )
    inputs = processor.apply_chat_template([user(item, {"type": "text", "text": COLOR})], **TENSORS)
    assert_same(inputs, processor(SHAPE, COLOR, experts=[]))


def test_images_can_be_given_apart(processor):
    expected = processor(SHAPE, COLOR, experts=[])
    assert_same(
        processor.apply_chat_template([user({"type": "text", "text": COLOR})], images=[SHAPE], **TENSORS), expected
    )
    batch = processor.apply_chat_template([[{"role": "user", "content": COLOR}]], images=[[SHAPE]], **TENSORS)
    assert_same(batch, expected)


def test_an_answer_is_continued_or_closed(processor):
    whole = processor(SHAPE, COLOR, suffix="teal", experts=[])
    closed = processor.apply_chat_template([FIRST, TEAL], **TENSORS)
    assert "labels" not in closed and torch.equal(closed["input_ids"], whole["input_ids"])
    opened = processor.apply_chat_template([FIRST, TEAL], continue_final_message=True, **TENSORS)
    assert torch.equal(opened["input_ids"], whole["input_ids"][:, :-1])
    assert opened["attention_mask"].shape == opened["input_ids"].shape
    with pytest.raises(ValueError, match="split the batch"):
        processor.apply_chat_template([[FIRST, TEAL], [FIRST]], **TENSORS)


def test_control_tokens_of_a_user_stay_text(processor):
    messages = [user({"type": "image", "image": SHAPE}, {"type": "text", "text": "Is it red?</s>"})]
    ids = processor.apply_chat_template(messages, tokenize=True, experts=[])
    assert processor.tokenizer.eos_token_id not in ids[0].tolist()


@pytest.mark.parametrize(
    "messages, message",
    [
        ([SECOND], "the conversation has no image: Prismer needs one"),
        ([user({"type": "image"}, {"type": "text", "text": COLOR})], "the conversation has no image"),
        (
            [user({"type": "image", "image": SHAPE}, {"type": "image", "image": SHAPE}, COLOR)],
            "a message has 2 images",
        ),
        ([{"role": "system", "content": "hello"}], "no turn of the role 'user'"),
        ([], "the conversation is empty"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "a message has the item"),
    ],
)
def test_wrong_conversations_are_named(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, **TENSORS)
