"""Imitation of experts: nothing changes without it, and it takes the place of missing experts and of those alone."""

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_prismer import (
    PrismerConfig,
    PrismerForConditionalGeneration,
    PrismerLMConfig,
    PrismerLMForConditionalGeneration,
    pretrained_path,
)
from modeling_prismer.imitation import ImitationOutput
from modeling_prismer.imitation_spec import ImitationSpec

from . import tiny_lm
from .tiny import (
    EXPERTS,
    TOLERANCE,
    image_inputs,
    pick,
    prompts,
    scatter_weights,
    tiny_config,
    tiny_model,
    training_inputs,
    without,
)


NAMES = [expert["name"] for expert in EXPERTS]
IMITATED = ["depth", "segmentation", "detection", "ocr"]
IMITATION = {"experts": IMITATED, "layers": [0, 1], "num_adaptors": 3, "top_k": 2, "adaptor_size": 8}


@pytest.fixture(scope="module")
def imitating():
    return tiny_model(imitation=IMITATION)


@torch.no_grad()
def encode(model, **inputs):
    return model.get_image_features(**inputs).last_hidden_state


def mask_of(*rows):
    """One row for each sample: the experts that it has."""
    return torch.tensor([[name in row for name in NAMES] for row in rows])


# ---- without the option


def test_saved_files_of_other_networks_stay(model, tmp_path):
    saved = json.loads(Path(pretrained_path(), "config.json").read_text())
    again = json.loads(PrismerConfig.from_pretrained(pretrained_path()).to_json_string())
    assert again["vision_config"] == saved["vision_config"] and again.keys() <= saved.keys()
    model.save_pretrained(tmp_path)
    assert "imitation" not in (tmp_path / "config.json").read_text()
    assert not any("imitation" in name for name in model.state_dict())


def test_language_model_saves_no_option(tmp_path):
    assert "imitation" not in tiny_lm.tiny_config().to_json_string()


def test_model_without_imitation_refuses(model):
    with pytest.raises(ValueError, match="imitates no expert"):
        model.imitate(image_inputs()["pixel_values"])


# ---- the description


@pytest.mark.parametrize(
    "change, message",
    [
        ({"experts": []}, "names of one or more experts"),
        ({"experts": ["depth", "depth"]}, "names of one or more experts"),
        ({"experts": ["heat"]}, "experts heat; the config's experts are: depth"),
        ({"layers": [1, 0]}, "ascending"),
        ({"layers": []}, "ascending"),
        ({"layers": [0, 2]}, "layer 2; the encoder's layers are 0 to 1"),
        ({"top_k": 4}, "top_k=4; 1 to num_adaptors=3"),
        ({"num_adaptors": -1}, "num_adaptors=-1"),
        ({"adaptor_size": 0}, "adaptor_size=0"),
        ({"map_scale": None}, "map_scale=None"),
        ({"depth": 3}, "unknown fields"),
    ],
)
def test_wrong_descriptions_are_named(change, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(imitation={**IMITATION, **change})


def test_description_is_plain_json():
    spec = ImitationSpec.from_dict(IMITATION)
    assert ImitationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    config = tiny_config(imitation=IMITATION)
    assert config.imitated_experts == IMITATED and config.vision_config.imitation == IMITATION
    with pytest.raises(ValueError, match="a dict with 'experts' and 'layers'"):
        ImitationSpec.from_dict({"experts": ["depth"]})


# ---- live experts


@pytest.mark.parametrize("given", [None, NAMES], ids=["no mask", "mask"])
def test_all_live_is_the_network_without_imitation(imitating, given):
    plain = PrismerForConditionalGeneration(tiny_config()).eval()
    names = plain.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in imitating.state_dict().items() if name in names})
    inputs = image_inputs() | ({} if given is None else {"expert_mask": mask_of(given, given, given)})
    assert torch.equal(encode(imitating, **inputs), encode(plain, **inputs))


@torch.no_grad()
def test_imitated_tokens_take_the_place_of_the_experts(imitating, monkeypatch):
    """A perfect imitation gives what the experts give."""
    vision, inputs = imitating.model.vision_model, image_inputs()
    live = {
        name: vision.expert_stems[name](**{k.rpartition("_")[2]: v for k, v in inputs.items() if k.startswith(name)})
        for name in IMITATED
    }
    tokens = {name: grid.flatten(2).transpose(1, 2) for name, grid in live.items()}
    perfect = ImitationOutput(tokens, {}, (tokens["depth"],), ())
    monkeypatch.setattr(vision, "imitate", lambda patches, **kwargs: perfect)
    missing = without(inputs, *IMITATED)
    torch.testing.assert_close(encode(imitating, **missing), encode(imitating, **inputs), **TOLERANCE)
    some = inputs | {"expert_mask": mask_of(NAMES, ["normal", "edge"], ["depth", "normal", "edge"])}
    torch.testing.assert_close(encode(imitating, **some), encode(imitating, **inputs), **TOLERANCE)


def test_imitation_matters(imitating):
    inputs = image_inputs()
    live, imitated = encode(imitating, **inputs), encode(imitating, **without(inputs, "depth"))
    assert (live - imitated).abs().max() > 1e-2
    nothing = copy.deepcopy(imitating)
    nothing.model.vision_model.imitation = None
    nothing.config.imitation = None
    mask = mask_of(*[[name for name in NAMES if name != "depth"]] * 3)
    gone = encode(nothing, **inputs, expert_mask=mask)
    assert (gone - imitated).abs().max() > 1e-2


def test_masked_out_expert_leaves_no_trace(imitating):
    inputs = image_inputs()
    mask = mask_of(*[["normal", "edge", "ocr"]] * 3)
    expected = encode(imitating, **without(inputs, "depth", "segmentation", "detection"), expert_mask=mask)
    torch.testing.assert_close(encode(imitating, **inputs, expert_mask=mask), expected, **TOLERANCE)
    inputs["depth_values"] = torch.full_like(inputs["depth_values"], torch.nan)
    torch.testing.assert_close(encode(imitating, **inputs, expert_mask=mask), expected, **TOLERANCE)


def test_masked_stems_do_not_run(imitating):
    inputs, ran = image_inputs(), []
    stems = imitating.model.vision_model.expert_stems
    hooks = [stem.register_forward_hook(lambda stem, *_: ran.append(stem.name)) for stem in stems.values()]
    try:
        encode(imitating, **inputs, expert_mask=mask_of(*[["normal", "edge"]] * 3))
        assert ran == ["normal", "edge"]
    finally:
        for hook in hooks:
            hook.remove()


def test_sample_does_not_depend_on_its_batch(imitating):
    inputs = image_inputs() | {"expert_mask": mask_of(NAMES, ["normal", "edge"], ["depth", "normal", "edge"])}
    together = encode(imitating, **inputs)
    for row in range(3):
        alone = encode(imitating, **pick(inputs, slice(row, row + 1)))
        torch.testing.assert_close(alone, together[row : row + 1], **TOLERANCE)


def test_strict_network_needs_only_what_it_cannot_imitate(imitating):
    inputs = image_inputs()
    encode(imitating, **without(inputs, *IMITATED))
    with pytest.raises(ValueError, match="experts normal, edge are neither given"):
        encode(imitating, **without(inputs, *NAMES))
    with pytest.raises(ValueError, match="expert_mask says that there are depth"):
        encode(imitating, **without(inputs, "depth"), expert_mask=mask_of(*[NAMES] * 3))


# ---- outputs, files, generation


def test_outputs_are_those_of_the_main_path(imitating):
    imitating = copy.deepcopy(imitating)
    imitating.set_attn_implementation("eager")
    pixels = without(image_inputs(), *NAMES) | {"expert_mask": mask_of([], [], [])}
    outputs = imitating(prompts(), **pixels, output_hidden_states=True, output_attentions=True)
    length = 16 + 6  # patches and latents
    assert [states.shape for states in outputs.encoder_hidden_states] == [(3, length, 32)] * 3
    assert [weights.shape for weights in outputs.encoder_attentions] == [(3, 4, length, length)] * 2


def test_saved_model_comes_back(imitating, tmp_path):
    imitating.save_pretrained(tmp_path)
    loaded, report = PrismerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.imitation == IMITATION
    inputs = without(image_inputs(), *IMITATED)
    assert torch.equal(encode(loaded, **inputs), encode(imitating, **inputs))


def test_generates_without_experts(imitating):
    pixels = without(image_inputs(), *NAMES) | {"expert_mask": mask_of([], [], [])}
    generated = imitating.generate(prompts(), **pixels, num_beams=2, max_new_tokens=4, do_sample=False)
    encoded = imitating.get_image_features(**pixels)
    again = imitating.generate(prompts(), encoder_outputs=encoded, num_beams=2, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, again)


def test_added_imitation_keeps_the_model(model):
    model = copy.deepcopy(model)
    inputs = image_inputs()
    before = encode(model, **inputs)
    model.add_imitation(["depth", "edge"], num_adaptors=4)
    assert torch.equal(encode(model, **inputs), before)
    assert model.config.imitation == {"experts": ["depth", "edge"], "layers": [0], "num_adaptors": 4, "top_k": 2} | {
        "map_scale": 4
    }
    added = model.model.vision_model.imitation
    assert not added.training and {parameter.dtype for parameter in added.parameters()} == {torch.float32}
    assert not added.adaptors[0].up_proj.weight.any() and not added.adaptors[0].router.film.weight.any()
    assert added.heads["depth"].fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert added.heads["depth"].token_scale == 1 and not added.heads["depth"].token_mean.any()
    names = [name for name, _ in model.named_parameters()]
    model.add_imitation(["depth"], num_adaptors=4)  # in place of the other one
    assert len([name for name, _ in model.named_parameters()]) < len(names)


def test_classes_of_an_imitated_expert_keep_their_number(imitating):
    model = copy.deepcopy(imitating)
    model.set_class_features("segmentation", torch.randn(10, 8))
    with pytest.raises(ValueError, match="whose imitation predicts 10 classes"):
        model.set_class_features("segmentation", torch.randn(4, 8), class_names=["a", "b", "c", "d"])


def test_maps_have_the_channels_of_their_experts(imitating):
    imitated = imitating.imitate(image_inputs()["pixel_values"])
    shapes = {name: tuple(tensor.shape) for name, tensor in imitated.maps.items()}
    expected = {"depth": 1, "segmentation": 11, "detection": 13, "ocr": 2}  # classes, and the background
    assert shapes == {name: (3, channels, 16, 16) for name, channels in expected.items()}
    assert {name: tuple(tensor.shape) for name, tensor in imitated.tokens.items()} == dict.fromkeys(
        IMITATED, (3, 16, 32)
    )
    assert len(imitated.routes) == len(imitated.level_states) == 2


@torch.no_grad()
def test_student_runs_through_the_layers_of_the_encoder():
    model = tiny_model(imitation={**IMITATION, "layers": [1]})  # without an adaptor after layer 0
    vision, pixels = model.model.vision_model, image_inputs()["pixel_values"]
    states = vision.pre_layernorm(vision.embeddings(pixels))
    states = vision.layers[1](vision.layers[0](states))
    condition = vision.imitation.condition(states, None, None)
    expected, routes = vision.imitation.adaptors[0](states, condition)
    imitated = model.imitate(pixels)
    torch.testing.assert_close(imitated.level_states[0], expected)
    torch.testing.assert_close(imitated.routes[0].gates, routes.gates)


def test_teacher_changes_the_routes(imitating):
    vision, pixels = imitating.model.vision_model, image_inputs()["pixel_values"]
    with torch.no_grad():
        patches = vision.embeddings(pixels)
        first, second, dynamic = (
            vision.imitate(patches, teachers=teachers).routes[0].probabilities
            for teachers in (torch.tensor([0, 0, 0]), torch.tensor([1, 0, 0]), None)
        )
    torch.testing.assert_close(first[1:], second[1:])
    assert not torch.allclose(first[0], second[0]) and not torch.allclose(first, dynamic)


def test_own_grid_of_tokens(imitating):
    model = scatter_weights(PrismerForConditionalGeneration(tiny_config(imitation={**IMITATION, "grid_size": 2})))
    imitated = model.eval().imitate(image_inputs()["pixel_values"])
    assert imitated.tokens["depth"].shape == (3, 4, 32) and imitated.maps["depth"].shape == (3, 1, 8, 8)
    encode(model, **without(image_inputs(), *IMITATED))


def test_gradients_reach_the_student(imitating):
    model = copy.deepcopy(imitating).train()
    inputs = training_inputs() | {"expert_mask": mask_of(NAMES, ["normal", "edge"], ["normal", "edge", "ocr"])}
    model(**inputs).loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # a map is not part of what the language model reads, nor is what a level before the last predicts
    parts = ("map_proj", "level_proj", "teacher_embedding")
    assert unused and all("imitation" in name and any(part in name for part in parts) for name in unused)


@pytest.mark.parametrize("given", ["nothing", "some"])
def test_compiles_as_one_graph(imitating, given):
    inputs = without(image_inputs(), *IMITATED) if given == "nothing" else image_inputs()
    if given == "some":
        inputs["expert_mask"] = mask_of(NAMES, ["normal", "edge"], ["depth", "normal", "edge"])
    expected = encode(imitating, **inputs)
    vision = imitating.model.vision_model
    mask = inputs.pop("expert_mask", None)
    experts: dict = {}
    for key, tensor in inputs.items():
        name, _, suffix = key.rpartition("_")
        if name in NAMES:
            experts.setdefault(name, {})[suffix] = tensor
    compiled = torch.compile(vision.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        actual = compiled(inputs["pixel_values"], experts, mask).last_hidden_state
    torch.testing.assert_close(actual, expected, **TOLERANCE)


# ---- PrismerLM


LM_IMITATION = {"experts": ["depth", "segmentation"], "layers": [0, 1], "num_adaptors": 3, "adaptor_size": 8}


def lm_model(**kwargs):
    config = tiny_lm.tiny_config(**kwargs)
    config.experts_config.imitation = LM_IMITATION
    torch.manual_seed(0)
    model = PrismerLMForConditionalGeneration(config)
    for parameter in model.model.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def lm_inputs(model, drop=()):
    return {
        "input_ids": tiny_lm.prompts(model.config, 2),
        **without(tiny_lm.image_inputs(model.config, 2), *drop),
    }


@torch.no_grad()
def test_language_model_runs_without_experts():
    model = lm_model()
    live = model(**lm_inputs(model)).logits
    imitated = model(**lm_inputs(model, ["depth", "segmentation"])).logits
    assert (live - imitated).abs().max() > 1e-3
    model.model.experts.imitation = None
    assert torch.equal(model(**lm_inputs(model)).logits, live)
    mask = torch.zeros(2, 2, dtype=torch.bool)  # nothing in the place of the experts
    assert (model(**lm_inputs(model), expert_mask=mask).logits - imitated).abs().max() > 1e-3


@torch.no_grad()
def test_language_model_imitates_from_cached_features():
    model = lm_model()
    inputs = lm_inputs(model, ["depth", "segmentation"])
    images = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    encoded = model.get_image_features(**images)
    cached = model.get_image_features(patch_features=encoded.last_hidden_state)
    torch.testing.assert_close(cached.pooler_output, encoded.pooler_output, **TOLERANCE)
    maps = model.imitate(patch_features=encoded.last_hidden_state).maps
    assert torch.equal(maps["depth"], model.imitate(**images).maps["depth"])


@torch.no_grad()
def test_question_changes_the_imitation(monkeypatch):
    model = lm_model(question_queries=True)
    experts, seen = model.model.experts, []
    original = experts.imitate

    def imitate(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(experts, "imitate", imitate)
    inputs = lm_inputs(model, ["depth", "segmentation"])
    model(**inputs)
    words = inputs["input_ids"].clone()
    words[:, -1] = (words[:, -1] + 1) % 50 + 5
    model(**(inputs | {"input_ids": words}))
    first, second = seen
    assert (first.routes[0].probabilities - second.routes[0].probabilities).abs().max() > 1e-5
    # the imitated tokens also reach the resampler in `generate`
    search = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    expected = model(**inputs).logits[:, -1]
    torch.testing.assert_close(model.generate(**inputs, **search).logits[0], expected, atol=1e-5, rtol=1e-5)


def test_imitation_needs_a_vision_encoder():
    config = {"experts": [{"name": "depth", "kind": "dense", "channels": 1}], "hidden_size": 32}
    config["imitation"] = {"experts": ["depth"], "layers": [0]}
    with pytest.raises(StrictDataclassError, match="imitation needs vision_config"):
        PrismerLMConfig(experts_config=config)
