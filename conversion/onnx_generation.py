"""
Runs a Prismer that `export_onnx` has written on onnxruntime.

This file needs only NumPy and onnxruntime. It can be copied to a place without torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import onnxruntime

NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
INTEGER_TYPES = ("tensor(uint8)", "tensor(int64)")
BACKGROUND = 255  # in a map of ids; negative ids are background too


class OnnxPrismer:
    """
    An exported Prismer. It has greedy generation, and logits for other uses.

    Args:
        folder (`str` or `Path`):
            The folder that `export_onnx` or `prismer export` wrote.
        providers (`list`, *optional*, defaults to `["CPUExecutionProvider"]`):
            The execution providers; see onnxruntime.
        session_options (`onnxruntime.SessionOptions`, *optional*):
            Number of threads and the like.

    Example:

    ```python
    >>> from modeling_prismer.conversion import OnnxPrismer

    >>> runtime = OnnxPrismer("onnx")  # the folder that `export_onnx` wrote
    >>> inputs = processor(images=image, text="What color is the shape?", return_tensors="np")
    >>> generated = runtime.generate(**inputs)
    >>> processor.post_process_generation(generated, inputs["input_ids"].shape[1])
    ['teal']
    ```
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        session_options: onnxruntime.SessionOptions | None = None,
    ):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("onnxruntime is needed: pip install 'modeling-prismer[export]'") from error

        folder = Path(folder)
        for name in ("encoder.onnx", "decoder.onnx", "config.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; `prismer export` writes such a folder")
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        generation = folder / "generation_config.json"
        self.generation_config = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
        self.experts = [expert["name"] for expert in self.config["vision_config"]["experts"] or ()]
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(folder / name), session_options, providers=list(providers))
            for name in ("encoder.onnx", "decoder.onnx")
        )
        self.image_inputs = {node.name: node for node in self.encoder.get_inputs()}
        text = self.config["text_config"]
        self.max_length = text["max_position_embeddings"] - text["pad_token_id"] - 1
        ends = self.generation_config.get("eos_token_id", self.config["eos_token_id"])
        self.eos_token_ids = ends if isinstance(ends, list) else [ends]
        self.pad_token_id = self.config["pad_token_id"]

    def encode(self, expert_mask: np.ndarray | None = None, **image_inputs: np.ndarray) -> dict[str, np.ndarray]:
        """
        Encodes images and their expert labels once, for any number of questions.

        Args:
            expert_mask (`np.ndarray` of shape `(images, number of experts)`, bool, *optional*):
                Which experts each image has; by default all. The tensors of an expert that no image has may be left
                out.
            image_inputs:
                `pixel_values` and the experts' tensors, as the processor returns them (`return_tensors="np"`, or
                torch's on the CPU).

        Returns:
            `dict[str, np.ndarray]`: the outputs of `encoder.onnx` by name, for `generate` or `forward`.

        Raises:
            ValueError: if an input is unknown, does not fit, or is missing and not masked out.
        """
        feed = {key: self._array(key, array) for key, array in image_inputs.items() if array is not None}
        if "pixel_values" not in feed:
            raise ValueError("pixel_values is missing")
        images = len(feed["pixel_values"])
        if self.experts:
            given = np.ones((images, len(self.experts)), bool) if expert_mask is None else expert_mask
            feed["expert_mask"] = self._array("expert_mask", given)
            for key in self.image_inputs.keys() - feed.keys():
                column = feed["expert_mask"][:, self.experts.index(key.rpartition("_")[0])]
                if column.any():
                    raise ValueError(f"{key} is missing, and expert_mask does not mask its expert out")
                shape = [size if isinstance(size, int) else 1 for size in self.image_inputs[key].shape]
                feed[key] = np.zeros((images, *shape[1:]), NUMPY_TYPES[self.image_inputs[key].type])
        elif expert_mask is not None and np.size(expert_mask):
            raise ValueError("expert_mask given, but this model has no experts")
        names = [node.name for node in self.encoder.get_outputs()]
        return dict(zip(names, self.encoder.run(names, feed)))

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        encoded: dict[str, np.ndarray],
        past: dict[str, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """
        Computes the logits of a prompt, or of the tokens that follow `past`.

        Args:
            input_ids (`np.ndarray` of shape `(rows, length)`):
                The number of rows is a multiple of the number of images; the rows of an image are adjacent.
            attention_mask (`np.ndarray` of shape `(rows, past_length + length)`):
                0 for padding, also for the tokens in `past`.
            encoded (`dict[str, np.ndarray]`):
                The output of `encode`.
            past (`dict[str, np.ndarray]`, *optional*):
                The second output of this method for the tokens before.

        Returns:
            Logits `(rows, length, vocabulary)`, and keys and values by the name of the input that takes them.
        """
        rows, images = len(input_ids), len(encoded["last_hidden_state"])
        if rows % images:
            raise ValueError(f"{rows} rows of text for {images} images; as many, or a multiple, is needed")
        if attention_mask.shape[1] > self.max_length:
            raise ValueError(f"{attention_mask.shape[1]} tokens; this model takes at most {self.max_length}")
        feed = {"input_ids": np.asarray(input_ids, np.int64), "attention_mask": np.asarray(attention_mask, np.int64)}
        for node in self.decoder.get_inputs():
            if ".encoder." in node.name:
                feed[node.name] = encoded[node.name]
            elif ".decoder." in node.name:
                _, heads, _, head_dim = node.shape
                empty = np.zeros((rows, heads, 0, head_dim), NUMPY_TYPES[node.type])
                feed[node.name] = empty if past is None else past[node.name]
        names = [node.name for node in self.decoder.get_outputs()]
        logits, *present = self.decoder.run(names, feed)
        return logits, {name.replace("present", "past_key_values"): array for name, array in zip(names[1:], present)}

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        max_new_tokens: int | None = None,
        encoded: dict[str, np.ndarray] | None = None,
        **image_inputs: np.ndarray,
    ) -> np.ndarray:
        """
        Generates greedily, like `model.generate(num_beams=1, do_sample=False)`.

        Args:
            input_ids (`np.ndarray` of shape `(rows, length)`):
                Prompts, padded on the left.
            attention_mask (`np.ndarray` of shape `(rows, length)`, *optional*):
                0 for padding; by default 0 at every `pad_token_id`.
            max_new_tokens (`int`, *optional*):
                By default the value in generation_config.json, else 20. The minimum length always comes from there.
            encoded (`dict[str, np.ndarray]`, *optional*):
                The output of `encode`, in place of `image_inputs`.
            image_inputs:
                As in `encode`.

        Returns:
            `np.ndarray` of shape `(rows, length + new)`, int64: prompt and continuation, padded on the right.

        Raises:
            ValueError: if prompts are padded on the right or too long, and as in `encode`.
        """
        if encoded is None:
            encoded = self.encode(**image_inputs)
        elif image_inputs:
            raise ValueError(f"give encoded or {', '.join(image_inputs)}, not both")
        sequences = np.asarray(input_ids, np.int64)
        mask = sequences != self.pad_token_id if attention_mask is None else attention_mask
        mask = np.asarray(mask, np.int64)
        if not mask[:, -1].all():
            raise ValueError("the prompts are padded on the right; generate needs them padded on the left")
        shortest, longest = self._lengths(sequences.shape[1], max_new_tokens)

        is_unfinished = np.ones(len(sequences), bool)
        tokens, past = sequences, None
        while sequences.shape[1] < longest:
            logits, past = self.forward(tokens, mask, encoded, past)
            logits = logits[:, -1]
            if sequences.shape[1] < shortest:
                logits[:, self.eos_token_ids] = -np.inf
            tokens = np.where(is_unfinished, logits.argmax(-1), self.pad_token_id)[:, None]
            sequences = np.concatenate([sequences, tokens], axis=1)
            mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)
            is_unfinished &= ~np.isin(tokens[:, 0], self.eos_token_ids)
            if not is_unfinished.any():
                break
        return sequences

    def _lengths(self, prompt_length: int, max_new_tokens: int | None) -> tuple[int, int]:
        """The smallest and the largest number of tokens, including the prompt."""
        config = self.generation_config
        shortest, longest = config.get("min_length") or 0, config.get("max_length") or prompt_length + 20
        if config.get("min_new_tokens") is not None:
            shortest = prompt_length + config["min_new_tokens"]
        if max_new_tokens is None:
            max_new_tokens = config.get("max_new_tokens")
        if max_new_tokens is not None:
            longest = prompt_length + max_new_tokens
        if longest <= prompt_length:
            raise ValueError(f"prompts of {prompt_length} tokens leave no room: max_length is {longest}")
        return shortest, longest

    def _array(self, key: str, array: Any) -> np.ndarray:
        node = self.image_inputs.get(key)
        if node is None:
            raise ValueError(f"{key} is not an input of this model; its inputs are {', '.join(self.image_inputs)}")
        array = np.asarray(array)
        if node.type in INTEGER_TYPES and array.dtype.kind not in "iub":
            raise ValueError(f"{key} is of the type {array.dtype}; an integer type is needed")
        if key.endswith("_ids") and array.dtype.kind == "i":
            array = np.where(array < 0, BACKGROUND, array.astype(np.int64))
        converted = array.astype(NUMPY_TYPES[node.type], copy=False)
        if array.dtype.kind in "iu" and not np.array_equal(converted, array):
            raise ValueError(f"{key} holds values from {array.min()} to {array.max()}; {node.type} takes fewer")
        if array.ndim != len(node.shape) or any(
            isinstance(wanted, int) and size != wanted for size, wanted in zip(array.shape, node.shape)
        ):
            raise ValueError(f"{key} has the shape {array.shape}; {tuple(node.shape)} is needed")
        return converted
