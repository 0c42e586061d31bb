"""
Writes modeling_prismer/assets/self_check from the golden recording.

Run it as `python -m tests.modeling_prismer.record_self_check`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_prismer import TASKS
from modeling_prismer.conversion.original_names import original_names
from modeling_prismer.self_check import RECORDING

from .conftest import Golden, load_golden


# The recorded generations, and their settings for a prompt of three tokens.
SEARCHES = {
    "greedy": ("greedy_max20", {"max_length": 20}),
    "caption": ("caption_beam3_max20_min8", TASKS["caption"].generation),
    "vqa": ("vqa_beam3_lenpen-1_max+10_min+2", TASKS["vqa"].generation),
}


def recording(golden: Golden) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the plain values that `prismer check` compares with."""
    given, expected, recorded = golden.inputs, golden.expected, golden.recorded
    tensors = {f"images.{name}": tensor for name, tensor in golden.images().items()}
    tensors |= {f"text.{name}": tensor for name, tensor in golden.text.items()}
    tensors |= {
        "ranking.prompt_ids": given["prompt_ids"],
        "ranking.input_ids": given["rank_question_ids"],
        "ranking.attention_mask": given["rank_question_mask"],
        "ranking.candidate_ids": given["rank_answer_ids"],
        "ranking.candidate_mask": given["rank_answer_mask"],
        "expected.encoder": expected["encoder_last_hidden_state"],
    }
    tensors |= {
        f"expected.{name}": expected[name]
        for name in ("encoder_without_depth", "logits", "loss_per_sample", "train_loss")
    }
    tensors |= {
        f"expected.stem_{name}": expected[f"stem_{golden.original(name)}"] for name in golden.config.expert_names
    }
    names: dict[str, list[str]] = {}
    sources = original_names(golden.config)
    for name, _ in golden.loaded.named_parameters():
        names.setdefault(sources[name].name, []).append(name)
    tensors["expected.gradient_norms"] = torch.tensor([recorded["train_grad_norm"][source] for source in names])
    values = {
        "gradient_names": list(names.values()),
        "searches": {name: settings for name, (_, settings) in SEARCHES.items()},
        "generated": {name: recorded[source] for name, (source, _) in SEARCHES.items()},
        "rank_k": recorded["rank_k"],
        "rank_best": recorded["rank_best_answer_index"],
        "rank_scores": recorded["rank_log_prob_by_answer"],
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, values


def main(folder: Path = RECORDING) -> None:
    golden = load_golden("tiny_prismer")
    tensors, values = recording(golden)
    golden.model().half().save_pretrained(folder)  # the values are exact in float16
    save_file(tensors, folder / "recording.safetensors")
    (folder / "recording.json").write_text(json.dumps(values) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
