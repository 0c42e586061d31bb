"""One call turns images and prompts into the inputs of PrismerLM; experts come as tokens, as words, or both."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    Dinov2Config,
    SiglipVisionConfig,
    pipeline,
)

from modeling_prismer import PrismerImageProcessor, PrismerLMConfig, PrismerLMProcessor
from modeling_prismer.processing.encoder_settings import read_encoder_settings
from modeling_prismer.processing.experts import CannyEdges

from .tiny_lm_processors import (
    EXPERTS,
    EXPERTS_CONFIG,
    IMAGE,
    LABELS,
    OTHER_IMAGE,
    OTHER_LABELS,
    labels_of,
    learned,
    make_model,
    make_processor,
    make_tokenizer,
)


NUM_FEATURES = 4 + 3  # patches and latents
QUESTION = "What shape is it?"


def ids_of(processor, text):
    return processor.tokenizer(text)["input_ids"]


def call(processor, *args, **kwargs):
    return processor(*args, expert_labels=LABELS, **kwargs)


# ---- prompts and images ----


def test_an_image_comes_before_its_prompt():
    processor = make_processor()
    inputs = call(processor, IMAGE, QUESTION)
    placeholders = [processor.image_token_id] * NUM_FEATURES
    assert inputs["input_ids"].tolist() == [placeholders + ids_of(processor, QUESTION)]
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == QUESTION


def test_cross_attention_needs_no_placeholder_for_one_image():
    processor = make_processor("cross_attention")
    assert call(processor, IMAGE, QUESTION)["input_ids"].tolist() == [ids_of(processor, QUESTION)]
    assert call(processor, IMAGE, f"<image>{QUESTION}")["input_ids"].tolist() == [
        [processor.image_token_id, *ids_of(processor, QUESTION)]
    ]


def test_the_placeholder_lies_after_the_tokens_of_the_tokenizer():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    assert make_processor(tokenizer=tokenizer).image_token_id == size
    assert make_processor(tokenizer=tokenizer).image_token_id == size, "once"
    own = make_tokenizer(["<image>"])
    assert make_processor(tokenizer=own).image_token_id == own.convert_tokens_to_ids("<image>") == 3


def test_every_encoder_gets_its_own_images():
    processor = make_processor()
    inputs = call(processor, IMAGE, QUESTION)
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and inputs["pixel_values_1"].shape == (1, 3, 28, 28)
    assert inputs["depth_values"].shape == (1, 1, 32, 32) and inputs["expert_mask"].all()
    grey = np.full((20, 20, 3), 255, np.uint8)
    inputs = processor(grey, QUESTION, experts=[])
    assert inputs["pixel_values"].mean() == 1 and inputs["pixel_values_1"][0, 0].mean() == pytest.approx(2.2489, 1e-3)
    assert set(inputs) <= set(processor.model_input_names)


def test_the_whole_image_is_seen_as_by_the_experts():
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :8] = 255  # would be lost in a crop of the middle
    encoder = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    settings = read_encoder_settings(encoder)
    pixels = PrismerImageProcessor(**settings)(image)["pixel_values"]
    assert settings["size"] == {"height": 32, "width": 32}
    assert pixels[0, 0, 16, 0] > 1.5 > pixels[0, 0, 16, 4]


def test_few_shot_prompts_have_images_between_texts():
    processor = make_processor()
    inputs = processor([IMAGE, OTHER_IMAGE], "<image>a dog <image>a", expert_labels=[LABELS, OTHER_LABELS])
    one = [processor.image_token_id] * NUM_FEATURES
    assert inputs["input_ids"].tolist() == [[*one, *ids_of(processor, "a dog "), *one, *ids_of(processor, "a")]]
    assert inputs["pixel_values"].shape[0] == 2 and inputs["expert_mask"].tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize(
    "images, text, rows, count",
    [
        (1, "a", ["<image>a"], 1),
        (2, "a", ["<image>a"] * 2, 2),
        (2, ["a", "dog"], ["<image>a", "<image>dog"], 2),
        (1, ["a", "dog"], ["<image>a", "<image>dog"], 1),
        (2, [["a", "dog"], ["yes", "no"]], ["<image>a", "<image>dog", "<image>yes", "<image>no"], 2),
        (2, ["a <image>dog", "<image>no"], ["a <image>dog", "<image>no"], 2),
        (2, ["<image>a<image>", "no"], ["<image>a<image>", "no"], 2),
        ([2], ["a"], ["<image><image>a"], 2),
        ([2, 1], ["a", "no"], ["<image><image>a", "<image>no"], 3),
        ([1, 0], ["a", "no"], ["<image>a", "no"], 1),
        ([2, 2], [["a", "dog"], ["yes", "no"]], [f"<image><image>{text}" for text in ("a", "dog", "yes", "no")], 4),
        (0, ["a", "dog"], ["a", "dog"], 0),
    ],
)
def test_prompts_share_the_images_as_their_layout_says(images, text, rows, count):
    processor = make_processor()
    nested = images if isinstance(images, int) else [[IMAGE] * number for number in images]
    nested = [IMAGE] * nested if isinstance(nested, int) else nested
    inputs = processor(nested or None, text, experts=[], padding=False, return_tensors=None)
    found = [processor.decode(row).replace("<image>" * NUM_FEATURES, "<image>") for row in inputs["input_ids"]]
    assert found == rows
    assert len(inputs.get("pixel_values", ())) == count
    inputs = processor(nested or None, text, experts=[])
    model = make_model(processor.image_token_id)
    assert torch.isfinite(model(**inputs).logits).all(), "and the model shares them in the same way"


def test_prompts_share_several_images_in_the_model():
    processor = make_processor()
    model = make_model(processor.image_token_id)
    pairs = [[IMAGE, OTHER_IMAGE], [OTHER_IMAGE, IMAGE]]
    shared = processor(pairs, [["a dog", "no cat"], ["a cat", "no dog"]], experts=[])
    alone = processor([pairs[0], pairs[0], pairs[1], pairs[1]], ["a dog", "no cat", "a cat", "no dog"], experts=[])
    assert shared["pixel_values"].shape[0] == 4 and alone["pixel_values"].shape[0] == 8
    torch.testing.assert_close(model(**shared).logits, model(**alone).logits, atol=1e-4, rtol=1e-4)


def test_shorter_prompts_are_padded_on_the_left():
    processor = make_processor()
    inputs = processor([IMAGE] * 2, [QUESTION, "a"], experts=[])
    padding = inputs["attention_mask"][1] == 0
    assert padding[0] and not padding[-1] and (inputs["input_ids"][1][padding] == 0).all()
    assert processor(IMAGE, "a", experts=[], pad_to_multiple_of=16)["input_ids"].shape[1] == 16
    assert processor(IMAGE, "a", experts=[], padding="max_length", max_length=20)["input_ids"].shape[1] == 20
    assert processor([IMAGE] * 2, [QUESTION, "a"], experts=[], padding_side="right")["attention_mask"][1, -1] == 0


def test_the_beginning_token_of_the_tokenizer_comes_first():
    tokenizer = make_tokenizer(bos_token="<|im_start|>")
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    inputs = make_processor(tokenizer=tokenizer)(IMAGE, "a", experts=[])
    assert inputs["input_ids"][0, 0] == 1 and (inputs["input_ids"] == 1).sum() == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"images": 2, "text": "<image>a <image>b <image>"}, ValueError, "text has 3 <image> for 2 images; one for e"),
        ({"images": [1, 1], "text": ["a", "<image><image>"]}, ValueError, "text 1 has 2 <image> for 1 images"),
        ({"images": 0, "text": "<image>a"}, ValueError, "text has 1 <image> for 0 images"),
        ({"images": 2, "text": ["a"] * 3}, ValueError, "3 texts for 2 images; as many texts as images, or a multiple"),
        ({"images": 2, "text": [["a"]]}, ValueError, "text has 1 lists for 2 images; one list for each image"),
        ({"images": 2, "text": [["a"], ["a", "b"]]}, ValueError, "text has lists of 1, 2 entries; every image needs"),
        ({"images": 1, "text": 3}, TypeError, "text must be a string, a list of strings, or a list of lists"),
        ({"images": 1, "text": []}, TypeError, "text must be a string, .* none is empty"),
        ({"images": 1, "text": ["a", "b"], "suffix": "c"}, ValueError, "1 suffixes for 2 prompts; a string for each"),
        ({"images": 1, "text": [["a"]], "suffix": [["a", "b"]]}, ValueError, r"suffix has lists of \[2\] entries"),
        ({"images": 1, "text": "a", "experts": ["dept"]}, ValueError, "experts has 'dept'; the config's experts are"),
        ({"images": 1, "text": "a", "expert_labels": [{}] * 2}, ValueError, "expert_labels has 2 entries for 1 im"),
        ({"images": 0, "text": "a", "expert_labels": [{}]}, ValueError, "expert_labels is given without images"),
        (
            {"images": 1, "text": "a dog " * 300},
            ValueError,
            r"text 0 has \d+ tokens, 7 of them placeholders of images",
        ),
        (
            {"images": 1, "text": QUESTION, "max_length": 9},
            ValueError,
            "max_length is 9. Shorten the text, or pass tr",
        ),
        ({"images": 1, "text": "a<image>", "max_length": 4, "truncation": True}, ValueError, "cuts the end but no im"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, error, message):
    processor = make_processor(tokenizer=make_tokenizer(model_max_length=400))
    images = arguments["images"]
    nested = [IMAGE] * images if isinstance(images, int) else [[IMAGE] * number for number in images]
    with pytest.raises(error, match=message):
        processor(**{**arguments, "images": nested or None})


def test_cross_attention_to_several_images_needs_their_places():
    processor = make_processor("cross_attention")
    with pytest.raises(ValueError, match="text 0 is about 2 images: with fusion='cross_attention' it needs <image>"):
        processor([[IMAGE, IMAGE]], ["a"])
    with pytest.raises(ValueError, match="text 0 is empty; with fusion='cross_attention' it needs text"):
        processor(IMAGE)


def test_a_row_without_an_image_sees_no_image_of_another_row():
    processor = make_processor("cross_attention")
    model = make_model(processor.image_token_id, "cross_attention")
    inputs = processor([[IMAGE], []], ["yes or no?", "a dog"], experts=[])
    with torch.no_grad():
        rows = model(**inputs).logits
        alone = model(**processor(None, ["a dog"])).logits
        seen = model(**processor(IMAGE, "<image>yes or no?", experts=[])).logits
    torch.testing.assert_close(rows[1, -1], alone[0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows[0, -1], seen[0, -1], atol=1e-4, rtol=1e-4)


def test_a_wrong_text_is_found_before_the_experts_run():
    edges = CannyEdges()
    processor = PrismerLMProcessor.from_backbones(make_tokenizer(), experts=[edges])
    with pytest.raises(ValueError, match="max_length is 10"):
        processor(IMAGE, QUESTION, max_length=10)
    assert edges.num_images == 0


def test_truncation_cuts_the_end():
    processor = make_processor()
    whole = processor(IMAGE, QUESTION, experts=[])["input_ids"]
    assert torch.equal(
        processor(IMAGE, QUESTION, experts=[], max_length=9, truncation=True)["input_ids"], whole[:, :9]
    )


def test_truncation_that_cuts_all_of_the_suffix_warns(warnings_once):
    processor = make_processor()
    inputs = processor(IMAGE, QUESTION, suffix="red", experts=[], max_length=40, truncation=True)
    assert (inputs["labels"] != -100).any() and warnings_once() == []
    inputs = processor(IMAGE, QUESTION, suffix="red", experts=[], max_length=9, truncation=True)
    assert (inputs["labels"] == -100).all()
    (warning,) = warnings_once()
    assert "cut to 9, it has none to learn" in warning and "text 0 has" in warning


def test_padding_and_truncation_have_the_tokenizers_names():
    processor = make_processor(tokenizer=make_tokenizer(model_max_length=40))
    with pytest.raises(ValueError, match="max_length is 9"):
        processor(IMAGE, QUESTION, experts=[], max_length=9, truncation="do_not_truncate")
    assert processor(IMAGE, QUESTION, experts=[], padding="max_length")["input_ids"].shape == (1, 40)
    with pytest.raises(ValueError, match="padding='max_length' needs max_length"):
        make_processor()(IMAGE, QUESTION, experts=[], padding="max_length")


def test_unknown_tasks_are_named():
    processor = make_processor()
    for ask in (
        lambda: processor(IMAGE, QUESTION, suffix="yes", task="vqa", experts=[]),
        lambda: processor.prepare_candidates(["yes"], task="txt"),
    ):
        with pytest.raises(ValueError, match="task is '(vqa|txt)'; accepted are 'text' and 'chat'"):
            ask()
    with pytest.raises(ValueError, match="task is 'foo'; accepted are 'caption', 'vqa'"):
        processor.prompt_for("foo")


# ---- what is learned ----


def test_the_suffix_and_its_end_are_learned():
    processor = make_processor()
    inputs = processor([IMAGE] * 2, [QUESTION, "a"], suffix=["A triangle", "dog"], experts=[])
    assert learned(processor, inputs) == [" A triangle<|im_end|>", " dog<|im_end|>"]
    prompt = processor(IMAGE, QUESTION, experts=[])["input_ids"][0]
    assert torch.equal(inputs["input_ids"][0, : len(prompt)], prompt), "generation starts from the same prompt"
    assert inputs["attention_mask"][1, -1] == 0 and inputs["labels"][1, -1] == -100, "padded on the right"


@pytest.mark.parametrize("prompt, expected", [("", "yes"), ("a\n", "yes"), ("a<|im_end|>", "yes"), ("a", " yes")])
def test_suffix_follows_white_space_and_special_tokens_directly(prompt, expected):
    processor = make_processor()
    inputs = processor(IMAGE, prompt, suffix=" yes ", experts=[])
    assert learned(processor, inputs) == [f"{expected}<|im_end|>"]
    inputs = processor(IMAGE, prompt, suffix="yes", experts=[], task="text")
    assert learned(processor, inputs) == [" yes<|im_end|>"]


def test_an_image_can_have_several_suffixes():
    processor = make_processor()
    inputs = processor([IMAGE, OTHER_IMAGE], suffix=["a", "b", "c", "d"], experts=[])
    assert learned(processor, inputs) == [f"{text}<|im_end|>" for text in "abcd"]
    nested = processor([IMAGE, OTHER_IMAGE], "dog", suffix=[["a", "b"], ["c", "d"]], experts=[])
    assert learned(processor, nested) == [f" {text}<|im_end|>" for text in "abcd"]


def test_control_tokens_in_a_suffix_are_text():
    processor = make_processor()
    inputs = processor(IMAGE, "a", suffix="<image><|im_end|>b", experts=[])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == NUM_FEATURES
    assert (inputs["input_ids"] == 2).sum() == 1
    assert learned(processor, inputs) == [" <image><|im_end|>b<|im_end|>"]


# ---- experts ----


def test_experts_as_words_leave_the_network_its_pixels():
    processor = make_processor(experts_as="words")
    inputs = call(processor, IMAGE, QUESTION)
    assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values", "pixel_values_1"]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4, "patches alone"
    words = 'Objects: 1 dog (left). Text: "stop" (bottom left).'
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == f"{words}\n{QUESTION}"
    assert processor.write_experts([LABELS, OTHER_LABELS]) == [words, ""]
    assert torch.isfinite(make_model(processor.image_token_id, experts_as="words")(**inputs).logits).all()


def test_experts_can_come_as_words_and_tokens():
    processor = make_processor(experts_as="both")
    inputs = call(processor, IMAGE, QUESTION)
    assert inputs["expert_mask"].all() and (inputs["input_ids"] == processor.image_token_id).sum() == NUM_FEATURES
    assert "1 dog" in processor.decode(inputs["input_ids"][0])
    left_out = call(processor, IMAGE, QUESTION, experts=["ocr"])
    assert processor.decode(left_out["input_ids"][0], skip_special_tokens=True) == (
        f'Text: "stop" (bottom left).\n{QUESTION}'
    )


def test_words_follow_the_image_that_they_are_about():
    processor = make_processor(experts_as="words")
    labels = [LABELS, {"ocr": {**labels_of(30, 20)["ocr"], "words": ["go"]}}]
    inputs = processor([IMAGE, OTHER_IMAGE], "<image>A. <image>B.", expert_labels=labels)
    text = processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert text == 'Objects: 1 dog (left). Text: "stop" (bottom left).\nA. Text: "go" (bottom left).\nB.'


def test_words_come_before_the_question_in_cross_attention():
    processor = make_processor("cross_attention", "words")
    assert processor.decode(call(processor, IMAGE, "a")["input_ids"][0]).endswith("(bottom left).\na")


def test_a_missing_expert_writes_nothing():
    processor = make_processor(experts_as="words")
    inputs = processor(IMAGE, QUESTION, expert_labels=OTHER_LABELS)
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == QUESTION


def test_words_have_a_limit_of_tokens():
    processor = make_processor(experts_as="words", max_word_tokens=30)
    whole = make_processor(experts_as="words").write_experts([LABELS])[0]
    (text,) = processor.write_experts([LABELS])
    assert 0 < len(ids_of(processor, text)) <= 30 < len(ids_of(processor, whole)) and text in whole


@pytest.mark.parametrize("word", ["<image>", "<|im_end|>", "<im<image>age>", "<|im_<|im_end|>end|>"])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_words_that_were_read_are_no_control_tokens(word, fusion):
    processor = make_processor(fusion, "both")
    labels = {**LABELS, "ocr": {**LABELS["ocr"], "words": [word]}}
    expected, found = (
        processor(IMAGE, QUESTION, expert_labels=own)["input_ids"][0].tolist() for own in (LABELS, labels)
    )
    for token in range(3):
        assert expected.count(token) == found.count(token)
    assert expected.count(processor.image_token_id) == found.count(processor.image_token_id)


def test_live_experts_run_and_name_their_classes():
    class Boxes(CannyEdges):
        type = "boxes_for_a_test"
        name, kind, channels, instances, num_classes = "detection", "label", 8, True, 3
        class_names = ["dog", "cat", "ball"]

        def run(self, images):
            return [labels_of(image.height, image.width)["detection"] for image in images]

    processor = PrismerLMProcessor.from_backbones(make_tokenizer(), experts=[Boxes()], experts_as="words")
    inputs = processor(IMAGE, QUESTION)
    assert processor.image_seq_length == 0 and sorted(inputs) == ["attention_mask", "input_ids"]
    assert processor.decode(inputs["input_ids"][0]) == f"Objects: 1 dog (left).\n{QUESTION}"
    assert processor.image_processor.experts[0]["class_names"] == Boxes.class_names


# ---- answers and candidates ----


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_classify_ranks_as_the_loss_of_each_label(fusion):
    processor = make_processor(fusion)
    model = make_model(processor.image_token_id, fusion)
    labels = ["a triangle", "circle", "yes or no"]
    images, given = [IMAGE, OTHER_IMAGE], {"expert_labels": [LABELS, OTHER_LABELS]}
    ranking = model.classify(processor, images, labels, text=[QUESTION, "Is it red?"], **given)
    for row, question in enumerate((QUESTION, "Is it red?")):
        assert [choice["score"] for choice in ranking[row]] == sorted((c["score"] for c in ranking[row]), reverse=True)
        for choice in ranking[row]:
            own = {"expert_labels": given["expert_labels"][row]}
            inputs = processor(images[row], question, suffix=choice["label"], **own)
            assert model(**inputs).loss.item() == pytest.approx(-choice["score"], abs=1e-3)


def test_candidates_have_the_tokens_of_a_suffix():
    processor = make_processor()
    for prompt in ("a", "a\n"):
        inputs = processor(IMAGE, prompt, suffix="A triangle", experts=[])
        candidates = processor.prepare_candidates(["A triangle", "no"], task=processor.task_for(prompt))
        expected = inputs["labels"][0][inputs["labels"][0] != -100]
        assert torch.equal(candidates["candidate_ids"][0], expected)
        assert candidates["candidate_mask"][1, -1] == 0
    with pytest.raises(ValueError, match="some texts end with white space or a special token and some do not"):
        processor.task_for(["a", "a\n"])
    with pytest.raises(ValueError, match="answers is empty or holds an empty text"):
        processor.prepare_candidates([" "])


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_generations_lose_prompt_and_special_tokens(fusion):
    processor = make_processor(fusion)
    model = make_model(processor.image_token_id, fusion)
    inputs = processor([IMAGE, OTHER_IMAGE], [QUESTION, "a"], experts=[])
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(generated[:, :length], inputs["input_ids"]), "the prompt comes back with its placeholders"
    expected = [text.strip() for text in processor.batch_decode(generated[:, length:], skip_special_tokens=True)]
    for ids in (generated, generated.numpy(), generated.tolist()):
        assert processor.post_process_generation(ids, length) == expected


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_the_pipeline_takes_texts_and_messages(fusion):
    processor = make_processor(fusion)
    pipe = pipeline("image-text-to-text", model=make_model(processor.image_token_id, fusion), processor=processor)
    image = Image.fromarray(IMAGE)
    settings = {"max_new_tokens": 3, "generate_kwargs": {"do_sample": False}}
    (answer,) = pipe(image, QUESTION, experts=[], **settings)
    assert answer["generated_text"].startswith(QUESTION)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    processor_kwargs = {"experts": []}
    (answer,) = pipe(text=messages, return_full_text=False, processor_kwargs=processor_kwargs, **settings)
    assert isinstance(answer["generated_text"], str) and QUESTION not in answer["generated_text"]
    answers = pipe(text=[messages, messages], batch_size=2, processor_kwargs=processor_kwargs, **settings)
    assert answers[1][0]["generated_text"][:-1] == messages


# ---- from backbones ----


def test_processor_from_the_models_configuration_agrees_with_it():
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), experts_as="both")
    processor = PrismerLMProcessor.from_backbones(tokenizer, config=model.config)
    other = make_processor(experts_as="both")
    assert processor.to_dict() == other.to_dict()
    assert processor.image_token_id == model.config.image_token_id
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings
    inputs = call(processor, IMAGE, QUESTION)
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_configuration_with_another_placeholder_is_refused():
    model = make_model(500)
    with pytest.raises(ValueError, match="config.image_token_id is 500, but the tokenizer gives <image> the id"):
        PrismerLMProcessor.from_backbones(make_tokenizer(), config=model.config)


def test_ids_and_folders_of_backbones_are_loaded(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    language, vision = tmp_path / "language", tmp_path / "vision"
    model.language_model.save_pretrained(language)
    tokenizer.save_pretrained(language)
    model.model.vision_encoders[0].save_pretrained(vision)
    CLIPImageProcessor(image_mean=[0.1] * 3, resample=2).save_pretrained(vision)
    processor = PrismerLMProcessor.from_backbones(str(language), str(vision), EXPERTS)
    assert processor.image_processor.image_mean[0] == 0.1 and processor.image_processor.resample == 2
    assert processor.image_processor.size == {"height": 32, "width": 32}, "that of the network, not of the file"
    assert processor.image_seq_length == 4 + 64 and processor.tokenizer.model_max_length == 512


@pytest.mark.parametrize(
    "config, side, mean",
    [
        (SiglipVisionConfig(image_size=64), 64, 0.5),
        (Dinov2Config(image_size=56), 56, 0.485),
        ({"size": 48, "image_mean": [0.3] * 3}, 48, 0.3),
    ],
)
def test_encoders_without_files_have_settings_of_their_family(config, side, mean):
    settings = read_encoder_settings(config)
    assert settings["size"] == {"height": side, "width": side} and settings["image_mean"][0] == mean


def test_parts_that_are_missing_are_named():
    with pytest.raises(ValueError, match="config is missing: vision has encoders whose configurations are not known"):
        PrismerLMProcessor.from_backbones(make_tokenizer(), {"size": 32})
    with pytest.raises(ValueError, match="language is None; an id, a folder, a tokenizer or the processor of"):
        PrismerLMProcessor.from_backbones(None)
    with pytest.raises(TypeError, match="vision has a int; accepted are ids and folders of vision encoders, models"):
        read_encoder_settings(3)
    config = PrismerLMConfig(vision_config=[SiglipVisionConfig()])
    with pytest.raises(ValueError, match="2 vision encoders are given; the config has 1"):
        PrismerLMProcessor.from_backbones(make_tokenizer(), [{"size": 32}] * 2, config=config)
    with pytest.raises(ValueError, match="config has all fields of the model; grid_size cannot be given beside it"):
        PrismerLMProcessor.from_backbones(make_tokenizer(), config=config, grid_size=3)


def test_settings_and_tokenizers_are_checked():
    image_processor = PrismerImageProcessor(experts=EXPERTS)
    with pytest.raises(ValueError, match="fusion='late'; accepted are 'prefix', 'cross_attention'"):
        PrismerLMProcessor(image_processor, make_tokenizer(), fusion="late")
    with pytest.raises(ValueError, match="experts_as='maps'; accepted are 'tokens', 'words', 'both'"):
        PrismerLMProcessor(image_processor, make_tokenizer(), experts_as="maps")
    with pytest.raises(ValueError, match="the tokenizer has neither pad_token nor eos_token"):
        PrismerLMProcessor(image_processor, make_tokenizer(eos_token=None, pad_token=None))
    assert PrismerLMProcessor(image_processor, make_tokenizer(pad_token=None)).tokenizer.pad_token == "<|im_end|>"


# ---- saving ----


@pytest.mark.parametrize("load", [PrismerLMProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_what_was_saved_is_loaded(load, tmp_path):
    experts = [CannyEdges(sigma=2.0)]
    settings = {"experts_as": "both", "word_positions": "boxes", "max_word_tokens": 50}
    saved = PrismerLMProcessor.from_backbones(
        make_tokenizer(), [SiglipVisionConfig(image_size=32), Dinov2Config(image_size=28)], experts, **settings
    )
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is PrismerLMProcessor and loaded.experts["edge"].sigma == 2.0
    expected, found = (processor(IMAGE, QUESTION, suffix="a") for processor in (saved, loaded))
    assert list(expected) == list(found) and all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.to_dict() == saved.to_dict()
    assert load(tmp_path, experts=None).experts is None


def test_model_and_processor_share_a_folder(tmp_path):
    processor = make_processor()
    make_model(processor.image_token_id).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert torch.isfinite(model(**call(loaded, IMAGE, QUESTION)).logits).all()
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    (answer,) = pipe(Image.fromarray(IMAGE), QUESTION, experts=[], max_new_tokens=2)
    assert answer["generated_text"].startswith(QUESTION)
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<image>") == processor.image_token_id


def test_a_saved_folder_works_where_the_package_is_not_installed(tmp_path, monkeypatch):
    for cls in (PrismerLMProcessor, PrismerImageProcessor):
        monkeypatch.setattr(cls, "_auto_class", None)
        cls.register_for_auto_class()
    processor = make_processor(experts_as="both")
    processor.save_pretrained(tmp_path / "saved")
    np.savez(tmp_path / "expected.npz", image=IMAGE, **processor(IMAGE, QUESTION, suffix="a", return_tensors="np"))
    assert {path.stem for path in (tmp_path / "saved").glob("*.py")} == {
        *("backbone_parts", "chat", "encoder_settings", "expert_labels", "expert_words", "experts_processor"),
        *("image_fetching", "image_loading", "image_processing_prismer", "processing_prismer_lm", "prompts"),
        "expert_router",
    }
    code = f"""
import sys
sys.modules["modeling_prismer"] = None  # as if it were not installed
import numpy as np
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
expected = np.load({str(tmp_path / "expected.npz")!r})
inputs = processor(expected["image"], {QUESTION!r}, suffix="a", return_tensors="np")
assert all((inputs[name] == expected[name]).all() for name in inputs), list(inputs)
assert "modeling_prismer" not in type(processor).__module__, type(processor).__module__
print("same", len(inputs))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("same"), result.stdout


def test_settings_are_plain_json(tmp_path):
    make_processor().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["encoders"][0] == {} and settings["encoders"][1]["size"] == {"height": 28, "width": 28}
    assert settings["image_seq_length"] == NUM_FEATURES and settings["experts_as"] == "tokens"
    assert settings["image_processor"]["expert_size"] == EXPERTS_CONFIG["image_size"]
