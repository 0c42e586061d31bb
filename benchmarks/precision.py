"""
Compares bfloat16 and an int8 decoder with float32: the speed-up, and the changes of the outputs.

    python benchmarks/precision.py
    python benchmarks/precision.py --checkpoint prismer-easy-vqa --image_files modeling_prismer/assets/shape.png \\
        --text "What color is the shape?" "What shape is in the image?"

Without `--checkpoint`, the program measures times and outputs with random weights of the true size. Tokens then change
easily, because the most probable token is hardly more probable than the next one. With `--checkpoint`, it compares the
outputs of a trained model. int8 comes from torchao (pip install torchao) without torch.compile: weight-only, or
dynamic, which also quantises the inputs of the layers. The program writes result.json and table.md.
"""

import argparse
import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measuring import (
    machine_facts,
    machine_text,
    markdown_table,
    matrix_product_gflops,
    positive,
    spread_text,
    time_repeatedly,
    write_result,
)
from rows import PROMPT, Setup, caption, encode, image_inputs, make_model, rank, select

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path


NEW_TOKENS = 20
NONE = "–"


# ---- the variants ----


def to_bfloat16(model: PrismerForConditionalGeneration, encoder: bool = False, decoder: bool = False) -> None:
    if encoder:
        model.model.vision_model.to(torch.bfloat16)
    for part in decoder_of(model) if decoder else ():
        part.to(torch.bfloat16)


def to_int8(model: PrismerForConditionalGeneration, config_name: str) -> None:
    """Quantises every linear layer of the decoder, including the language modelling head."""
    import torchao.quantization

    for part in decoder_of(model):
        torchao.quantization.quantize_(part, getattr(torchao.quantization, config_name)())


def decoder_of(model: PrismerForConditionalGeneration) -> tuple[torch.nn.Module, ...]:
    return model.model.text_model, model.lm_head


def int8_of_bfloat16(model: PrismerForConditionalGeneration) -> None:
    to_bfloat16(model, encoder=True, decoder=True)
    to_int8(model, "Int8WeightOnlyConfig")


VARIANTS: dict[str, Callable[[PrismerForConditionalGeneration], None]] = {
    "float32": lambda model: None,
    "encoder bfloat16": lambda model: to_bfloat16(model, encoder=True),
    "decoder bfloat16": lambda model: to_bfloat16(model, decoder=True),
    "bfloat16": lambda model: to_bfloat16(model, encoder=True, decoder=True),
    "decoder int8 weight-only": lambda model: to_int8(model, "Int8WeightOnlyConfig"),
    "decoder int8 dynamic": lambda model: to_int8(model, "Int8DynamicActivationInt8WeightConfig"),
    "bfloat16, decoder int8 weight-only": int8_of_bfloat16,
}


def installed_variants() -> tuple[list[str], str | None]:
    """The variants that can run, and a note on the others."""
    try:
        import torchao
    except ImportError:
        names = [name for name in VARIANTS if "int8" not in name]
        return names, "int8 is left out: torchao is not installed (pip install torchao)."
    return list(VARIANTS), f"int8 by torchao {torchao.__version__}."


# ---- measuring ----


def time_rows(model: PrismerForConditionalGeneration, repeats: int) -> dict[str, Any]:
    times = {}
    for name, prepare in {
        "encode 1 image": lambda: encode(model, images=1),
        "caption 1 image": lambda: caption(model, images=1),
        "rank 128 candidates": lambda: rank(model, candidates=128),
    }.items():
        torch.manual_seed(0)
        times[name] = asdict(time_repeatedly(prepare(), repeats, model.device))
    return times


@torch.no_grad()
def say(model: PrismerForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The encoded images, and the greedily generated text."""
    inputs = dict(inputs)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask") if name in inputs}
    encoded = model.get_image_features(**inputs).last_hidden_state
    encoder_outputs = (encoded.to(model.model.text_model.dtype),)
    lengths = {"max_new_tokens": NEW_TOKENS, "num_beams": 1, "do_sample": False}
    generated = model.generate(**text, **lengths, encoder_outputs=encoder_outputs)
    return {"encoder_outputs": encoder_outputs, "generated": generated, "prompt": text["input_ids"].shape[1]}


@torch.no_grad()
def logits_along(model: PrismerForConditionalGeneration, said: dict[str, Any], text: torch.Tensor) -> torch.Tensor:
    """The float32 logits of each token of `text` after the prompt, without padding: (tokens, vocabulary)."""
    mask = text != model.config.pad_token_id
    logits = model(input_ids=text, attention_mask=mask, encoder_outputs=said["encoder_outputs"]).logits
    start = said["prompt"]
    return logits[:, start - 1 : -1][mask[:, start:]].float()


def change(reference: dict[str, Any], said: dict[str, Any], logits: list[torch.Tensor], pad: int) -> dict[str, float]:
    """The differences between two outputs. `logits` are those of the reference and of `said`."""
    difference = (logits[1] - logits[0]).abs()
    generated = [each["generated"][:, each["prompt"] :] for each in (reference, said)]
    length = max(each.shape[1] for each in generated)
    padded = [torch.nn.functional.pad(each, (0, length - each.shape[1]), value=pad) for each in generated]
    there = (padded[0] != pad) | (padded[1] != pad)
    return {
        "encoded_max": max_difference(reference["encoder_outputs"][0], said["encoder_outputs"][0]),
        "logits_max": difference.max().item(),
        "logits_mean": difference.mean().item(),
        "logits_std": logits[0].std().item(),
        "equal_next_tokens": (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item(),
        "equal_greedy_tokens": (padded[0] == padded[1])[there].float().mean().item(),
        "tokens": int(there.sum()),
    }


def max_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()


def measure(
    model: PrismerForConditionalGeneration, inputs: dict[str, torch.Tensor], names: list[str], repeats: int
) -> dict[str, Any]:
    """The times of each variant (if `repeats` is not 0), and its differences from the float32 model."""
    reference = say(model, inputs)
    expected = logits_along(model, reference, reference["generated"])
    variants = {}
    for name in names:
        print(f"{name} …", flush=True)
        variant = copy.deepcopy(model)
        VARIANTS[name](variant)
        said = say(variant, inputs)
        logits = [expected, logits_along(variant, said, reference["generated"])]
        variants[name] = {
            "times": time_rows(variant, repeats) if repeats else {},
            "change": change(reference, said, logits, model.config.pad_token_id),
        }
        del variant, said, logits
        gc.collect()
    return variants


def checkpoint_and_inputs(
    checkpoint: str, images: list[str], texts: list[str] | None, device: torch.device
) -> tuple[PrismerForConditionalGeneration, dict[str, torch.Tensor]]:
    """A trained model and its inputs: every text for every image. Its experts run live."""
    folder = checkpoint if Path(checkpoint).is_dir() else pretrained_path(checkpoint)
    processor = PrismerProcessor.from_pretrained(folder)
    model = PrismerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    text = None if texts is None else [texts] * len(images)
    return model, dict(processor(images=images, text=text).to(device))


# ---- reading ----


def table(result: dict[str, Any]) -> str:
    variants = result["variants"]
    parts = []
    timed = next(iter(variants.values()))["times"]
    if timed:
        rows = []
        for name, entry in variants.items():
            cells = [name]
            for row, timing in entry["times"].items():
                text = spread_text(timing["seconds"])
                if "float32" in variants and name != "float32":
                    theirs = variants["float32"]["times"][row]["seconds"]
                    text += f", {statistics.median(theirs) / statistics.median(timing['seconds']):.2f}×"
                cells.append(text)
            rows.append(cells)
        head = ["", *(f"{name}, s" for name in timed)]
        parts.append(markdown_table(head, rows))
        speeds = ", ".join(f"{dtype} {speed:,.0f}" for dtype, speed in result["gemm_gflops"].items())
        parts.append(f"The number after the comma is the speed-up over float32. Matrix products in GFLOP/s: {speeds}.")
    rows = []
    for name, entry in variants.items():
        change = entry["change"]
        cells = [name, *(f"{change[key]:.2g}" for key in ("encoded_max", "logits_max", "logits_mean"))]
        rows.append([*cells, f"{change['equal_next_tokens']:.1%}", f"{change['equal_greedy_tokens']:.1%}"])
    head = ["largest change", "encoded", "logits", "logits, mean change"]
    parts.append(markdown_table([*head, "same next token", "same greedy token"], rows))
    change = next(iter(variants.values()))["change"]
    parts.append(
        f"The logits' standard deviation is {change['logits_std']:.2g}. Next tokens are compared along the "
        f"{change['tokens']} tokens that float32 generated. Greedy tokens are compared by position, so all tokens "
        "after the first different one may differ."
    )
    parts.append(f"{result['network']}; {machine_text(result['machine'])}. {result['note']}")
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder for the result")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only variants whose names contain one of these")
    parser.add_argument("--repeats", type=positive, default=3, help="runs that count, after a warm-up run")
    parser.add_argument("--images", type=positive, default=4, help="number of random images")
    parser.add_argument("--checkpoint", help="a folder or the name of a shipped checkpoint; no times are measured")
    parser.add_argument("--image_files", nargs="+", default=[], metavar="FILE", help="images, for --checkpoint")
    parser.add_argument("--text", nargs="+", help="prompts or questions for every image, for --checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the program")
    args = parser.parse_args()
    if args.checkpoint and not args.image_files:
        parser.error("--checkpoint needs --image_files")
    setup = Setup(args.small, args.device, keep_memory=args.device == "cpu")
    setup.prepare_process()
    names, note = installed_variants()
    names = select(args.only, names)
    result: dict[str, Any] = {
        "network": args.checkpoint or setup.network,
        "machine": {**machine_facts(setup.torch_device, setup.torch_dtype), "dtype": "several dtypes"},
        "note": note,
        "gemm_gflops": {
            str(dtype).removeprefix("torch."): matrix_product_gflops(setup.torch_device, dtype, setup.product_size)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
    torch.manual_seed(0)
    if args.checkpoint:
        model, inputs = checkpoint_and_inputs(args.checkpoint, args.image_files, args.text, setup.torch_device)
        result["variants"] = measure(model, inputs, names, repeats=0)
    else:
        model = make_model(setup)
        inputs = image_inputs(model, args.images)
        inputs["input_ids"] = torch.tensor([PROMPT] * args.images, device=model.device)
        result["variants"] = measure(model, inputs, names, args.repeats)
    write_result(args.out, result, table(result))


if __name__ == "__main__":
    main()
