"""Options of `generate`: penalties, constraints, streams, scores, assistants, compilation."""

import string
import threading

import pytest
import torch
from transformers import (
    CompileConfig,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaTokenizer,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration
from modeling_prismer.cache import CACHE_NAME

from .test_generation import BEAMS, EOS, GREEDY, PAD, Calls, cross_projections, strip
from .tiny import (
    EXPERTS,
    TOLERANCE,
    VOCAB_SIZE,
    image_inputs,
    pick,
    prompts,
    scatter_weights,
    tiny_config,
    tiny_model,
)


PROMPT_LENGTH = 5
SEARCHES = pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])


@pytest.fixture
def inputs():
    return {"input_ids": prompts(), **image_inputs()}


@pytest.fixture(scope="module")
def tokenizer():
    """Of RoBERTa's kind, with a space and a letter for each id."""
    letters = string.ascii_letters + "0123"
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *("Ġ" + letter for letter in letters)]
    return RobertaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def said(generated):
    """The continuation of each row, without padding."""
    return strip(generated[:, PROMPT_LENGTH:])


def favourite(model, inputs):
    """The token that the model says most often."""
    return torch.mode(model.generate(**inputs, **GREEDY)[:, PROMPT_LENGTH:].flatten()).values.item()


# ---- penalties and constraints


@SEARCHES
@pytest.mark.parametrize("penalty", [{"no_repeat_ngram_size": 1}, {"repetition_penalty": 100.0}])
def test_penalties_prevent_repetition(model, inputs, search, penalty):
    assert any(len(set(row)) < len(row) for row in said(model.generate(**inputs, **search)))
    for row in strip(model.generate(**inputs, **search, **penalty)):
        assert len(set(row)) == len(row)


@SEARCHES
@pytest.mark.parametrize("way", ["bad_words_ids", "suppress_tokens"])
def test_banned_words_do_not_appear(model, inputs, search, way):
    word = favourite(model, inputs)
    banned = {"bad_words_ids": [[word]], "suppress_tokens": [word]}[way]
    assert word not in model.generate(**inputs, **search, **{way: banned})[:, PROMPT_LENGTH:]


@SEARCHES
def test_sequence_bias_pushes_a_word(model, inputs, search):
    word = next(word for word in range(4, VOCAB_SIZE) if word not in model.generate(**inputs, **search))
    pushed = model.generate(**inputs, **search, sequence_bias=[[[word], 50.0]])
    assert all(word in row for row in said(pushed))


@SEARCHES
def test_each_row_follows_its_own_constraint(model, inputs, search):
    # what a trie of allowed answers does: the row's own word, then the end
    def allowed(row, ids):
        return [10 + row] if len(ids) == PROMPT_LENGTH else [EOS]

    generated = model.generate(**inputs, **search, prefix_allowed_tokens_fn=allowed)
    assert said(generated) == [[10, EOS], [11, EOS], [12, EOS]]


@SEARCHES
def test_length_settings_are_followed(model, inputs, search):
    free = said(model.generate(**inputs, **search))
    assert any(len(row) == 8 and EOS not in row for row in free)
    hurried = said(model.generate(**inputs, **search, exponential_decay_length_penalty=(1, 5.0)))
    assert all(row[-1] == EOS and len(row) < 8 for row in hurried)
    long = model.generate(**inputs, **search, sequence_bias=[[[EOS], 50.0]], min_new_tokens=5)
    assert [row.index(EOS) for row in said(long)] == [5, 5, 5]


@pytest.mark.parametrize(
    "settings, allowed",
    [
        ({"top_k": 3}, lambda logits, scores: logits >= logits.topk(3).values[..., -1:]),
        ({"min_p": 0.3}, lambda logits, scores: logits.softmax(-1) >= 0.3 * logits.softmax(-1).amax(-1, keepdim=True)),
        ({"top_p": 0.5, "temperature": 0.7}, lambda logits, scores: scores.isfinite()),
        ({"typical_p": 0.5}, lambda logits, scores: scores.isfinite()),
        ({"epsilon_cutoff": 0.05}, lambda logits, scores: scores.isfinite()),
        ({"eta_cutoff": 0.05}, lambda logits, scores: scores.isfinite()),
        ({"top_h": 0.4}, lambda logits, scores: scores.isfinite()),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sampling_is_cut_to_probable_tokens(model, inputs, settings, allowed):
    drawn = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=8,
        **({"top_k": 0} | settings),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    logits, scores = torch.stack(drawn.logits, dim=1), torch.stack(drawn.scores, dim=1)  # (rows, steps, vocabulary)
    choice = allowed(logits, scores)
    assert not choice.all()
    tokens = drawn.sequences[:, PROMPT_LENGTH:]
    assert choice.gather(2, tokens[..., None])[..., 0][tokens != PAD].all()


def test_beams_can_be_sampled(model, inputs):
    settings = {"do_sample": True, "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 8, "temperature": 3.0}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(strip(model.generate(**inputs, **settings)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 6 and len({tuple(row) for row in drawn[0]}) == 6


def test_guidance_away_from_text_without_the_image(model, inputs):
    guided = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=6,
        guidance_scale=2.0,
        negative_prompt_ids=inputs["input_ids"],
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        seeing, blind = (
            model(input_ids=guided.sequences, **images).logits[:, PROMPT_LENGTH - 1 : -1].log_softmax(dim=-1)
            for images in (image_inputs(), {})
        )
    torch.testing.assert_close(torch.stack(guided.scores, dim=1), 2 * seeing - blind, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "settings, repository",
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive-search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group-beam-search"),
        ({"num_beams": 4, "force_words_ids": [[7]]}, "constrained-beam-search"),
        ({"dola_layers": "low"}, "dola"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_moved_searches_name_their_repository(model, inputs, settings, repository):
    with pytest.raises(ValueError, match=f"transformers-community/{repository}"):
        model.generate(**inputs, **GREEDY, **settings)


def test_custom_search(model, inputs):
    """Each step, as in contrastive search, runs several candidates of each row and keeps one of them."""

    def search(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache = None
        for _ in range(generation_config.max_new_tokens):
            if cache is None:
                outputs = model(**model.prepare_inputs_for_generation(input_ids, **kwargs))
                cache = outputs[CACHE_NAME]
            else:
                cache.batch_repeat_interleave(2)
                last = input_ids[:, -1:].repeat_interleave(2, dim=0)
                last[1::2] = 7  # the other candidate, which is always thrown away
                outputs = model(input_ids=last, cache=cache, use_cache=True)
                cache.batch_select_indices(torch.arange(0, len(last), 2))
                outputs.logits = outputs.logits[::2]
            token = outputs.logits[:, -1:].argmax(dim=-1)
            token[(input_ids[:, PROMPT_LENGTH:] == EOS).any(dim=1)] = PAD
            input_ids = torch.cat([input_ids, token], dim=1)
        return input_ids

    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=search), model.generate(**inputs, **GREEDY))


# ---- streams and stops


def test_streamer_prints_text(model, tokenizer, capsys):
    inputs = {"input_ids": prompts(1), **image_inputs(1)}
    generated = model.generate(**inputs, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(generated[0, PROMPT_LENGTH:]).strip()


def test_streamer_is_an_iterator(model, tokenizer):
    inputs = {"input_ids": prompts(1), **image_inputs(1)}
    expected = tokenizer.decode(model.generate(**inputs, **GREEDY)[0]).strip()
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == expected and len(pieces) > 3


@SEARCHES
def test_generation_stops_at_a_string(model, tokenizer, inputs, search):
    free = said(model.generate(**inputs, **search))
    stop = free[0][3]
    stopped = said(model.generate(**inputs, **search, stop_strings=tokenizer.decode(stop), tokenizer=tokenizer))
    assert stopped[0][-1] == stop and len(stopped[0]) <= 4


def test_stopping_criteria_stop_each_row(model, inputs):
    class RowsStop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= PROMPT_LENGTH + torch.tensor([2, 4, 6])

    stopped = model.generate(
        **inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8, stopping_criteria=[RowsStop()]
    )
    assert [len(row) for row in said(stopped)] == [2, 4, 6]


# ---- scores, hidden states, attention


@pytest.mark.parametrize("rows", [3, 6], ids=["one prompt an image", "two prompts an image"])
def test_returned_values_equal_forward(model, rows):
    model.set_attn_implementation("eager")
    images = image_inputs()
    returned = model.generate(
        input_ids=prompts(rows),
        **images,
        do_sample=False,
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    with torch.no_grad():
        whole = model(
            input_ids=returned.sequences[:, :-1], **images, output_attentions=True, output_hidden_states=True
        )
    start = PROMPT_LENGTH - 1
    torch.testing.assert_close(torch.stack(returned.logits, dim=1), whole.logits[:, start:], **TOLERANCE)
    assert all(scores[:, EOS].isneginf().all() for scores in returned.scores)  # the scores are processed, logits not
    assert len(returned.attentions) == len(returned.hidden_states) == 4
    for step, (attentions, states) in enumerate(zip(returned.attentions, returned.hidden_states)):
        place = slice(0, PROMPT_LENGTH) if step == 0 else slice(start + step, start + step + 1)
        assert len(attentions) == 3 and len(states) == 4
        for layer, expected in zip(attentions, whole.attentions):
            torch.testing.assert_close(layer, expected[:, :, place, : start + step + 1], **TOLERANCE)
        for layer, expected in zip(states, whole.hidden_states):
            torch.testing.assert_close(layer, expected[:, place], **TOLERANCE)


@pytest.mark.parametrize("search", ["one token at a time", "beams"])
def test_cross_attention_of_each_step_equals_one_pass(model, search):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        encoded = model.get_image_features(**image_inputs(2))
        generated = model.generate(
            input_ids=prompts(4), encoder_outputs=encoded, **(BEAMS if search == "beams" else GREEDY)
        )
        looked = model(input_ids=generated, encoder_outputs=encoded, output_attentions=True).cross_attentions
        cache, steps = None, []
        for token in generated.split(1, dim=1):
            given = {"cache": cache} if cache is not None else {"encoder_outputs": encoded}
            outputs = model(input_ids=token, **given, use_cache=True, output_attentions=True)
            cache = outputs[CACHE_NAME]
            steps.append(outputs.cross_attentions)
    assert len(looked) == 2  # the output layer does not look
    for layer, attention in enumerate(looked):
        assert attention.shape == (4, 3, generated.shape[1], 16 + 6)  # patches and latents
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
        torch.testing.assert_close(attention, torch.cat([step[layer] for step in steps], dim=2), **TOLERANCE)


@SEARCHES
def test_the_scores_of_each_token(model, inputs, search):
    returned = model.generate(**inputs, **search, length_penalty=0.0, return_dict_in_generate=True, output_scores=True)
    scores = model.compute_transition_scores(
        returned.sequences,
        returned.scores,
        returned.get("beam_indices"),
        normalize_logits="beam_indices" not in returned,
    )
    tokens = returned.sequences[:, PROMPT_LENGTH:]
    with torch.no_grad():
        log_probs = model(input_ids=returned.sequences, **image_inputs()).logits[:, PROMPT_LENGTH - 1 : -1]
    expected = log_probs.log_softmax(dim=-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(scores[tokens != PAD], expected[tokens != PAD], atol=1e-4, rtol=1e-4)


# ---- other inputs


@SEARCHES
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"num_return_sequences": 2, "num_beams": 2}])
def test_embeddings_equal_their_words(model, search, how):
    padded = prompts()
    padded[1] = torch.tensor([PAD, PAD, *prompts()[1, :3]])
    given = {"attention_mask": (padded != PAD).long(), **image_inputs(), **(search | how)}
    words = model.generate(input_ids=padded, **given)
    embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(padded), **given)
    assert torch.equal(embeddings, words[:, PROMPT_LENGTH:])


def test_several_answers_to_several_prompts_for_one_image(model):
    images, prompt = image_inputs(2), prompts(6)
    settings = {"do_sample": False, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    encoder, projections = Calls(model.model.vision_model), Calls(*cross_projections(model))
    encoded = model.get_image_features(**images)
    together = model.generate(input_ids=prompt, encoder_outputs=encoded, **settings)
    assert encoder.rows == [2] and projections.rows == [2] * 4
    for row in range(6):
        alone = model.generate(input_ids=prompt[row : row + 1], **pick(images, [row // 3]), **settings)
        assert strip(together[2 * row : 2 * row + 2]) == strip(alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "how", [GREEDY, BEAMS, {**GREEDY, "cache_implementation": "static"}, {**GREEDY, "use_cache": False}]
)
def test_half_precision_picks_likely_tokens(model, inputs, dtype, how):
    half = tiny_model().to(dtype)
    generated = half.generate(**inputs, **how)
    with torch.no_grad():
        logits = model(input_ids=generated, **image_inputs()).logits[:, PROMPT_LENGTH - 1 : -1]
    tokens = generated[:, PROMPT_LENGTH:]
    ranks = (logits > logits.gather(2, tokens[..., None])).sum(dim=-1)
    assert generated.shape[1] > PROMPT_LENGTH and (ranks[tokens != PAD] < (4 if how is BEAMS else 3)).all()
    model_inputs = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}
    assert torch.equal(half.generate(**model_inputs, **how), generated)  # inputs of either type


def test_a_long_prompt_can_be_run_in_chunks(model):
    inputs = {"input_ids": prompts(length=9), **image_inputs()}
    chunked = model.generate(**inputs, **GREEDY, prefill_chunk_size=4)
    assert torch.equal(chunked, model.generate(**inputs, **GREEDY))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache_implementation", ["offloaded", "offloaded_static"])
def test_the_cache_can_wait_on_the_cpu(model, inputs, cache_implementation):
    model.cuda()
    inputs = {key: tensor.cuda() for key, tensor in inputs.items()}
    offloaded = model.generate(**inputs, **GREEDY, cache_implementation=cache_implementation, disable_compile=True)
    assert torch.equal(offloaded, model.generate(**inputs, **GREEDY))


# ---- faster


def test_a_step_is_one_graph_compiled_once(model):
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers itself compiles on accelerators only
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for seed in (0, 1):
        inputs = {"input_ids": prompts(seed=seed), **image_inputs(seed=seed)}
        compiled = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
        assert torch.equal(compiled, model.generate(**inputs, **GREEDY))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_static_cache_compiles_the_step(model, inputs):
    model.cuda()
    inputs = {key: tensor.cuda() for key, tensor in inputs.items()}
    compiled = model.generate(**inputs, **GREEDY, cache_implementation="static")
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled, model.generate(**inputs, **GREEDY))


def assistant(width: int = 16, experts: list[dict] = EXPERTS) -> PrismerForConditionalGeneration:
    """A smaller Prismer with other weights, whose encoder has another width."""
    config = tiny_config()
    torch.manual_seed(3)
    return scatter_weights(
        PrismerForConditionalGeneration(
            PrismerConfig(
                vision_config={**config.vision_config.to_dict(), "hidden_size": width, "experts": experts},
                text_config={**config.text_config.to_dict(), "num_hidden_layers": 2},
            )
        )
    ).eval()


@pytest.mark.parametrize("masked", [False, True], ids=["all experts", "some experts"])
def test_smaller_prismer_assists(model, masked):
    helper, inputs = assistant(), {"input_ids": prompts(1), **image_inputs(1)}
    if masked:
        inputs["expert_mask"] = torch.tensor([[True, False] * 3])
    expected = model.generate(**inputs, **GREEDY)
    encoders = Calls(model.model.vision_model), Calls(helper.model.vision_model)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=helper), expected)
    assert encoders[0].rows == encoders[1].rows == [1]


def test_assistant_sees_image_and_padded_prompt(model):
    # it makes the very drafts that the model would say itself, so that few steps are enough
    prompt = torch.cat([torch.full((1, 3), PAD), prompts(1)], dim=1)
    inputs = {"input_ids": prompt, "attention_mask": (prompt != PAD).long(), **image_inputs(1, seed=1)}
    settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    expected = model.generate(**inputs, **settings)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    helper = tiny_model()
    helper.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(model.generate(**inputs, **settings, assistant_model=helper), expected)
    assert len(steps) <= 3


def test_an_assistant_for_text_alone(model):
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        is_decoder=True,
    )
    inputs = {"input_ids": prompts(1), **image_inputs(1)}
    assisted = model.generate(**inputs, **GREEDY, assistant_model=RobertaForCausalLM(config).eval())
    assert torch.equal(assisted, model.generate(**inputs, **GREEDY))


def test_assisted_sampling_follows_the_seed(model):
    inputs = {"input_ids": prompts(1), **image_inputs(1), "do_sample": True, "max_new_tokens": 8, "temperature": 2.0}
    helper, drawn = assistant(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(strip(model.generate(**inputs, assistant_model=helper)))
    assert drawn[0] == drawn[1] != drawn[2]


def test_assistant_refuses_bad_inputs(model):
    images = image_inputs(1)
    encoded = model.get_image_features(**images)
    with pytest.raises(ValueError, match="assisted decoding needs pixel_values and the experts' tensors, not encoder"):
        model.generate(input_ids=prompts(1), encoder_outputs=encoded, **GREEDY, assistant_model=assistant())
    with pytest.raises(ValueError, match="depth_values given, but the config's experts are: edge"):
        helper = assistant(experts=[expert for expert in EXPERTS if expert["name"] == "edge"])
        model.generate(input_ids=prompts(1), **images, **GREEDY, assistant_model=helper)
    with pytest.raises(ValueError, match="assistant_early_exit needs a model that was trained for it"):
        model.generate(input_ids=prompts(1), **images, **GREEDY, assistant_early_exit=1)
