"""A PrismerLM in pieces, in two processes (torch's FSDP2), gives the results of one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training_examples.distributed_launch import launch

from . import lm_sharding
from .tiny_lm import FUSIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    assert launch(lm_sharding.in_pieces, folder, number=2) == [0, 0]
    return folder


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_step_in_pieces_is_that_of_one_process(folder, fusion):
    model = lm_sharding.frozen_model(fusion)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss, weights = lm_sharding.step(model), load_file(folder / f"{fusion}.safetensors")
    answers = lm_sharding.answers(model)
    for rank in range(2):
        facts = json.loads((folder / f"facts_{rank}.json").read_text())[fusion]
        assert facts["loss"] == pytest.approx(loss, abs=1e-5)
        assert facts["answers"] == answers
        assert facts["parts"] == 2 + len(model.model.cross_blocks) + 2 + 1
        assert 0.4 < facts["share"] < 0.6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-4, rtol=1e-4)
        assert parameter.requires_grad or torch.equal(weights[name], before[name])
