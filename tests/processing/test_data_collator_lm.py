"""Batches for PrismerLM from prompts and conversations; many texts about one image in one row."""

import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_prismer import DataCollatorForPrismerLM, PrismerLMProcessor
from modeling_prismer.processing import JointAugmentation

from .tiny_lm_processors import (
    EXPERTS,
    IMAGE,
    LABELS,
    OTHER_IMAGE,
    labels_of,
    learned,
    make_model,
    make_processor,
    make_tokenizer,
)


IMAGES = {"a": (IMAGE, LABELS), "b": (OTHER_IMAGE, labels_of(30, 20))}
QUESTIONS = {
    "a": (["What shape is it?", "Is it red?", "Is it red or a dog?"], ["A triangle.", "no", "a dog, or"]),
    "b": (["Is it a dog?", "What shape?", "yes?"], ["yes", "A circle", "no, a"]),
}


def labels_for(ids):
    return [IMAGES[image_id][1] for image_id in ids]


def row(image_id, **columns):
    return {"image": IMAGES[image_id][0], "image_id": image_id, **columns}


def rows(number=3):
    return [row(key, text=texts[:number], suffix=answers[:number]) for key, (texts, answers) in QUESTIONS.items()]


def collate(processor, rows, **kwargs):
    return DataCollatorForPrismerLM(processor, labels_for, **kwargs)(rows)


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ---- rows ----


def test_texts_and_suffixes_become_the_processors_batch():
    processor = make_processor()
    batch = collate(processor, rows(1))
    labels = [IMAGES[key][1] for key in "ab"]
    texts = [QUESTIONS[key][0][0] for key in "ab"]
    suffixes = [QUESTIONS[key][1][0] for key in "ab"]
    expected = processor([IMAGE, OTHER_IMAGE], texts, suffix=suffixes, expert_labels=labels)
    assert sorted(batch) == sorted(expected) and all(torch.equal(batch[name], expected[name]) for name in batch)


def test_texts_of_an_image_share_it():
    processor = make_processor()
    batch = collate(processor, rows())
    assert batch["input_ids"].shape[0] == 6 and batch["pixel_values"].shape[0] == 2
    assert learned(processor, batch)[0] == " A triangle.<|im_end|>"
    uneven = [row("a", text=["a", "b"], suffix=["c", "d"]), row("b", text="a", suffix="c")]
    with pytest.raises(ValueError, match="the rows have 2, 1 texts; each needs equally many"):
        collate(processor, uneven)


def test_some_texts_are_drawn():
    processor = make_processor()
    batch = collate(processor, rows(), texts_per_image=2)
    assert batch["input_ids"].shape[0] == 4
    answers = [text.strip().removesuffix("<|im_end|>") for text in learned(processor, batch)]
    assert set(answers[:2]) < set(QUESTIONS["a"][1]) and set(answers[2:]) < set(QUESTIONS["b"][1])


def test_captions_need_no_text():
    processor = make_processor()
    batch = collate(processor, [row("a", suffix="A dog."), row("b", suffix="A circle.")])
    assert learned(processor, batch) == ["A dog.<|im_end|>", "A circle.<|im_end|>"]


def test_without_suffix_prompts_are_padded_on_the_left():
    batch = collate(make_processor(), [row("a", text="What shape is it?"), row("b", text="a")], with_suffix=False)
    mask = batch["attention_mask"][1]
    assert "labels" not in batch and mask[-1] == 1 and mask[0] == 0


def test_chats_are_made_of_texts():
    processor = make_processor()
    batch = collate(processor, rows(1), as_chat=True)
    assert learned(processor, batch) == ["A triangle.<|im_end|>", "yes<|im_end|>"]
    prompts = collate(processor, rows(1), as_chat=True, with_suffix=False)
    text = f"<|im_start|>user\n{'<image>' * 7}What shape is it?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(prompts["input_ids"][0][prompts["attention_mask"][0] == 1]) == text
    assert processor.decode(batch["input_ids"][0]).startswith(text)


def test_conversations_learn_the_assistants_turns():
    processor = make_processor()
    messages = [*conversation("What shape is it?", "A triangle."), *conversation("Is it red?", "no")]
    batch = collate(processor, [row("a", messages=messages), row("b", messages=conversation("<image>a", "b"))])
    assert learned(processor, batch) == ["A triangle.<|im_end|>no<|im_end|>", "b<|im_end|>"]
    prompts = collate(processor, [row("a", messages=messages)], with_suffix=False)
    assert processor.decode(prompts["input_ids"][0]).endswith("Is it red?<|im_end|>\n<|im_start|>assistant\n")


def test_rows_can_have_several_images_or_none():
    processor = make_processor()
    messages = conversation("Is <image> as <image>?", "yes")
    batch = collate(
        processor,
        [
            {"images": [IMAGE, OTHER_IMAGE], "image_ids": ["a", "b"], "messages": messages},
            {"messages": conversation("yes or no?", "no")},
        ],
    )
    assert batch["pixel_values"].shape[0] == 2 and learned(processor, batch)[1] == "no<|im_end|>"
    assert torch.isfinite(make_model(processor.image_token_id)(**batch).loss)
    alone = collate(processor, [{"messages": conversation("yes or no?", "no")}])
    assert sorted(alone) == ["attention_mask", "input_ids", "labels"]


def test_images_can_be_one_array():
    pair = torch.zeros(2, 3, 24, 40, dtype=torch.uint8)
    messages = conversation("Is <image> as <image>?", "yes")
    batch = collate(make_processor(), [{"images": pair, "image_ids": ["a", "b"], "messages": messages}])
    assert batch["pixel_values"].shape[0] == 2


def test_images_in_messages_and_llava_files_are_read():
    processor = make_processor()
    image = Image.fromarray(IMAGE)
    items = [{"type": "image", "image": image}, {"type": "text", "text": "a"}]
    inside = {"messages": [{"role": "user", "content": items}, {"role": "assistant", "content": "b"}]}
    llava = {"image": image, "conversations": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]}
    first, second = (DataCollatorForPrismerLM(processor, experts=[])([own]) for own in (inside, llava))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_live_experts_run_where_no_labels_are_given():
    processor = PrismerLMProcessor.from_backbones(
        make_tokenizer(), experts="offline", experts_config={"num_latents": 2}
    )
    batch = DataCollatorForPrismerLM(processor)([{"image": IMAGE, "text": "a", "suffix": "b"}])
    assert batch["expert_mask"].all()


def test_dropped_experts_leave_the_words_too():
    processor = make_processor(experts_as="both")
    collator = DataCollatorForPrismerLM(processor, labels_for, expert_dropout=0.5)
    seen = set()
    for epoch in range(12):
        collator.epoch = epoch
        batch = collator([row("a", text="b", suffix="c")])
        text = processor.decode(batch["input_ids"][0])
        has_boxes, has_words = batch["expert_mask"][0, 1].item(), batch["expert_mask"][0, 2].item()
        assert ("1 dog" in text) == has_boxes and ('"stop"' in text) == has_words
        seen.add((has_boxes, has_words))
    assert len(seen) > 2


def test_images_and_labels_are_augmented_together():
    augmentation = JointAugmentation(EXPERTS, size=(32, 32))
    batch = collate(make_processor(), rows(1), augmentation=augmentation)
    assert not torch.equal(batch["depth_values"], collate(make_processor(), rows(1))["depth_values"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image": IMAGE}, "row 0 has neither 'messages' nor 'text' or 'suffix'; its columns are: image"),
        (row("a", text="a", suffix="b", weight=0.3), "row 0 has a 'weight', which PrismerLM does not read"),
        ({"images": [IMAGE], "image_ids": ["a", "b"], "text": "a"}, "row 0 has 2 image_ids for 1 images"),
        (row("a", messages=conversation("<image><image>a", "b")), "places for 2 images, but 1 images are given"),
        (row("a", text=["a", "b"], suffix=["c"]), "1 suffixes for 2 prompts|suffix has lists of"),
    ],
)
def test_wrong_rows_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        collate(make_processor(), [wrong])


# ---- packing ----


def language_models(vocab_size):
    config = GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    return {"llama": None, "gpt2": GPT2LMHeadModel(config)}  # rotary and absolute positions


@pytest.mark.parametrize("as_chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
@pytest.mark.parametrize("language", ["llama", "gpt2"])
def test_packed_texts_have_the_loss_of_single_ones(language, fusion, attention, as_chat):
    processor = make_processor(fusion, "both")
    torch.manual_seed(0)
    model = make_model(
        processor.image_token_id,
        fusion,
        language_models(processor.image_token_id)[language],
        experts_as="both",
        image_token_id=processor.image_token_id,
    )
    model.language_model.set_attn_implementation(attention)
    uneven = [rows()[0], row("b", text=QUESTIONS["b"][0][:2], suffix=QUESTIONS["b"][1][:2])]
    packed = collate(processor, uneven, pack=True, as_chat=as_chat)
    assert packed["input_ids"].shape[0] == packed["pixel_values"].shape[0] == 2
    single = [collate(processor, [own], as_chat=as_chat) for own in uneven]
    counts = [(batch["labels"] != -100).sum() for batch in single]
    with torch.no_grad():
        losses = [model(**batch).loss for batch in single]
        expected = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
        found = model(**packed).loss
    assert (packed["labels"] != -100).sum() == sum(counts)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_texts_can_be_packed_after_words_alone(attention):
    processor = PrismerLMProcessor.from_backbones(make_tokenizer(), None, EXPERTS, experts_as="words")
    model = make_model(processor.image_token_id, vision=False, experts_as="words")
    model.language_model.set_attn_implementation(attention)
    packed, single = (collate(processor, rows()[:1], pack=pack) for pack in (True, False))
    assert sorted(packed) == ["attention_mask", "input_ids", "labels", "position_ids"]
    torch.testing.assert_close(model(**packed).loss, model(**single).loss, atol=1e-4, rtol=1e-5)


def test_a_packed_text_sees_the_image_and_itself_only():
    processor = make_processor()
    batch = collate(processor, rows()[:1], pack=True)
    ids, mask = batch["input_ids"][0], batch["attention_mask"][0, 0]
    assert (ids == processor.image_token_id).sum() == 7 and batch["attention_mask"].dtype == torch.bool
    starts = (batch["position_ids"][0].diff() < 0).nonzero()[:, 0] + 1
    assert len(starts) == 2
    second, third = starts.tolist()
    assert mask[second:, :7].all(), "all see the image"
    assert not mask[second, 7:second].any() and not mask[third, second:third].any(), "none sees another text"
    assert mask[third, third] and not mask[third, third + 1]


def test_a_packed_batch_trains_the_experts():
    processor = make_processor()
    model = make_model(processor.image_token_id).train()
    model(**collate(processor, rows(), pack=True)).loss.backward()
    assert model.model.experts.expert_stems["depth"].projection.weight.grad.abs().sum() > 0


def test_conversations_about_an_image_can_be_packed():
    processor = make_processor()
    messages = [conversation("What shape is it?", "A triangle."), conversation("Is it red?", "no")]
    batch = collate(processor, [row("a", messages=messages)], pack=True)
    assert learned(processor, batch) == ["A triangle.<|im_end|>no<|im_end|>"]


def test_texts_that_cannot_be_packed_are_named():
    processor = make_processor()
    with pytest.raises(ValueError, match="the texts of row 0 cannot be packed: they need the same text up to"):
        collate(processor, [row("a", text=["a <image>", "dog <image>"], suffix=["b", "c"])], pack=True)
    with pytest.raises(ValueError, match="cannot be packed: .* each of them text of its own before what is learned"):
        collate(processor, [row("a", suffix=["A dog.", "A circle."])], pack=True)
    with pytest.raises(ValueError, match="pack=True is for training; with_suffix=False needs rows of their own"):
        DataCollatorForPrismerLM(processor, pack=True, with_suffix=False)


# ---- trl ----


@pytest.mark.parametrize("own_collator", [True, False], ids=["ours", "trl's"])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_the_sft_trainer_takes_conversations(fusion, own_collator, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    processor = make_processor(fusion)
    model = make_model(processor.image_token_id, fusion)
    processor.experts = None
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    columns = {"messages": [conversation("a", "A triangle.")] * 4, "images": [[Image.fromarray(IMAGE)]] * 4}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.02,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        data_collator=DataCollatorForPrismerLM(processor, experts=[]) if own_collator else None,
        train_dataset=datasets.Dataset.from_dict(columns, features),
        processing_class=processor,
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and not any("language_model" in name or "vision_encoders" in name for name in moved)
