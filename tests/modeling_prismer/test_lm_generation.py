"""Generation with PrismerLM: families of language models, searches, batches, several images and questions."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TextStreamer

from modeling_prismer import PrismerLMForConditionalGeneration
from modeling_prismer.cache import CACHE_NAME

from .tiny_lm import (
    FUSIONS,
    LANGUAGE_MODELS,
    VOCAB_SIZE,
    Calls,
    image_inputs,
    pad_left,
    pick,
    prompts,
    repeat,
    shared_model,
    tiny_language_model,
    tiny_model,
)


NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
BEAMS = {**GREEDY, "num_beams": 3}
SEARCHES = pytest.mark.parametrize("search", [GREEDY, BEAMS], ids=["greedy", "beams"])
families = pytest.mark.parametrize("language", LANGUAGE_MODELS)
fusions = pytest.mark.parametrize("fusion", FUSIONS)


def said(generated: torch.Tensor) -> list[list[int]]:
    return generated[:, -NEW:].tolist()


# ---- every family of language models ----


@families
@fusions
@SEARCHES
def test_cached_generation_equals_uncached(language, fusion, search):
    model = shared_model(language, fusion)
    images = image_inputs(model.config, 2)
    input_ids = prompts(model.config, 2)
    cached, uncached = (model.generate(input_ids, **images, **search, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@families
@fusions
@SEARCHES
def test_a_row_generates_the_same_alone_and_padded(language, fusion, search):
    model = shared_model(language, fusion)
    images = image_inputs(model.config, 2)
    input_ids = prompts(model.config, 2)
    together = said(model.generate(input_ids, **images, **search))
    assert said(model.generate(input_ids[1:], **pick(images, [1]), **search)) == together[1:]
    assert said(model.generate(**pad_left(input_ids, 3), **images, **search)) == together


@families
@fusions
@SEARCHES
def test_several_questions_share_an_image(language, fusion, search):
    model = shared_model(language, fusion)
    images = image_inputs(model.config, 2)
    questions = prompts(model.config, 4)
    shared = model.generate(questions, **images, **search)
    assert torch.equal(shared, model.generate(questions, **repeat(images, 2), **search))
    encoded = model.get_image_features(**images)
    assert torch.equal(shared, model.generate(questions, encoder_outputs=encoded, **search))


@families
@fusions
def test_prompts_with_several_images(language, fusion):
    model = shared_model(language, fusion)
    images = image_inputs(model.config, 4)
    input_ids = prompts(model.config, 2, images=2, length=3)
    for search in (GREEDY, BEAMS):
        cached = model.generate(input_ids, **images, **search)
        assert torch.equal(cached, model.generate(input_ids, **images, **search, use_cache=False))
        assert torch.equal(cached[1:], model.generate(input_ids[1:], **pick(images, [2, 3]), **search))


@families
@fusions
def test_static_cache(language, fusion):
    model = shared_model(language, fusion)
    images = image_inputs(model.config, 4)
    input_ids = prompts(model.config, 2, images=2, length=3)
    static = {"cache_implementation": "static", "disable_compile": True}
    for search in (GREEDY, BEAMS):
        expected = model.generate(input_ids, **images, **search)
        assert torch.equal(model.generate(input_ids, **images, **search, **static), expected)


# ---- several images and rows ----


@fusions
def test_rows_may_have_different_numbers_of_images(fusion):
    model = shared_model(fusion=fusion)
    images = image_inputs(model.config, 3)
    one, two = prompts(model.config, 1, placeholders=True), prompts(model.config, 1, images=2)
    padded = pad_left(one, two.shape[1] - one.shape[1])
    batch = {
        "input_ids": torch.cat([padded["input_ids"], two]),
        "attention_mask": torch.cat([padded["attention_mask"], torch.ones_like(two)]),
    }
    expected = said(model.generate(one, **pick(images, [0]), **GREEDY))
    expected += said(model.generate(two, **pick(images, [1, 2]), **GREEDY))
    assert said(model.generate(**batch, **images, **GREEDY)) == expected


def test_a_few_shot_prompt_has_a_row_without_its_own_image():
    model = shared_model(fusion="cross_attention")
    image = [model.config.image_token_id]
    input_ids = torch.tensor([[*image, 7, 8, 9], [11, 12, 13, 14]])  # the second row is text alone
    logits = model(input_ids=input_ids, **image_inputs(model.config, 1)).logits
    torch.testing.assert_close(logits[1], model(input_ids=input_ids[1:]).logits[0])


def test_a_token_cross_attends_to_its_last_image_only():
    model = tiny_model(fusion="cross_attention", cross_attention_every=1)
    outputs = []
    model.model.cross_blocks["0"].register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    image = [model.config.image_token_id]
    input_ids = torch.tensor([[3, *image, 4, 5, *image, 6, 7]])
    for first, second in ((0, 1), (2, 1), (0, 3)):
        model(input_ids=input_ids, **pick(image_inputs(model.config, 4), [first, second]))
    plain, other_first, other_second = outputs
    changed = [(plain - other).abs().amax(dim=-1) > 1e-4 for other in (other_first, other_second)]
    assert changed[0].tolist() == [False, True, True, True, False, False, False]
    assert changed[1].tolist() == [False, False, False, False, True, True, True]


@fusions
@SEARCHES
def test_text_in_front_of_the_images(fusion, search):
    model = shared_model(fusion=fusion)
    images, text = image_inputs(model.config, 4), torch.tensor([[7, 8], [9, 10]])
    input_ids = torch.cat([text, prompts(model.config, 2, images=2, length=3)], dim=1)
    cached, uncached = (model.generate(input_ids, **images, **search, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_encoded_images_serve_other_prompts_too():
    model = shared_model(fusion="cross_attention")
    encoded = model.get_image_features(**image_inputs(model.config, 2))
    short = torch.tensor([[7], [8]])
    expected = model.generate(short, encoder_outputs=encoded, **GREEDY)
    model.generate(prompts(model.config, 1, images=2), encoder_outputs=encoded, **GREEDY)
    assert torch.equal(model.generate(short, encoder_outputs=encoded, **GREEDY), expected)


@fusions
def test_every_image_of_a_prompt_matters(fusion):
    model = shared_model(fusion=fusion)
    input_ids = prompts(model.config, 1, images=3, length=2)
    plain = model(input_ids=input_ids, **pick(image_inputs(model.config, 6), [0, 1, 2])).logits[:, -1]
    for chosen in ([3, 1, 2], [0, 4, 2], [0, 1, 5]):
        other = model(input_ids=input_ids, **pick(image_inputs(model.config, 6), chosen)).logits[:, -1]
        assert (plain - other).abs().max() > 1e-4


@pytest.mark.parametrize("given", ["pixels", "encoder_outputs"])
@fusions
def test_encoders_and_stems_run_once_for_each_image(fusion, given):
    model = tiny_model(fusion=fusion, vision=("siglip", "clip"))
    calls = Calls(*model.model.vision_encoders, *model.model.experts.expert_stems.values())
    images = image_inputs(model.config, 2)
    if given == "encoder_outputs":
        images = {"encoder_outputs": model.get_image_features(**images)}
    blocks = [block.cross_attn.k_proj for block in model.model.cross_blocks.values()]
    projections = Calls(*blocks)
    model.generate(prompts(model.config, 4), **images, **BEAMS, num_return_sequences=2)
    assert calls.rows == [2] * 4
    assert projections.rows == [2] * len(blocks)  # keys are projected once for each image, too


@fusions
def test_text_without_images_equals_the_language_model(fusion):
    model = shared_model(fusion=fusion)
    text = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.generate(text, **GREEDY), model.language_model.generate(text, **GREEDY))


@fusions
@pytest.mark.parametrize("number", [1, 2])
def test_a_conversation_goes_on_from_its_cache(fusion, number):
    model = shared_model(fusion=fusion)
    images, input_ids = image_inputs(model.config, number), prompts(model.config, 1, images=number)
    first = model.generate(input_ids, **images, **GREEDY, return_dict_in_generate=True)
    second = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], dim=1)
    given = {"attention_mask": torch.ones_like(second), **images, **GREEDY}
    cache = {CACHE_NAME: getattr(first, CACHE_NAME)}
    assert said(model.generate(second, **given, **cache)) == said(model.generate(second, **given))


# ---- what users ask `generate` for ----


@fusions
@SEARCHES
def test_embeddings_give_what_their_words_give(fusion, search):
    inside = tiny_model(fusion=fusion, image_token_id=VOCAB_SIZE - 1)
    images, input_ids = image_inputs(inside.config, 2), prompts(inside.config, 2, placeholders=True)
    expected = inside.generate(input_ids, **images, **search)
    embeddings = inside.get_input_embeddings()(input_ids)
    assert said(inside.generate(inputs_embeds=embeddings, **images, **search)) == said(expected)
    types = (input_ids == VOCAB_SIZE - 1).long()
    marked = inside.generate(inputs_embeds=embeddings, mm_token_type_ids=types, **images, **search)
    assert said(marked) == said(expected)


def test_embeddings_need_marked_placeholders():
    model = shared_model()
    embeddings = torch.randn(1, model.config.image_seq_length + 3, 32)
    with pytest.raises(ValueError, match="inputs_embeds needs mm_token_type_ids"):
        model.generate(inputs_embeds=embeddings, **image_inputs(model.config, 1), **GREEDY)


def test_a_prompt_is_needed():
    model = shared_model()
    with pytest.raises(ValueError, match="input_ids is missing"):
        model.generate(**image_inputs(model.config, 1), **GREEDY)


@fusions
def test_all_that_can_be_returned_is_what_forward_computes(fusion):
    model = tiny_model(fusion=fusion)
    model.set_attn_implementation("eager")
    images, input_ids = image_inputs(model.config, 2), prompts(model.config, 4)
    wanted = {"output_logits": True, "output_scores": True, "output_hidden_states": True, "output_attentions": True}
    returned = model.generate(input_ids, **images, **GREEDY, return_dict_in_generate=True, **wanted)
    whole = torch.cat([input_ids, returned.sequences[:, -NEW:]], dim=1)[:, :-1]
    with torch.no_grad():
        outputs = model(input_ids=whole, **images, output_hidden_states=True, output_attentions=True)
    start = input_ids.shape[1] - 1
    torch.testing.assert_close(torch.stack(returned.logits, dim=1), outputs.logits[:, start:], atol=1e-4, rtol=1e-4)
    last = torch.cat([step[-1][:, -1:] for step in returned.hidden_states], dim=1)
    torch.testing.assert_close(last, outputs.hidden_states[-1][:, start:], atol=1e-4, rtol=1e-4)
    assert len(returned.attentions[0]) == len(outputs.attentions) == 2


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


@fusions
def test_text_is_printed_as_it_comes(fusion, tokenizer, capsys):
    model = shared_model(fusion=fusion)
    images, input_ids = image_inputs(model.config, 1), prompts(model.config, 1)
    generated = model.generate(input_ids, **images, **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(generated[0, -NEW:]).split()


@fusions
def test_sampling_is_repeated_with_its_seed(fusion):
    model = shared_model(fusion=fusion)
    images, input_ids = image_inputs(model.config, 2), prompts(model.config, 2)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(said(model.generate(input_ids, **images, do_sample=True, top_k=0, max_new_tokens=NEW)))
    assert drawn[0] == drawn[1] != drawn[2]


@fusions
@SEARCHES
@pytest.mark.parametrize("penalty", [{"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}])
def test_it_does_not_repeat_itself(fusion, search, penalty):
    model = shared_model(fusion=fusion)
    images, input_ids = image_inputs(model.config, 2), prompts(model.config, 2)
    free = model.generate(input_ids, **images, **{**search, "max_new_tokens": 20})[:, -20:].tolist()
    assert any(len(set(row)) < len(row) for row in free)
    for row in said(model.generate(input_ids, **images, **search, **penalty)):
        assert len(set(row)) == len(row)


ASSISTANTS = {
    "text": lambda fusion: tiny_language_model(),
    "the same": lambda fusion: copy.deepcopy(shared_model(fusion=fusion)),
    "another": lambda fusion: tiny_model(fusion=fusion, language="mistral", vision=("clip",)),
}


@fusions
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", ASSISTANTS)
def test_assisted_decoding_says_what_the_model_says(fusion, kind, number):
    model, assistant = shared_model(fusion=fusion), ASSISTANTS[kind](fusion)
    images, input_ids = image_inputs(model.config, number), prompts(model.config, 1, images=number)
    encoders = assistant.model.vision_encoders if isinstance(assistant, PrismerLMForConditionalGeneration) else []
    calls = Calls(*encoders)
    settings = {**GREEDY, "max_new_tokens": 10}
    expected = model.generate(input_ids, **images, **settings)
    steps = Calls(model.model.decoder_layers[0])
    assert torch.equal(model.generate(input_ids, **images, **settings, assistant_model=assistant), expected)
    assert calls.rows == [number] * len(encoders)
    if kind == "the same":  # its drafts are right
        assert len(steps.rows) < 8


@fusions
def test_drafts_from_the_prompt(fusion):
    model = shared_model(fusion=fusion)
    images, input_ids = image_inputs(model.config, 1), prompts(model.config, 1)
    expected = model.generate(input_ids, **images, **GREEDY)
    assert torch.equal(model.generate(input_ids, **images, **GREEDY, prompt_lookup_num_tokens=3), expected)


def test_an_assistant_needs_the_images_themselves():
    model = shared_model()
    encoded = model.get_image_features(**image_inputs(model.config, 1))
    with pytest.raises(ValueError, match="assisted decoding needs the image inputs"):
        model.generate(
            prompts(model.config, 1), encoder_outputs=encoded, **GREEDY, assistant_model=copy.deepcopy(model)
        )
