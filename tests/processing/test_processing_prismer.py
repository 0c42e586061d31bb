"""One call turns images and text into the inputs of the network, and runs the experts whose labels are missing."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AddedToken, AutoProcessor
from transformers.models.auto import processing_auto
from transformers.testing_utils import CaptureLogger

from modeling_prismer import PrismerForConditionalGeneration
from modeling_prismer.processing import (
    PrismerImageProcessor,
    PrismerProcessor,
    clean_caption,
    clean_question,
    experts_processor,
    processing_prismer,
)
from modeling_prismer.processing.experts import CannyEdges


TEXTS = [
    json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "fixtures" / "preprocessing").glob("*/text.json"))
]


# ---- clean-up ----


@pytest.mark.parametrize("raw, cleaned", [pair for texts in TEXTS for pair in texts["pre_caption_max30"]])
def test_captions_are_cleaned_as_recorded(raw, cleaned):
    assert clean_caption(raw) == cleaned


@pytest.mark.parametrize("raw, cleaned", [pair for texts in TEXTS for pair in texts["pre_question_max30"]])
def test_questions_are_cleaned_as_recorded(raw, cleaned):
    assert clean_question(raw) == cleaned


# ---- prompts ----


def test_caption_begins_with_a_picture_of(make_processor, image, tokenizer):
    inputs = make_processor("caption")(images=image)
    assert inputs["input_ids"].tolist() == [[0, *tokenizer("A picture of", add_special_tokens=False)["input_ids"]]]
    assert "labels" not in inputs


def test_class_begins_with_a_photo_of_a(make_processor, image):
    processor = make_processor("classification")
    assert processor.batch_decode(processor(images=[image, image])["input_ids"]) == ["<s>A photo of a"] * 2


def test_white_space_after_a_prompt_does_not_change_it(make_processor, image):
    processor = make_processor("caption")
    with_space, without = (processor(images=image, text=text)["input_ids"] for text in ("A photo of ", "A photo of"))
    assert torch.equal(with_space, without)


def test_question_is_cleaned_and_has_no_end(make_processor, image):
    processor = make_processor("vqa")
    inputs = processor(images=image, text="what COLOR is (the) shape  ")
    assert processor.decode(inputs["input_ids"][0]) == "<s>What color is  the  shape?"


def test_question_has_at_most_35_tokens(make_processor, image, tokenizer):
    question = "zzqx " * 30
    tokens = tokenizer(clean_question(question), add_special_tokens=False)["input_ids"]
    with CaptureLogger(processing_prismer.logger) as log:
        inputs = make_processor("vqa")(images=image, text=question)
    assert f"a text of {len(tokens) + 1} tokens is cut to its first 35: 'Zzqx zzqx" in log.out
    assert len(tokens) > 35 and inputs["input_ids"].tolist() == [[0, *tokens][:35]]
    assert make_processor("vqa")(images=image, text=question, max_length=12)["input_ids"].shape == (1, 12)
    assert make_processor("vqa")(images=image, text=question, truncation=False)["input_ids"].shape[1] > 35


def test_shorter_prompts_are_padded_on_the_left(make_processor, image):
    inputs = make_processor("vqa")(images=image, text=["How many people are there?", "Red?"])
    padding = inputs["input_ids"][1] == 1
    assert padding[0] and not padding[-1] and not (inputs["input_ids"][0] == 1).any()
    assert torch.equal(inputs["attention_mask"][1] == 0, padding)
    assert inputs["input_ids"][1, padding.sum()] == 0


def test_padding_follows_the_arguments(make_processor, image):
    processor = make_processor("vqa")
    texts = ["How many people are there?", "Red?"]
    assert processor(images=image, text=texts, padding="max_length", max_length=16)["input_ids"].shape == (2, 16)
    assert processor(images=image, text=texts, pad_to_multiple_of=8)["input_ids"].shape[1] % 8 == 0
    right = processor(images=image, text=texts, suffix=["2", "no"], padding_side="right")
    assert right["input_ids"][1, -1] == 1 and right["labels"][1, -1] == -100
    unpadded = processor(images=image, text=texts, padding=False, return_tensors=None)["input_ids"]
    assert len(unpadded[0]) > len(unpadded[1])


def test_padding_side_of_the_tokenizer_does_not_matter(make_processor, image, tokenizer, tmp_path):
    make_processor("vqa").save_pretrained(tmp_path)
    loaded = PrismerProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.padding_side == "left"
    loaded.tokenizer.padding_side = "right"
    inputs = loaded(images=image, text=["How many people are there?", "Red?"])
    assert inputs["input_ids"][1, 0] == 1 and inputs["input_ids"][1, -1] != 1


def test_special_tokens_in_a_text_stay_text(make_processor, image):
    inputs = make_processor("vqa")(images=image, text="is </s> or <pad> red", suffix="<mask>")
    assert [(inputs["input_ids"] == token).sum().item() for token in (0, 1, 2, 4)] == [1, 0, 1, 0]


# ---- tokens that were added ----


@pytest.fixture
def with_tokens(image_processor, tokenizer):
    """A processor whose tokenizer got new tokens, and their ids."""
    tokenizer.add_tokens(["<loc_1>", "</s>2"], special_tokens=True)
    tokenizer.add_tokens(["[DEFECT]", "(#1)", AddedToken("AI", single_word=True)])

    def make(task):
        return PrismerProcessor(image_processor, tokenizer, task=task)

    return make, tokenizer.convert_tokens_to_ids(["<loc_1>", "</s>2", "[DEFECT]", "(#1)", "AI"])


@pytest.mark.parametrize("task", ["caption", "vqa", "classification"])
@pytest.mark.parametrize("token", ["<loc_1>", "</s>2", "[DEFECT]", "(#1)", "AI"])
@pytest.mark.parametrize("text", ["{}", "{} dog", "A {} dog", "two DOGS. {}", "RED {} AND {}"])
def test_added_token_becomes_its_id(with_tokens, image, task, token, text):
    make, _ = with_tokens
    processor, text = make(task), text.format(token, token)
    number = processor.tokenizer.convert_tokens_to_ids(token)
    inputs = processor(image, text=text, suffix=text)
    assert (inputs["labels"] == number).sum() == text.count(token)
    assert (inputs["input_ids"] == number).sum() == 2 * text.count(token)
    candidate = processor.prepare_candidates([text])["candidate_ids"][0]
    assert (candidate == number).sum() == text.count(token)
    assert [(inputs["input_ids"] == control).sum().item() for control in (0, 1, 2, 3, 4)] == [1, 0, 1, 0, 0]
    generated = processor.post_process_generation(inputs["input_ids"])[0]
    assert generated.count(token) == 2 * text.count(token)
    assert processor.post_process_image_text_to_text(inputs["input_ids"])[0].count(token) == 2 * text.count(token)


@pytest.mark.parametrize(
    "task, prompt, answer",
    [
        ("caption", "A [DEFECT] Near (what)", " a [DEFECT], near the <loc_1> edge"),
        ("vqa", "A [DEFECT] near  what?", " A [DEFECT], near; the <loc_1> edge"),
        ("classification", "A [DEFECT] Near (what)", " a [DEFECT], near; the <loc_1> edge"),
    ],
)
def test_text_around_an_added_token_is_cleaned(with_tokens, image, task, prompt, answer):
    processor = with_tokens[0](task)
    suffix = "a [DEFECT], Near; the <loc_1> EDGE"
    inputs = processor(image, text="A [DEFECT] Near (what)", suffix=suffix, truncation=False)
    assert processor.batch_decode(inputs["input_ids"]) == [f"<s>{prompt}{answer}</s>"]


def test_control_tokens_stay_text_next_to_added_tokens(with_tokens, image):
    make, (place, other, *_) = with_tokens
    processor = make("vqa")
    text = "<loc_1></s> </s>2 <PAD> <mask><s></s></s>2"
    inputs = processor(image, text=f"is {text} red", suffix=text)
    ids = inputs["input_ids"]
    assert [(ids == number).sum().item() for number in (0, 1, 2, 3, 4, place, other)] == [1, 0, 1, 0, 0, 2, 4]
    assert processor.decode(ids[0]) == f"<s>Is {text.lower()} red? {text.lower()}</s>"


def test_added_whole_word_is_not_found_inside_words(with_tokens, image):
    make, (*_, word) = with_tokens
    inputs = make("caption")(image, suffix="AI FAILS in TRAINING of AI")
    assert (inputs["labels"] == word).sum() == 2
    assert make("caption").decode(inputs["labels"][0][inputs["labels"][0] != -100]) == (
        " AI fails in training of AI</s>"
    )


def test_answers_keep_added_tokens(with_tokens):
    make, (place, _, defect, *_) = with_tokens
    processor = make("vqa")
    row = [0, *processor.tokenizer(" Red", add_special_tokens=False)["input_ids"], place, defect, 2, 1, 1]
    assert processor.post_process_generation([row]) == ["red<loc_1>[DEFECT]"]
    assert processor.post_process_generation(torch.tensor([row]), prompt_length=1) == ["red<loc_1>[DEFECT]"]
    assert processor.post_process_image_text_to_text(torch.tensor([row])) == [" Red<loc_1>[DEFECT]"]
    assert processor.post_process_image_text_to_text(np.array(row)) == " Red<loc_1>[DEFECT]"
    kept = processor.post_process_image_text_to_text([row], skip_special_tokens=False)
    assert kept == ["<s> Red<loc_1>[DEFECT]</s><pad><pad>"]


def test_added_tokens_are_saved_with_the_processor(with_tokens, image, tmp_path):
    make, _ = with_tokens
    make("vqa").save_pretrained(tmp_path)
    loaded = PrismerProcessor.from_pretrained(tmp_path)
    expected, found = (each(image, "is it [DEFECT]", suffix="<loc_1>") for each in (make("vqa"), loaded))
    assert torch.equal(expected["input_ids"], found["input_ids"])


# ---- what is learned ----


def learned(processor, inputs, row=0):
    labels = inputs["labels"][row]
    assert torch.equal(labels[labels != -100], inputs["input_ids"][row][labels != -100])
    return processor.decode(labels[labels != -100])


@pytest.mark.parametrize(
    "task, text, suffix, expected",
    [
        ("caption", None, "Two DOGS, playing (in the park)!", " two dogs, playing in the park</s>"),
        ("vqa", "What color is the shape?", "blue circle", " Blue circle</s>"),
        ("classification", None, "Golden Retriever", " golden retriever</s>"),
    ],
)
def test_only_the_suffix_is_learned_in_the_form_of_the_task(make_processor, image, task, text, suffix, expected):
    processor = make_processor(task)
    prompt = processor(images=image, text=text)["input_ids"][0]
    inputs = processor(images=image, text=text, suffix=suffix)
    assert learned(processor, inputs) == expected
    assert torch.equal(inputs["input_ids"][0, : len(prompt)], prompt), "generation starts from the same prompt"


def test_labels_are_masked_on_padding_and_prompt(make_processor, image):
    processor = make_processor("vqa")
    inputs = processor(images=image, text=["How many people are there?", "Red?"], suffix=["Two dogs", "yes"])
    assert (inputs["labels"][inputs["attention_mask"] == 0] == -100).all()
    assert learned(processor, inputs, 0) == " Two dogs</s>"
    assert learned(processor, inputs, 1) == " Yes</s>"


def test_long_caption_is_cut_to_30_tokens_and_ends(make_processor, image):
    inputs = make_processor("caption")(images=image, suffix="zzqx " * 30)
    assert inputs["input_ids"].shape == (1, 30)
    assert inputs["input_ids"][0, -1] == inputs["labels"][0, -1] == 2


def test_answer_is_never_cut(make_processor, image):
    processor = make_processor("vqa")
    answer = "zzqx " * 20
    inputs = processor(images=image, text="why " * 30, suffix=answer)
    assert learned(processor, inputs) == f" {answer.strip().capitalize()}</s>"


def test_text_longer_than_max_length_keeps_prompt_and_end(make_processor, image):
    inputs = make_processor("vqa")(
        images=image, text=["why " * 30, "Red?"], suffix="yes no".split(), max_length=10, padding="max_length"
    )
    assert inputs["input_ids"].shape == inputs["labels"].shape == (2, 10)
    assert (inputs["labels"][:, -1] == 2).all() and (inputs["labels"][:, -2] != -100).all()


# ---- rows ----


def test_questions_of_an_image_stay_together(make_processor, image):
    processor = make_processor("vqa")
    nested = processor(images=[image, image], text=[["one", "two"], ["three", "four"]])
    assert processor.batch_decode(nested["input_ids"], skip_special_tokens=True) == ["One?", "Two?", "Three?", "Four?"]
    assert nested["pixel_values"].shape[0] == nested["expert_mask"].shape[0] == 2
    flat = processor(images=[image, image], text=["one", "two", "three", "four"])
    assert torch.equal(nested["input_ids"], flat["input_ids"])


def test_suffixes_have_the_layout_of_the_questions(make_processor, image):
    processor = make_processor("vqa")
    inputs = processor(images=[image, image], text=[["a", "b"], ["c", "d"]], suffix=[["1", "2"], ["3", "4"]])
    assert [learned(processor, inputs, row) for row in range(4)] == [" 1</s>", " 2</s>", " 3</s>", " 4</s>"]


def test_one_image_can_have_a_list_of_questions(make_processor, image):
    inputs = make_processor("vqa")(images=image, text=["one", "two", "three"])
    assert inputs["input_ids"].shape[0] == 3 and inputs["pixel_values"].shape[0] == 1


def test_one_question_can_be_asked_about_every_image(make_processor, image):
    inputs = make_processor("vqa")(images=[image, image], text="what is it?")
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"text": "what?"}, ValueError, "images is missing: Prismer needs an image. Pass images=…, or call"),
        ({"images": 2}, ValueError, r"text is missing: the task 'vqa' needs .* processor.process_images\(images\)"),
        (
            {"images": 2, "text": ["a", "b", "c"]},
            ValueError,
            "3 texts for 2 images; as many texts as images, or a mul",
        ),
        ({"images": 2, "text": []}, ValueError, "0 texts for 2 images"),
        ({"images": 2, "text": [["a"]]}, ValueError, "text has 1 lists for 2 images; one list for each image"),
        ({"images": 2, "text": [["a"], ["b", "c"]]}, ValueError, "text has lists of 1, 2 entries; every image needs"),
        ({"images": 2, "text": [1, 2]}, TypeError, "text must be a string, a list of strings, or a list of lists"),
        (
            {"images": 1, "text": ["a", "b"], "suffix": "c"},
            ValueError,
            "1 suffixes for 2 prompts; one for each prompt",
        ),
        (
            {"images": 1, "text": "a", "expert_labels": [{}, {}]},
            ValueError,
            "expert_labels has 2 entries for 1 images",
        ),
        (
            {"images": 1, "text": "a", "experts": ["dept"]},
            ValueError,
            "experts has 'dept'; the config's experts are: de",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make_processor, image, arguments, error, message):
    if "images" in arguments:
        arguments = {**arguments, "images": [image] * arguments["images"]}
    with pytest.raises(error, match=message):
        make_processor("vqa")(**arguments)


def test_wrong_text_is_found_before_the_experts_run(make_processor, pretend_suite, image):
    suite = pretend_suite("depth")
    with pytest.raises(ValueError):
        make_processor("vqa", suite)(images=image, text=[])
    assert suite["depth"].seen == []


# ---- experts ----


def test_live_experts_run_on_the_whole_batch_at_once(make_processor, pretend_suite, image):
    suite = pretend_suite("depth", "ocr")
    inputs = make_processor(experts=suite)(images=[image, image[:9, :5]])
    assert suite["depth"].seen == suite["ocr"].seen == [[(40, 24), (5, 9)]]
    assert inputs["expert_mask"].tolist() == [[True, False, False, False, False, True]] * 2
    assert inputs["depth_values"].max() > 0.99 and (inputs["ocr_features"][:, 0] == 1).all()


def test_experts_run_for_labels_that_are_not_given(make_processor, pretend_suite, image):
    suite = pretend_suite("depth", "edge")
    white = np.full((24, 40), 255, np.uint8)
    processor = make_processor(experts=suite)
    inputs = processor(images=[image, image[:9]], expert_labels=[{"depth": white}, None])
    assert suite["depth"].seen == [[(40, 9)]]
    assert sorted(sum(suite["edge"].seen, [])) == [(40, 9), (40, 24)]
    assert (inputs["depth_values"][0] == -1).all() and inputs["depth_values"][1].max() > 0.99
    assert inputs["expert_mask"][:, [0, 3]].all()


def test_label_of_none_marks_a_missing_expert(make_processor, pretend_suite, image):
    suite = pretend_suite("depth")
    inputs = make_processor(experts=suite)(images=image, expert_labels={"depth": None})
    assert suite["depth"].seen == [] and not inputs["expert_mask"][0, 0]


def test_experts_can_be_chosen_for_a_call(make_processor, pretend_suite, image):
    suite = pretend_suite("depth", "edge")
    processor = make_processor(experts=suite)
    labels = {"normal": image}
    assert processor(images=image, expert_labels=labels, experts=["edge"])["expert_mask"][0].nonzero().tolist() == [
        [3]
    ]
    assert processor(images=image, expert_labels=labels, experts=["normal"])["expert_mask"][0, 1]
    assert not processor(images=image, expert_labels=labels, experts=[])["expert_mask"].any()
    assert suite["depth"].seen == [] and len(suite["edge"].seen) == 1


def test_live_experts_that_are_not_configured_do_not_run(make_processor, pretend_suite, image):
    suite = pretend_suite("depth", "motion")
    make_processor(experts=suite)(images=image)
    assert len(suite["depth"].seen) == 1 and suite["motion"].seen == []


def test_live_expert_with_another_description_is_refused(make_processor, pretend_suite, image):
    suite = pretend_suite("ocr")
    suite["ocr"].description["channels"] = 64
    with pytest.raises(
        ValueError, match="live expert 'ocr' has channels=64; the config's expert 'ocr' has channels=8"
    ):
        make_processor(experts=suite)(images=image)


def test_expert_without_labels_is_warned_about_once(make_processor, pretend_suite, image, warnings_once):
    processor = make_processor(experts=pretend_suite("depth", "edge", "ocr"))
    processor(images=image, experts=["depth"])
    processor(images=image, expert_labels={"normal": None, "segmentation": None, "detection": None})
    assert warnings_once() == []
    processor(images=image)
    processor(images=image)
    assert warnings_once() == [
        "The configured experts normal, segmentation, detection are neither among the live experts nor in "
        "expert_labels: they are masked out."
    ]


def test_experts_can_be_replaced(make_processor, pretend_suite, image):
    processor = make_processor(experts=pretend_suite("depth"))
    processor.experts = None
    assert processor.experts is None and not processor(images=image)["expert_mask"].any()
    processor.experts = suite = pretend_suite("edge")
    assert processor.experts is suite and processor(images=image)["expert_mask"][0, 3]
    with pytest.raises(TypeError, match="experts is a PretendExpert; accepted are an ExpertSuite, a list of experts"):
        processor.experts = suite["edge"]


def test_labels_and_image_inputs_are_available_alone(make_processor, pretend_suite, image):
    processor = make_processor("vqa", pretend_suite("depth"))
    labels = processor.run_experts([image, image])
    assert [list(given) for given in labels] == [["depth"], ["depth"]] and labels[0]["depth"].shape == (24, 40)
    inputs, whole = processor.process_images(image), processor(images=image, text="what?")
    assert list(inputs) == processor.image_processor.model_input_names
    assert all(torch.equal(inputs[name], whole[name]) for name in inputs)


def test_experts_and_network_get_upright_images(make_processor, pretend_suite, image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    suite = pretend_suite("depth")
    processor = make_processor(experts=suite)
    inputs = processor(images=str(tmp_path / "a.png"))
    assert suite["depth"].seen == [[(24, 40)]]
    upright = processor(images=np.rot90(image, -1))
    assert torch.equal(inputs["pixel_values"], upright["pixel_values"])


def test_call_takes_settings_of_the_image_processor(make_processor, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "a.png")
    processor = make_processor()
    assert processor(images=image, size={"height": 8, "width": 8})["pixel_values"].shape == (1, 3, 8, 8)
    assert processor(images=image[..., :2].repeat(2, 2), input_data_format="channels_last")
    with pytest.raises(ValueError, match="the limit is max_pixels=10"):
        processor(images=tmp_path / "a.png", max_image_pixels=10)
    processor.image_processor.max_image_pixels = 10
    assert processor(images=tmp_path / "a.png", max_image_pixels=1000)


# ---- outputs ----


def test_network_knows_every_input_by_name(make_processor, image):
    processor = make_processor()
    inputs = processor(images=image, suffix="a dog")
    assert set(inputs) == {*processor.model_input_names, "labels"}
    assert set(inputs) <= set(inspect.signature(PrismerForConditionalGeneration.forward).parameters)


@pytest.mark.parametrize("return_tensors, type_of", [("pt", torch.Tensor), ("np", np.ndarray)])
def test_tensors_have_the_requested_type(make_processor, image, return_tensors, type_of):
    inputs = make_processor()(images=image, suffix="a dog", return_tensors=return_tensors)
    assert all(isinstance(value, type_of) for value in inputs.values())
    assert str(inputs["labels"].dtype).endswith("int64") and str(inputs["segmentation_ids"].dtype).endswith("uint8")


@pytest.mark.parametrize(
    "task, expected", [("caption", " a dog</s>"), ("vqa", " A dog</s>"), ("classification", " a dog</s>")]
)
def test_candidates_have_the_form_of_the_task(make_processor, task, expected):
    processor = make_processor(task)
    candidates = processor.prepare_candidates([" a Dog", "Golden retriever"])
    first = candidates["candidate_ids"][0][candidates["candidate_mask"][0].bool()]
    assert processor.decode(first) == expected
    assert (candidates["candidate_mask"].diff(dim=1) <= 0).all(), "padded on the right"
    assert candidates["candidate_ids"].dtype == torch.int64


@pytest.mark.parametrize("task", ["caption", "vqa", "classification"])
def test_candidate_has_the_tokens_of_the_suffix(make_processor, image, task):
    processor = make_processor(task)
    inputs = processor(images=image, text="what?", suffix="Golden retriever")
    candidates = processor.prepare_candidates("Golden retriever", return_tensors="np")
    assert inputs["labels"][inputs["labels"] != -100].tolist() == candidates["candidate_ids"][0].tolist()


@pytest.mark.parametrize("answers", [[], ["a", " "]])
def test_candidates_without_text_are_refused(make_processor, answers):
    with pytest.raises(ValueError, match="answers is empty or has an empty text"):
        make_processor().prepare_candidates(answers)


@pytest.mark.parametrize("task, expected", [("vqa", "blue circle"), ("caption", "Blue circle")])
def test_generated_texts_lose_prompt_and_padding(make_processor, image, task, expected):
    processor = make_processor(task)
    inputs = processor(images=image, text=["What color is the shape?", "Red?"], suffix=["Blue circle"] * 2)
    prompt_length = int((inputs["labels"][0] == -100).sum())
    generated = torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=1)
    for ids in (generated, generated.numpy(), generated.tolist()):
        texts = processor.post_process_generation(ids, prompt_length)
        assert [text.lower() for text in texts] == ["blue circle"] * 2
        assert task == "caption" or texts[0] == expected


# ---- construction, saving and loading ----


def test_unknown_task_and_tokenizer_without_padding_are_refused(image_processor, tokenizer):
    with pytest.raises(ValueError, match="task is 'ocr'; accepted are 'caption', 'vqa', 'classification'"):
        PrismerProcessor(image_processor, tokenizer, task="ocr")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no pad_token"):
        PrismerProcessor(image_processor, tokenizer)


@pytest.fixture
def pretend_package(monkeypatch, pretend_suite):
    monkeypatch.setattr(experts_processor, "_suite_class", lambda: pretend_suite)


@pytest.mark.parametrize("load", [PrismerProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_saved_processor_is_loaded(make_processor, pretend_suite, pretend_package, image, tmp_path, load):
    saved = make_processor("vqa", pretend_suite("depth", "ocr"))
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is PrismerProcessor and loaded.task == "vqa"
    assert list(loaded.experts) == ["depth", "ocr"] and loaded.experts.folder == str(tmp_path)
    expected, found = (processor(images=image, text="what color?", suffix="red") for processor in (saved, loaded))
    assert list(expected) == list(found) and all(torch.equal(expected[name], found[name]) for name in expected)
    loaded.save_pretrained(tmp_path / "again")
    config = "processor_config.json"
    assert (tmp_path / "again" / config).read_text() == (tmp_path / config).read_text()


def test_saved_experts_are_restored(make_processor, image, tmp_path):
    saved = make_processor(experts=[CannyEdges(low_threshold=0.02, high_threshold=0.05)])
    saved.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.experts["edge"].low_threshold == 0.02
    expected, found = (processor.process_images(image, experts=["edge"]) for processor in (saved, loaded))
    assert expected["expert_mask"][0, 3] and torch.equal(expected["edge_values"], found["edge_values"])
    loaded.experts = "offline"
    assert list(loaded.experts) == ["edge", "ocr"]


def test_saved_paths_of_own_weights_are_relative(make_processor, pretend_suite, tmp_path):
    processor = make_processor(experts=pretend_suite("depth"))
    processor.save_pretrained(tmp_path)
    assert "/home/me" not in (tmp_path / "processor_config.json").read_text()
    assert processor.to_dict()["experts"]["experts"][0]["weights"] == "/home/me/depth", "and the live ones are kept"


def test_processor_without_experts_is_restored_without(make_processor, tmp_path):
    make_processor().save_pretrained(tmp_path)
    assert PrismerProcessor.from_pretrained(tmp_path).experts is None
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize("load", [PrismerProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_experts_can_be_replaced_and_moved_on_loading(make_processor, pretend_suite, pretend_package, tmp_path, load):
    make_processor(experts=pretend_suite("depth")).save_pretrained(tmp_path)
    assert load(tmp_path, experts=None).experts is None
    suite = pretend_suite("edge")
    loaded = load(tmp_path, experts=suite, expert_device="cpu", expert_dtype="bfloat16")
    assert loaded.experts is suite and suite.moved_to == ("cpu", torch.bfloat16)
    assert not any(name.startswith("expert") for name in loaded.tokenizer.init_kwargs)
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="experts_memory is 'little'; accepted are 'sequential', 'all'"):
        load(tmp_path, experts_memory="little")


def test_folder_keeps_experts_that_cannot_run(
    make_processor, pretend_suite, image, tmp_path, monkeypatch, warnings_once
):
    make_processor(experts=pretend_suite("depth")).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "modeling_prismer.processing.experts", None)
    loaded = PrismerProcessor.from_pretrained(tmp_path)
    assert not loaded(images=image, experts=["depth"])["expert_mask"].any()
    assert "live experts need the package modeling-prismer" in warnings_once()[0]
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["experts"]["experts"]
    with pytest.raises(ImportError, match="live experts need the package modeling-prismer"):
        loaded.experts = "offline"


def test_live_experts_are_never_copied(make_processor, pretend_suite):
    suite = pretend_suite("depth")
    processor = make_processor(experts=suite)
    assert '"pretend"' in repr(processor)
    assert copy.deepcopy(processor).experts is suite
    processor.experts = None
    assert pickle.loads(pickle.dumps(processor)).task == "caption"


def test_saved_folder_works_without_the_package(
    image_processor, tokenizer, pretend_suite, image, tmp_path, monkeypatch
):
    monkeypatch.setattr(PrismerProcessor, "_auto_class", None)
    monkeypatch.setattr(PrismerImageProcessor, "_auto_class", None)
    PrismerProcessor.register_for_auto_class()
    PrismerImageProcessor.register_for_auto_class()
    processor = PrismerProcessor(image_processor, tokenizer, experts=pretend_suite("depth"), task="vqa")
    processor.save_pretrained(tmp_path / "saved")
    expected = processor(images=image, text="what color?", expert_labels={"depth": image[..., 0]}, return_tensors="np")
    np.savez(tmp_path / "expected.npz", image=image, **expected)
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {
        "chat.py",
        "expert_labels.py",
        "expert_router.py",
        "experts_processor.py",
        "image_fetching.py",
        "image_loading.py",
        "image_processing_prismer.py",
        "processing_prismer.py",
        "tasks.py",
    }
    code = f"""
import sys
sys.modules["modeling_prismer"] = None  # as if it were not installed
import numpy as np
from transformers import AddedToken, AutoProcessor
processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
expected = np.load({str(tmp_path / "expected.npz")!r})
image = expected["image"]
inputs = processor(images=image, text="what color?", expert_labels={{"depth": image[..., 0]}}, return_tensors="np")
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


def test_auto_class_knows_the_processor():
    assert processing_auto.processor_class_from_name("PrismerProcessor") is PrismerProcessor


def test_each_text_of_a_batch_can_have_its_own_task(make_processor, image):
    processor = make_processor("vqa")
    texts = [["A picture of", "is it a dog"], ["A picture of", "what color"]]
    tasks = [["caption", "vqa"], ["caption", "vqa"]]
    inputs = processor([image] * 2, text=texts, suffix=[["A dog.", "yes"], ["Two DOGS!", "RED"]], task=tasks)
    rows = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert rows == ["A picture of a dog", "Is it a dog? Yes", "A picture of two dogs", "What color? Red"]


def test_image_without_text_is_captioned(image_processor, tokenizer, image, tmp_path):
    processor = PrismerProcessor(image_processor, tokenizer, task="vqa", tasks=["caption", "vqa"])
    processor.save_pretrained(tmp_path)
    for each in (processor, PrismerProcessor.from_pretrained(tmp_path)):
        asked, captioned = each(image, text="is it a dog"), each(image)
        assert processor.batch_decode(asked["input_ids"], skip_special_tokens=True) == ["Is it a dog?"]
        assert processor.batch_decode(captioned["input_ids"], skip_special_tokens=True) == ["A picture of"]


@pytest.fixture
def for_both(image_processor, tokenizer):
    return PrismerProcessor(image_processor, tokenizer, task="vqa", tasks=["caption", "vqa"])


@pytest.mark.parametrize(
    "text, read",
    [
        ("A picture of", "A picture of"),
        ("A picture of ", "A picture of"),
        (" a  Picture of", "A picture of"),
        ("a picture of a Dog", "A picture of a Dog"),
        ("A picture of what", "A picture of what"),
        ("A picture of what?", "A picture of what?"),
        ("A picture of a dog or a cat? ", "A picture of a dog or a cat?"),
        ("a picture offers what", "A picture offers what?"),
        ("is it A picture of", "Is it a picture of?"),
        ("A photo of a", "A photo of a?"),  # the prompt of a task that the checkpoint was not made for
    ],
)
def test_prompt_of_a_task_selects_the_task(for_both, image, text, read):
    assert for_both.batch_decode(for_both(image, text)["input_ids"]) == [f"<s>{read}"]
    several = for_both([image] * 2, text=[["is it red", text], [text, "what is it"]])
    rows = for_both.batch_decode(several["input_ids"], skip_special_tokens=True)
    assert rows == ["Is it red?", read, read, "What is it?"]


def test_task_in_the_call_decides(for_both, image):
    for task, read in (("vqa", "A picture of?"), ("caption", "A picture of"), ("classification", "A picture of")):
        assert for_both.batch_decode(for_both(image, "A picture of", task=task)["input_ids"]) == [f"<s>{read}"]


def test_suffix_has_the_form_of_the_selected_task(for_both, image):
    inputs = for_both(image, ["A picture of", "what color"], suffix=["Two DOGS.", "RED"])
    rows = for_both.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert rows == ["A picture of two dogs", "What color? Red"]
    assert for_both.post_process_generation(inputs["input_ids"]) == ["A picture of two dogs", "what color? red"]


def test_task_for_tells_how_texts_are_read(for_both, make_processor):
    assert [for_both.task_for(text) for text in (None, "a picture of", "is it", [["is it"], ["what"]])] == (
        ["caption", "caption", "vqa", "vqa"]
    )
    assert make_processor("vqa").task_for(None) == make_processor("vqa").task_for("A picture of") == "vqa"
    with pytest.raises(ValueError, match="the texts belong to several tasks, caption and vqa; name one: task=…"):
        for_both.task_for(["A picture of", "is it"])


def test_single_task_reads_every_text(make_processor, image):
    processor = make_processor("vqa")
    assert processor.batch_decode(processor(image, "A picture of")["input_ids"]) == ["<s>A picture of?"]


def test_unknown_task_in_the_call_is_refused(make_processor, image_processor, tokenizer, image):
    with pytest.raises(ValueError, match="task is 'poem'; accepted are 'caption', 'vqa', 'classification'"):
        make_processor()(image, task="poem")
    with pytest.raises(ValueError, match="3 tasks for 1 prompts"):
        make_processor()(image, text=["a"], task=["vqa"] * 3)
    with pytest.raises(ValueError, match="not among the tasks"):
        PrismerProcessor(image_processor, tokenizer, task="vqa", tasks=["caption"])
