"""
Wrong input gets an error that names it, says what is wrong and what is accepted.

Others are tested where the input is: wrong expert tensors and masks in test_experts_inputs, labels of experts in
tests/processing/test_image_processing_prismer, images and texts that do not go together in test_processing_prismer,
descriptions of experts in test_configuration, what `generate` refuses in test_generation and its features.
"""

import pytest
import torch

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path

from .tiny import VOCAB_SIZE, image_inputs, pick, prompts, tiny_config, tiny_model, training_inputs


def changed(tensor, value):
    tensor = tensor.clone()
    tensor.flatten()[0] = value
    return tensor


INPUTS = training_inputs()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"input_ids": changed(INPUTS["input_ids"], VOCAB_SIZE)},
            f"input_ids has values from .* to {VOCAB_SIZE}; 0 to {VOCAB_SIZE - 1} is accepted",
        ),
        ({"input_ids": changed(INPUTS["input_ids"], -100)}, "input_ids has values from -100 to"),  # labels, perhaps
        (
            {"labels": torch.full_like(INPUTS["labels"], -100)},
            "labels are -100 everywhere: there is nothing to learn. They are aligned with input_ids",
        ),
        ({"labels": INPUTS["labels"][:, :5]}, r"labels of the shape \(3, 5\) for logits of \(3, 7\)"),
        ({"sample_weight": torch.ones(3, 1)}, r"sample_weight has the shape \(3, 1\); \(3,\) is needed, one weight"),
        ({"sample_weight": torch.ones(2)}, r"sample_weight has the shape \(2,\); \(3,\) is needed"),
        (
            {"ocr_features": torch.zeros(3, 6, 9)},
            r"ocr_features has the shape \(3, 6, 9\); \(batch, number of ids, 8\)",
        ),
        ({"ocr_features": torch.zeros(3, 8)}, r"ocr_features has the shape \(3, 8\); \(batch, number of ids, 8\)"),
        (
            {"detection_classes": INPUTS["detection_classes"][:, None]},
            r"detection_classes has the shape \(3, 1, 8\); \(batch, instances\) is needed",
        ),
        (
            {"detection_rows": torch.full((3, 32, 32), 128)},
            "detection_rows has values from 128 to 128; 0 to 127 is accepted",
        ),
        (
            {"depth_values": torch.zeros(3, 3, 32, 32)},
            r"depth_values has the shape .* needs \(batch, 1, height, width\)",
        ),
        (
            {"expert_mask": torch.ones(3, 5, dtype=torch.bool)},
            r"\(3, 5\); \(batch, 6\) is needed, one column for each of",
        ),
    ],
)
def test_wrong_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(INPUTS | changes))


def test_sample_without_labels_is_allowed_in_a_batch():
    labels = INPUTS["labels"].clone()
    labels[1] = -100
    outputs = tiny_model()(**(INPUTS | {"labels": labels}))
    assert outputs.loss_per_sample[1] == 0 and outputs.loss > 0


@pytest.mark.parametrize("unknown", [12, 13, 255, -2])
def test_a_class_that_the_model_does_not_know_is_background(unknown):
    model, inputs = tiny_model(experts=[{"name": "things", "kind": "label", "channels": 8, "num_classes": 12}]), {}
    images = image_inputs(1, experts=model.config.experts)
    ids, images["things_ids"] = images["things_ids"], torch.full_like(images["things_ids"], 255)
    nothing = model.get_image_features(**images)[0]
    images["things_ids"] = torch.where(ids == 255, ids, 0)
    images["things_classes"] = torch.full((1, 4), unknown)
    assert torch.equal(model.get_image_features(**images, **inputs)[0], nothing)


def test_image_edge_beyond_the_last_patch_is_cut_as_in_clip():
    """Not an error: prismer_large takes 480 pixels in patches of 14."""
    model = tiny_model(experts=[], image_size=30)
    images = image_inputs(1, experts=[])["pixel_values"][:, :, :30, :30]
    encoded = model.get_image_features(images)[0]
    assert encoded.shape[1] == 9
    images[:, :, 24:], images[:, :, :, 24:] = 0, 0
    assert torch.equal(model.get_image_features(images)[0], encoded)


@pytest.mark.parametrize(
    "load, message",
    [
        (lambda: tiny_config(image_size=7), "image_size=7 is smaller than patch_size=8"),
        (lambda: tiny_model().resize_position_embeddings(4), "image_size=4 is smaller than patch_size=8"),
        (lambda: tiny_model().resize_position_embeddings(48.5), "image_size=48.5; a whole number of pixels is needed"),
        (lambda: tiny_model().resize_position_embeddings(-48), "image_size=-48 is smaller than patch_size=8"),
        (lambda: tiny_model().set_class_features("dept", torch.zeros(3, 8)), "no expert 'dept'; the config has depth"),
        (
            lambda: tiny_model().generate(input_ids=prompts(2), **image_inputs(3), max_new_tokens=1),
            "2 rows of text for 3 images",
        ),
        (
            lambda: tiny_model()(input_ids=prompts(), encoder_outputs=torch.zeros(2, 22, 32)),
            "3 rows of text for 2 images: the rows must be a multiple",
        ),
    ],
)
def test_wrong_settings_are_named(load, message):
    with pytest.raises(Exception, match=message):
        load()


@pytest.fixture(scope="module")
def processor():
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"))
    processor.experts = None
    return processor


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": "what color?"}, "images is missing: Prismer needs an image"),
        ({"images": 1}, "text is missing: the task 'vqa' needs a question"),
        ({"images": 2, "text": ["a", "b", "c"]}, "3 texts for 2 images; as many texts as images, or a multiple"),
        ({"images": 1, "text": "a", "experts": ["depth"]}, "experts has 'depth'; the config's experts are: edge, ocr"),
        (
            {"images": 1, "text": "a", "expert_labels": {"depth": None}},
            "expert_labels has 'depth'; the config's experts",
        ),
        (
            {"images": 1, "text": "a", "expert_labels": {"edge": torch.zeros(8, 8, 3, dtype=torch.uint8)}},
            "edge label has 3 channels; the config's expert 'edge' has 1",
        ),
    ],
)
def test_bundled_processor_refuses_bad_inputs(processor, arguments, message):
    if "images" in arguments:
        arguments = arguments | {"images": [torch.zeros(3, 64, 64, dtype=torch.uint8)] * arguments["images"]}
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_a_model_and_inputs_of_another_checkpoint(processor):
    """A processor of one checkpoint with the network of another raises an error."""
    inputs = processor(torch.zeros(3, 64, 64, dtype=torch.uint8), "what color?")
    with pytest.raises(ValueError, match="2\\); \\(batch, 6\\) is needed, one column for each of depth, normal"):
        tiny_model()(**inputs)
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path("prismer-easy-vqa"), dtype=torch.float32)
    small = {"input_ids": prompts(1), **pick(image_inputs(), [0])}
    with pytest.raises(ValueError, match=r"depth_values given, but the config's experts are: edge, ocr"):
        model(**small)
