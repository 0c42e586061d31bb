"""
Counts the memory of a PrismerLM on language models of 0.5, 3 and 7 billion weights.

    python benchmarks/lm_memory.py

The models are built on the meta device, which allocates nothing: Qwen2.5, SigLIP 2 (base, 224×224), and the stems and
the resampler of six experts. Frozen weights are in bfloat16. Trained weights are in float32, with gradients and the
two moments of AdamW. With 4 bits, the linear layers of the language model's decoder are quantised as by bitsandbytes:
NF4 in blocks of 64 weights, with a float32 scale for each block. Activations, the workspace of kernels and the
experts' own networks are not counted. The program prints the table of docs/prismer_lm.md.
"""

from typing import Any

import torch
from measuring import markdown_table
from transformers import Qwen2Config, Siglip2VisionConfig

from modeling_prismer import PrismerConfig, PrismerLMConfig, PrismerLMForConditionalGeneration


# https://huggingface.co/Qwen/Qwen2.5-0.5B and the same of 3B and 7B
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
FUSIONS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "cross-attention": {"fusion": "cross_attention", "cross_attention_every": 4},
}
BF16, NF4 = 2, 0.5 + 4 / 64  # bytes of a frozen weight
TRAINED = 4 + 4 + 8  # bytes of a trained weight in float32, its gradient and its moments
TOKENS = 1000


def build(sizes: dict[str, Any], **kwargs: Any) -> PrismerLMForConditionalGeneration:
    """The model on the meta device, with frozen backbones."""
    encoder = Siglip2VisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    encoder.num_patches = 196
    config = PrismerLMConfig(
        vision_config=[encoder],
        text_config=Qwen2Config(**sizes),
        experts_config={"experts": PrismerConfig.from_variant("prismer_base").experts},
        **kwargs,
    )
    with torch.device("meta"):
        return PrismerLMForConditionalGeneration(config).freeze_backbones()


def count(model: PrismerLMForConditionalGeneration) -> dict[str, float]:
    """Bytes of the weights, of a training, and of the cache of `TOKENS` tokens."""
    weights = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    quantised = sum(
        module.weight.numel() for module in model.model.decoder_layers.modules() if isinstance(module, torch.nn.Linear)
    )
    frozen = {"bf16": BF16 * (weights - trained)}
    frozen["4 bit"] = frozen["bf16"] - (BF16 - NF4) * quantised
    text = model.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    return {
        "trained": trained,
        **{name: own + 4 * trained for name, own in frozen.items()},
        **{f"{name}, training": own + TRAINED * trained for name, own in frozen.items()},
        "cache": TOKENS * 2 * BF16 * text.num_hidden_layers * text.num_key_value_heads * head_dim,
    }


def main() -> None:
    head = ["language model", "fusion", "bf16, GB", "4 bit, GB", "trained weights, million"]
    head += ["training, bf16, GB", "training, 4 bit, GB", f"cache of {TOKENS:,} tokens, MB"]
    rows = []
    for name, sizes in LANGUAGE_MODELS.items():
        for fusion, settings in FUSIONS.items():
            found = count(build(sizes, **settings))
            memory = [f"{found[key] / 1e9:.2f}" for key in ("bf16", "4 bit")]
            training = [f"{found[f'{key}, training'] / 1e9:.2f}" for key in ("bf16", "4 bit")]
            rows.append(
                [name, fusion, *memory, f"{found['trained'] / 1e6:.1f}", *training, f"{found['cache'] / 1e6:.0f}"]
            )
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
