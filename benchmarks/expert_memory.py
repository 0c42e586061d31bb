"""
Measures the memory of each expert of a suite, with random weights of the true size.

    python benchmarks/expert_memory.py --suite published                    (about 6 minutes on one core)
    python benchmarks/expert_memory.py --suite published --device cuda

Each expert runs one batch through its own code. On CUDA the peak is `torch.cuda.max_memory_allocated`. On a CPU it is
counted: the weights plus all tensors that operations have returned and that are still held. It does not include
workspaces of kernels, memory of the driver, or gaps between the blocks of CUDA's allocator. Half precision is bfloat16
on a CPU and float16 on CUDA; autocast keeps slightly different operations in float32.

The models have the sizes of the published weights, see `processing/experts/architectures.py`. The images are square,
because these give the largest inputs. One expert is in memory
at a time. onnxruntime reads text on the CPU, and its memory is not counted.
"""

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import HeldBytes, positive, write_result
from PIL import Image

from modeling_prismer.processing.experts import BaeNormals, DexiNedEdges, Expert, ExpertSuite, PretrainedExpert
from modeling_prismer.processing.experts.architectures import ARCHITECTURES


# The memory for tensors on a GPU with 4 GB: the CUDA context and its libraries take about half a gigabyte.
BUDGET = 4 * 2**30 - 500 * 2**20


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


def peak_bytes(expert: Expert, images: list[Image.Image], device: torch.device) -> int:
    """The peak memory of a loaded expert in bytes while it runs one batch, including its weights."""
    expert.batch_size = len(images)
    depth = [np.array(Image.linear_gradient("L").resize(image.size)) for image in images]
    others = {name: depth for name in (*expert.needs, *expert.uses)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        expert(images, **others)
        return torch.cuda.max_memory_allocated(device)
    with HeldBytes(sum(tensor.nbytes for tensor in weights_of(expert))) as held:
        expert(images, **others)
    return held.peak


def measure(expert: Expert, image_size: int, device: torch.device, batch_sizes: list[int]) -> dict[str, Any]:
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
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    batch_sizes = sorted({*batch_sizes, expert.batch_size})
    with tempfile.TemporaryDirectory() as folder:
        expert = with_random_weights(expert, Path(folder)).to(device)
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
    most = 0
    for result in results:
        weights = " / ".join(f"{size / 1e6:,.0f} MB" for size in result["weights"].values())
        on_cuda = result["peaks"]["half" if result["half_on_cuda"] else "single"]
        most = max(most, on_cuda[result["batch"]])
        for number in result["peaks"]["single"]:
            peaks = [result["peaks"].get(precision, {}).get(number) for precision in ("single", "half")]
            cells = " | ".join("–" if peak is None else f"{peak / 1e6:,.0f} MB" for peak in peaks)
            default = ", the default" if number == result["batch"] else ""
            size = f"{result['parameters'] / 1e6:.1f} M"
            lines.append(f"| {result['expert']} | {size} | {weights} | {number}{default} | {cells} |")
    verdict = "fits" if most <= BUDGET else "does not fit"
    lines.append(
        f"\nThe largest peak with the default settings is {most / 1e6:,.0f} MB, which {verdict} into the "
        f"{BUDGET / 1e6:,.0f} MB that a GPU with 4 GB has for tensors."
    )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="published", help="name of a suite of experts")
    parser.add_argument("--only", nargs="*", help="only the experts with these names")
    parser.add_argument("--image_size", type=positive, default=640, help="width and height of the images")
    parser.add_argument(
        "--batch_sizes", type=positive, nargs="*", default=[1], help="in addition to each expert's own"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/expert_memory"), help="folder for the result")
    args = parser.parse_args()
    results = []
    for name, expert in ExpertSuite.from_name(args.suite).items():
        if args.only is None or name in args.only:
            results.append(measure(expert, args.image_size, torch.device(args.device), args.batch_sizes))
    write_result(args.out, results, table(results))


if __name__ == "__main__":
    main()
