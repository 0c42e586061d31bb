"""
Times Prismer on random weights of the true size, beside the recorded times of the original network.

    python benchmarks/benchmark.py --out runs/benchmark          (make benchmark)

Each row is the median of repeated runs. The speed of a 2048³ float32 matrix product is measured in the same run,
before and after; the reference was recorded with its own, so that a ratio compares the two in units of that product
and not of the machine. `--small` runs a tiny network, to try the program itself.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration


REFERENCE = Path(__file__).with_name("reference.json")


def seconds(work: Callable, repeats: int, device: torch.device) -> float:
    """Median time of `work`, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_gflops(device: torch.device, size: int = 2048) -> float:
    """Speed of a float32 matrix product, in GFLOP/s."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return 2 * size**3 / seconds(lambda: a @ b, repeats=5, device=device) / 1e9


def image_inputs(config: PrismerConfig, images: int, device: torch.device, map_size: int) -> dict[str, torch.Tensor]:
    """Random images and expert maps; label maps painted beforehand, as the reference took them."""
    size = config.vision_config.image_size
    inputs = {"pixel_values": torch.randn(images, 3, size, size, device=device)}
    for expert in config.experts:
        shape = (images, expert["channels"], map_size, map_size)
        inputs[f"{expert['name']}_values"] = torch.rand(shape, device=device) * 2 - 1
        if expert.get("instances"):
            inputs[f"{expert['name']}_rows"] = torch.randint(128, (images, map_size, map_size), device=device)
    return inputs


def make_model(small: bool, image_size: int, device: torch.device) -> PrismerForConditionalGeneration:
    config = PrismerConfig.from_variant("prismer_base", image_size=image_size)
    if small:
        vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": image_size}
        text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        config = PrismerConfig(vision_config=vision, text_config=text, experts=config.experts)
    return PrismerForConditionalGeneration(config).to(device)


def run(small: bool = False, repeats: int = 3, device: str = "cpu") -> dict:
    """All rows: `{"gemm_gflops": [before, after], "rows": {name: seconds}, "peak_memory_gb": …}`."""
    torch.manual_seed(0)
    device = torch.device(device)
    image_size, train_size, map_size = (96, 64, 64) if small else (480, 224, 224)
    gemm = [gemm_gflops(device)]
    rows = {}

    model = make_model(small, image_size, device).eval()
    with torch.inference_mode():
        for images in (1, 4):
            inputs = image_inputs(model.config, images, device, map_size)
            name = f"encode {images} image{'s' * (images > 1)}"
            rows[name] = seconds(partial(model.get_image_features, **inputs), repeats, device)
        generate = partial(model.generate, num_beams=3, min_length=20, max_length=20, do_sample=False)
        prompt = torch.tensor([[0, 250, 2170, 9]], device=device)  # <s>A picture of
        for images in (1, 4):
            encoded = model.get_image_features(**image_inputs(model.config, images, device, map_size))
            name = f"caption {images} image{'s' * (images > 1)}"
            work = partial(generate, input_ids=prompt.expand(images, -1), encoder_outputs=encoded)
            rows[name] = seconds(work, repeats, device)
        encoded = model.get_image_features(**image_inputs(model.config, 1, device, map_size))
        question = torch.cat([prompt[:, :1], torch.randint(4, 50000, (1, 11), device=device)], dim=1)
        lengths = torch.randint(2, 7, (128, 1), device=device)
        candidates = torch.randint(4, 50000, (128, 6), device=device)
        mask = (torch.arange(6, device=device) < lengths).long()
        work = partial(model.rank_candidates, candidates, mask, 128, input_ids=question, encoder_outputs=encoded)
        rows["rank 128 candidates"] = seconds(work, repeats, device)
    del model, encoded, inputs, generate, work  # the training step has the memory to itself

    model = make_model(small, train_size, device).train()
    model.freeze_backbones(vision=True, language=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    inputs = image_inputs(model.config, 4, device, map_size)
    input_ids = torch.randint(4, 50000, (4, 20), device=device)

    def training_step():
        model(input_ids=input_ids, labels=input_ids, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rows["training step"] = seconds(training_step, repeats, device)
    gemm.append(gemm_gflops(device))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "network": "tiny" if small else "prismer_base",
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": repeats,
        "gemm_gflops": gemm,
        "rows": rows,
        "peak_memory_gb": peak / 1e9,
    }


def table(result: dict) -> str:
    """The result beside the reference, as Markdown."""
    reference = json.loads(REFERENCE.read_text())
    speed = statistics.mean(result["gemm_gflops"])
    lines = [
        "| work | seconds | gemm-GFLOP | reference, gemm-GFLOP | times faster |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, time_taken in result["rows"].items():
        ours, theirs = time_taken * speed, reference["rows"][name]["gemm_gflop"]
        comparison = f"{theirs} | {theirs / ours:.2f}×" if result["network"] == "prismer_base" else "– | –"
        lines.append(f"| {name} | {time_taken:.3f} | {ours:.0f} | {comparison} |")
    gemm = ", ".join(f"{value:.0f}" for value in result["gemm_gflops"])
    lines.append(
        f"\n{result['network']} on {result['device']}, {result['threads']} threads, torch {result['torch']}; matrix "
        f"product {gemm} GFLOP/s before and after; peak memory of the process {result['peak_memory_gb']:.1f} GB; "
        f"medians of {result['repeats']} runs."
    )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for result.json and table.md")
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the program")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    result = run(args.small, args.repeats, args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "table.md").write_text(table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
