"""`forward`: outputs and their shapes, attention implementations, number types, initialisation, resizing."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.masking_utils import flash_attention_mask

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration, PrismerModel
from modeling_prismer.cache import CACHE_NAME
from modeling_prismer.layers import PrismerLayerNorm
from modeling_prismer.modeling_prismer import PrismerAdaptor

from .tiny import (
    TOLERANCE,
    VOCAB_SIZE,
    image_inputs,
    needs_traced_checks,
    pick,
    prompts,
    tiny_config,
    tiny_model,
    training_inputs,
    without,
)


TOKENS = 16 + 6  # patches and latents


# ---- outputs


def test_output_shapes(model):
    outputs = model(**training_inputs(), output_hidden_states=True, use_cache=True)
    assert outputs.logits.shape == (3, 7, VOCAB_SIZE)
    assert outputs.loss.shape == () and outputs.loss_per_sample.shape == (3,)
    assert outputs.encoder_last_hidden_state.shape == (3, TOKENS, 32)
    assert [states.shape for states in outputs.hidden_states] == [(3, 7, 24)] * 4
    assert [states.shape for states in outputs.encoder_hidden_states] == [(3, TOKENS, 32)] * 3
    assert CACHE_NAME not in outputs  # there is nothing to continue after a loss
    outputs = model(input_ids=prompts(), **image_inputs())
    assert outputs.loss is None and outputs.hidden_states is None and outputs.attentions is None
    assert outputs[CACHE_NAME].get_seq_length() == 5


def test_image_outputs_equal_the_encoder(model):
    model.set_attn_implementation("eager")
    recorded = {"output_hidden_states": True, "output_attentions": True}
    encoded = model.get_image_features(**image_inputs(), **recorded)
    images = model(input_ids=prompts(), **image_inputs(), **recorded).image_outputs
    assert torch.equal(images.last_hidden_state, encoded.last_hidden_state)
    assert torch.equal(images.pooler_output, encoded.pooler_output)
    assert len(images.hidden_states) == len(encoded.hidden_states) == 3
    assert torch.equal(images.attentions[1], encoded.attentions[1])
    assert model(input_ids=prompts()).image_outputs is None


def test_the_shapes_of_attentions(model):
    model.set_attn_implementation("eager")
    outputs = model(input_ids=prompts(6), **image_inputs(3), output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(6, 3, 5, 5)] * 3
    assert [weights.shape for weights in outputs.cross_attentions] == [(6, 3, 5, TOKENS)] * 2
    assert [weights.shape for weights in outputs.encoder_attentions] == [(3, 4, TOKENS, TOKENS)] * 2
    for weights in (*outputs.attentions, *outputs.cross_attentions, *outputs.encoder_attentions):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert not outputs.attentions[0].triu(1).any()


def test_cross_attentions_of_each_row(model):
    model.set_attn_implementation("eager")
    images, text = image_inputs(2), prompts(6)
    together = model(input_ids=text, **images, output_attentions=True)
    for row in range(6):
        alone = model(input_ids=text[row : row + 1], **pick(images, [row // 3]), output_attentions=True)
        for weights, expected in zip(together.cross_attentions, alone.cross_attentions):
            torch.testing.assert_close(weights[row : row + 1], expected, **TOLERANCE)


def test_a_tuple_on_demand(model):
    inputs = training_inputs()
    outputs, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs.loss) and torch.equal(as_tuple[1], outputs.logits)
    base = model.model(**without({"input_ids": prompts(), **image_inputs()}), return_dict=False)
    assert torch.equal(base[0], model.model(input_ids=prompts(), **image_inputs()).last_hidden_state)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])], ids=["one", "three", "chosen"])
def test_logits_of_some_positions_only(model, kept):
    inputs = {"input_ids": prompts(), **image_inputs()}
    everything = model(**inputs).logits
    places = kept if isinstance(kept, torch.Tensor) else slice(-kept, None)
    torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, everything[:, places], **TOLERANCE)


def test_loss_is_the_weighted_mean_of_sample_losses(model):
    inputs = training_inputs()
    outputs = model(**inputs, sample_weight=torch.tensor([1.0, 0.0, 0.3]))
    shifted = outputs.logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(shifted, inputs["labels"][:, 1:], label_smoothing=0.1, reduction="none").sum(dim=1)
    torch.testing.assert_close(outputs.loss_per_sample, losses)
    torch.testing.assert_close(outputs.loss, (losses[0] + 0.3 * losses[2]) / 3)
    torch.testing.assert_close(model(**inputs).loss, losses.mean())


def test_label_smoothing_is_a_field_of_the_config(model):
    inputs = training_inputs()
    model.config.label_smoothing = 0.0
    outputs = model(**inputs)
    log_probs = outputs.logits[:, :-1].log_softmax(dim=-1)
    learned = inputs["labels"][:, 1:]
    picked = log_probs.gather(2, learned.clamp(min=0)[..., None])[..., 0] * (learned != -100)
    torch.testing.assert_close(outputs.loss_per_sample, -picked.sum(dim=1))


def test_labels_that_are_shifted_already(model):
    inputs = training_inputs()
    expected = model(**inputs).loss
    labels = inputs.pop("labels")
    torch.testing.assert_close(model(**inputs, shift_labels=F.pad(labels[:, 1:], (0, 1), value=-100)).loss, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_of_the_text_changes_nothing(model, side, attention):
    model.set_attn_implementation(attention)
    inputs = training_inputs()
    expected = model(**inputs)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = inputs | {
        "input_ids": F.pad(inputs["input_ids"], pad, value=1),
        "attention_mask": F.pad(inputs["attention_mask"], pad),
        "labels": F.pad(inputs["labels"], pad, value=-100),
    }
    outputs = model(**padded)
    shown = padded["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[shown], expected.logits.flatten(0, 1), **TOLERANCE)
    torch.testing.assert_close(outputs.loss_per_sample, expected.loss_per_sample)


def test_token_sees_only_earlier_tokens(model):
    inputs = {"input_ids": prompts(length=7), **image_inputs()}
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 4] = 9
    before, after = model(**inputs).logits, model(**changed).logits
    torch.testing.assert_close(before[:, :4], after[:, :4], **TOLERANCE)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_positions_count_from_zero(model):
    inputs = {"input_ids": prompts(), **image_inputs()}
    torch.testing.assert_close(model(**inputs, position_ids=torch.arange(5)[None]).logits, model(**inputs).logits)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(
        model(inputs_embeds=embeddings, **inputs).logits, model(input_ids=prompts(), **inputs).logits
    )


def test_rows_of_text_may_be_a_multiple_of_the_images(model):
    inputs = training_inputs(6)
    text = {key: inputs.pop(key) for key in ("input_ids", "attention_mask", "labels")}
    images = pick(inputs, [0, 1])
    repeated = pick(inputs, [0, 0, 0, 1, 1, 1])
    together, apart = model(**text, **images), model(**text, **repeated)
    torch.testing.assert_close(together.logits, apart.logits, **TOLERANCE)
    assert together.encoder_last_hidden_state.shape[0] == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.zeros(3, 5, 24)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": prompts(4)}, "4 rows of text for 3 images"),
        ({"encoder_outputs": (torch.zeros(3, TOKENS, 32),)}, "pixel_values or encoder_outputs, not both"),
        ({**dict.fromkeys(image_inputs()), "encoder_outputs": torch.zeros(3, TOKENS, 30)}, r"22, 30\); .* 32\)"),
    ],
)
def test_bad_inputs_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": prompts(), **image_inputs()} | changes))


def test_the_parts_run_by_themselves(model):
    images = image_inputs()
    expected = model(input_ids=prompts(), **images)
    vision, text = model.get_encoder("image"), model.model.text_model
    assert vision is model.model.vision_model
    assert model.get_encoder("audio") is model  # as the library says that there is none
    by_expert = {}
    for key, tensor in images.items():
        name, _, suffix = key.rpartition("_")
        if name != "pixel":
            by_expert.setdefault(name, {})[suffix] = tensor
    encoded = vision(images["pixel_values"], by_expert).last_hidden_state
    assert torch.equal(encoded, expected.encoder_last_hidden_state)
    decoded = text(input_ids=prompts(), encoder_hidden_states=encoded).last_hidden_state
    torch.testing.assert_close(model.lm_head(decoded), expected.logits, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (12, 1), (5, 3), (16, 1)])
def test_the_head_scores_many_places_as_it_does_each_alone(model, shape):
    states = torch.randn(*shape, 24)
    logits = model.lm_head(states)
    assert logits.shape == (*shape, VOCAB_SIZE)
    alone = torch.stack([model.lm_head(row[None])[0] for row in states.flatten(0, 1)])
    torch.testing.assert_close(logits.flatten(0, 1), alone, **TOLERANCE)


# ---- attention, memory, number types


@pytest.mark.parametrize("masked", [False, True], ids=["all experts", "some experts"])
def test_eager_and_sdpa_are_equal(model, masked):
    inputs = training_inputs()
    inputs["attention_mask"][1, :3], inputs["labels"][1, :4] = 0, -100
    if masked:
        inputs["expert_mask"] = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    results = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.model.vision_model.config._attn_implementation == attention
        assert model.model.text_model.config._attn_implementation == attention
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((outputs.logits[inputs["attention_mask"].bool()], gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def attention_without_padding(module, query, key, value, attention_mask, scaling, **kwargs):
    """As flash attention does it: a mask of the keys, the last of which are the queries', and padding is cut out."""
    outputs = torch.zeros_like(query)
    length = query.shape[2]
    for row in range(query.shape[0]):
        keys = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
        queries = keys[-length:] if attention_mask is not None else torch.ones(length, dtype=torch.bool)
        scores = query[row][:, queries] @ key[row][:, keys].mT * scaling
        if module.is_causal:  # aligned at the end
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
            scores = scores.masked_fill(~seen, -torch.inf)
        outputs[row][:, queries] = scores.softmax(dim=-1) @ value[row][:, keys]
    return outputs.transpose(1, 2), None


@torch.no_grad()
def test_attention_that_removes_padding(model):
    AttentionInterface.register("without_padding", attention_without_padding)
    AttentionMaskInterface.register("without_padding", flash_attention_mask)
    inputs = training_inputs()
    inputs["attention_mask"][1, :3], inputs["labels"][1, :4] = 0, -100
    inputs["expert_mask"] = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    images = image_inputs() | {"expert_mask": inputs["expert_mask"]}
    candidates = torch.tensor([[9, 2, 1], [9, 8, 2], [11, 2, 1]])
    results = []
    for attention in ("sdpa", "without_padding"):
        model.set_attn_implementation(attention)
        outputs = model(**inputs)
        generated = model.generate(input_ids=prompts(), **images, do_sample=False, num_beams=3, max_new_tokens=6)
        ranking = model.rank_candidates(candidates, candidates != 1, 3, input_ids=prompts(), **images)
        shown = inputs["attention_mask"].bool()
        results.append((outputs.encoder_last_hidden_state, outputs.logits[shown], generated, ranking.scores))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_the_attention_of_each_part_can_be_chosen():
    model = PrismerForConditionalGeneration._from_config(
        tiny_config(), attn_implementation={"vision_config": "eager", "text_config": "sdpa"}
    )
    assert model.model.vision_model.config._attn_implementation == "eager"
    assert model.model.text_model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:.*will be removed in v6")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, frozen):
    inputs = training_inputs()
    inputs["detection_rows"] = torch.randint(128, (3, 32, 32))
    inputs["expert_mask"] = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    results = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if frozen:
            model.freeze_backbones()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        loss = model(**inputs).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((loss, gradients, dict(model.named_buffers())))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_full_precision(model, dtype):
    inputs = training_inputs()
    expected = model(**inputs)
    half = copy.deepcopy(model).to(dtype)
    outputs = half(**inputs)
    assert outputs.logits.dtype == dtype and outputs.encoder_last_hidden_state.dtype == dtype
    assert outputs.loss.dtype == torch.float32
    coarse = 0.1 if dtype == torch.bfloat16 else 0.01
    assert (outputs.logits.float() - expected.logits).std() < coarse * expected.logits.std()
    outputs.loss.backward()
    ids = half.generate(input_ids=prompts(), **image_inputs(), do_sample=False, num_beams=2, max_new_tokens=4)
    assert ids.shape[0] == 3 and 5 < ids.shape[1] <= 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norms_compute_in_float32(model, dtype):
    model.to(dtype)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms and all(isinstance(norm, PrismerLayerNorm) for norm in norms)
    norm = norms[0]
    states = torch.randn(4, 32).to(dtype) * 300
    expected = F.layer_norm(states.float(), (32,), norm.weight.float(), norm.bias.float(), 1e-5)
    assert torch.equal(norm(states), expected.to(dtype))
    assert torch.equal(norm(states.float()), expected)  # as under autocast


def test_autocast_is_close_to_full_precision(model):
    inputs = training_inputs()
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**inputs, expert_mask=torch.tensor([[True] * 6, [True, False] * 3, [True] * 6])).loss
        model.eval()
        torch.testing.assert_close(model(**inputs).loss, expected, rtol=0.02, atol=0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@needs_traced_checks
def test_it_compiles_in_one_graph(model):
    inputs = training_inputs()
    inputs["expert_mask"] = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    expected = model(**inputs)
    outputs = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(outputs.loss, expected.loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(model, dtype):
    inputs = {"input_ids": prompts(), **image_inputs()}
    with torch.no_grad():
        expected = model(**inputs)
    generated = model.generate(**inputs, do_sample=False, num_beams=3, max_new_tokens=6)
    model.to("cuda", dtype)
    inputs = {key: tensor.to("cuda") for key, tensor in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs)
    coarse = 0.1 if dtype == torch.bfloat16 else 1e-2  # TF32
    assert (outputs.logits.float().cpu() - expected.logits).std() < coarse * expected.logits.std()
    said = model.generate(**inputs, do_sample=False, num_beams=3, max_new_tokens=6)
    static = model.generate(
        **inputs, do_sample=False, num_beams=3, max_new_tokens=6, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(said, static)
    if dtype == torch.float32:
        assert torch.equal(said.cpu(), generated)
    candidates = torch.tensor([[9, 2, 1], [9, 8, 2], [11, 2, 1]]).cuda()
    ranking = model.rank_candidates(candidates, candidates != 1, 3, **inputs)
    assert ranking.indices.shape == (3, 3) and torch.isfinite(ranking.scores).all()


# ---- initialisation


@pytest.fixture
def garbage_in_fresh_memory():
    """`torch.empty` returns NaN, so that weights without initialisation show."""
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.parametrize("auto", [False, True], ids=["constructor", "AutoModel"])
def test_every_weight_is_initialised(garbage_in_fresh_memory, auto):
    model = AutoModel.from_config(tiny_config()) if auto else PrismerForConditionalGeneration(tiny_config())
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name


def test_a_fresh_model_follows_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(PrismerForConditionalGeneration(tiny_config()).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    random = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[2][name])]
    for part in ("convs.0.weight", "instance_embedding", "latents", "position_embedding"):
        assert any(part in name for name in random)
    # a buffer of the library is always made the same: `class_features` are random, but do not follow the seed
    fixed = ("class_features", ".norms.", "layer_norm")
    assert not any(name.endswith("bias") or any(part in name for part in fixed) for name in random)


def test_adaptors_start_as_the_identity():
    model = PrismerForConditionalGeneration(tiny_config())
    adaptors = [module for module in model.modules() if isinstance(module, PrismerAdaptor)]
    assert len(adaptors) == 4
    states = {True: torch.randn(2, 5, 32), False: torch.randn(2, 5, 24)}
    for adaptor in adaptors:
        given = states[adaptor.norm_first]
        expected = given if adaptor.norm_first else adaptor.layer_norm(given)
        assert torch.equal(adaptor(given), expected)
        assert adaptor.down_proj.weight.any()  # so that it can learn


@pytest.mark.parametrize(
    "weight, std",
    [
        ("vision_model.embeddings.patch_embedding", 0.02),
        ("vision_model.expert_stems.depth.convs.3", (2 / (9 * 256)) ** 0.5),
        ("vision_model.expert_stems.ocr.convs.3", (2 / (9 * 256)) ** 0.5),
        ("vision_model.expert_stems.depth.projection", 256**-0.5),
        ("vision_model.resampler.layers.1.latent_attn.q_proj", (2 / 256) ** 0.5),
        ("vision_model.resampler.layers.1.latent_attn.v_proj", (2 * 2 * 256) ** -0.5),
        ("vision_model.resampler.layers.1.latent_attn.out_proj", 256**-0.5),
        ("vision_model.layers.0.self_attn.k_proj", (2 * 3 * 256) ** -0.5),
        ("vision_model.layers.0.mlp.fc1", (2 * 256) ** -0.5),
        ("vision_model.layers.0.mlp.fc2", (2 * 3 * 256) ** -0.5),
        ("vision_model.layers.0.adaptor.down_proj", 0.02),
        ("text_model.layers.0.self_attn.q_proj", 0.05),
        ("text_model.layers.0.cross_attn.v_proj", 0.05),
        ("text_model.embeddings.word_embeddings", 0.05),
    ],
)
def test_how_far_the_weights_of_a_fresh_model_spread(wide_model, weight, std):
    assert wide_model.model.get_submodule(weight).weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.fixture(scope="module")
def wide_model():
    torch.manual_seed(0)
    config = tiny_config()
    vision = {**config.vision_config.to_dict(), "hidden_size": 256, "num_hidden_layers": 3}
    text = {**config.text_config.to_dict(), "hidden_size": 96, "initializer_range": 0.05}
    return PrismerForConditionalGeneration(PrismerConfig(vision_config=vision, text_config=text))


def test_a_fresh_model_is_calm():
    torch.manual_seed(0)
    model = PrismerForConditionalGeneration(tiny_config()).train()
    outputs = model(**training_inputs(), output_hidden_states=True)
    for states in (*outputs.hidden_states, *outputs.encoder_hidden_states, outputs.encoder_last_hidden_state):
        assert 0.2 < states.std() < 5
    uniform = torch.log(torch.tensor(float(VOCAB_SIZE)))
    torch.testing.assert_close(outputs.loss_per_sample / 5, uniform.expand(3), atol=0.3, rtol=0)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or "adaptor.down_proj" in name or "adaptor.layer_norm" in name, name


def test_new_resampler_keeps_differences_between_images():
    torch.manual_seed(0)
    vision_model = PrismerForConditionalGeneration(tiny_config()).model.vision_model.train()
    for stem in vision_model.expert_stems.values():
        torch.testing.assert_close(stem.projection.weight.mean(1), torch.zeros(32, 1, 1), atol=1e-6, rtol=0)
    tokens = torch.randn(8, 96, 32, generator=torch.Generator().manual_seed(0))
    latents = vision_model.resampler(tokens)
    of_a_picture = latents - latents.mean(0)
    of_its_own = of_a_picture - of_a_picture.mean(1, keepdim=True)
    assert of_a_picture.std() > 0.2 * latents.std() and of_its_own.std() > 0.15 * latents.std()


# ---- resizing


def test_resized_positions_are_bicubic(model):
    table = model.model.vision_model.embeddings.position_embedding.detach().clone()
    images = image_inputs()
    before = model.get_image_features(**images).last_hidden_state
    assert model.resize_position_embeddings(48) is model
    resized = model.model.vision_model.embeddings.position_embedding
    expected = F.interpolate(table.view(1, 4, 4, 32).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic")
    torch.testing.assert_close(resized.detach(), expected.flatten(2)[0].T)
    assert resized.requires_grad and resized.is_contiguous()
    assert model.config.vision_config.image_size == model.model.vision_model.config.image_size == 48
    images["pixel_values"] = F.interpolate(images["pixel_values"], size=48)
    assert model.get_image_features(**images).last_hidden_state.shape == (3, 36 + 6, 32)
    with pytest.raises(ValueError, match=r"needs \(batch, 3, 48, 48\)"):
        model(input_ids=prompts(), **image_inputs())
    model.model.vision_model.embeddings.position_embedding.data = expected.flatten(2)[0].T  # as it is
    model.resize_position_embeddings(32)
    assert model.get_image_features(**image_inputs()).last_hidden_state.shape == before.shape


def test_the_same_resolution_changes_nothing(model):
    before = model.get_image_features(**image_inputs()).last_hidden_state
    model.resize_position_embeddings(32)
    assert torch.equal(model.get_image_features(**image_inputs()).last_hidden_state, before)


def test_frozen_positions_stay_frozen_when_resized(model):
    model.model.vision_model.embeddings.position_embedding.requires_grad_(False)
    model.resize_position_embeddings(40)
    assert not model.model.vision_model.embeddings.position_embedding.requires_grad


def test_image_edge_beyond_the_last_patch_is_cut():
    model = tiny_model(tiny_config(experts=[], image_size=37))
    pixels = torch.randn(2, 3, 37, 37)
    cropped = copy.deepcopy(model).resize_position_embeddings(32)
    expected = cropped.get_image_features(pixels[..., :32, :32]).last_hidden_state
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, expected)


def test_a_resolution_below_the_patch_is_refused(model):
    with pytest.raises(ValueError, match="image_size=7 is smaller than patch_size=8"):
        model.resize_position_embeddings(7)
    with pytest.raises(ValueError, match="a PrismerTextModel takes no images"):
        model.model.text_model.resize_position_embeddings(48)


@pytest.mark.parametrize("size", [VOCAB_SIZE + 5, VOCAB_SIZE - 20])
def test_the_vocabulary_can_be_resized(model, size):
    inputs = training_inputs()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=30)
    before = model(input_ids=inputs["input_ids"], **image_inputs()).logits
    model.resize_token_embeddings(size)
    assert model.config.text_config.vocab_size == size
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert model.lm_head.decoder.bias.shape == (size,)
    after = model(input_ids=inputs["input_ids"], **image_inputs()).logits
    assert after.shape[-1] == size
    kept = min(size, VOCAB_SIZE)
    torch.testing.assert_close(after[..., :kept], before[..., :kept], **TOLERANCE)
    model.generate(input_ids=inputs["input_ids"], **image_inputs(), do_sample=False, max_new_tokens=3)


def test_the_base_model_is_the_same_network(model):
    base = PrismerModel(model.config)
    base.load_state_dict(model.model.state_dict())
    outputs = base.eval()(input_ids=prompts(), **image_inputs())
    torch.testing.assert_close(
        model.lm_head(outputs.last_hidden_state), model(input_ids=prompts(), **image_inputs()).logits
    )
