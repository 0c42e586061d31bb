"""The program that test_lm_distributed.py runs in two processes: PrismerLMs sharded by `fully_shard`."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from modeling_prismer import PrismerLMForConditionalGeneration

from .tiny_lm import image_inputs, prompts, tiny_model, training_inputs


GENERATION = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}


def frozen_model(fusion: str) -> PrismerLMForConditionalGeneration:
    return tiny_model(fusion=fusion, question_queries=True).freeze_backbones()


def step(model: PrismerLMForConditionalGeneration) -> float:
    """One step on samples that all processes share; returns their loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model.train()
    loss = model(**training_inputs(model.config)).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def answers(model: PrismerLMForConditionalGeneration) -> list:
    images = image_inputs(model.config, 2)
    return model.eval().generate(prompts(model.config, 4), **images, **GENERATION).tolist()


def in_pieces(folder: Path):
    torch.distributed.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    facts = {}
    for fusion in ("prefix", "cross_attention"):
        model = frozen_model(fusion)
        core = model.model
        for part in (*core.decoder_layers, *core.cross_blocks.values(), *core.experts.expert_stems.values()):
            fully_shard(part)
        fully_shard(model)
        register_fsdp_forward_method(model, "generate")
        whole = sum(parameter.numel() for parameter in model.parameters())
        own = sum(parameter.to_local().numel() for parameter in model.parameters())
        facts[fusion] = {
            "share": own / whole,
            "parts": sum(isinstance(module, FSDPModule) for module in model.modules()),
            "loss": step(model),
            "answers": answers(model),
        }
        weights = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
        if rank == 0:
            save_file(weights, folder / f"{fusion}.safetensors")
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts))
