"""A small checkpoint with an expert for features, whose weights lie in it."""

from transformers import AutoTokenizer

from modeling_prismer import PrismerImageProcessor, PrismerProcessor, pretrained_path
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite, VisionFeatures
from tests.modeling_prismer.tiny import tiny_config, tiny_model

from .models import photograph, save
from .test_vision_features import dinov2


def feature_suite(folder):
    return ExpertSuite([CannyEdges(), VisionFeatures(save(dinov2, folder), width=32)])


def save_feature_checkpoint(folder):
    """Saves model and processor into `folder`/model. Returns that folder."""
    suite = feature_suite(folder / "encoder")
    config = tiny_config(experts=suite.descriptions)
    config.vision_config.num_hidden_layers = config.vision_config.resampler_layers = 1
    config.text_config.num_hidden_layers = 2
    config.text_config.vocab_size = 371  # that of the shipped tokenizer
    model = tiny_model(config)
    model.generation_config.update(max_new_tokens=4)
    tokenizer = AutoTokenizer.from_pretrained(pretrained_path("prismer-easy-vqa"))
    size = {"height": 32, "width": 32}
    image_processor = PrismerImageProcessor(experts=suite.descriptions, size=size, expert_size=64)
    processor = PrismerProcessor(image_processor, tokenizer, experts=suite, task="vqa")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def save_photographs(folder, number):
    folder.mkdir()
    for seed in range(number):
        photograph((96 + seed, 64), seed).save(folder / f"{seed}.png")
    return folder
