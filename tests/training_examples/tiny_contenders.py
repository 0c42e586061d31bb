"""Folders with tiny random models of every kind that compare.py takes."""

import torch
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    OPTConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor
from tests.modeling_prismer.tiny_lm import VLMS, scatter_weights
from tests.processing.tiny_lm_processors import SIZES, make_tokenizer, make_vlm, make_vlm_processor


SIZE = {"height": 28, "width": 28}
TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{%- for item in message.content %}{% if item.type == 'image' %}<image>{% else %}{{ item.text }}{% endif %}\
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def save(folder, model, processor):
    torch.manual_seed(0)
    scatter_weights(model).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def git(folder):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "what",
        "is",
        "it",
        "color",
        "red",
        "blue",
        "yes",
        "no",
        "a",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    sizes = {**SIZES, "max_position_embeddings": 64, "vocab_size": len(words)}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    model = GitForCausalLM(GitConfig(vision_config=vision, **sizes, **special))
    images = CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    return save(folder, model, GitProcessor(images, tokenizer))


def blip_2(folder):
    tokenizer = make_tokenizer(chat_template=None, bos_token="<|im_start|>")
    processor = Blip2Processor(BlipImageProcessor(size=SIZE), tokenizer, num_query_tokens=2)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    text = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        **special,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**{**SIZES, "num_hidden_layers": 1}, image_size=28, patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig(**{**SIZES, "num_hidden_layers": 1}, encoder_hidden_size=32).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return save(folder, Blip2ForConditionalGeneration(config), processor)


def paligemma(folder):
    tokenizer = make_tokenizer(chat_template=None, bos_token="<|im_start|>")
    images = SiglipImageProcessor(size=SIZE)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    config = VLMS["paligemma"]()
    config.image_token_index = config.image_token_id = processor.image_token_id
    config.text_config.vocab_size = len(tokenizer)
    return save(folder, PaliGemmaForConditionalGeneration(config), processor)


def idefics3(folder):
    tokenizer, images = _splitting_parts(Idefics3ImageProcessor)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=TEMPLATE)
    config: Idefics3Config = VLMS["idefics3"]()
    return _splitting(folder, Idefics3ForConditionalGeneration, config, processor)


def smolvlm(folder):
    tokenizer, images = _splitting_parts(SmolVLMImageProcessor)
    videos = SmolVLMVideoProcessor()
    processor = SmolVLMProcessor(images, tokenizer, videos, image_seq_len=1, chat_template=TEMPLATE)
    config: SmolVLMConfig = VLMS["smolvlm"]()
    return _splitting(folder, SmolVLMForConditionalGeneration, config, processor)


def _splitting_parts(image_processor_class):
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    size = {"longest_edge": 28}
    images = image_processor_class(do_image_splitting=False, size=size, max_image_size=size)
    return make_tokenizer(special, TEMPLATE), images


def _splitting(folder, model_class, config, processor):
    config.image_token_id = processor.image_token_id
    config.text_config.vocab_size = len(processor.tokenizer)
    return save(folder, model_class(config), processor)


def qwen2_5_vl(folder):
    processor = make_vlm_processor()
    return save(folder, make_vlm(processor), processor)


def clip(folder):
    tokenizer = make_tokenizer(chat_template=None, bos_token="<|im_start|>")
    return _contrastive(
        folder, CLIPConfig, CLIPModel, CLIPProcessor(CLIPImageProcessor(size=SIZE, crop_size=SIZE), tokenizer)
    )


def siglip(folder):
    tokenizer = make_tokenizer(chat_template=None, model_max_length=32)
    return _contrastive(folder, SiglipConfig, SiglipModel, SiglipProcessor(SiglipImageProcessor(size=SIZE), tokenizer))


def _contrastive(folder, config_class, model_class, processor):
    tokenizer = processor.tokenizer
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "projection_size": 32, **special}
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    return save(folder, model_class(config_class(text_config=text, vision_config=vision)), processor)


def prismer_lm(folder, language, vision):
    """Of the folders of a language model and a vision encoder."""
    model = PrismerLMForConditionalGeneration.from_backbones(str(language), str(vision))
    processor = PrismerLMProcessor.from_backbones(str(language), str(vision), config=model.config)
    model.save_pretrained(folder, trained_only=True)
    processor.save_pretrained(folder)
    return folder


BUILDERS = {
    "git": git,
    "blip_2": blip_2,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_5_vl": qwen2_5_vl,
    "clip": clip,
    "siglip": siglip,
}
