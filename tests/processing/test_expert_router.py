"""A router chooses which experts run for a question, before any of them does."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_prismer import PrismerForConditionalGeneration, PrismerImageProcessor, PrismerProcessor, pretrained_path
from modeling_prismer.processing.expert_router import ExpertRouter, RouterConfig, best_rows, summarize_images
from modeling_prismer.processing.experts import Expert, ExpertSuite, NormalsFromDepth

from .taught_routers import LESSONS, taught_router
from .tiny_lm_processors import IMAGE, OTHER_IMAGE, make_processor


SIGN, NEAR, COLOR = "What does the sign say?", "Is the cone nearer than the ball?", "What color is the ball?"


@pytest.fixture
def router():
    return taught_router()


@pytest.fixture
def processor(image_processor, tokenizer, pretend_suite, router):
    processor = PrismerProcessor(image_processor, tokenizer, experts=pretend_suite("depth", "edge", "ocr"), task="vqa")
    processor.router = router
    return processor


def seen(processor):
    """How many images each expert has got in each of its calls."""
    return {name: [len(sizes) for sizes in expert.seen] for name, expert in processor.experts.items()}


def mask(inputs, processor):
    names = [expert["name"] for expert in processor.image_processor.experts]
    return [[name for name, present in zip(names, row) if present] for row in inputs["expert_mask"].tolist()]


# ---- the choice ----


def test_each_question_gets_its_experts(router):
    assert router.choose([[text] for text in LESSONS]) == list(LESSONS.values())
    # punctuation and upper case do not count, since a processor may clean them away
    assert router.choose([["WHAT does the sign, say"]]) == [["ocr"]]


def test_texts_about_one_image_add_up(router):
    assert router.choose([[SIGN, NEAR, COLOR], [COLOR, COLOR]]) == [["depth", "ocr"], []]
    assert router.choose([[]]) == [[]]


def test_price_weighs_time(router):
    assert router.choose([[SIGN], [NEAR]], price=20.0) == [[], ["depth"]]  # 0.8 is worth 20 ms, but not 100 ms
    assert router.choose([[SIGN]], price=math.inf) == [[]]


def test_budget_takes_the_best_price_that_it_allows(router):
    config = router.config
    assert [config.price_for(budget) for budget in (None, 100, 40, 39, 10, 9)] == [2.0, 2.0, 2.0, 20.0, 20.0, math.inf]
    with pytest.raises(ValueError, match="budget_ms is -1; at least 0 is needed"):
        config.price_for(-1)


def test_equal_scores_take_the_fastest_subset():
    scores = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.2, 0.9]])
    assert best_rows(scores, [0.3, 0.1, 0.2], 0.0).tolist() == [1, 2]
    assert best_rows(scores, [0.3, 0.1, 0.2], math.inf).tolist() == [1, 1]


def test_images_can_decide():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    router = taught_router({"?": ["ocr"], "??": []}, images=features)  # punctuation does not count: equal texts
    assert router.choose([["?"], ["?"]], features) == [["ocr"], []]


def test_unknown_words_say_nothing(router):
    assert torch.equal(router.predict(["qwerty uiop"])[0], router.weights["constants"])
    assert router.choose([["Please, what does the sign say now?"]]) == [["ocr"]]


def test_weights_must_fit(router):
    with pytest.raises(ValueError, match="the weights have the shapes .* are needed"):
        ExpertRouter(RouterConfig([[], ["ocr"]], [0.0, 0.1]), router.weights)


# ---- in a processor ----


def test_experts_run_on_the_images_that_need_them(processor, image):
    texts = [SIGN, COLOR, NEAR, "Which word is on the left sign?", COLOR]
    inputs = processor([image] * 5, texts, experts="auto")
    assert seen(processor) == {"depth": [1], "edge": [5], "ocr": [2]}  # the router does not know edges: they run
    assert mask(inputs, processor) == [["edge", "ocr"], ["edge"], ["depth", "edge"], ["edge", "ocr"], ["edge"]]


def test_sign_runs_text_alone(processor, image):
    processor.experts.pop("edge")
    inputs = processor(image, SIGN, experts="auto")
    assert seen(processor) == {"depth": [], "ocr": [1]} and mask(inputs, processor) == [["ocr"]]
    expected = processor(image, SIGN, experts=["ocr"])
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert {name.partition("_")[0] for name in inputs} == {"input", "attention", "pixel", "ocr", "expert"}


def test_budget_is_an_argument_of_the_call(processor, image):
    processor.experts.pop("edge")
    assert mask(processor(image, SIGN, experts="auto", budget_ms=9), processor) == [[]]
    assert mask(processor(image, NEAR, experts="auto", budget_ms=10), processor) == [["depth"]]
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": SIGN}]}]
    for budget, expected in ((None, ["ocr"]), (9, [])):
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, experts="auto", budget_ms=budget
        )
        assert mask(inputs, processor) == [expected]


def test_several_questions_share_the_experts_of_their_image(processor, image):
    processor.experts.pop("edge")
    inputs = processor([image, image], [[SIGN, NEAR], [COLOR, COLOR]], experts="auto")
    assert mask(inputs, processor) == [["depth", "ocr"], []]


def test_given_labels_are_kept(processor, image):
    processor.experts.pop("edge")
    depth = np.zeros(image.shape[:2], np.uint8)
    inputs = processor(image, COLOR, expert_labels={"depth": depth}, experts="auto")
    assert mask(inputs, processor) == [["depth"]] and seen(processor) == {"depth": [], "ocr": []}


def test_left_out_experts_have_no_label(processor, image):
    (labels,) = processor.run_experts([image], experts="auto", text=[[SIGN]])
    assert labels["depth"] is None and labels["ocr"]["words"] == ["stop"]


def test_frozen_encoder_sees_the_image_without_experts(processor, image):
    given = []

    def encode(return_dict, **inputs):
        given.append(inputs)
        bright = inputs["pixel_values"].mean((1, 2, 3))
        return SimpleNamespace(last_hidden_state=torch.stack([bright, -bright], 1)[:, None].expand(-1, 3, -1))

    dark, light = np.zeros_like(image), np.full_like(image, 255)
    encoder = SimpleNamespace(get_image_features=encode, device=torch.device("cpu"))
    inputs = processor.process_images([dark, light], experts=[])
    features = summarize_images(encoder, inputs)
    processor.router = taught_router({"?": ["ocr"], "??": []}, images=features)
    with pytest.raises(ValueError, match="set processor.router.encoder = model"):
        processor([dark, light], "?", experts="auto")
    processor.router.encoder = encoder
    inputs = processor([dark, light], "?", experts="auto")
    assert mask(inputs, processor) == [["edge", "ocr"], ["edge"]]
    assert not given[-1]["expert_mask"].any()


def test_frozen_encoder_is_that_of_the_network(image):
    path = pretrained_path("prismer-easy-vqa")
    processor, model = PrismerProcessor.from_pretrained(path), PrismerForConditionalGeneration.from_pretrained(path)
    router = ExpertRouter(RouterConfig([[], ["edge"]], [0.0, 0.1], image_size=128))
    processor.router, router.encoder = router, model
    inputs = processor(image, "What shape is it?", experts="auto")
    assert inputs["expert_mask"].shape == (1, 2)
    features = router.image_features(processor.process_images([image, image], experts=[]))
    assert features.shape == (2, 128) and torch.equal(features[0], features[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budget_ms": 5}, "budget_ms is for experts='auto'; experts is None"),
        ({"experts": ["ocr"], "budget_ms": 5}, "budget_ms is for experts='auto'"),
        ({"experts": "auto", "budget_ms": -5}, "budget_ms is -5"),
        ({"experts": "automatic"}, "experts has 'automatic'"),
    ],
)
def test_wrong_arguments_are_named(processor, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(image, SIGN, **arguments)


def test_router_and_text_are_needed(processor, image):
    with pytest.raises(ValueError, match="experts='auto' needs a text"):
        processor.run_experts([image], experts="auto")
    processor.router = None
    with pytest.raises(ValueError, match="this processor has none; training_examples/train_router.py"):
        processor(image, SIGN, experts="auto")


def test_needed_labels_are_made_where_they_are_lacking(image, tokenizer, experts):
    """Normals from depth run where depth is not chosen, and depth stays missing there."""
    flat = Flat()
    suite = ExpertSuite([flat, NormalsFromDepth()])
    processor = PrismerProcessor(
        PrismerImageProcessor(experts=suite.descriptions, size={"height": 32, "width": 32}),
        tokenizer,
        suite,
        task="vqa",
    )
    subsets = [[], ["depth"], ["normal"], ["depth", "normal"]]
    lessons = {SIGN: ["normal"], NEAR: ["depth", "normal"], COLOR: []}
    processor.router = taught_router(lessons, subsets, [0.0, 0.01, 0.01, 0.02])
    inputs = processor([image] * 3, [SIGN, NEAR, COLOR], experts="auto")
    assert mask(inputs, processor) == [["normal"], ["depth", "normal"], []]
    assert torch.equal(inputs["normal_values"][0], inputs["normal_values"][1]) and inputs["normal_values"][0].any()
    assert flat.num_images == 2  # not a second time for the normals of the second image


class Flat(Expert):
    name, kind, channels = "depth", "dense", 1

    def run(self, images):
        return [np.tile(np.arange(image.width, dtype=np.uint8), (image.height, 1)) for image in images]


def test_tensors_of_missing_experts_change_nothing(image):
    path = pretrained_path("prismer-easy-vqa")
    processor, model = PrismerProcessor.from_pretrained(path), PrismerForConditionalGeneration.from_pretrained(path)
    for experts in ([], ["edge"]):
        inputs = processor(image, "What shape is it?", experts=experts)
        given = dict(inputs)
        lean = processor.without_missing(inputs)
        assert len(lean) < len(given)
        assert torch.equal(model(**lean).logits, model(**given).logits)


# ---- saving ----


def test_router_is_saved_with_the_processor(router, image, tmp_path):
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"))
    assert processor.router is None
    processor.router = taught_router(subsets=[[], ["edge"], ["ocr"], ["edge", "ocr"]], lessons={SIGN: ["ocr"]})
    processor.save_pretrained(tmp_path)
    assert {"router.json", "router.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert "router" not in json.loads((tmp_path / "processor_config.json").read_text())
    again = PrismerProcessor.from_pretrained(tmp_path)
    assert again.router.config == processor.router.config
    assert mask(again(image, SIGN, experts="auto"), again) == [["ocr"]]


def test_damaged_router_is_named(router, tmp_path):
    assert ExpertRouter.from_pretrained(tmp_path) is None
    router.save_pretrained(tmp_path)
    for name, content in (("router.safetensors", b"x"), ("router.json", b'{"subsets": []}'), ("router.json", b"{")):
        router.save_pretrained(tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"the router of {tmp_path} is damaged"):
            ExpertRouter.from_pretrained(tmp_path)
    router.save_pretrained(tmp_path)
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(ValueError, match="router.safetensors is missing"):
        ExpertRouter.from_pretrained(tmp_path)


# ---- PrismerLM ----


def test_prismer_lm_has_a_router_too(pretend_suite):
    processor = make_processor()
    processor.experts = pretend_suite("depth", "ocr")
    processor.router = taught_router()
    texts = [f"<image>{text}" for text in (SIGN, COLOR, NEAR)]
    inputs = processor([IMAGE, OTHER_IMAGE, IMAGE], texts, experts="auto")
    assert mask(inputs, processor) == [["ocr"], [], ["depth"]]
    # a prompt about two images
    inputs = processor([[IMAGE, OTHER_IMAGE]], [f"<image><image>{SIGN}"], experts="auto", budget_ms=60)
    assert mask(inputs, processor) == [["ocr"], ["ocr"]]
