"""A small checkpoint and a folder of images with texts, for the recipes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, RobertaTokenizer, SiglipVisionConfig, SiglipVisionModel

from modeling_prismer import PrismerImageProcessor, PrismerProcessor
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite, RapidOcrText
from tests.modeling_prismer.tiny import tiny_config, tiny_model


COLORS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 210), "white": (240, 240, 240)}
NUM_IMAGES = 12


def color_of(number):
    return list(COLORS)[number % len(COLORS)]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Images of one coloured square, with `captions.csv` and `questions.jsonl`."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    captions, questions = ["file_name,caption"], []
    for number in range(NUM_IMAGES):
        pixels = generator.integers(90, 110, (48, 64, 3), dtype=np.uint8)
        left, top = generator.integers(4, 30, 2)
        pixels[top : top + 14, left : left + 14] = COLORS[color_of(number)]
        name = f"{number:02}.png"
        Image.fromarray(pixels).save(folder / name)
        captions.append(f"{name},a {color_of(number)} square")
        questions.append({"file_name": name, "question": "what color is it", "answer": color_of(number)})
        questions.append({"file_name": name, "question": "is it red", "answer": "yes" if number % 4 == 0 else "no"})
    (folder / "captions.csv").write_text("\n".join(captions) + "\n")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = ["A picture of", "A photo of a", "What color is it?", "Is it red?", " square", " a", " yes", " no"]
    texts += [f" {word}" for color in COLORS for word in (color, color.capitalize())] + [" Yes", " No"]
    trainer = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(texts, vocab_size=320, min_frequency=1, special_tokens=special_tokens)
    folder = tmp_path_factory.mktemp("tokenizer")
    trainer.save_model(str(folder))
    return RobertaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """The folder of a small random model with one live expert, edges, and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    experts = ExpertSuite([CannyEdges()])
    config = tiny_config(experts=experts.descriptions)
    config.text_config.vocab_size = len(tokenizer)
    tiny_model(config).save_pretrained(folder)
    image_processor = PrismerImageProcessor(
        experts=experts.descriptions, size={"height": 32, "width": 32}, expert_size=32
    )
    PrismerProcessor(image_processor, tokenizer, experts=experts).save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def language(tmp_path_factory, tokenizer):
    """The folder of a tiny language model with a chat template."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**sizes, **special, vocab_size=len(tokenizer), max_position_embeddings=1024)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """The folder of a tiny vision encoder."""
    folder = tmp_path_factory.mktemp("tiny-siglip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = SiglipVisionConfig(**sizes, image_size=32, patch_size=16, vision_use_head=False)
    SiglipVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def suites(tmp_path_factory):
    """Folders with suites of experts: edges, and edges with text."""
    folders = {}
    for name, experts in {"edges": [CannyEdges()], "both": [CannyEdges(), RapidOcrText()]}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        ExpertSuite(experts).save_pretrained(folders[name])
    return folders
