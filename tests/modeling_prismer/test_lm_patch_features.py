"""`patch_features`: images that frozen encoders have encoded before, in place of `pixel_values`."""

import pytest
import torch

from modeling_prismer import PrismerLMForConditionalGeneration, pretrained_path
from tests.modeling_prismer.tiny_lm import (
    FUSIONS,
    image_inputs,
    shared_model,
    tiny_language_model,
    tiny_model,
    training_inputs,
)


PIXELS = ("pixel_values", "pixel_values_1")


def without_pixels(inputs):
    return {name: tensor for name, tensor in inputs.items() if name not in PIXELS}


@torch.no_grad()
def encoded(model, inputs):
    image_inputs = model.model.pop_image_inputs(dict(inputs))
    return {"patch_features": model.get_image_features(**image_inputs).last_hidden_state}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("vision", [("siglip",), ("siglip", "dinov2")])
def test_encoded_images_give_the_same_loss_and_text(fusion, vision):
    model = shared_model(fusion=fusion, vision=vision)
    inputs = training_inputs(model.config)
    again = {**without_pixels(inputs), **encoded(model, inputs)}
    torch.testing.assert_close(model(**again).loss, model(**inputs).loss)
    del inputs["labels"], again["labels"]
    assert model.generate(**again, max_new_tokens=4).tolist() == model.generate(**inputs, max_new_tokens=4).tolist()


def test_projection_learns_from_encoded_images():
    model = shared_model()
    inputs = training_inputs(model.config)
    gradients = []
    for own in (inputs, {**without_pixels(inputs), **encoded(model, inputs)}):
        model.zero_grad()
        model(**own).loss.backward()
        gradients.append(model.model.vision_projection.fc1.weight.grad.clone())
    model.zero_grad()
    torch.testing.assert_close(*gradients)


def test_prismer_encoder_needs_no_expert_for_encoded_images():
    language = tiny_language_model()
    model = PrismerLMForConditionalGeneration.from_backbones(language, pretrained_path("prismer-scenes"))
    width = model.config.vision_config[0].hidden_size
    patch_features = torch.randn(2, model.config.num_features, width)
    features = model.get_image_features(patch_features=patch_features)
    assert features.pooler_output.shape == (2, model.config.num_features, model.config.hidden_size)
    with pytest.raises(ValueError, match="depth"):
        model.get_image_features(torch.randn(2, 3, 128, 128))


def test_wrong_encoded_images_are_refused():
    model = tiny_model(experts=[])
    with pytest.raises(ValueError, match=r"patch_features has the shape \(2, 4, 8\); \(num_images, 4, 32\) is needed"):
        model.get_image_features(patch_features=torch.randn(2, 4, 8))
    inputs = image_inputs(model.config, 2)
    with pytest.raises(ValueError, match="patch_features is given, but pixel_values is given too"):
        model.get_image_features(**inputs, **encoded(model, inputs))
    blind = shared_model(vision=())
    inputs = without_pixels(image_inputs(blind.config, 2))
    with pytest.raises(ValueError, match="patch_features is given, but the model has no vision encoder"):
        blind.get_image_features(**inputs, patch_features=torch.randn(2, 4, 32))
