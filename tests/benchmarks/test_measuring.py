"""Counted operations and memory agree with counts by hand."""

import torch
from measuring import (
    HeldBytes,
    count_flops,
)

from modeling_prismer.cpu_inference import optimize_for_cpu


def test_operations_of_a_matrix_product():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    layer = torch.nn.Linear(5, 7)
    assert count_flops(lambda: layer(a)) == 2 * 3 * 5 * 7  # the bias does not count


@torch.no_grad()
def test_operations_of_an_optimized_linear_layer():
    layer = optimize_for_cpu(torch.nn.Sequential(torch.nn.Linear(5, 7)))
    assert count_flops(lambda: layer(torch.rand(2, 3, 5))) == 2 * 2 * 3 * 5 * 7


def test_operations_of_attention_on_a_cpu():
    query, key = torch.rand(2, 4, 10, 16), torch.rand(2, 4, 6, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    products = 2 * (2 * 4 * 10 * 6 * 16)  # queries by keys, and weights by values
    assert count_flops(lambda: attention(query, key, key)) == 2 * products


def test_operations_of_a_backward_pass():
    layer, inputs = torch.nn.Linear(5, 7), torch.rand(3, 5)
    forward = 2 * 3 * 5 * 7
    assert count_flops(lambda: layer(inputs).sum().backward()) == 2 * forward  # the inputs need no gradient
    states = torch.rand(1, 2, 10, 16, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = count_flops(lambda: attention(states, states, states))
    both = count_flops(lambda: attention(states, states, states).sum().backward())
    assert both == forward + 5 * forward / 2  # the weights again, then four gradients


def test_operations_on_a_view_of_a_parameter_without_gradients():
    class Latents(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.latents, self.layer = torch.nn.Parameter(torch.rand(3, 5)), torch.nn.Linear(5, 7)

        def forward(self):
            return self.layer(self.latents.expand(1, -1, -1))

    assert count_flops(torch.no_grad()(Latents())) == 2 * 3 * 5 * 7


def test_held_tensors_count_once_until_they_are_freed():
    weight = torch.rand(100, 100)  # 40 kB
    with HeldBytes(weight.nbytes) as held:
        product = torch.rand(100, 100) @ weight
        assert (held.now, held.peak) == (80_000, 120_000)
        row = product.relu()[:1]
        assert (held.now, held.peak) == (120_000, 120_000)
        del product
        assert held.now == 80_000  # the row is a view, which holds the whole tensor
        del row
        assert (held.now, held.peak) == (40_000, 120_000)
