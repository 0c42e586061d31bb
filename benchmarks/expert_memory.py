"""
Counts or measures the memory of each expert of a suite, with random weights of the true size.

    python benchmarks/expert_memory.py --suite commercial --device fake     (a few minutes on one core)
    python benchmarks/expert_memory.py --suite published                    (counts while it really computes)
    python benchmarks/expert_memory.py --suite published --device cuda

Each expert runs one batch through its own code. On CUDA the peak is `torch.cuda.max_memory_allocated`. On a CPU it is
counted: the weights plus all tensors that operations have returned and that are still held. It does not include
workspaces of kernels, memory of the driver, or gaps between the blocks of CUDA's allocator. Half precision is float16,
and bfloat16 where a CPU computes; autocast keeps slightly different operations in float32.

With `--device fake` nothing is computed and no GPU is used: torch's fake tensors have shapes and types and no content.
The count ends where an expert reads its results, after the network and the resizing of the first image. A network that
reads values on its way cannot be counted like this.

The models have the sizes of the published weights, see `processing/experts/architectures.py`. The images are square,
because these give the largest inputs. One expert is in memory at a time. onnxruntime reads text on the CPU, and its
memory is not counted.
"""

import argparse
import gc
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import HeldBytes, positive, write_result
from PIL import Image
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from modeling_prismer.processing.experts import BaeNormals, DexiNedEdges, Expert, ExpertSuite, PretrainedExpert
from modeling_prismer.processing.experts.architectures import ARCHITECTURES


# The memory for tensors on a GPU with 4 GB: the CUDA context and its libraries take about half a gigabyte.
BUDGET = 4 * 2**30 - 500 * 2**20
DEVICES = ("cpu", "cuda", "fake")
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def with_random_weights(expert: Expert, folder: Path) -> Expert:
    """The expert with random weights of the same size, saved in `folder`; the expert itself if it needs none."""
    if isinstance(expert, PretrainedExpert):
        torch.manual_seed(0)
        model, processor = ARCHITECTURES[expert.model_id]()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return type(expert)(model_id=str(folder), image_processor=expert.image_processor)
    if isinstance(expert, BaeNormals | DexiNedEdges):
        return type(expert)(pretrained=False)
    return expert


def weights_of(expert: Expert) -> list[torch.Tensor]:
    """The parameters and buffers of a loaded expert."""
    if not isinstance(expert.model, torch.nn.Module):
        return []
    return [*expert.model.parameters(), *expert.model.buffers()]


class ValuesRead(Exception):
    """An expert reads the values of a tensor, and a fake tensor has none."""


def read_values(tensor: FakeTensor, *args: Any) -> None:
    raise ValuesRead


def make_fake(network: torch.nn.Module) -> None:
    """Replaces the weights of a network by fake tensors of the same shapes and types."""
    made: dict[int, torch.Tensor] = {}  # by the weight, because some are shared

    def fake(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    with FAKE:
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(fake(parameter), requires_grad=False)
            module._buffers = {name: fake(buffer) for name, buffer in module._buffers.items()}


def fake_peak_bytes(expert: Expert, images: list[Image.Image], others: dict[str, list[Any]], weights: int) -> int:
    """
    The peak memory of a loaded expert in bytes up to the place where it reads its results, without computing.

    Raises:
        ValueError: if the network itself reads values, so that the count would end too early.
    """
    finished: list[bool] = []
    is_network = isinstance(expert.model, torch.nn.Module)
    with ExitStack() as stack:
        if is_network:
            make_fake(expert.model)
            stack.callback(expert.model.register_forward_hook(lambda *_: finished.append(True)).remove)
        # checks of values are passed, and reading an array ends the count
        stack.enter_context(mock.patch.object(torch, "_check_tensor_all_with", lambda *_: None))
        stack.enter_context(mock.patch.object(FakeTensor, "__bool__", lambda tensor: True))
        stack.enter_context(mock.patch.object(FakeTensor, "numpy", read_values))
        stack.enter_context(torch.no_grad())  # inference mode would hide tensors inside composed operations
        stack.enter_context(FAKE)
        held = stack.enter_context(HeldBytes(weights))
        try:
            expert.run(images, **others)
        except (ValuesRead, DataDependentOutputException, DynamicOutputShapeException) as error:
            if is_network and not finished:
                raise ValueError(
                    f"{type(expert).__name__}: the network reads values of its tensors; count it with --device cpu"
                ) from error
    return held.peak


def peak_bytes(expert: Expert, images: list[Image.Image], device: str) -> int:
    """The peak memory of a loaded expert in bytes while it runs one batch, including its weights."""
    expert.batch_size = len(images)
    depth = [np.array(Image.linear_gradient("L").resize(image.size)) for image in images]
    others = {name: depth for name in (*expert.needs, *expert.uses)}
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        expert(images, **others)
        return torch.cuda.max_memory_allocated()
    weights = sum(tensor.nbytes for tensor in weights_of(expert))
    if device == "fake":
        return fake_peak_bytes(expert, images, others, weights)
    with HeldBytes(weights) as held:
        expert(images, **others)
    return held.peak


def measure(expert: Expert, image_size: int, device: str, batch_sizes: list[int]) -> dict[str, Any]:
    """Measures one expert: `{"weights": {precision: bytes}, "peaks": {precision: {images: bytes}}, …}`."""
    image = Image.effect_noise((image_size, image_size), 64).convert("RGB")
    result: dict[str, Any] = {
        "expert": f"{expert.name}: {type(expert).__name__}",
        "stated_bytes": expert.size_in_bytes,
        "batch": expert.batch_size,
        "half_on_cuda": expert.half_on_cuda,
        "weights": {},
        "peaks": {},
    }
    half = torch.bfloat16 if device == "cpu" else torch.float16
    batch_sizes = sorted({*batch_sizes, expert.batch_size})
    with tempfile.TemporaryDirectory() as folder:
        expert = with_random_weights(expert, Path(folder)).to("cuda" if device == "cuda" else "cpu")
        for precision, dtype in {"single": torch.float32, "half": half}.items():
            if precision == "half" and not expert.half_on_cuda:
                continue
            expert.to(dtype=dtype).load()
            result["parameters"] = sum(tensor.numel() for tensor in weights_of(expert) if not is_buffer(tensor))
            result["weights"][precision] = sum(tensor.nbytes for tensor in weights_of(expert))
            result["peaks"][precision] = {
                number: peak_bytes(expert, [image] * number, device) for number in batch_sizes
            }
            expert.unload()
            gc.collect()
    return result


def is_buffer(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, torch.nn.Parameter)


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown. Sizes are in MB (10⁶ bytes)."""
    lines = [
        "| expert | parameters | weights, single and half | batch size | peak, single | peak, half |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    most = loaded = activations = 0
    for result in results:
        weights = " / ".join(f"{size / 1e6:,.0f} MB" for size in result["weights"].values())
        precision = "half" if result["half_on_cuda"] else "single"
        peak, own = result["peaks"][precision][result["batch"]], result["weights"][precision]
        most, loaded, activations = max(most, peak), loaded + own, max(activations, peak - own)
        for number in result["peaks"]["single"]:
            peaks = [result["peaks"].get(precision, {}).get(number) for precision in ("single", "half")]
            cells = " | ".join("–" if peak is None else f"{peak / 1e6:,.0f} MB" for peak in peaks)
            default = ", the default" if number == result["batch"] else ""
            size = f"{result['parameters'] / 1e6:.1f} M"
            lines.append(f"| {result['expert']} | {size} | {weights} | {number}{default} | {cells} |")
    lines += ["", f"With the default settings, of the {BUDGET / 1e6:,.0f} MB for tensors of a GPU with 4 GB:", ""]
    for use, size in (("one expert at a time", most), ("all experts loaded", loaded + activations)):
        verdict = "fits" if size <= BUDGET else "does not fit"
        lines.append(f"- {use}: {size / 1e6:,.0f} MB at most, which {verdict}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="published", help="name of a suite of experts")
    parser.add_argument("--only", nargs="*", help="only the experts with these names")
    parser.add_argument("--image_size", type=positive, default=640, help="width and height of the images")
    parser.add_argument(
        "--batch_sizes", type=positive, nargs="*", default=[1], help="in addition to each expert's own"
    )
    parser.add_argument("--device", default="cpu", choices=DEVICES, help="fake counts without computing")
    parser.add_argument("--out", type=Path, default=Path("runs/expert_memory"), help="folder for the result")
    args = parser.parse_args()
    results = []
    for name, expert in ExpertSuite.from_name(args.suite).items():
        if args.only is None or name in args.only:
            results.append(measure(expert, args.image_size, args.device, args.batch_sizes))
    write_result(args.out, results, table(results))


if __name__ == "__main__":
    main()
