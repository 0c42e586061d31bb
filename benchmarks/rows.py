"""
The rows of the benchmark, with random weights of the true size and random images.

A row is a function that prepares everything and returns the function to be timed, which takes no arguments.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from modeling_prismer import (
    PrismerConfig,
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    keep_freed_memory,
    optimize_for_cpu,
)


EXPERT_SIZE = 224  # side of the experts' maps; those of smaller images have the size of the image
PROMPT = [0, 250, 2170, 9]  # <s>A picture of
Work = Callable[[], Any]


@dataclass(frozen=True)
class Setup:
    """
    The network and where it runs.

    Args:
        small (`bool`): use a tiny network, to try a program in seconds.
        device, dtype (`str`): as in torch.
        keep_memory (`bool`): call [`keep_freed_memory`] first.
        compiled (`bool`): compile the encoder, and the model in the training step.
    """

    small: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    keep_memory: bool = True
    compiled: bool = False

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
        parser.add_argument("--small", action="store_true", help="a tiny network, to try the program")
        parser.add_argument("--give_memory_back", action="store_true", help="do not call keep_freed_memory on a CPU")

    @classmethod
    def from_arguments(cls, args: Namespace) -> "Setup":
        return cls(args.small, args.device, args.dtype, args.device == "cpu" and not args.give_memory_back)

    def prepare_process(self) -> None:
        """Call this first in every process."""
        if self.keep_memory:
            keep_freed_memory()

    @property
    def network(self) -> str:
        return "tiny" if self.small else "prismer_base"

    @property
    def image_size(self) -> int:
        return 96 if self.small else 480

    @property
    def train_size(self) -> int:
        return 64 if self.small else 224

    @property
    def product_size(self) -> int:
        """The size of the matrix product that times are compared with."""
        return 256 if self.small else 2048

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


# ---- the network and its inputs ----


def make_config(setup: Setup, image_size: int) -> PrismerConfig:
    config = PrismerConfig.from_variant("prismer_base", image_size=image_size)
    if setup.small:
        vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": image_size}
        text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        text["vocab_size"] = 3000
        config = PrismerConfig(vision_config=vision, text_config=text, experts=config.experts)
    return config


def make_model(
    setup: Setup, image_size: int | None = None, dtype: torch.dtype | None = None
) -> PrismerForConditionalGeneration:
    """A model in evaluation mode, by default in the size and dtype of the setup."""
    config = make_config(setup, image_size or setup.image_size)
    dtype = dtype or setup.torch_dtype
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).to(setup.torch_device).eval()
    is_on_cpu = setup.torch_device.type == "cpu" and dtype == torch.float32
    return optimize_for_cpu(model) if is_on_cpu else model


def image_inputs(model: PrismerForConditionalGeneration, images: int) -> dict[str, torch.Tensor]:
    """Images and dense expert maps. Label maps are painted beforehand, because the reference takes them that way."""
    kind = {"device": model.device, "dtype": model.model.vision_model.dtype}
    size = model.config.vision_config.image_size
    map_size = min(EXPERT_SIZE, size)
    inputs = {"pixel_values": torch.randn(images, 3, size, size, **kind)}
    for spec in model.config.expert_specs:
        inputs[f"{spec.name}_values"] = torch.rand(images, spec.channels, map_size, map_size, **kind) * 2 - 1
        if spec.instances:
            inputs[f"{spec.name}_rows"] = torch.randint(128, (images, map_size, map_size), device=model.device)
    return inputs


def random_words(model: PrismerForConditionalGeneration, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(4, model.config.text_config.vocab_size, shape)


@torch.no_grad()
def encoded_images(model: PrismerForConditionalGeneration, images: int) -> tuple[torch.Tensor]:
    """Encoded images for `encoder_outputs`, in the dtype of the decoder."""
    encoded = model.get_image_features(**image_inputs(model, images)).last_hidden_state
    return (encoded.to(model.model.text_model.dtype),)


def image_and_labels(
    config: PrismerConfig, width: int = 640, height: int = 480, seed: int = 0
) -> tuple[Image.Image, dict[str, Any]]:
    """An image and made-up expert labels for the processor: 8-bit maps of the image's size."""
    generator = np.random.default_rng(seed)

    def blocks(high: int, channels: int) -> np.ndarray:
        """Squares of 20 pixels, smooth enough to look like a map."""
        coarse = generator.integers(0, high, (height // 20, width // 20, channels), dtype=np.uint8)
        return np.kron(coarse, np.ones((20, 20, 1), np.uint8))

    labels: dict[str, Any] = {}
    for spec in config.expert_specs:
        if spec.is_dense:
            labels[spec.name] = blocks(256, spec.channels)
            continue
        items = 20 if spec.label_parts else spec.num_classes
        labels[spec.name] = label = {"ids": blocks(items, 1)[..., 0]}
        if "classes" in spec.label_parts:
            label["classes"] = generator.integers(0, spec.num_classes, items)
        elif "features" in spec.label_parts:
            label["features"] = generator.normal(size=(items, spec.channels)).astype(np.float32)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return image, labels


def make_image_processor(config: PrismerConfig) -> PrismerImageProcessor:
    size = config.vision_config.image_size
    return PrismerImageProcessor(experts=config.experts, size={"height": size, "width": size})


# ---- the rows ----


def encode(model: PrismerForConditionalGeneration, images: int, compiled: bool = False) -> Work:
    """The vision encoder with all stems and the resampler. In the compiled one, the weights are constants."""
    features = model.get_image_features
    if compiled:
        features = torch.compile(features, fullgraph=True, options={"freezing": True})
    return torch.no_grad()(partial(features, **image_inputs(model, images)))


def caption(model: PrismerForConditionalGeneration, images: int, beams: int = 3) -> Work:
    """Beam search from a prompt of 4 tokens to exactly 20 tokens in total. The images are encoded beforehand."""
    return partial(
        model.generate,
        input_ids=torch.tensor([PROMPT] * images, device=model.device),
        encoder_outputs=encoded_images(model, images),
        num_beams=beams,
        min_length=20,
        max_length=20,
        do_sample=False,
    )


def rank(model: PrismerForConditionalGeneration, candidates: int, k: int | None = None, shortest: int = 2) -> Work:
    """
    Scores `k` (by default all) answers of `shortest` to 6 tokens after a question of 12 tokens. The image is encoded
    beforehand.
    """
    question = torch.cat([torch.tensor([PROMPT[:1]]), random_words(model, (1, 11))], dim=1)
    lengths = torch.randint(shortest, 7, (candidates, 1))
    return partial(
        model.rank_candidates,
        candidate_ids=random_words(model, (candidates, 6)).to(model.device),
        candidate_mask=(torch.arange(6) < lengths).to(model.device),
        k=k or candidates,
        input_ids=question.to(model.device),
        encoder_outputs=encoded_images(model, 1),
    )


def training_step(setup: Setup) -> Work:
    """
    Forward, backward and update with Trainer's default AdamW(fused=True), both backbones frozen. The weights are in
    float32. Another dtype of the setup is used for autocast, as with Trainer's `--bf16`.
    """
    model = make_model(setup, setup.train_size, dtype=torch.float32).train()
    model.freeze_backbones(vision=True, language=True)
    forward = torch.compile(model) if setup.compiled else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, fused=True)
    inputs = image_inputs(model, images=4)
    inputs["input_ids"] = inputs["labels"] = random_words(model, (4, 20)).to(model.device)

    def step():
        with torch.autocast(setup.torch_device.type, setup.torch_dtype, enabled=setup.dtype != "float32"):
            loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transform(setup: Setup) -> Work:
    """The image processor on an image and six label maps, in one thread."""
    config = make_config(setup, setup.image_size)
    processor = make_image_processor(config)
    image, labels = image_and_labels(config)
    return on_one_thread(partial(processor, image, labels))


def painting(setup: Setup) -> Work:
    """The painting of ids in the stems of label experts, up to the first convolution, in one thread."""
    model = make_model(setup)
    image, labels = image_and_labels(model.config)
    inputs = make_image_processor(model.config)(image, labels).to(model.device)

    @torch.no_grad()
    def paint():
        for name, stem in model.model.vision_model.expert_stems.items():
            ids = inputs.get(f"{name}_ids")
            if ids is None:
                continue
            stem.paint(ids, stem.feature_table(inputs.get(f"{name}_classes"), inputs.get(f"{name}_features"), 1))
            if stem.num_instance_embeddings:
                stem.instance_rows(ids)

    return on_one_thread(paint)


def labels_to_inputs(setup: Setup) -> Work:
    """Both, one after the other."""
    transformed, painted = transform(setup), painting(setup)
    return lambda: (transformed(), painted())


ROWS: dict[str, Callable[[Setup], Work]] = {
    "encode 1 image": lambda setup: encode(make_model(setup), images=1, compiled=setup.compiled),
    "encode 4 images": lambda setup: encode(make_model(setup), images=4, compiled=setup.compiled),
    "caption 1 image": lambda setup: caption(make_model(setup), images=1),
    "caption 4 images": lambda setup: caption(make_model(setup), images=4),
    "rank 128 candidates": lambda setup: rank(make_model(setup), candidates=128),
    "training step": training_step,
    "labels to inputs": labels_to_inputs,
    "labels to inputs: transform": transform,
    "labels to inputs: painting": painting,
}


def bytes_of_a_sample(setup: Setup) -> dict[str, int]:
    """The size of each tensor that the image processor returns for one image."""
    config = make_config(setup, setup.image_size)
    sample = make_image_processor(config)(*image_and_labels(config))
    return {name: tensor.nbytes for name, tensor in sample.items()}


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_one_thread(work: Work) -> Work:
    return one_thread()(work)


def select(only: list[str] | None, names: list[str]) -> list[str]:
    """The names that contain one of the words of `only`; all names if `only` is empty."""
    chosen = [name for name in names if not only or any(word in name for word in only)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(only)} matches nothing; there are {', '.join(names)}")
    return chosen
