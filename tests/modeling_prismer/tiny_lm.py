"""Tiny random PrismerLMs of many families, and inputs for them. Their weights are large, so that images matter."""

from functools import lru_cache

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Gemma3TextConfig,
    GPT2Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Olmo2Config,
    PaliGemmaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    SmolVLMConfig,
)

from modeling_prismer import PrismerLMConfig, PrismerLMForConditionalGeneration


EXPERTS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {"name": "segmentation", "kind": "label", "channels": 8, "num_classes": 3},
]
FUSIONS = ("prefix", "cross_attention")
IMAGE_SIZE, PATCH_SIZE = 32, 16
NUM_PATCHES, NUM_LATENTS = 4, 3
VOCAB_SIZE = 100
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}

_SPECIAL = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_SIZES, **_SPECIAL, "num_key_value_heads": 1, "max_position_embeddings": 256}
LANGUAGE_MODELS = {
    "llama": lambda: LlamaConfig(**_TEXT),
    "qwen3": lambda: Qwen3Config(**_TEXT, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(
        **_TEXT, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "smollm3": lambda: SmolLM3Config(**_TEXT),
    "mistral": lambda: MistralConfig(**_TEXT, head_dim=16, sliding_window=8),
    "olmo2": lambda: Olmo2Config(**_TEXT),
    "phi3": lambda: Phi3Config(**_TEXT),
    "gpt2": lambda: GPT2Config(
        **_SPECIAL, n_embd=32, n_layer=2, n_head=2, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}
_GRID = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
ENCODERS = {
    "clip": lambda: CLIPVisionConfig(**_SIZES, **_GRID),
    "siglip": lambda: SiglipVisionConfig(**_SIZES, **_GRID, vision_use_head=False),
    "siglip2": lambda: Siglip2VisionConfig(
        **_SIZES, patch_size=PATCH_SIZE, num_patches=NUM_PATCHES, vision_use_head=False
    ),
    "dinov2": lambda: Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **_GRID),
    "dinov2_registers": lambda: Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **_GRID
    ),
    "dinov3": lambda: DINOv3ViTConfig(**_SIZES, **_GRID, num_register_tokens=4),
}

# ---- vision-language models ----

_VLM_TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 64, "max_position_embeddings": 256, **_SPECIAL},
}
_VLM_VISION = {**_SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_VISION = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
    **{"spatial_merge_size": 2, "out_hidden_size": 32},
}
VLM_IMAGE, VLM_START, VLM_END = 99, 97, 96  # tokens of the vision-language models
VLMS = {
    "llava": lambda: LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VLM_VISION},
        text_config={"model_type": "llama", **_VLM_TEXT},
        image_token_index=VLM_IMAGE,
        vision_feature_layer=-1,
    ),
    "paligemma": lambda: PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VLM_VISION, "projection_dim": 32},
        text_config={"model_type": "gemma", **_VLM_TEXT, "head_dim": 8},
        image_token_index=VLM_IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
    "internvl": lambda: InternVLConfig(
        vision_config={
            **{"model_type": "internvl_vision", **_VLM_VISION},
            **{"image_size": [28, 28], "patch_size": [14, 14]},
        },
        text_config={"model_type": "qwen2", **_VLM_TEXT},
        image_token_id=VLM_IMAGE,
        downsample_ratio=0.5,
    ),
    "idefics3": lambda: Idefics3Config(
        vision_config=_VLM_VISION,
        text_config={"model_type": "llama", **_VLM_TEXT},
        image_token_id=VLM_IMAGE,
        scale_factor=2,
    ),
    "smolvlm": lambda: SmolVLMConfig(
        vision_config=_VLM_VISION,
        text_config={"model_type": "llama", **_VLM_TEXT},
        image_token_id=VLM_IMAGE,
        scale_factor=2,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        vision_config={**_QWEN_VISION, "patch_size": 14, "fullatt_block_indexes": [0], "window_size": 56},
        text_config={**_VLM_TEXT, "rope_parameters": _MROPE},
        image_token_id=VLM_IMAGE,
        video_token_id=98,
        vision_start_token_id=VLM_START,
        vision_end_token_id=VLM_END,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        vision_config={
            **{**_QWEN_VISION, "patch_size": 16, "deepstack_visual_indexes": [0]},
            **{"num_position_embeddings": 16},
        },
        text_config={**_VLM_TEXT, "head_dim": 8, "rope_parameters": _MROPE},
        image_token_id=VLM_IMAGE,
        video_token_id=98,
        vision_start_token_id=VLM_START,
        vision_end_token_id=VLM_END,
    ),
}


def vlm_inputs(
    name: str, rows: int, config: PrismerLMConfig | None = None, images: int = 1
) -> dict[str, torch.Tensor]:
    """
    Inputs of a vision-language model: prompts with images. With the `config` of a PrismerLM, the placeholders of the
    experts of each image follow it.
    """
    generator = torch.Generator().manual_seed(0)
    number = {"internvl": 1, "idefics3": 1, "smolvlm": 1}.get(name, 4)
    image = [VLM_IMAGE] * number
    if name.startswith("qwen"):
        image = [VLM_START, *image, VLM_END]
    if config is not None:
        image += [config.image_token_id] * config.image_seq_length
    ids = [
        [3, *(t for text in torch.randint(5, 90, (images, 4), generator=generator).tolist() for t in (*image, *text))]
        for _ in range(rows)
    ]
    input_ids = torch.tensor(ids)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if name.startswith("qwen"):
        side = 14 if name == "qwen2_5_vl" else 16
        inputs["pixel_values"] = torch.randn(rows * images * 16, 3 * 2 * side**2, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * (rows * images))
        inputs["mm_token_type_ids"] = (input_ids == VLM_IMAGE).long()
    elif name in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = torch.randn(rows, images, 3, 28, 28, generator=generator)
    else:
        inputs["pixel_values"] = torch.randn(rows * images, 3, 28, 28, generator=generator)
    return inputs


def tiny_vlm(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return scatter_weights(AutoModelForImageTextToText.from_config(VLMS[name]()), seed).eval()


# ---- PrismerLM ----


def tiny_config(
    language: str | PreTrainedConfig = "llama",
    vision: tuple[str, ...] = ("siglip",),
    fusion: str = "prefix",
    experts: list[dict] | None = None,
    **kwargs,
) -> PrismerLMConfig:
    """`experts=[]` gives a model without experts."""
    experts_config = {
        "experts": [dict(expert) for expert in (EXPERTS if experts is None else experts)],
        "hidden_size": 32,
        "num_latents": NUM_LATENTS,
        "resampler_layers": 1,
        "resampler_attention_heads": 2,
        **_GRID,
    }
    return PrismerLMConfig(
        vision_config=[ENCODERS[name]() for name in vision],
        text_config=LANGUAGE_MODELS[language]() if isinstance(language, str) else language,
        experts_config=None if experts == [] else experts_config,
        fusion=fusion,
        cross_attention_every=kwargs.pop("cross_attention_every", 2),
        cross_attention_intermediate_size=32,
        **kwargs,
    )


@torch.no_grad()
def scatter_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves all weights away from where they start, and opens all gates."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        if name.endswith("gate"):
            parameter.fill_(1.0)
    return model


def tiny_model(config: PrismerLMConfig | None = None, **kwargs) -> PrismerLMForConditionalGeneration:
    """In evaluation mode, with scattered weights: each call returns the same."""
    torch.manual_seed(0)
    return scatter_weights(PrismerLMForConditionalGeneration(config or tiny_config(**kwargs))).eval()


@lru_cache
def shared_model(language: str = "llama", fusion: str = "prefix", **kwargs) -> PrismerLMForConditionalGeneration:
    """As `tiny_model`, made once: for tests that leave it as it is."""
    return tiny_model(language=language, fusion=fusion, **kwargs)


def tiny_language_model(language: str = "llama", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = LANGUAGE_MODELS[language]() if isinstance(language, str) else language
    return scatter_weights(AutoModelForCausalLM.from_config(config), seed).eval()


def image_inputs(config: PrismerLMConfig, number: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images for all encoders, and the maps of all experts."""
    generator = torch.Generator().manual_seed(seed)
    shape = (number, 3, IMAGE_SIZE, IMAGE_SIZE)
    inputs = {}
    for index in range(len(config.vision_config)):
        inputs[f"pixel_values_{index}" if index else "pixel_values"] = torch.randn(shape, generator=generator)
    for expert in config.experts:
        name, channels = expert["name"], expert["channels"]
        if expert["kind"] == "dense":
            inputs[f"{name}_values"] = torch.rand(number, channels, *shape[2:], generator=generator) * 2 - 1
        else:
            blocks = torch.randint(expert["num_classes"], (number, 4, 4), generator=generator).to(torch.uint8)
            inputs[f"{name}_ids"] = blocks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    return inputs


def prompts(
    config: PrismerLMConfig, rows: int, images: int = 1, length: int = 5, seed: int = 0, placeholders: bool = False
) -> torch.Tensor:
    """
    Prompts of `length` tokens after each image. For cross-attention, images have placeholders if there are several, or
    if `placeholders` is true.
    """
    generator = torch.Generator().manual_seed(seed)
    has_placeholders = config.fusion == "prefix" or images > 1 or placeholders
    image = [config.image_token_id] * (config.image_seq_length if has_placeholders else 0)
    ids = []
    for _ in range(rows):
        texts = torch.randint(3, VOCAB_SIZE - 1, (images, length), generator=generator).tolist()
        ids.append([token for text in texts for token in (*image, *text)])
    return torch.tensor(ids)


def pad_left(input_ids: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    padding = torch.zeros(len(input_ids), number, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(input_ids)], dim=1)
    return {"input_ids": torch.cat([padding, input_ids], dim=1), "attention_mask": mask}


def training_inputs(config: PrismerLMConfig, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """One image for each row; all but the first two words are learned."""
    input_ids = prompts(config, rows, length=7, seed=seed)
    labels = input_ids.clone()
    labels[:, :-5] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        **image_inputs(config, rows, seed=seed),
    }


def pick(inputs: dict[str, torch.Tensor], rows) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in inputs.items()}


def repeat(inputs: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    return {name: tensor.repeat_interleave(number, dim=0) for name, tensor in inputs.items()}


class Calls:
    """Counts the calls of modules, and the rows of their first input."""

    def __init__(self, *modules: torch.nn.Module):
        self.rows: list[int] = []
        for module in modules:
            module.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self.rows.append(len(tensors[0]))
