"""`generate`: what it makes, what it computes only once, how prompts, beams and caches are shared."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from modeling_prismer.cache import CACHE_NAME

from .tiny import TOLERANCE, VOCAB_SIZE, image_inputs, pick, prompts, tiny_config, tiny_model, without


GREEDY = {"do_sample": False, "max_new_tokens": 8}
BEAMS = {"do_sample": False, "max_new_tokens": 8, "num_beams": 4}
PAD, EOS = 1, 2


def strip(generated):
    """Token ids without padding on either side."""
    return [[token for token in row if token != PAD] for row in generated.tolist()]


class Calls:
    """Counts the calls of modules, and remembers how many rows each got."""

    def __init__(self, *modules):
        self.rows = []
        for module in modules:
            module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        tensor = args[0] if args else kwargs["pixel_values"]
        self.rows.append(tensor.shape[0])


def cross_projections(model):
    layers = [layer.cross_attn for layer in model.model.text_model.layers if layer.cross_attn is not None]
    return [projection for attention in layers for projection in (attention.k_proj, attention.v_proj)]


@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_text_depends_on_the_image(model, search):
    prompt = prompts(1).repeat(3, 1)
    generated = model.generate(input_ids=prompt, **image_inputs(seed=1), **search)
    assert torch.equal(generated[:, :5], prompt)  # the prompt comes first
    assert len({tuple(row) for row in strip(generated)}) == 3


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(
    "search", [GREEDY, BEAMS, {"do_sample": True, "max_new_tokens": 5}], ids=["greedy", "beams", "sampling"]
)
def test_the_images_are_encoded_once(model, search, use_cache):
    encoder = Calls(model.model.vision_model)
    model.generate(input_ids=prompts(), use_cache=use_cache, **image_inputs(), **search)
    assert encoder.rows == [3]


@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_the_images_keys_and_values_are_projected_once(model, search, cache_implementation):
    projections = cross_projections(model)
    assert len(projections) == 4
    calls = Calls(*projections)
    model.generate(input_ids=prompts(), cache_implementation=cache_implementation, **image_inputs(), **search)
    assert calls.rows == [3] * 4  # one row an image, not one a beam


@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_cached_and_uncached_are_equal(model, search):
    inputs = {"input_ids": prompts(), **image_inputs()}
    assert torch.equal(
        model.generate(**inputs, use_cache=True, **search), model.generate(**inputs, use_cache=False, **search)
    )


@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_static_and_dynamic_cache_are_equal(model, search):
    inputs = {"input_ids": prompts(), **image_inputs()}
    static = model.generate(**inputs, cache_implementation="static", return_dict_in_generate=True, **search)
    assert isinstance(static[CACHE_NAME], StaticCache)
    assert torch.equal(static.sequences, model.generate(**inputs, **search))


def test_static_cache_is_reused_for_other_images(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=20)
    for seed in (0, 1):
        inputs = {"input_ids": prompts(), **image_inputs(seed=seed)}
        cache.reset()
        again = model.generate(**inputs, **{CACHE_NAME: cache}, **GREEDY)
        assert torch.equal(again, model.generate(**inputs, **GREEDY))


def test_guessed_continuations_change_nothing(model):
    inputs = {"input_ids": prompts(1), **image_inputs(1)}
    guessing = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
    assert torch.equal(guessing, model.generate(**inputs, **GREEDY))


def test_greedy_is_the_argmax_of_forward(model):
    inputs = image_inputs()
    generated = model.generate(input_ids=prompts(), **inputs, **GREEDY)
    with torch.no_grad():
        predicted = model(input_ids=generated, **inputs).logits.argmax(dim=-1)
    said = generated[:, 5:] != PAD
    assert torch.equal(predicted[:, 4:-1][said], generated[:, 5:][said])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_left_padding_changes_nothing(model, search, attention):
    model.set_attn_implementation(attention)
    images, prompt = image_inputs(), prompts()
    lengths = [5, 3, 4]
    padded = torch.full_like(prompt, PAD)
    for row, length in enumerate(lengths):
        padded[row, -length:] = prompt[row, :length]
    together = model.generate(input_ids=padded, attention_mask=(padded != PAD).long(), **images, **search)
    inferred = model.generate(input_ids=padded, **images, **search)
    assert torch.equal(together, inferred)
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids=prompt[row : row + 1, :length], **pick(images, [row]), **search)
        assert strip(together[row : row + 1]) == strip(alone)


@pytest.mark.parametrize("mask", ["given", "inferred"])
def test_right_padding_is_refused(model, mask):
    padded = prompts()
    padded[1, 3:] = PAD
    kwargs = {"attention_mask": (padded != PAD).long()} if mask == "given" else {}
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(input_ids=padded, **kwargs, **image_inputs(), **GREEDY)


@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_batch_equals_single_samples(model, search):
    images, prompt = image_inputs(4), prompts(4)
    together = model.generate(input_ids=prompt, **images, **search)
    for row in range(4):
        alone = model.generate(input_ids=prompt[row : row + 1], **pick(images, [row]), **search)
        assert strip(together[row : row + 1]) == strip(alone)


def test_mixed_experts_in_a_batch_equal_single_samples(model):
    images, prompt = image_inputs(3), prompts(3)
    mask = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    together = model.generate(input_ids=prompt, expert_mask=mask, **images, **BEAMS)
    for row in range(3):
        gone = [name for name, has in zip(model.config.expert_names, mask[row]) if not has]
        alone = model.generate(
            input_ids=prompt[row : row + 1],
            expert_mask=mask[row : row + 1],
            **without(pick(images, [row]), *gone),
            **BEAMS,
        )
        assert strip(together[row : row + 1]) == strip(alone)


def test_sampling_follows_the_seed(model):
    inputs = {"input_ids": prompts(), **image_inputs(), "do_sample": True, "max_new_tokens": 8, "temperature": 2.0}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(strip(model.generate(**inputs)))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("search", ["beams", "sampling"])
def test_several_sequences_for_each_image(model, search):
    inputs = {"input_ids": prompts(2), **image_inputs(2), "max_new_tokens": 6, "num_return_sequences": 3}
    if search == "beams":
        generated = model.generate(**inputs, do_sample=False, num_beams=4)
        best = model.generate(**(inputs | {"num_return_sequences": 1}), do_sample=False, num_beams=4)
        assert strip(generated[::3]) == strip(best)
    else:
        generated = model.generate(**inputs, do_sample=True)
    assert generated.shape[0] == 6
    assert torch.equal(generated[:, :5], prompts(2).repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in strip(generated)}) == 6


def test_beam_scores_equal_the_sequences_scores(model):
    images = image_inputs()
    best = model.generate(
        input_ids=prompts(),
        **images,
        **BEAMS,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        log_probs = model(input_ids=best.sequences, **images).logits[:, 4:-1].log_softmax(dim=-1)
    said = best.sequences[:, 5:]
    scores = (log_probs.gather(2, said[..., None])[..., 0] * (said != PAD)).sum(dim=-1)
    torch.testing.assert_close(best.sequences_scores, scores, atol=1e-4, rtol=1e-4)


def test_generation_stops_at_the_end_of_sequence(model):
    images = image_inputs()
    free = model.generate(input_ids=prompts(), **images, do_sample=False, max_new_tokens=12)
    row = max(range(3), key=lambda row: len(strip(free)[row]))
    end = next(token for token in free[row, 7:].tolist() if token not in (*free[row, 5:7].tolist(), EOS))
    stopped = model.generate(
        input_ids=prompts(), **images, do_sample=False, max_new_tokens=12, eos_token_id=[EOS, end]
    )
    for before, after in zip(strip(free), strip(stopped)):
        ends = [place for place, token in enumerate(before) if place >= 5 and token in (EOS, end)]
        assert after == before[: ends[0] + 1] if ends else after == before
    assert strip(stopped)[row][-1] == end


def test_special_tokens_come_from_the_config(model):
    assert model.generation_config.eos_token_id == EOS
    assert model.generation_config.pad_token_id == PAD
    assert model.generation_config.bos_token_id == 0


@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("form", ["output", "tuple", "tensor"])
def test_images_encoded_before_can_be_used_again(model, search, form):
    images = image_inputs()
    expected = model.generate(input_ids=prompts(), **images, **search)
    with torch.no_grad():
        encoded = model.get_image_features(**images)
    given = {"output": encoded, "tuple": (encoded[0],), "tensor": encoded[0]}[form]
    encoder, projections = Calls(model.model.vision_model), Calls(*cross_projections(model))
    for _ in range(2):
        assert torch.equal(model.generate(input_ids=prompts(), encoder_outputs=given, **search), expected)
    assert encoder.rows == [] and projections.rows == [3] * 8


@pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_several_prompts_for_one_image(model, search):
    images, prompt = image_inputs(2), prompts(6)
    encoder, projections = Calls(model.model.vision_model), Calls(*cross_projections(model))
    together = model.generate(input_ids=prompt, **images, **search)
    assert encoder.rows == [2] and projections.rows == [2] * 4
    repeated = {key: tensor.repeat_interleave(3, dim=0) for key, tensor in images.items()}
    assert torch.equal(together, model.generate(input_ids=prompt, **repeated, **search))


def test_rows_must_be_a_multiple_of_the_images(model):
    with pytest.raises(ValueError, match="5 rows of text for 3 images: the rows must be a multiple"):
        model.generate(input_ids=prompts(5), **image_inputs(3), **GREEDY)


@pytest.mark.parametrize("images_again", [False, True], ids=["cache alone", "images again"])
def test_a_generation_can_be_continued(model, images_again):
    images = image_inputs()
    whole = model.generate(input_ids=prompts(), **images, do_sample=False, max_new_tokens=9, min_new_tokens=9)
    first = model.generate(
        input_ids=prompts(),
        **images,
        do_sample=False,
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
    )
    rest = model.generate(
        input_ids=first.sequences,
        **{CACHE_NAME: first[CACHE_NAME]},
        **(images if images_again else {}),
        do_sample=False,
        max_new_tokens=5,
        min_new_tokens=5,
    )
    assert torch.equal(rest, whole)


def test_a_prompt_can_be_run_in_parts(model):
    images, prompt = image_inputs(), prompts(length=6)
    with torch.no_grad():
        whole = model(input_ids=prompt, **images).logits
        first = model(input_ids=prompt[:, :4], **images, use_cache=True)
        second = model(input_ids=prompt[:, 4:], cache=first[CACHE_NAME])
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, **TOLERANCE)


def test_a_copied_cache_goes_on_by_itself(model):
    images, prompt = image_inputs(), prompts(length=6)
    with torch.no_grad():
        cache = model(input_ids=prompt[:, :4], **images, use_cache=True)[CACHE_NAME]
        expected = model(input_ids=prompt, **images).logits[:, 4:]
        for _ in range(2):
            outputs = model(input_ids=prompt[:, 4:], cache=copy.deepcopy(cache))
            torch.testing.assert_close(outputs.logits, expected, **TOLERANCE)


def test_new_images_replace_those_of_a_cache(model):
    prompt, cache = prompts(), DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=prompt, **image_inputs(seed=1), cache=cache)
        cache.reset()
        again = model(input_ids=prompt, **image_inputs(seed=0), cache=cache)
        expected = model(input_ids=prompt, **image_inputs(seed=0))
    torch.testing.assert_close(again.logits, expected.logits, **TOLERANCE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cleared_cache_holds_no_image(model, kind):
    prompt = prompts()
    config = model.config.text_config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=20)
    with torch.no_grad():
        expected = model(input_ids=prompt).logits
        model(input_ids=prompt, **image_inputs(), cache=cache)
        cache.reset()
        again = model(input_ids=prompt, cache=cache).logits
    torch.testing.assert_close(again, expected, **TOLERANCE)


def test_layers_of_any_class_keep_the_image(model):
    class OwnLayer(DynamicLayer):
        pass

    images, prompt = image_inputs(), prompts(length=6)
    cache = Cache(layer_class_to_replicate=OwnLayer)
    with torch.no_grad():
        expected = model(input_ids=prompt, **images).logits[:, 4:]
        model(input_ids=prompt[:, :4], **images, cache=cache)
        outputs = model(input_ids=prompt[:, 4:], cache=cache)
    assert all(isinstance(layer, OwnLayer) for layer in cache.layers)
    torch.testing.assert_close(outputs.logits, expected, **TOLERANCE)


def test_text_runs_without_images(model):
    text = model.generate(input_ids=prompts(), **GREEDY)
    assert torch.equal(text, model.generate(input_ids=prompts(), use_cache=False, **GREEDY))
    assert strip(text) != strip(model.generate(input_ids=prompts(), **image_inputs(), **GREEDY))


def test_word_embeddings_in_place_of_words(model):
    embeddings = model.get_input_embeddings()(prompts())
    said = model.generate(inputs_embeds=embeddings, **image_inputs(), **GREEDY)
    assert torch.equal(said, model.generate(input_ids=prompts(), **image_inputs(), **GREEDY)[:, 5:])


def test_own_experts_reach_the_encoder():
    heat = {"name": "heat", "kind": "dense", "channels": 2}
    model = tiny_model(experts=[heat])
    inputs = image_inputs(experts=[heat])
    said = model.generate(input_ids=prompts(), **inputs, **GREEDY)
    inputs["heat_values"] = inputs["heat_values"] * 5 + 3
    assert not torch.equal(said, model.generate(input_ids=prompts(), **inputs, **GREEDY))


def test_bad_inputs_are_refused(model):
    images = image_inputs()
    with pytest.raises(ValueError, match="experts depth are neither given nor masked out"):
        model.generate(input_ids=prompts(), **without(images, "depth"), **GREEDY)
    with pytest.raises(ValueError, match="depth_values.* given without pixel_values"):
        model.generate(input_ids=prompts(), depth_values=images["depth_values"], **GREEDY)
    with pytest.raises(ValueError, match="pixel_values or encoder_outputs, not both"):
        encoded = model.get_image_features(**images)
        model.generate(input_ids=prompts(), encoder_outputs=encoded, **images, **GREEDY)
    with pytest.raises(ValueError, match="colour"):
        model.generate(input_ids=prompts(), colour="red", **images, **GREEDY)


def test_a_text_longer_than_the_positions_is_refused():
    config = tiny_config(experts=[])
    model = tiny_model(config)
    longest = config.text_config.max_position_embeddings - 2
    images = image_inputs(1, experts=[])
    text = prompts(1, length=longest)
    assert model(input_ids=text, **images).logits.shape == (1, longest, VOCAB_SIZE)
    with pytest.raises(ValueError, match=f"{longest + 1} tokens; this model takes at most {longest}"):
        model(input_ids=prompts(1, length=longest + 1), **images)
