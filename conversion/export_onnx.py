"""Export to ONNX: one graph encodes images and expert labels, the other one decodes text."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache

from modeling_prismer.cache import CACHE_NAME, image_layer
from modeling_prismer.configuration_prismer import PrismerConfig
from modeling_prismer.expert_spec import read_specs
from modeling_prismer.modeling_prismer import PrismerForConditionalGeneration

from .output_folder import check_output_dir, written_whole


# The dynamic sizes. All other sizes are those of the model and of its processor.
IMAGE_AXES = {0: "images"}
TEXT_AXES = {0: "rows", 1: "length"}
MASK_AXES = {0: "rows", 1: "all_length"}
PAST_AXES = {0: "rows", 2: "past_length"}


class EncoderGraph(nn.Module):
    """Encodes images and projects them once to the keys and values of every decoder layer."""

    def __init__(self, model: PrismerForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        encoded = self.model.get_image_features(**inputs).last_hidden_state
        layers = [layer.cross_attn for layer in self.model.text_model.layers if layer.cross_attn is not None]
        return encoded, *(tensor for attention in layers for tensor in attention.project_keys_values(encoded))


class DecoderGraph(nn.Module):
    """Decodes any number of tokens after any number of earlier ones: a prompt or a step."""

    def __init__(self, model: PrismerForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
        cross: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(config=self.model.config.text_config)
        for index, (keys, values) in enumerate(past):
            cache.update(keys, values, index)
        for index, keys_values in enumerate(cross):
            image_layer(cache, index).cross_keys_values = keys_values
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, cache=cache, use_cache=True)
        present = outputs[CACHE_NAME].layers
        return outputs.logits, *(tensor for layer in present for tensor in (layer.keys, layer.values))


@torch.no_grad()
def export_onnx(
    model: PrismerForConditionalGeneration,
    processor: Any,
    output_dir: str | Path,
    *,
    opset_version: int | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes a model as two ONNX graphs in float32, with its configurations and processor. [`OnnxPrismer`] runs them
    without torch.

    - `encoder.onnx` takes `pixel_values`, every expert's tensors and `expert_mask`, as the processor returns them. It
      returns `last_hidden_state` (images, tokens, width) and `past_key_values.N.encoder.key` and `.value` (images,
      heads, tokens, head_dim). The number of images, and of instances or words in an image, is dynamic.
    - `decoder.onnx` takes `input_ids` (rows, length), `attention_mask` (rows, past_length + length), the encoder's
      keys and values, and `past_key_values.N.decoder.key` and `.value` (rows, heads, past_length, head_dim). It
      returns `logits` (rows, length, vocabulary) and `present.N.decoder.key` and `.value`. All these lengths are
      dynamic, and past_length is 0 for a prompt. The number of rows is a multiple of the number of images, and the
      rows of an image are adjacent.
    - `PrismerProcessor.from_pretrained(output_dir)` loads the processor.

    Args:
        model ([`PrismerForConditionalGeneration`]):
            The model, which is not changed. Merge adapters of peft into it first.
        processor ([`PrismerProcessor`] or [`PrismerImageProcessor`]):
            The processor of the same checkpoint. It gives the sizes of images and maps.
        output_dir (`str` or `Path`):
            The folder to write. If the export fails, it does not exist.
        opset_version (`int`, *optional*):
            Version of ONNX's operators; by default the one that torch recommends.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a Prismer in `output_dir`, with everything else in that folder.

    Returns:
        `Path`: the folder.

    Raises:
        ImportError: if the extra `export` is not installed.
        TypeError: if `model` is not a [`PrismerForConditionalGeneration`].
        ValueError: if the model is quantised, or if model and processor do not fit together.
        FileExistsError: if `output_dir` is a file, or is not empty.

    Example:

    ```python
    >>> from modeling_prismer.conversion import export_onnx

    >>> folder = export_onnx(model, processor, "onnx")
    >>> sorted(file.name for file in folder.glob("*.onnx"))
    ['decoder.onnx', 'encoder.onnx']
    ```
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs the extra 'export': pip install 'modeling-prismer[export]'") from error
    if not isinstance(model, PrismerForConditionalGeneration):
        raise TypeError(
            f"model is a {type(model).__name__}; a PrismerForConditionalGeneration is needed (for a model of peft: "
            "model.merge_and_unload())"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError("model is quantised; export the model before quantisation, and quantise the ONNX files")
    output_dir = check_output_dir(output_dir, overwrite)
    inputs = _sample_inputs(model, getattr(processor, "image_processor", processor))

    source = model
    model = copy.deepcopy(source).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # its mask is finite, so a row with only padding gives no NaN
    with written_whole(output_dir) as folder:
        _export_encoder(EncoderGraph(model), inputs, folder / "encoder.onnx", opset_version)
        _export_decoder(DecoderGraph(model), folder / "decoder.onnx", opset_version)
        source.config.save_pretrained(folder)
        source.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
    return output_dir


def _sample_inputs(model: PrismerForConditionalGeneration, image_processor: Any) -> dict[str, torch.Tensor]:
    """The processor's output for two blank images without labels."""
    config = model.config
    here, there = read_specs(image_processor.experts), config.expert_specs
    if len(here) != len(there) or any(spec.difference(other) for spec, other in zip(here, there)):
        names = [", ".join(spec.name for spec in specs) or "none" for specs in (here, there)]
        raise ValueError(
            f"the processor's experts ({names[0]}) differ in name or description from the model's ({names[1]})"
        )
    size, wanted = image_processor.size, config.vision_config.image_size
    if (size["height"], size["width"]) != (wanted, wanted):
        raise ValueError(
            f"the processor makes images of {size['width']}×{size['height']} pixels; the model takes {wanted}×{wanted}"
        )
    inputs = dict(image_processor([Image.new("RGB", (wanted, wanted))] * 2, return_tensors="pt"))
    if "expert_mask" in inputs:
        inputs["expert_mask"] = ~inputs["expert_mask"]
    for length, key in enumerate(_lists(config), start=11):
        # all dynamic sizes differ, because torch could export two equal ones as one
        inputs[key] = inputs[key].new_zeros(2, length, *inputs[key].shape[2:])
    return inputs


def _lists(config: PrismerConfig) -> list[str]:
    """The tensors with one entry for each instance or word of an image."""
    return [name for spec in config.expert_specs for name in spec.tensor_names[1:]]


def _export_encoder(
    graph: EncoderGraph, inputs: dict[str, torch.Tensor], path: Path, opset_version: int | None
) -> None:
    lists = _lists(graph.model.config)
    axes = {key: {**IMAGE_AXES, 1: f"num_{key}"} if key in lists else IMAGE_AXES for key in inputs}
    layers = len(graph.model.text_model.layers) - 1
    names = [f"past_key_values.{index}.encoder.{part}" for index in range(layers) for part in ("key", "value")]
    _export(
        graph, {"inputs": inputs}, {"inputs": axes}, list(inputs), ["last_hidden_state", *names], path, opset_version
    )


def _export_decoder(graph: DecoderGraph, path: Path, opset_version: int | None) -> None:
    config = graph.model.config
    heads = config.text_config.num_attention_heads
    head_dim = config.text_config.hidden_size // heads
    tokens = config.vision_config.image_size // config.vision_config.patch_size
    tokens = tokens**2 + (config.num_latents if config.experts else 0)
    layers = config.text_config.num_hidden_layers
    images, rows, length, past_length = 2, 6, 5, 7

    def keys_values(number: int, *shape: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(number)]

    arguments = {
        "input_ids": torch.full((rows, length), 3),
        "attention_mask": torch.ones(rows, past_length + length, dtype=torch.long),
        "past": keys_values(layers, rows, heads, past_length, head_dim),
        "cross": keys_values(layers - 1, images, heads, tokens, head_dim),
    }
    axes = {
        "input_ids": TEXT_AXES,
        "attention_mask": MASK_AXES,
        "past": [(PAST_AXES, PAST_AXES)] * layers,
        "cross": [(IMAGE_AXES, IMAGE_AXES)] * (layers - 1),
    }
    past = [f"{index}.decoder.{part}" for index in range(layers) for part in ("key", "value")]
    cross = [f"{index}.encoder.{part}" for index in range(layers - 1) for part in ("key", "value")]
    input_names = ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in past + cross)]
    output_names = ["logits", *(f"present.{name}" for name in past)]
    _export(graph, arguments, axes, input_names, output_names, path, opset_version)


def _export(
    graph: nn.Module,
    arguments: dict[str, Any],
    axes: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
    path: Path,
    opset_version: int | None,
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"# The axis name: \w+ will not be used")  # inputs share it
        program = torch.onnx.export(
            graph.eval(),
            kwargs=arguments,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset_version,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the places in the source, with paths of this machine
    program.save(str(path), external_data=True)  # weights of more than 2 GB need a file of their own
