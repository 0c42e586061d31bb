"""Processors of PrismerLM on small tokenizers, and small random models that fit them."""

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor


SENTENCES = ["system user assistant", "What shape is it? Is it red? A triangle, a circle, a dog, yes or no."]
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

# As those of most language models: a content is a text.
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

VLM_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{%- if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}\
{%- if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}\
{%- endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

EXPERTS = [
    {"name": "depth", "kind": "dense", "channels": 1},
    {
        "name": "detection",
        "kind": "label",
        "channels": 8,
        "num_classes": 3,
        "instances": True,
        "class_names": ["dog", "cat", "ball"],
    },
    {"name": "ocr", "kind": "label", "channels": 8},
]
EXPERTS_CONFIG = {
    "hidden_size": 32,
    "num_latents": 3,
    "resampler_layers": 1,
    "resampler_attention_heads": 2,
    "image_size": 32,
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
OTHER_IMAGE = np.random.default_rng(1).integers(0, 256, (30, 20, 3), dtype=np.uint8)


def make_tokenizer(special_tokens=(), chat_template=CHAT_TEMPLATE, **kwargs):
    special_tokens = [*CHAT_TOKENS, *special_tokens]
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(SENTENCES, vocab_size=320, min_frequency=1, special_tokens=special_tokens)
    kwargs = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **kwargs}
    return PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer,
        additional_special_tokens=special_tokens[3:],
        chat_template=chat_template,
        **kwargs,
    )


def make_vlm_processor():
    image_processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 56, patch_size=14, merge_size=2)
    tokenizer = make_tokenizer(VISION_TOKENS, VLM_TEMPLATE)
    return Qwen2VLProcessor(image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=VLM_TEMPLATE)


def labels_of(height, width):
    """Labels of an image: a near half, a dog on the left, the word "stop" below it."""
    depth = np.zeros((height, width), np.uint8)
    depth[height // 2 :] = 200
    boxes, words = np.full((2, height, width), 255, np.uint8)
    boxes[:, : width // 4] = 0
    words[-2:, :4] = 0
    return {
        "depth": depth,
        "detection": {"ids": boxes, "classes": [0]},
        "ocr": {"ids": words, "words": ["stop"], "features": np.ones((1, 8), np.float32)},
    }


LABELS = labels_of(24, 40)
OTHER_LABELS = {"depth": None, "detection": None, "ocr": None}


def make_model(vocab_size, fusion="prefix", language=None, vision=True, **kwargs):
    """A small random model, whose images matter."""
    torch.manual_seed(0)
    if language is None:
        language = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab_size, max_position_embeddings=512))
    encoders = [
        SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=32, patch_size=16)),
        Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)),
    ]
    model = PrismerLMForConditionalGeneration.from_backbones(
        language,
        encoders if vision else None,
        EXPERTS,
        fusion=fusion,
        experts_config=EXPERTS_CONFIG,
        cross_attention_every=1,
        **kwargs,
    )
    with torch.no_grad():
        language.get_output_embeddings().weight.mul_(20)
        for block in model.model.cross_blocks.values():
            block.attn_gate.fill_(1.0)
            block.mlp_gate.fill_(0.5)
            block.cross_attn.v_proj.weight.mul_(20)
    return model.eval()


def make_vlm(processor):
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
    text = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(processor.tokenizer)}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        text_config={
            **text,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def make_processor(fusion="prefix", experts_as="tokens", tokenizer=None, **kwargs):
    """A processor for the model of `make_model`, with descriptions of experts and without live ones."""
    return PrismerLMProcessor.from_backbones(
        make_tokenizer() if tokenizer is None else tokenizer,
        [SiglipVisionConfig(image_size=32, patch_size=16), Dinov2Config(image_size=28)],
        EXPERTS,
        fusion=fusion,
        experts_as=experts_as,
        experts_config=EXPERTS_CONFIG,
        **kwargs,
    )


def learned(processor, inputs):
    """The text that each row learns."""
    return [processor.decode(row[row != -100]) for row in inputs["labels"]]
