"""The shared parts of the PrismerLM recipes: collator, generated texts, trainer and model card."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from torch.nn import functional
from tqdm import tqdm
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from feature_cache import FeatureCache
from model_card import results_section
from modeling_prismer import DataCollatorForPrismerLM, PrismerLMForConditionalGeneration
from modeling_prismer.processing.prompts import NOT_LEARNED
from training import Rows, TextTrainer


BACKBONES = ("model.language_model.", "model.vision_encoders.")


class RecipeCollator(DataCollatorForPrismerLM):
    """
    Puts captions and questions into the prompts of the processor, and takes encoded images from a cache.

    Attributes:
        features ([`FeatureCache`], *optional*): patch features of the images, in place of pixels.
        encoded_names (`tuple[str]`): beginnings of the names of the tensors that the features replace.
    """

    features: FeatureCache | None = None
    encoded_names: tuple[str, ...] = ("pixel_values",)

    def __call__(self, rows):
        return super().__call__([self.with_prompts(row) for row in rows])

    def with_prompts(self, row: dict[str, Any]) -> dict[str, Any]:
        row = {name: value for name, value in row.items() if name not in ("weight", "task")}
        if "messages" in row:
            return row
        text, suffix = row.get("text"), row.get("suffix")
        if text is None:
            prompt = self.processor.prompt_for("caption")
            row["text"] = [prompt] * len(suffix) if isinstance(suffix, list) else prompt
        else:
            row["text"] = list(map(self.prompt_for, text)) if isinstance(text, list) else self.prompt_for(text)
        return row

    def prompt_for(self, question: str) -> str:
        return self.processor.prompt_for("vqa", question.strip())

    def _collate(self, rows):
        batch = super()._collate(rows)
        if self.features is None:
            return batch
        ids = [name for row in rows for name in row.get("image_ids", [row.get("image_id")])]
        batch = {name: tensor for name, tensor in batch.items() if not name.startswith(self.encoded_names)}
        return {**batch, "patch_features": self.features(ids)} if ids else batch


# ---- generated texts ----


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of rows in batches of about `size` prompts. All rows of a batch have equally many."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for length, group in groupby(order, key=lambda number: lengths[number]):
        numbers, each = list(group), max(1, size // max(1, length))
        yield from (numbers[start : start + each] for start in range(0, len(numbers), each))


@torch.no_grad()
def generate_texts(
    model: PrismerLMForConditionalGeneration,
    collator: DataCollatorForPrismerLM,
    row_of: Callable[[int], dict[str, Any]],
    lengths: Sequence[int],
    batch_size: int,
    **generation: Any,
) -> list[list[str]]:
    """
    The model's texts for rows that may have several prompts each. An image is encoded once for all of them.

    Args:
        row_of (`Callable`): from a number to a row of the collator.
        lengths (`list[int]`): the number of prompts of each row.
        batch_size (`int`): the number of prompts in a batch.
        generation: arguments of `generate`.

    Returns:
        `list[list[str]]`: the texts for each row.
    """
    model.eval()
    state = PartialState()
    batches = list(batches_by_length(lengths, batch_size))[state.process_index :: state.num_processes]
    found: list[tuple[int, list[str]]] = []
    for numbers in tqdm(batches, desc="generating", leave=False, disable=not state.is_main_process):
        inputs = collator([row_of(number) for number in numbers])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        generated = model.generate(**inputs, do_sample=False, **generation)
        texts = collator.processor.post_process_generation(generated, inputs["input_ids"].shape[1])
        each = len(texts) // len(numbers)
        found += [(number, texts[place * each : (place + 1) * each]) for place, number in enumerate(numbers)]
    if state.num_processes > 1:
        found = gather_object(found)
    return [texts for _, texts in sorted(found)]


def tidy_answer(text: str) -> str:
    """An answer in the form of the data: the first line in lower case, without a full stop."""
    return (text.strip().splitlines() or [""])[0].strip().rstrip(".").lower()


# ---- the trainer ----


def with_learned_logits(inputs: dict[str, Any]) -> dict[str, Any]:
    """Has logits computed where a row learns the next token only. The head is a fifth of a small language model."""
    next_tokens = functional.pad(inputs["labels"][:, 1:], (0, 1), value=NOT_LEARNED)
    places = (next_tokens != NOT_LEARNED).any(dim=0).nonzero().flatten()
    return {**inputs, "shift_labels": next_tokens[:, places], "logits_to_keep": places}


@dataclass
class CardFacts:
    """
    Facts for the model card that are not in the configuration.

    Args:
        language_id (`str`, *optional*): Hub id of a language model that was loaded from a folder.
        vision_ids (`list[str]`): Hub ids of vision encoders that were loaded from folders.
        prompt (`str`): a prompt as those of the training.
        is_chat (`bool`): whether the prompts are turns of a conversation.
        training (`str`): a sentence about the training.
    """

    language_id: str | None = None
    vision_ids: list[str] = field(default_factory=list)
    prompt: str = "What is this?"
    is_chat: bool = True
    training: str = ""


class LmTrainer(TextTrainer):
    """
    A [`TextTrainer`] with the loss of the language model, a mean over tokens. It saves the trained weights alone.

    Args:
        generation (`dict`): arguments of `generate` in evaluation.
        read_text (`Callable`): gives a generated text the form in which it is measured.
        facts ([`CardFacts`]): for the model card.
        args, kwargs: as those of [`TextTrainer`].
    """

    def __init__(self, *args, generation: dict[str, Any], read_text: Callable[[str], str], facts: CardFacts, **kwargs):
        super().__init__(*args, **kwargs)
        self.generation = generation
        self.read_text = read_text
        self.facts = facts
        if self.is_fsdp_enabled:
            raise SystemExit("PrismerLM's recipes train on several GPUs by DDP: accelerate_configs/ddp.yaml")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.accelerator.unwrap_model(model).config.has_vision_language_model:
            inputs = with_learned_logits(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def predict_texts(self, dataset: Rows) -> list[str]:
        columns = dataset.with_format(None)
        groups: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(columns["image_id"][:]):
            groups[name].append(number)
        of_image = list(groups.values())
        questions = columns["text"][:] if "text" in columns.column_names else None

        def row_of(image: int) -> dict[str, Any]:
            first = dataset[of_image[image][0]]
            row = {"image": first["image"], "image_id": first["image_id"]}
            return row if questions is None else {**row, "text": [questions[number] for number in of_image[image]]}

        lengths = [1 if questions is None else len(numbers) for numbers in of_image]
        with self.accelerator.autocast():
            texts = generate_texts(
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
                self.eval_collator,
                row_of,
                lengths,
                self.args.eval_batch_size,
                **self.generation,
            )
        predictions = [""] * len(dataset)
        for numbers, own in zip(of_image, texts):
            for number, text in zip(numbers, own if questions is not None else own * len(numbers)):
                predictions[number] = self.read_text(text)
        return predictions

    def create_model_card(self, **kwargs) -> None:
        write_model_card(self.args.output_dir, self.accelerator.unwrap_model(self.model), self.facts, self.metrics)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, trained_only=True)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Checkpoints lack the frozen weights."""

    def publish(self, folder: str) -> None:
        """Writes the trained weights in half precision, without paths of this machine, with the processor."""
        model = self.accelerator.unwrap_model(self.model)
        entries = [model.config.backbones["language"], *model.config.backbones["vision"]]
        own_ids = [entry["id"] for entry in entries]
        for entry, public_id in zip(entries, public_ids(model, self.facts)):
            entry["id"] = public_id
        try:
            model.save_pretrained(folder, trained_only=True)
        finally:
            for entry, own_id in zip(entries, own_ids):
                entry["id"] = own_id
        path = Path(folder, SAFE_WEIGHTS_NAME)
        half = {name: own.half() if own.is_floating_point() else own for name, own in load_file(path).items()}
        save_file(half, path, metadata={"format": "pt"})
        self.processing_class.save_pretrained(folder)
        write_model_card(folder, model, self.facts, self.metrics)


# ---- the model card ----


def public_ids(model: PrismerLMForConditionalGeneration, facts: CardFacts) -> list[str]:
    """Ids of the language model and the vision encoders. A folder without one is called by its name."""
    backbones = model.config.backbones
    own_ids = [backbones["language"]["id"], *(entry["id"] for entry in backbones["vision"])]
    given = [facts.language_id, *facts.vision_ids] + [None] * len(own_ids)
    return [public or (Path(own).name if os.path.isdir(own) else own) for own, public in zip(own_ids, given)]


CARD = """\
# {name}

A PrismerLM: frozen vision encoders and experts in front of a language model ([Prismer](https://arxiv.org/abs/2303.02506)). This folder has the trained weights alone. The backbones are loaded by their ids, or given as `language=…` and `vision=…`.

| part | |
| --- | --- |
| language model | {language} |
| vision encoders | {vision} |
| experts | {experts} |
| fusion | {fusion} |
| trained weights | {trained:.2f} million |

## Use

```python
from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor

processor = PrismerLMProcessor.from_pretrained("{name}")
model = PrismerLMForConditionalGeneration.from_pretrained("{name}")

{call}
generated = model.generate(**inputs, max_new_tokens=30)
print(processor.post_process_generation(generated, inputs["input_ids"].shape[1])[0])
```
"""  # noqa: E501
CHAT_CALL = """\
messages = [{{"role": "user", "content": {prompt}}}]
inputs = processor.apply_chat_template(
    messages, images=["image.png"], add_generation_prompt=True, tokenize=True, return_dict=True
)"""


def write_model_card(
    folder: str | Path, model: PrismerLMForConditionalGeneration, facts: CardFacts, metrics: dict[str, float]
) -> None:
    """Writes README.md: base models, experts, how to load it, and what was measured."""
    config, (language, *vision) = model.config, public_ids(model, facts)
    adapter = config.backbones["language"].get("adapter")
    how = "frozen"
    if adapter:
        how = f"with {'DoRA' if adapter.get('use_dora') else 'LoRA'} of rank {adapter.get('r', 8)}"
    prompt = json.dumps(f"<image>{facts.prompt}")
    trained = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not name.startswith(BACKBONES)
    )
    card = CARD.format(
        name=Path(folder).resolve().name,
        language=f"{language}, {how}",
        vision=", ".join(vision) or "none",
        experts=f"{', '.join(config.expert_names)}, as {config.experts_as}" if config.expert_names else "none",
        fusion=config.fusion,
        trained=trained / 1e6,
        call=CHAT_CALL.format(prompt=prompt) if facts.is_chat else f'inputs = processor("image.png", {prompt})',
    )
    if facts.training:
        card += f"\n## Training\n\n{facts.training}\n"
    card += results_section(metrics)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[name for name in (language, *vision) if "/" in name] or None,
        tags=["prismer", "prismer_lm"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card}").save(Path(folder, "README.md"))
