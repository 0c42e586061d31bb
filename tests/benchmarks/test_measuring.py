"""What the programs measure with: operations and memory are compared with hand counts."""

import json

import pytest
import torch
from measuring import (
    HeldBytes,
    count_flops,
    in_own_process,
    machine_facts,
    machine_text,
    peak_memory,
    spread_text,
    time_repeatedly,
)

from modeling_prismer.cpu_inference import optimize_for_cpu


CPU = torch.device("cpu")


def test_a_matrix_product_counts_two_operations_for_each_product_of_numbers():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    layer = torch.nn.Linear(5, 7)
    assert count_flops(lambda: layer(a)) == 2 * 3 * 5 * 7  # the bias counts for nothing


@torch.no_grad()
def test_a_linear_layer_of_the_network_is_counted():
    layer = optimize_for_cpu(torch.nn.Sequential(torch.nn.Linear(5, 7)))
    assert count_flops(lambda: layer(torch.rand(2, 3, 5))) == 2 * 2 * 3 * 5 * 7


def test_attention_on_a_cpu_is_counted():
    query, key = torch.rand(2, 4, 10, 16), torch.rand(2, 4, 6, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    products = 2 * (2 * 4 * 10 * 6 * 16)  # queries by keys, and weights by values
    assert count_flops(lambda: attention(query, key, key)) == 2 * products


def test_a_backward_pass_is_counted():
    layer, inputs = torch.nn.Linear(5, 7), torch.rand(3, 5)
    forward = 2 * 3 * 5 * 7
    assert count_flops(lambda: layer(inputs).sum().backward()) == 2 * forward  # the inputs need no gradient
    states = torch.rand(1, 2, 10, 16, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = count_flops(lambda: attention(states, states, states))
    both = count_flops(lambda: attention(states, states, states).sum().backward())
    assert both == forward + 5 * forward / 2  # the weights again, then the gradients of four factors


def test_a_view_of_a_parameter_can_be_counted_without_gradients():
    class Latents(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.latents, self.layer = torch.nn.Parameter(torch.rand(3, 5)), torch.nn.Linear(5, 7)

        def forward(self):
            return self.layer(self.latents.expand(1, -1, -1))

    assert count_flops(torch.no_grad()(Latents())) == 2 * 3 * 5 * 7


def test_what_is_held_counts_once_and_until_it_is_let_go():
    weight = torch.rand(100, 100)  # 40 kB
    with HeldBytes(weight.nbytes) as held:
        product = torch.rand(100, 100) @ weight
        assert (held.now, held.peak) == (80_000, 120_000)
        row = product.relu()[:1]
        assert (held.now, held.peak) == (120_000, 120_000)
        del product
        assert held.now == 80_000  # the row holds all that it is a view of
        del row
        assert (held.now, held.peak) == (40_000, 120_000)


def test_the_peak_of_a_process_of_its_own_is_its_own():
    here = torch.ones(100_000_000)  # 400 MB
    assert peak_memory(CPU) > here.nbytes
    assert in_own_process(peak_memory, CPU) < peak_memory(CPU) - 0.5 * here.nbytes


def test_the_run_to_warm_up_does_not_count():
    calls = []
    timing = time_repeatedly(lambda: calls.append(len(calls)), 3, CPU)
    assert len(calls) == 4 and len(timing.seconds) == 3


def test_quick_work_is_repeated_for_longer():
    timing = time_repeatedly(lambda: torch.rand(100_000).sort(), 1, CPU, at_least=0.1)
    assert sum(timing.seconds) >= 0.1 and len(timing.seconds) > 1


@pytest.mark.parametrize(
    "times, text",
    [
        ([12.34, 11, 13], "12.3 (11.0 – 13.0)"),
        ([1.5, 1.25, 2], "1.50 (1.25 – 2.00)"),
        ([0.0123, 0.0111, 0.02], "0.0123 (0.0111 – 0.0200)"),
        ([0.00123, 0.0011, 0.002], "0.00123 (0.00110 – 0.00200)"),
    ],
)
def test_a_spread_is_median_shortest_and_longest(times, text):
    assert spread_text(times) == text


def test_the_machine_is_described():
    facts = json.loads(json.dumps(machine_facts(CPU, torch.bfloat16)))
    assert facts["dtype"] == "bfloat16" and facts["torch"] == torch.__version__ and facts["threads"] == 1
    assert facts["cpu"] and facts["cpu"] in machine_text(facts)
