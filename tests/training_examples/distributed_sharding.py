"""The functions that test_distributed.py runs in two processes, with models sharded by `fully_shard`."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from modeling_prismer import PrismerForConditionalGeneration
from tests.modeling_prismer.tiny import image_inputs, prompts, tiny_model
from tests.training_examples import distributed_training


CONFIGS = Path(__file__).parents[2] / "training_examples" / "accelerate_configs"
CANDIDATES = torch.tensor([[5, 2, 1], [6, 7, 2], [8, 2, 1], [5, 9, 2], [10, 2, 1]])


def accelerate_launch(config: str, *options: str) -> tuple[Namespace, dict[str, str]]:
    """The arguments and environment of the processes that `accelerate launch --config_file CONFIG` would start."""
    started = {}

    def start(args):
        started["args"] = args
        started["environment"] = (
            prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
        )

    with mock.patch.multiple("accelerate.commands.launch", multi_gpu_launcher=start, deepspeed_launcher=start):
        launch_command(
            launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), *options, "script.py"])
        )
    return started["args"], started["environment"]


# ---- with the functions of torch ----


def sharded(model: PrismerForConditionalGeneration) -> PrismerForConditionalGeneration:
    for layer in (*model.model.vision_model.layers, *model.model.text_model.layers):
        fully_shard(layer)
    return fully_shard(model)


def optimizer_of(model: PrismerForConditionalGeneration) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def step(model: PrismerForConditionalGeneration, optimizer: torch.optim.Optimizer, rows: slice) -> float:
    """Takes one step on some of the samples and returns their loss."""
    model.train()
    loss = model(**distributed_training.stacked(distributed_training.samples()[rows])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def whole(model: PrismerForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}


def answers(model: PrismerForConditionalGeneration) -> dict[str, list]:
    """The generated texts and the ranking for three prompts about three images."""
    model.eval()
    inputs = {"input_ids": prompts(3), "attention_mask": torch.ones(3, 5, dtype=torch.long), **image_inputs(3)}
    generated = model.generate(**inputs, max_new_tokens=6, num_beams=2)
    ranked = model.rank_candidates(CANDIDATES, CANDIDATES != 1, k=4, **inputs)
    return {"generated": generated.tolist(), "ranked": ranked.indices.tolist(), "scores": ranked.scores.tolist()}


def with_fully_shard(folder: Path):
    torch.distributed.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    rows = slice(4 * rank, 4 * rank + 4)
    model = sharded(distributed_training.model_without_batch_statistics())
    optimizer = optimizer_of(model)
    facts = {
        "share": sum(parameter.to_local().numel() for parameter in model.parameters()) / model.num_parameters(),
        "parts": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "losses": [step(model, optimizer, rows)],
    }

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    first = whole(model)
    facts["losses"].append(step(model, optimizer, rows))
    second = whole(model)

    other = sharded(distributed_training.model_without_batch_statistics())
    optimizer = optimizer_of(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    weights, state = get_state_dict(other, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    set_state_dict(other, optimizer, model_state_dict=weights, optim_state_dict=state)
    facts["loss_after_loading"] = step(other, optimizer, rows)
    after_loading = whole(other)
    if rank == 0:
        for name, tensors in {"first": first, "second": second, "after_loading": after_loading}.items():
            save_file(tensors, folder / f"{name}.safetensors")

    model = sharded(tiny_model())
    for method in ("generate", "rank_candidates"):
        register_fsdp_forward_method(model, method)
    try:
        facts["answers"] = answers(model)
    except RuntimeError as error:
        facts["answers"] = str(error)
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts))


# ---- with accelerate and the recipes, by accelerate_configs/fsdp2.yaml ----


def use_cpu_as_accelerator():
    """Makes accelerate shard on the CPU, where it would silently use DistributedDataParallel instead."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)


def caption(folder: Path, checkpoint: Path, image_folder: Path, *options: str):
    import run_captioning

    command = (
        f"run_captioning.py --model {checkpoint} --train_data {image_folder / 'captions.csv'} --do_train --labels live"
    )
    command += f" --output_dir {folder} --image_size 32 --max_steps 2 --total_batch_size 8 --save_steps 1"
    command += " --per_device_train_batch_size 2 --learning_rate 1e-3 --expert_dropout 0.3 --disable_tqdm true"
    sys.argv = [*command.split(), *options]
    run_captioning.main()


def with_recipes(folder: Path, checkpoint: Path, image_folder: Path):
    use_cpu_as_accelerator()
    os.environ |= accelerate_launch("fsdp2.yaml", "--mixed_precision", "no")[1]
    trainer, notes = distributed_training.training_run(folder, 2, use_cpu=False)
    rank = trainer.args.process_index
    facts = {
        "processes": trainer.accelerator.num_processes,
        "sharded": [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)],
        "losses": notes.losses,
    }
    rows = distributed_training.questions(image_folder)
    options = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 2, "use_cpu": False}
    trainer = distributed_training.answering_trainer(folder, checkpoint, None, rows, **options)
    trainer.train()  # FSDP shards a model only for training
    try:
        facts["generated"] = trainer.predict_texts(rows)
        trainer.candidates = distributed_training.CANDIDATES
        facts["ranked"] = trainer.predict_texts(rows)
    except RuntimeError as error:
        facts["generated"] = facts["ranked"] = str(error)

    os.environ |= accelerate_launch("fsdp2.yaml")[1]  # unchanged, in bf16
    facts["bf16_losses"] = distributed_training.training_run(folder, 2, use_cpu=False)[1].losses
    caption(folder / "captions", checkpoint, image_folder, "--publish_to", str(folder / "published"))
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts))


def resume_recipe(folder: Path, checkpoint: Path, image_folder: Path):
    use_cpu_as_accelerator()
    os.environ |= accelerate_launch("fsdp2.yaml")[1]
    caption(folder, checkpoint, image_folder, "--resume_from_checkpoint", "last")
