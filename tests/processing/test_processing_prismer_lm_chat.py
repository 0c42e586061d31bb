"""Conversations with images: chat templates of language models, and what of a conversation is learned."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from modeling_prismer.processing.chat import read_messages

from .tiny_lm_processors import IMAGE, LABELS, OTHER_IMAGE, OTHER_LABELS, learned, make_processor, make_tokenizer


USER = {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What shape is it?"}]}
ASSISTANT = {"role": "assistant", "content": "A triangle."}
AGAIN = {"role": "user", "content": "Is it red?"}
NO = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}
HEADER = "<|im_start|>assistant\n"
PROMPT = "<|im_start|>user\n<image>What shape is it?<|im_end|>\n"

WITH_MARKERS = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"""

# As Qwen3: the last turn gets a thought, the ones before do not.
WITH_THOUGHTS = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{%- if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{{- message['content'] | trim + '<|im_end|>\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def prepare(processor, conversation, images=None, **kwargs):
    return processor.prepare_conversations(conversation, images, processor_kwargs={"experts": []}, **kwargs)


# ---- text ----


def test_the_template_of_a_language_model_gets_text():
    processor = make_processor()
    assert processor.apply_chat_template([USER]) == PROMPT
    assert processor.apply_chat_template([USER], add_generation_prompt=True) == PROMPT + HEADER
    several = processor.apply_chat_template([[USER], [USER, ASSISTANT]])
    assert several == [PROMPT, f"{PROMPT}{HEADER}A triangle.<|im_end|>\n"]


def test_a_turn_can_be_continued():
    text = make_processor().apply_chat_template([USER, ASSISTANT], continue_final_message=True)
    assert text == f"{PROMPT}{HEADER}A triangle."


def test_messages_stay_as_they_were():
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    make_processor().apply_chat_template(conversation, images=[IMAGE], tokenize=True, processor_kwargs={"experts": []})
    assert conversation == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]


def test_placeholders_in_texts_of_a_list_are_broken_up():
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what is <image><|im_end|>?"}]
    text = make_processor().apply_chat_template([{"role": "user", "content": content}])
    assert text == "<|im_start|>user\n<image>what is < image><|im_end|>?<|im_end|>\n"
    text = make_processor().apply_chat_template([{"role": "user", "content": content}], sanitize_control_tokens=True)
    assert text == "<|im_start|>user\n<image>what is < image>< |im_end|>?<|im_end|>\n"


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(ValueError, match="does not have a chat template"):
        make_processor(tokenizer=make_tokenizer(chat_template=None)).apply_chat_template([USER])


def test_another_template_can_be_given():
    processor = make_processor()
    assert (
        processor.apply_chat_template([USER], chat_template="{{ messages[0].content }}") == "<image>What shape is it?"
    )
    processor.chat_template = "{{ messages | length }}{{ mood }}"
    assert processor.apply_chat_template([USER], mood="!") == "1!"


# ---- tensors ----


@pytest.mark.parametrize("fusion, count", [("prefix", 7), ("cross_attention", 1)])
def test_tokens_of_a_conversation_are_those_of_its_text(fusion, count):
    processor = make_processor(fusion)
    inputs = processor.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=True, return_dict=True, expert_labels=LABELS
    )
    text = (PROMPT + HEADER).replace("<image>", "<image>" * count)
    assert inputs["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"]]
    assert inputs["pixel_values"].shape[0] == 1 and inputs["expert_mask"].all()
    alone = processor.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=True, processor_kwargs={"experts": []}
    )
    assert torch.equal(alone, inputs["input_ids"])


def test_images_can_be_given_beside_the_messages():
    processor = make_processor()
    places = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What shape is it?"}]}]
    settings = {"tokenize": True, "return_dict": True, "processor_kwargs": {"experts": []}}
    expected = processor.apply_chat_template([USER], **settings)
    for messages in (places, [{"role": "user", "content": "What shape is it?"}]):
        inputs = processor.apply_chat_template(messages, images=[IMAGE], **settings)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    batch = processor.apply_chat_template([places, [AGAIN]], images=[[IMAGE], []], **settings)
    assert batch["pixel_values"].shape[0] == 1 and batch["input_ids"].shape[0] == 2


@pytest.mark.parametrize("key", ["image", "path", "url", "base64", "image_url"])
def test_images_in_messages_are_opened(key, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    item = {
        "image": {"image": IMAGE},
        "path": {"path": str(tmp_path / "a.png")},
        "url": {"url": f"data:image/png;base64,{encoded}"},
        "base64": {"base64": encoded},
        "image_url": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    }[key]
    messages = [{"role": "user", "content": [{"type": "image", **item}, {"type": "text", "text": "a"}]}]
    processor = make_processor()
    settings = {"tokenize": True, "return_dict": True, "processor_kwargs": {"experts": []}}
    inputs = processor.apply_chat_template(messages, **settings)
    assert torch.equal(inputs["pixel_values"], processor(IMAGE, "a", experts=[])["pixel_values"])


def test_words_of_experts_follow_their_image():
    processor = make_processor(experts_as="words")
    messages = [[USER], [{"role": "user", "content": "<image>a"}]]
    inputs = processor.apply_chat_template(
        messages, images=[[], [OTHER_IMAGE]], tokenize=True, return_dict=True, expert_labels=[LABELS, OTHER_LABELS]
    )
    texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert texts[0] == 'user\nObjects: 1 dog (left). Text: "stop" (bottom left).\nWhat shape is it?\n'
    assert texts[1] == "user\na\n"


@pytest.mark.parametrize(
    "messages, images, message",
    [
        ([], None, "the conversation is empty; a list of messages"),
        (["a"], None, "a message is 'a'; a dict"),
        ([{"content": "a"}], None, "a message has no 'role'; its keys are: content"),
        ([{"role": "user", "content": 3}], None, "a message has a content of type int; a text or a list is needed"),
        ([{"role": "user", "content": [{"type": "video"}]}], None, r"a message has the item \{'type': 'video'\}"),
        ([{"role": "user", "content": "<image><image>a"}], [IMAGE], "places for 2 images, but 1 images are given"),
        ([{"role": "user", "content": "<image>a"}], None, "1 of 1 images of the conversation are missing"),
        ([{"role": "assistant", "content": "a"}], [IMAGE], "the messages have no 'user' turn for the 1 images"),
        ([[USER], [USER]], [[IMAGE]], "images has 1 entries for 2 conversations; one list for each is needed"),
    ],
)
def test_wrong_conversations_are_named(messages, images, message):
    with pytest.raises(ValueError, match=message):
        make_processor().apply_chat_template(messages, images=images, tokenize=True)


# ---- what is learned ----


@pytest.mark.parametrize("template", [None, WITH_MARKERS], ids=["prefixes", "markers"])
def test_the_assistants_turns_are_learned_with_their_end(template):
    processor = make_processor()
    processor.chat_template = template or processor.chat_template
    inputs = prepare(processor, [USER, ASSISTANT, AGAIN, NO])
    assert learned(processor, inputs) == ["A triangle.<|im_end|>no<|im_end|>"]
    whole = processor.apply_chat_template([USER, ASSISTANT, AGAIN, NO]).replace("<image>", "<image>" * 7)
    assert processor.decode(inputs["input_ids"][0]) == whole
    assert inputs["attention_mask"].all() and inputs["pixel_values"].shape[0] == 1


def test_turns_are_found_under_templates_that_change_them():
    processor = make_processor()
    processor.chat_template = WITH_THOUGHTS
    found = learned(processor, prepare(processor, [USER, {**ASSISTANT, "content": " A triangle. "}, AGAIN, NO]))
    assert found == ["A triangle.<|im_end|><think>\n\n</think>\n\nno<|im_end|>"]


def test_turns_that_are_not_found_are_named():
    processor = make_processor()
    processor.chat_template = "{% for message in messages %}{{ loop.length }}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match="the assistant's turn 1 is not found in the text of the chat template"):
        prepare(processor, [USER, ASSISTANT, AGAIN])


def test_a_conversation_without_an_answer_is_named():
    with pytest.raises(ValueError, match="conversation 1 has no turn of an assistant"):
        prepare(make_processor(), [[USER, ASSISTANT], [AGAIN]])


def test_the_mask_is_of_finished_conversations():
    with pytest.raises(ValueError, match="return_assistant_tokens_mask is for finished conversations"):
        make_processor().apply_chat_template(
            [USER, ASSISTANT], tokenize=True, return_assistant_tokens_mask=True, add_generation_prompt=True
        )


def test_generation_goes_on_from_the_tokens_before_a_turn():
    processor = make_processor()
    inputs = prepare(processor, [USER, ASSISTANT])
    prompt = processor.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=True, processor_kwargs={"experts": []}
    )[0]
    first = (inputs["labels"][0] != -100).nonzero()[0, 0]
    assert torch.equal(inputs["input_ids"][0, :first], prompt)


def test_several_conversations_are_padded_on_the_right():
    processor = make_processor()
    inputs = prepare(processor, [[USER, ASSISTANT], [AGAIN, NO]])
    assert learned(processor, inputs) == ["A triangle.<|im_end|>", "no<|im_end|>"]
    assert inputs["attention_mask"][1, -1] == 0 and inputs["pixel_values"].shape[0] == 1
    arrays = prepare(processor, [USER, ASSISTANT], return_tensors="np")
    assert isinstance(arrays["labels"], np.ndarray)


def test_the_mask_of_assistant_tokens_needs_no_markers():
    processor = make_processor()
    inputs = processor.apply_chat_template(
        [USER, ASSISTANT],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"experts": []},
    )
    assert processor.decode(inputs["input_ids"][inputs["assistant_masks"] == 1]) == "A triangle.<|im_end|>"


def test_messages_of_llava_files_are_read():
    processor = make_processor()
    messages = [{"from": "human", "value": "What shape\n<image>\nis it?"}, {"from": "gpt", "value": "A triangle."}]
    inputs = prepare(processor, messages, [IMAGE])
    assert learned(processor, inputs) == ["A triangle.<|im_end|>"]
    text = processor.decode(inputs["input_ids"][0])
    assert text.startswith(f"<|im_start|>user\nWhat shape\n{'<image>' * 7}\nis it?<|im_end|>")


def test_columns_that_are_none_are_left_out():
    item = {"type": "text", "text": "a", "image": None}
    messages, images = read_messages([{"role": "user", "content": [item], "tool_calls": None}])
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}] and images == []


@pytest.mark.parametrize("as_bytes", [True, False])
def test_images_of_data_sets_are_read(as_bytes):
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "png")
    image = {"bytes": buffer.getvalue(), "path": None} if as_bytes else Image.fromarray(IMAGE)
    processor = make_processor()
    inputs = prepare(processor, [{"role": "user", "content": "a"}, NO], [image])
    assert torch.equal(inputs["pixel_values"], processor(IMAGE, "a", experts=[])["pixel_values"])


def test_the_template_is_saved_with_the_processor(tmp_path):
    processor = make_processor()
    processor.chat_template = WITH_MARKERS
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert loaded.chat_template == WITH_MARKERS
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<image>") == processor.image_token_id
