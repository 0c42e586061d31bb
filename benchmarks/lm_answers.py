"""
Compares the time of a PrismerLM's answer with that of its language model alone, for the same number of tokens.

    python benchmarks/lm_answers.py

The language model has the architecture of SmolLM2-135M with random weights. Images are encoded before the timing,
which covers the prompt and 20 new tokens. In prefix fusion, the language model alone gets 128 more tokens in place of
the image. In cross-attention it gets the text. Both sides take turns in one run. The program writes result.json and
table.md.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from measuring import machine_facts, machine_text, markdown_table, positive, seconds, spread_text, write_result
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_prismer import PrismerLMForConditionalGeneration


# https://huggingface.co/HuggingFaceTB/SmolLM2-135M
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
REQUIRED = {"prefix": 1.10, "cross_attention": 1.25}  # times that of the language model alone
IMAGE_TOKENS = 128


def build(fusion: str, dtype: torch.dtype, sizes: dict[str, Any]) -> PrismerLMForConditionalGeneration:
    """A PrismerLM without vision encoder, whose latents are the image's tokens."""
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    return PrismerLMForConditionalGeneration.from_backbones(
        language_model,
        experts=[{"name": "depth", "kind": "dense", "channels": 1}],
        experts_config={"hidden_size": 192, "image_size": 128, "num_latents": IMAGE_TOKENS, "resampler_layers": 1},
        fusion=fusion,
    ).eval()


@torch.no_grad()
def time_fusion(
    fusion: str, repeats: int, text_tokens: int, new_tokens: int, dtype: torch.dtype, sizes: dict[str, Any]
) -> dict[str, Any]:
    model = build(fusion, dtype, sizes)
    text = torch.randint(10, sizes["vocab_size"], (1, text_tokens))
    image = torch.full((1, IMAGE_TOKENS), model.config.image_token_id)
    with_image = torch.cat([image, text], dim=1) if fusion == "prefix" else text
    alone = torch.cat([torch.randint(10, sizes["vocab_size"], image.shape), text], dim=1)
    alone = alone if fusion == "prefix" else text
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    encoded = model.get_image_features(depth_values=torch.rand(1, 1, 128, 128))

    def both() -> tuple[float, float]:
        cpu = torch.device("cpu")
        inputs = {"input_ids": with_image, "attention_mask": torch.ones_like(with_image), "encoder_outputs": encoded}
        one = seconds(lambda: model.generate(**inputs, **settings), cpu)
        inputs = {"input_ids": alone, "attention_mask": torch.ones_like(alone)}
        return one, seconds(lambda: model.language_model.generate(**inputs, **settings), cpu)

    both()  # warm-up
    pairs = [both() for _ in range(repeats)]
    ratios = [one / other for one, other in pairs]
    return {
        "prismer_lm": [one for one, _ in pairs],
        "alone": [other for _, other in pairs],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "required": REQUIRED[fusion],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lm_answers"), help="folder for the result")
    parser.add_argument("--repeats", type=positive, default=7, help="pairs of runs that count, after a warm-up")
    parser.add_argument("--text_tokens", type=positive, default=16, help="tokens of the question")
    parser.add_argument("--new_tokens", type=positive, default=20, help="tokens of the answer")
    parser.add_argument("--layers", type=positive, default=30, help="layers of the language model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the language model")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    machine = machine_facts(torch.device("cpu"), dtype)
    sizes = {**SMOLLM2, "num_hidden_layers": args.layers}
    fusions = {
        fusion: time_fusion(fusion, args.repeats, args.text_tokens, args.new_tokens, dtype, sizes)
        for fusion in REQUIRED
    }
    rows = [
        [
            fusion.replace("_", "-"),
            spread_text(found["prismer_lm"]),
            spread_text(found["alone"]),
            spread_text(found["ratios"]),
            f"{found['required']:.2f}",
        ]
        for fusion, found in fusions.items()
    ]
    head = ["fusion", "PrismerLM, s", "language model alone, s", "ratio", "required"]
    text = f"{markdown_table(head, rows)}\n\nMedian (shortest – longest). {machine_text(machine)}."
    write_result(args.out, {"machine": machine, "fusions": fusions}, text)


if __name__ == "__main__":
    main()
