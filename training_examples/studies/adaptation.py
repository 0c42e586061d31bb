"""Other parts in place of a Prismer's adaptors, with about as many weights, and of its resampler."""

import torch
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from torch import nn

from modeling_prismer import PrismerForConditionalGeneration


def backbone_layers(model: PrismerForConditionalGeneration) -> dict[str, nn.Linear]:
    """The linear layers that come from CLIP and RoBERTa. The backbones are frozen afterwards."""
    model.freeze_backbones()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and not module.weight.requires_grad
    }


def count_adaptors(model: nn.Module) -> int:
    """The number of weights in the paper's adaptors, which is the budget of the others."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".adaptor." in name)


def lora(layers: dict[str, nn.Linear], budget: int, use_dora: bool = False) -> LoraConfig:
    wanted = budget - use_dora * sum(layer.out_features for layer in layers.values())
    rank = max(1, round(wanted / sum(layer.in_features + layer.out_features for layer in layers.values())))
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), use_dora=use_dora)


def ia3(layers: dict[str, nn.Linear]) -> IA3Config:
    """(IA)³ has fewer weights by its nature."""
    names = [name for name in layers if name.endswith(("k_proj", "v_proj", "fc2"))]
    return IA3Config(target_modules=names, feedforward_modules=[name for name in names if name.endswith("fc2")])


class AllTokens(nn.Module):
    """Replaces the resampler: returns the tokens of all experts unchanged. No expert may be missing."""

    def forward(self, tokens: torch.Tensor, token_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        if token_mask is not None and not token_mask.all():
            raise ValueError("an expert is missing; a model without a resampler needs all of them")
        return tokens


def replace_adaptors(model: PrismerForConditionalGeneration, method: str) -> None:
    """
    Freezes the backbones and the adaptors, and adds LoRA, DoRA or (IA)³ to the backbones. New adaptors have no effect,
    except for the layer norm in those of the decoder.
    """
    layers = backbone_layers(model)
    budget = count_adaptors(model)
    for name, module in model.named_modules():
        if name.endswith(".adaptor"):
            module.requires_grad_(False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inject_adapter_in_model(ia3(layers) if method == "(IA)³" else lora(layers, budget, method == "DoRA"), model)
    for name, parameter in model.named_parameters():  # peft has frozen all other weights
        parameter.requires_grad_(parameter.requires_grad or name in trained)
