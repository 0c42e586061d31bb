"""The model card of a trained Prismer: what it was trained from, its experts, how to use it, and what was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_prismer import PrismerProcessor
from modeling_prismer.pretrained import shipped_checkpoints
from modeling_prismer.processing.tasks import find_task


CARD = """\
# {name}

A Prismer ([arXiv 2303.02506](https://arxiv.org/abs/2303.02506)) for the task `{task}`, {origin}.

| part | |
| --- | --- |
| images | {size}×{size} pixels |
| experts | {experts} |
| weights | {weights:.1f} million, {trained:.1f} million of them trained |

## Use

```python
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor

processor = PrismerProcessor.from_pretrained("{name}")
model = PrismerForConditionalGeneration.from_pretrained("{name}")
{call}
```
"""
GENERATE = """\
inputs = processor(images="image.png", {text})
generated = model.generate(**inputs)
print(processor.post_process_generation(generated, inputs["input_ids"].shape[1]))"""
CLASSIFY = """\
print(model.classify(processor, "image.png", ["a class", "another class"]))"""


def write_model_card(
    folder: str | Path,
    model: Any,
    processor: PrismerProcessor,
    sources: Sequence[str],
    metrics: dict[str, float] | None = None,
) -> None:
    """
    Writes README.md, without paths of this machine.

    Args:
        folder (`str` or `Path`): the folder of the model.
        model ([`PrismerForConditionalGeneration`] or a `PeftModel` of it): the model.
        processor ([`PrismerProcessor`]): its processor.
        sources (`Sequence[str]`): where the model's weights came from: Hub ids, folders, or names of shipped ones.
        metrics (`dict`, *optional*): what was measured.
    """
    bases = base_models(sources)
    task = find_task(processor.task)
    names = [expert["name"] for expert in processor.image_processor.experts]
    text = 'text="What is in the image?"' if task.prompt is None else f"task={task.name!r}".replace("'", '"')
    parameters = list(model.parameters())
    adapters = getattr(model, "peft_config", {})
    card = CARD.format(
        name=Path(folder).resolve().name,
        task=task.name,
        origin=f"{'an adapter of' if adapters else 'trained from'} {_linked(bases, sources)}",
        size=processor.image_processor.size["height"],
        experts=", ".join(names) or "none",
        weights=sum(parameter.numel() for parameter in parameters) / 1e6,
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6,
        call=CLASSIFY if task.is_ranked else GENERATE.format(text=text),
    )
    card += results_section(metrics or {})
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=bases or None,
        tags=["prismer", *sorted({config.peft_type.value.lower() for config in adapters.values()})],
    )
    if adapters and bases:
        data.base_model_relation = "adapter"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card}").save(Path(folder, "README.md"))


def base_models(sources: Sequence[str]) -> list[str]:
    """The Hub ids of these checkpoints. A folder has those of its own model card."""
    ids: list[str] = []
    for source in sources:
        card = Path(source, "README.md")
        if card.is_file():
            listed = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model") or []
            ids += [listed] if isinstance(listed, str) else listed
        elif "/" in source and not Path(source).exists():
            ids.append(source)
    return [own for own in dict.fromkeys(ids) if is_hub_id(own)]


def is_hub_id(name: Any) -> bool:
    """Whether this can be the id of a model on the Hub, and is no folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def measured(metrics: dict[str, float], prefix: str = "eval_") -> dict[str, float]:
    """The metrics of an evaluation without times and speeds."""
    of_run = ("_runtime", "_per_second", "epoch")
    return {name.removeprefix(prefix): value for name, value in metrics.items() if not name.endswith(of_run)}


def results_section(metrics: dict[str, float]) -> str:
    """The section of a card with a table of metrics; empty without metrics."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return f"\n## Results\n\n| metric | value |\n| --- | --- |\n{rows}\n" if metrics else ""


def _linked(bases: Sequence[str], sources: Sequence[str]) -> str:
    shipped = [f"`{source}` of the package modeling-prismer" for source in sources if source in shipped_checkpoints()]
    linked = [f"[{own}](https://huggingface.co/{own})" for own in bases]
    return " and ".join([*linked, *shipped]) or ("a local checkpoint" if sources else "scratch")
