"""Routed adaptors: their start, the choice of the router, and the mixture against one adaptor at a time."""

import pytest
import torch

from modeling_prismer.routed_adaptors import PrismerRoutedAdaptors, Routes, init_adaptor_weights


WIDTH, SIZE, NUM, TOP_K = 16, 4, 5, 2


def scattered(num_adaptors=NUM):
    """Adaptors with random weights everywhere."""
    torch.manual_seed(0)
    adaptors = PrismerRoutedAdaptors(WIDTH, SIZE, num_adaptors, TOP_K, 1e-5)
    for parameter in adaptors.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return adaptors.eval()


@pytest.fixture
def tokens():
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def condition():
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))


def test_new_adaptors_are_the_identity(tokens, condition):
    adaptors = scattered()
    adaptors.apply(init_adaptor_weights)
    torch.nn.init.zeros_(adaptors.shared_up_proj.bias)
    assert torch.equal(adaptors(tokens, condition)[0], tokens)


@torch.no_grad()
def test_film_starts_without_effect(tokens, condition):
    adaptors = scattered()
    other = condition + 1
    routes = [adaptors(tokens, given)[1].probabilities for given in (condition, other)]
    assert not torch.allclose(*routes)
    adaptors.apply(init_adaptor_weights)
    routes = [adaptors(tokens, given)[1].probabilities for given in (condition, other)]
    assert torch.equal(*routes)


@torch.no_grad()
def test_router_is_the_formula_of_prism(tokens, condition):
    router = scattered().router
    scale, shift = router.film(condition)[:, None].chunk(2, dim=-1)
    film = (1 + scale) * tokens + shift
    mixed = tokens + torch.sigmoid(router.film_gate(tokens)) * (film - tokens)
    expected = router.scores(mixed).softmax(dim=-1)
    torch.testing.assert_close(router(tokens, condition).probabilities, expected)


@torch.no_grad()
def test_gates_choose_the_best_and_sum_to_one(tokens, condition):
    routes = scattered().router(tokens, condition)
    best = routes.probabilities.topk(TOP_K, dim=-1).indices.sort(dim=-1).values
    chosen = (routes.gates > 0).nonzero()[:, -1].view(3, 7, TOP_K)
    assert torch.equal(chosen, best)
    torch.testing.assert_close(routes.gates.sum(dim=-1), torch.ones(3, 7))
    # the weights of the chosen ones are in the ratio of their probabilities
    kept = routes.probabilities * (routes.gates > 0)
    torch.testing.assert_close(routes.gates, kept / kept.sum(dim=-1, keepdim=True))


@torch.no_grad()
def test_mixture_is_the_sum_of_single_adaptors(tokens, condition):
    adaptors = scattered()
    mixed, routes = adaptors(tokens, condition)
    inner = adaptors.layer_norm(tokens)
    gelu = torch.nn.functional.gelu
    expected = tokens + adaptors.shared_up_proj(gelu(adaptors.shared_down_proj(inner)))
    for number in range(NUM):
        own = slice(number * SIZE, (number + 1) * SIZE)
        units = gelu(inner @ adaptors.down_proj.weight[own].T + adaptors.down_proj.bias[own])
        expected = expected + routes.gates[..., number, None] * (units @ adaptors.up_proj.weight[:, own].T)
    torch.testing.assert_close(mixed, expected)


@torch.no_grad()
def test_without_routed_adaptors_the_shared_one_is_left(tokens, condition):
    adaptors = scattered(num_adaptors=0)
    mixed, routes = adaptors(tokens, condition)
    assert routes is None and not hasattr(adaptors, "router")
    assert not torch.allclose(mixed, tokens)


@torch.no_grad()
def test_a_token_does_not_depend_on_others(tokens, condition):
    adaptors = scattered()
    together = adaptors(tokens, condition)[0]
    torch.testing.assert_close(adaptors(tokens[1:2, 3:4], condition[1:2])[0], together[1:2, 3:4])


def test_training_explores(tokens, condition):
    adaptors = scattered().train()
    adaptors.apply(init_adaptor_weights)
    torch.nn.init.zeros_(adaptors.router.scores.weight)
    torch.nn.init.constant_(adaptors.router.noise.bias, -20.0)  # without noise, dropping is left
    routes = adaptors.router(tokens.repeat(40, 1, 1), condition.repeat(40, 1))
    dropped = (routes.probabilities == 0).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.03)
    torch.nn.init.zeros_(adaptors.router.noise.bias)
    assert len(routes.probabilities.unique()) < len(adaptors.router(tokens, condition).probabilities.unique())


def test_balance_is_one_if_all_serve_equally():
    even = torch.eye(4)[None]  # each of four tokens has an adaptor of its own
    assert Routes(torch.full((1, 4, 4), 0.25), even).balance() == 1
    one = torch.eye(4)[:1].expand(1, 4, 4)  # one adaptor has all tokens
    assert Routes(one, one).balance() == 4
    both = Routes(torch.cat([even, one]), torch.cat([even, one]))
    assert both.balance(torch.tensor([False, True])) == 4 and both.balance() < 4
