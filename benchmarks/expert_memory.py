"""
Measures the memory of each expert of a suite, with random weights of the true size.

    python benchmarks/expert_memory.py --suite published                    (about 6 minutes on one core)
    python benchmarks/expert_memory.py --suite published --device cuda

Each expert runs one batch through its own code. On CUDA the peak is `torch.cuda.max_memory_allocated`. On a CPU it is
counted: the weights plus all tensors that operations have returned and that are still held. It does not include
workspaces of kernels, memory of the driver, or gaps between the blocks of CUDA's allocator. Half precision is bfloat16
on a CPU and float16 on CUDA; autocast keeps slightly different operations in float32.

The models have the sizes of the published weights, see `MODELS`. The images are square, because these give the largest
inputs. One expert is in memory at a time. onnxruntime reads text on the CPU, and its memory is not counted.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measuring import HeldBytes, positive, write_result
from PIL import Image

from modeling_prismer.processing.experts import BaeNormals, DexiNedEdges, Expert, ExpertSuite, PretrainedExpert


# The memory for tensors on a GPU with 4 GB: the CUDA context and its libraries take about half a gigabyte.
BUDGET = 4 * 2**30 - 500 * 2**20


def classes(number: int) -> dict[str, Any]:
    return {"id2label": {index: f"class {index}" for index in range(number)}, "num_labels": number}


def dpt_hybrid():
    """The configuration of dpt_hybrid-midas-501f0c75.pt in transformers' conversion script; 490 MB on the Hub."""
    config = transformers.DPTConfig(
        is_hybrid=True,
        hidden_size=768,
        neck_hidden_sizes=[256, 512, 768, 768],
        reassemble_factors=[1, 1, 1, 0.5],
        backbone_out_indices=[2, 5, 8, 11],
        readout_type="project",
    )
    return transformers.DPTForDepthEstimation(config), transformers.DPTImageProcessor()


def depth_anything_small():
    """DINOv2-S with a DPT head of 48 to 384 channels; 99.2 MB on the Hub."""
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(
            image_size=518,
            patch_size=14,
            hidden_size=384,
            num_attention_heads=6,
            out_indices=[3, 6, 9, 12],
            reshape_hidden_states=False,
        ),
        reassemble_hidden_size=384,
        neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
    )
    processor = transformers.DPTImageProcessor(
        size={"height": 518, "width": 518}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    return transformers.DepthAnythingForDepthEstimation(config), processor


def tipsv2_normals():
    """The defaults are google/tipsv2-b14-dpt. It has three heads; only the one for normals is loaded."""
    config = transformers.Tipsv2DptConfig()
    return transformers.Tipsv2DptForNormalEstimation(config), transformers.Tipsv2DptImageProcessor()


def mask2former(embed_dim, depths, num_heads, window_size, image_size, num_queries):
    """From Mask2Former's configuration files; Swin-L is `maskformer2_swin_large_IN21k_384_bs16_100ep`, 866 MB."""
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=image_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_queries=num_queries,
        **classes(133),
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), transformers.Mask2FormerImageProcessor()


def dfine_xlarge():
    """dfine_x_obj365 in transformers' conversion script, 366 classes; 252 MB with the 80 classes of COCO."""
    config = transformers.DFineConfig(
        backbone_config=transformers.HGNetV2Config(
            stem_channels=[3, 32, 64],
            stage_in_channels=[64, 128, 512, 1024],
            stage_mid_channels=[64, 128, 256, 512],
            stage_out_channels=[128, 512, 1024, 2048],
            stage_num_blocks=[1, 2, 5, 2],
            out_indices=[2, 3, 4],
        ),
        encoder_in_channels=[512, 1024, 2048],
        encoder_hidden_dim=384,
        encoder_ffn_dim=2048,
        decoder_in_channels=[384, 384, 384],
        decoder_n_points=[3, 6, 3],
        **classes(366),
    )
    return transformers.DFineForObjectDetection(config), transformers.RTDetrImageProcessor()


def rtdetr_v2_r18():
    """ResNet-18 with three decoder layers, COCO; 20.2 million parameters."""
    config = transformers.RTDetrV2Config(
        backbone_config=transformers.RTDetrResNetConfig(
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[128, 256, 512],
        decoder_layers=3,
        hidden_expansion=0.5,
        **classes(80),
    )
    return transformers.RTDetrV2ForObjectDetection(config), transformers.RTDetrImageProcessor()


def segformer_b0():
    """The defaults with the 150 classes of ADE20K; 15 MB on the Hub."""
    config = transformers.SegformerConfig(**classes(150))
    return transformers.SegformerForSemanticSegmentation(config), transformers.SegformerImageProcessor()


SWIN_LARGE = (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 384, 200)
SWIN_TINY = (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 224, 100)
MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Intel/dpt-hybrid-midas": dpt_hybrid,
    "depth-anything/Depth-Anything-V2-Small-hf": depth_anything_small,
    "google/tipsv2-b14-dpt": tipsv2_normals,
    "facebook/mask2former-swin-large-coco-panoptic": partial(mask2former, *SWIN_LARGE),
    "facebook/mask2former-swin-tiny-coco-panoptic": partial(mask2former, *SWIN_TINY),
    "nvidia/segformer-b0-finetuned-ade-512-512": segformer_b0,
    "ustc-community/dfine-xlarge-obj365": dfine_xlarge,
    "PekingU/rtdetr_v2_r18vd": rtdetr_v2_r18,
}


def with_random_weights(expert: Expert, folder: Path) -> Expert:
    """The expert with random weights of the same size, saved in `folder`; the expert itself if it needs none."""
    if isinstance(expert, PretrainedExpert):
        torch.manual_seed(0)
        model, processor = MODELS[expert.model_id]()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return type(expert)(str(folder), image_processor=expert.image_processor)
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
