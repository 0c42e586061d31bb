"""
How a typed program uses this package. It is not run: `make types` has mypy read it, with the types of the libraries.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from PIL import Image

from modeling_prismer import (
    DataCollatorForPrismer,
    ExpertSpec,
    PrismerConfig,
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    PrismerProcessor,
    pretrained_path,
)
from modeling_prismer.conversion import OnnxPrismer, convert_original_checkpoint, export_onnx
from modeling_prismer.processing.experts import Expert, ExpertSuite


def answer(image: Image.Image, question: str) -> str:
    path = pretrained_path("prismer-easy-vqa")
    processor = PrismerProcessor.from_pretrained(path, experts=None)
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    labels = {"edge": np.zeros((64, 64), np.uint8), "ocr": None}
    inputs = processor(images=image, text=question, expert_labels=[labels], return_tensors="pt").to(model.device)
    generated = model.generate(**inputs, num_beams=3)
    answers = processor.post_process_generation(generated, prompt_length=inputs["input_ids"].shape[1])
    assert_type(answers, list[str])
    candidates = processor.prepare_candidates(["circle", "triangle"])
    ranking = model.rank_candidates(**candidates, k=2, **inputs)
    assert ranking.indices is not None
    return answers[int(ranking.indices[0, 0])]


def logits(model: PrismerForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.freeze_backbones(vision=True, language=False).train()
    outputs = model(**inputs)
    encoded = model.get_image_features(inputs["pixel_values"])
    model(input_ids=inputs["input_ids"], encoder_outputs=encoded)
    return outputs.logits


def new_model() -> PrismerForConditionalGeneration:
    experts: list[dict[str, Any]] = [{"name": "depth", "kind": "dense", "channels": 1}]
    config = PrismerConfig(vision_config={"image_size": 64}, experts=experts, label_smoothing=0.0)
    assert_type(config.vision_config.image_size, int)
    assert_type(config.text_config.hidden_size, int)
    assert_type(config.expert_names, list[str])
    assert_type(config.expert_specs, list[ExpertSpec])
    model = PrismerForConditionalGeneration(PrismerConfig.from_variant("prismer_base", image_size=480))
    model.add_expert("edge", "dense", 1)
    model.resize_position_embeddings(224)
    return model.from_backbones("openai/clip-vit-base-patch16", "FacebookAI/roberta-base", experts=experts)


class Saliency(Expert):
    type = "saliency"
    name, kind, channels = "saliency", "dense", 1

    def run(self, images: list[Image.Image]) -> list[np.ndarray]:
        return [np.asarray(image.convert("L")) for image in images]


def with_own_experts(path: str) -> PrismerProcessor:
    suite = ExpertSuite([Saliency()]).to("cpu")
    return PrismerProcessor.from_pretrained(path, experts=suite, experts_memory="sequential")


def collate(processor: PrismerProcessor) -> dict[str, torch.Tensor]:
    collator = DataCollatorForPrismer(processor, expert_dropout=0.1)
    batch = collator([{"image": "cat.jpg", "text": "A picture of", "suffix": "a cat"}])
    assert_type(batch, dict[str, torch.Tensor])
    return batch


def maps(images: list[Image.Image]) -> Any:
    image_processor = PrismerImageProcessor(experts=[{"name": "depth", "kind": "dense", "channels": 1}])
    return image_processor(images, expert_labels=[{"depth": np.zeros((8, 8), np.uint8)}] * len(images))


def deploy(checkpoint: Path, folder: Path) -> np.ndarray:
    model = convert_original_checkpoint(checkpoint, "prismer_base", folder / "model", task="vqa")
    processor = PrismerProcessor.from_pretrained(folder / "model")
    assert_type(export_onnx(model, processor, folder / "onnx"), Path)
    return OnnxPrismer(folder / "onnx").generate(np.zeros((1, 4)), pixel_values=np.zeros((1, 3, 480, 480)))
