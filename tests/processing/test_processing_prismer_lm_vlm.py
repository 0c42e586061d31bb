"""The processor of a vision-language model prepares text and images as ever; the experts are added."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PaliGemmaProcessor, SiglipImageProcessor, pipeline

from modeling_prismer import DataCollatorForPrismerLM, PrismerLMProcessor
from tests.training_examples.tiny_contenders import BUILDERS

from .tiny_lm_processors import (
    EXPERTS,
    EXPERTS_CONFIG,
    IMAGE,
    LABELS,
    OTHER_IMAGE,
    OTHER_LABELS,
    learned,
    make_model,
    make_tokenizer,
    make_vlm,
    make_vlm_processor,
)


QUESTION = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is it?"}]}]
ANSWER = {"role": "assistant", "content": "A triangle."}
CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
FUSIONS = pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])


def wrap(fusion="prefix", experts_as="tokens", processor=None):
    return PrismerLMProcessor.from_backbones(
        processor or make_vlm_processor(),
        experts=EXPERTS,
        fusion=fusion,
        experts_as=experts_as,
        experts_config=EXPERTS_CONFIG,
    )


@pytest.fixture(scope="module")
def models():
    return {
        fusion: make_model(None, fusion, make_vlm(make_vlm_processor()), vision=False, image_token_id=token)
        for fusion, token in ((fusion, wrap().image_token_id) for fusion in ("prefix", "cross_attention"))
    }


@FUSIONS
def test_the_experts_follow_each_image(fusion):
    own = make_vlm_processor().apply_chat_template(QUESTION, **CHAT)
    processor = wrap(fusion)
    inputs = processor.apply_chat_template(QUESTION, expert_labels=LABELS, **CHAT)
    text = processor.decode(inputs["input_ids"][0])
    assert f"{VISION}{'<experts>' * (3 if fusion == 'prefix' else 1)}What is it?" in text
    assert torch.equal(inputs["pixel_values"], own["pixel_values"]) and inputs["expert_mask"].all()
    kept = inputs["input_ids"] != processor.image_token_id
    assert torch.equal(inputs["input_ids"][kept], own["input_ids"][0]), "the rest is as without experts"
    assert torch.equal(inputs["mm_token_type_ids"][kept], own["mm_token_type_ids"][0])


def test_words_come_after_the_image_that_they_are_about():
    processor = wrap(experts_as="words")
    inputs = processor.apply_chat_template(QUESTION, expert_labels=LABELS, **CHAT)
    words = 'Objects: 1 dog (left). Text: "stop" (bottom left).'
    assert f"{VISION}{words}\nWhat is it?" in processor.decode(inputs["input_ids"][0])
    assert "depth_values" not in inputs


@FUSIONS
def test_the_model_takes_what_the_processor_makes(fusion, models):
    processor, model = wrap(fusion), models[fusion]
    inputs = processor.apply_chat_template(QUESTION, expert_labels=LABELS, **CHAT)
    without = processor.apply_chat_template(QUESTION, expert_labels=OTHER_LABELS, **CHAT)
    assert not torch.allclose(model(**inputs).logits, model(**without).logits, atol=1e-3)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert len(processor.post_process_generation(generated, inputs["input_ids"].shape[1])) == 1


@FUSIONS
def test_conversations_and_suffixes_are_learned_alike(fusion, models):
    processor, model = wrap(fusion), models[fusion]
    chat = processor.prepare_conversations([*QUESTION, ANSWER], expert_labels=LABELS)
    assert learned(processor, chat) == ["A triangle.<|im_end|>"]
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    suffixed = processor(IMAGE, prompt, suffix="A triangle.", expert_labels=LABELS)
    assert learned(processor, suffixed) == ["A triangle.<|im_end|>"]
    assert model(**chat).loss.item() == pytest.approx(model(**suffixed).loss.item(), abs=1e-4)


@FUSIONS
def test_classify_ranks_as_the_loss_of_each_label(fusion, models):
    processor, model = wrap(fusion), models[fusion]
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    (ranking,) = model.classify(processor, IMAGE, ["A triangle", "no dog", "yes"], text=prompt, expert_labels=LABELS)
    for choice in ranking:
        inputs = processor(IMAGE, prompt, suffix=choice["label"], expert_labels=LABELS)
        assert model(**inputs).loss.item() == pytest.approx(-choice["score"], abs=1e-3)


def test_a_batch_can_have_rows_without_images(models):
    processor = wrap()
    inputs = processor.prepare_conversations(
        [[*QUESTION, ANSWER], [{"role": "user", "content": "yes or no?"}, {"role": "assistant", "content": "no"}]],
        expert_labels=LABELS,
    )
    assert learned(processor, inputs) == ["A triangle.<|im_end|>", "no<|im_end|>"]
    assert torch.isfinite(models["prefix"](**inputs).loss)


def test_prompts_about_one_image_share_its_experts(models):
    processor = wrap()
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor([IMAGE, OTHER_IMAGE], [[prompt] * 2] * 2, experts=[])
    assert inputs["image_grid_thw"].shape[0] == 4 and inputs["depth_values"].shape[0] == 2
    assert torch.isfinite(models["prefix"](**inputs).logits).all()


@FUSIONS
def test_what_was_saved_is_loaded(fusion, tmp_path, models):
    processor = wrap(fusion)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.vlm_processor.tokenizer is loaded.tokenizer and loaded.to_dict() == processor.to_dict()
    expected, found = (own.apply_chat_template(QUESTION, expert_labels=LABELS, **CHAT) for own in (processor, loaded))
    assert list(expected) == list(found) and all(torch.equal(expected[name], found[name]) for name in expected)
    assert set(found) <= set(loaded.model_input_names)
    pipe = pipeline("image-text-to-text", model=models[fusion], processor=loaded)
    (answer,) = pipe(text=QUESTION, max_new_tokens=3, return_full_text=False, processor_kwargs={"experts": []})
    assert "What is it?" not in answer["generated_text"]


def test_the_collator_takes_a_vision_language_model(models):
    processor = wrap()
    messages = [{"role": "user", "content": "What is it?"}, ANSWER]
    rows = [{"images": [IMAGE], "messages": messages}, {"images": [OTHER_IMAGE], "messages": messages}]
    batch = DataCollatorForPrismerLM(processor, experts=[])(rows)
    assert learned(processor, batch) == ["A triangle.<|im_end|>"] * 2
    assert torch.isfinite(models["prefix"](**batch).loss)
    with pytest.raises(ValueError, match="pack=True is not for vision-language models"):
        DataCollatorForPrismerLM(processor, pack=True)


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_experts_follow_an_image_with_marks_around_it(kind, tmp_path):
    own = AutoProcessor.from_pretrained(BUILDERS[kind](tmp_path))
    expected = own.apply_chat_template(QUESTION, **CHAT)
    processor = wrap(processor=AutoProcessor.from_pretrained(tmp_path))
    inputs = processor.apply_chat_template(QUESTION, expert_labels=LABELS, **CHAT)
    around = "<fake_token_around_image>"
    text = f"{around}<global-img><image>{around}<experts><experts><experts>What is it?"
    assert text in processor.decode(inputs["input_ids"][0])
    kept = inputs["input_ids"] != processor.image_token_id
    assert torch.equal(inputs["input_ids"][kept], expected["input_ids"][0])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    base = AutoModelForImageTextToText.from_pretrained(tmp_path)
    model = make_model(None, "prefix", base, vision=False, image_token_id=processor.image_token_id)
    without = processor.apply_chat_template(QUESTION, expert_labels=OTHER_LABELS, **CHAT)
    assert not torch.allclose(model(**inputs).logits, model(**without).logits, atol=1e-3)
    answered = processor.prepare_conversations([*QUESTION, ANSWER], expert_labels=LABELS)
    assert learned(processor, answered) == ["A triangle.<|im_end|>"]


def test_paligemma_keeps_its_line_break_and_token_types():
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    tokenizer = make_tokenizer(["<image>"], None, bos_token="<|im_start|>")
    processor = wrap(processor=PaliGemmaProcessor(image_processor, tokenizer))
    inputs = processor(IMAGE, "what shape", suffix="a triangle", experts=[])
    text = "<image><image><image><image><|im_start|><experts><experts><experts>what shape\na triangle<|im_end|>"
    assert processor.decode(inputs["input_ids"][0]) == text
    assert learned(processor, inputs) == ["a triangle<|im_end|>"]
    assert torch.equal(inputs["token_type_ids"][0] == 1, inputs["labels"][0] != -100)
    candidates = processor.prepare_candidates(["a triangle"], task=processor.task_for("what shape"))
    assert torch.equal(candidates["candidate_ids"][0], inputs["labels"][0][inputs["labels"][0] != -100])
    assert "labels" not in processor(IMAGE, "what shape", experts=[])
