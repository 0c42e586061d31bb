"""`prismer verify`: checks a checkpoint with its experts on images, above all after a conversion."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_prismer.expert_spec import BACKGROUND, ExpertSpec
from modeling_prismer.modeling_prismer import PrismerForConditionalGeneration
from modeling_prismer.processing.expert_labels import label_parts
from modeling_prismer.processing.experts import ClipTextFeatures
from modeling_prismer.processing.tasks import find_task

from .class_tables import difference_of_names, fault_of_order, fault_of_table, other_spellings, possible_orders
from .convert_checkpoint import CLIP_PCA
from .stem_inputs import FAMILIAR, MIN_IMAGES, examine_stem


QUESTION = "What is in the image?"
BATCH_SIZE = 8


@dataclass
class Check:
    """
    The result of one check.

    Args:
        name (`str`): what was checked.
        holds (`bool`, *optional*): whether it is right; `None` if it could not be checked.
        detail (`str`): the figures, or what is wrong and the likely cause.

    Example:

    ```python
    >>> from modeling_prismer.conversion import Check

    >>> Check("edge: maps", holds=False, detail="its maps are inverted").holds
    False
    ```
    """

    name: str
    holds: bool | None
    detail: str


@dataclass
class Verification:
    """
    The result of [`verify_model`].

    Args:
        checks (`list[Check]`): each with its `name`, whether it `holds` (`None`: could not be checked), and `detail`.
        texts (`dict[str, str]`): the caption or answer of each image, to be read by you.

    Example:

    ```python
    >>> from modeling_prismer.conversion import Check, Verification

    >>> found = Verification([Check("weights", True, "all finite"), Check("edge: maps", False, "inverted")])
    >>> [check.name for check in found.problems]
    ['edge: maps']
    ```
    """

    checks: list[Check] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if check.holds is False]


def verify_model(
    model: PrismerForConditionalGeneration,
    processor: Any,
    images: Mapping[str, Image.Image],
    expert_labels: Sequence[Mapping[str, Any]] | None = None,
    question: str = QUESTION,
) -> Verification:
    """
    Checks a trained model and its processor on images: their settings, each expert, its maps and its class table, and
    the texts.

    The maps of an expert are compared with those of the training: the BatchNorms of its stem have recorded their means
    and variances. If they differ, known faults are undone in turn to find the cause: inverted maps, swapped channels
    or signs, values that are not normalised, classes in another order, features or vectors of another size.

    Args:
        model ([`PrismerForConditionalGeneration`]): the model.
        processor ([`PrismerProcessor`]): its processor.
        images (`dict[str, PIL.Image.Image]`):
            Images by name, like those of the training: at least 4, better 16 or more.
        expert_labels (`list[dict]`, *optional*):
            Labels for each image, in place of live experts; see [`PrismerProcessor.__call__`].
        question (`str`, *optional*, defaults to `"What is in the image?"`): the text for a model that needs one.

    Returns:
        [`Verification`]: `checks`, `problems`, and the `texts` of the images.

    Raises:
        ValueError: if there are no images.

    Example:

    ```python
    >>> from modeling_prismer.conversion import verify_model

    >>> found = verify_model(model, processor, {f"image {number}": image for number in range(4)})
    >>> found.texts["image 0"]
    'triangle'
    >>> {check.name: check.holds for check in found.checks}["image"]
    True
    ```
    """
    if not images:
        raise ValueError("images is empty; at least 4 images are needed, better 16")
    opened = list(images.values())
    labels, failures = _run_experts(processor, opened, expert_labels)
    inputs = processor.image_processor(opened, labels, return_tensors="pt")
    found = Verification([_check_weights(model), _check_image(model, processor, inputs["pixel_values"])])
    found.checks += [_check_text(model, processor), _check_experts(model, processor)]
    for index, spec in enumerate(model.config.expert_specs):
        if spec.name in failures:
            found.checks.append(Check(spec.name, False, f"the expert does not run: {failures[spec.name]}"))
            continue
        of_expert = [label.get(spec.name) for label in labels]
        class_names = _class_names(processor, spec.name)
        found.checks += _check_classes(model, processor, spec, of_expert, class_names)
        present = inputs["expert_mask"][:, index]
        own = {
            suffix: inputs[f"{spec.name}_{suffix}"][present]
            for suffix in ("values", "ids", "classes", "features")
            if f"{spec.name}_{suffix}" in inputs
        }
        found.checks.append(_check_maps(model, spec, own, int(present.sum()), class_names))
    texts = _texts(model, processor, opened, labels, question)
    found.texts = dict(zip(images, texts))
    found.checks.append(_check_texts(texts))
    return found


# ---- experts ----


def _run_experts(
    processor: Any, images: list[Image.Image], given: Sequence[Mapping[str, Any]] | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The labels of all experts for each image, and by expert the reason why it does not run."""
    labels: list[dict[str, Any]] = [dict(known) for known in given] if given is not None else [{} for _ in images]
    failures: dict[str, str] = {}
    done: list[str] = []
    for name in [expert["name"] for expert in processor.image_processor.experts]:
        known = [{each: own[each] for each in (*done, name) if each in own} for own in labels]
        try:
            found = processor.run_experts(images, known, experts=[*done, name])
        except Exception as error:  # an expert can fail in any way, and the others are to be checked
            failures[name] = " ".join(str(error).split())
            found = [{}] * len(images)
        else:
            done.append(name)
        for own, new in zip(labels, found):
            own[name] = new.get(name)
    return labels, failures


def _class_names(processor: Any, name: str) -> list[str] | None:
    suite = processor.experts
    if suite is None or name not in suite:
        return None
    try:
        return getattr(suite[name], "class_names", None)
    except Exception:  # its configuration is not available
        return None


# ---- settings ----


def _check_weights(model: PrismerForConditionalGeneration) -> Check:
    name = "weights"
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return Check(name, False, f"{key} has numbers that are not finite")
    return Check(name, True, f"{model.num_parameters() / 1e6:,.1f} million, all finite")


def _check_image(model: PrismerForConditionalGeneration, processor: Any, pixel_values: torch.Tensor) -> Check:
    settings, side = processor.image_processor, model.config.vision_config.image_size
    low, high = pixel_values.min().item(), pixel_values.max().item()
    between = f"pixel values from {low:.3g} to {high:.3g}"
    size = (settings.size["height"], settings.size["width"])
    if max(-low, high) > 10:
        wrong = f"{between} in place of about -2 to 3: they are not normalised (do_rescale, do_normalize)"
    elif 0 <= low and high <= 1 and high > 0:
        wrong = f"{between} in place of about -2 to 3: mean and deviation are not removed (do_normalize)"
    elif size != (side, side):
        wrong = f"the processor resizes to {size[0]}×{size[1]}, the network reads {side}×{side}"
    elif not np.allclose((*settings.image_mean, *settings.image_std), (*OPENAI_CLIP_MEAN, *OPENAI_CLIP_STD)):
        wrong = f"image_mean {settings.image_mean} and image_std {settings.image_std} are not those of CLIP"
    else:
        return Check("image", True, f"{side}×{side}, {between}")
    return Check("image", False, wrong)


def _check_text(model: PrismerForConditionalGeneration, processor: Any) -> Check:
    tokenizer, config = processor.tokenizer, model.config
    if len(tokenizer) > config.vocab_size:
        return Check("text", False, f"{len(tokenizer)} tokens, but the network knows {config.vocab_size}")
    for token in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if getattr(tokenizer, token) != getattr(config, token):
            detail = f"{token} is {getattr(tokenizer, token)} in the tokenizer, {getattr(config, token)} in the config"
            return Check("text", False, detail)
    for task in (processor.task, *(processor.tasks or ())):
        find_task(task)
    return Check("text", True, f"{len(tokenizer):,} tokens, task {processor.task}")


def _check_experts(model: PrismerForConditionalGeneration, processor: Any) -> Check:
    ours, theirs = (
        model.config.expert_specs,
        [ExpertSpec.from_dict(each) for each in processor.image_processor.experts],
    )
    if [spec.name for spec in ours] != [spec.name for spec in theirs]:
        names = (", ".join(spec.name for spec in specs) or "none" for specs in (ours, theirs))
        return Check("experts", False, "the network has {}, the processor {}".format(*names))
    for spec, other in zip(ours, theirs):
        if different := spec.difference(other):
            values = getattr(spec, different), getattr(other, different)
            detail = f"{different} of {spec.name} is {values[0]} in the network, {values[1]} in the processor"
            return Check("experts", False, detail)
    return Check("experts", True, ", ".join(spec.name for spec in ours) or "none")


# ---- one expert ----


def _check_classes(
    model: PrismerForConditionalGeneration,
    processor: Any,
    spec: ExpertSpec,
    labels: list[Any],
    class_names: list[str] | None,
) -> Iterator[Check]:
    """Checks the table of an expert's classes, or the encoder of its words."""
    if not spec.is_label:
        return
    if spec.num_classes is None:
        yield _check_words(model, processor, spec)
        return
    names = None if spec.class_names is None else list(spec.class_names)
    stem = model.model.vision_model.expert_stems[spec.name]
    features, background = stem.class_features[:-1].float(), stem.class_features[-1].float()
    wrong = fault_of_table(features, background, names)
    encoder = _word_encoder(processor)
    detail = f"{len(features)} rows"
    if wrong is None and names is not None and isinstance(encoder, ClipTextFeatures):
        try:
            wrong = fault_of_order(features, names, encoder)
            detail += ", each with the features of its name"
        except Exception as error:  # the text encoder is not available, or of another size
            detail += f"; not compared with CLIP's features of the names: {' '.join(str(error).split())[:100]}"
    yield Check(f"{spec.name}: table", wrong is None, wrong or detail)

    name = f"{spec.name}: classes"
    seen = _most_seen(spec, labels, names)
    if names is None:
        yield Check(name, None, f"the table has no names. {seen}")
    elif class_names is None:
        yield Check(name, None, f"the expert has no class names to compare with. {seen}")
    elif wrong := difference_of_names(names, class_names):
        yield Check(name, False, wrong)
    else:
        spelt = other_spellings(names, class_names)
        others = f"{spelt} of them spelt differently; " if spelt else ""
        yield Check(name, True, f"{len(names)} names in the order of the table, {others}{seen}")


def _most_seen(spec: ExpertSpec, labels: list[Any], names: list[str] | None) -> str:
    """The three classes with the most pixels, or of the most instances."""
    counts: Counter[int] = Counter()
    for label in labels:
        if label is None:
            continue
        parts = label_parts(label, spec.is_dense)
        classes = np.asarray(parts["classes"] if spec.instances else parts["ids"]).ravel()
        counts.update(classes[classes != BACKGROUND].tolist())
    known = [
        names[number] if names and number < len(names) else f"class {number}" for number, _ in counts.most_common(3)
    ]
    return f"seen most: {', '.join(known) or 'nothing'}"


def _word_encoder(processor: Any) -> Any:
    suite = processor.experts
    encoders = [getattr(expert, "word_features", None) for expert in (suite or {}).values()]
    return next((encoder for encoder in encoders if encoder is not None), None)


def _check_words(model: PrismerForConditionalGeneration, processor: Any, spec: ExpertSpec) -> Check:
    name, analysis = f"{spec.name}: words", Path(model.name_or_path) / f"{CLIP_PCA}.safetensors"
    suite = processor.experts
    encoder = None if suite is None or spec.name not in suite else getattr(suite[spec.name], "word_features", None)
    if encoder is None:
        return Check(name, None, "no live expert encodes words")
    if not analysis.is_file():
        return Check(name, None, f"encoded by {type(encoder).__name__}; the training's encoder is not known")
    if not isinstance(encoder, ClipTextFeatures):
        return Check(
            name,
            False,
            f"encoded by {type(encoder).__name__}; the checkpoint was trained with CLIP's features: "
            f"RapidOcrText(ClipTextFeatures(pca={str(analysis)!r}))",
        )
    own, trained = load_file(encoder.pca), load_file(analysis)
    if any(not torch.equal(own[part], trained[part]) for part in ("mean", "components")):
        return Check(name, False, f"the analysis {encoder.pca} is not that of the checkpoint, {analysis}")
    return Check(name, True, "encoded by CLIP with the analysis of the checkpoint")


def _check_maps(
    model: PrismerForConditionalGeneration,
    spec: ExpertSpec,
    inputs: dict[str, torch.Tensor],
    number: int,
    class_names: list[str] | None,
) -> Check:
    """Compares an expert's maps with those of the training."""
    name, stem = f"{spec.name}: maps", model.model.vision_model.expert_stems[spec.name]
    if any((norm.running_mean == 0).all() and (norm.running_var == 1).all() for norm in stem.norms):
        return Check(name, False, "the stem was never trained: its BatchNorms have no statistics")
    if number == 0:
        return Check(name, False, "no image has a label")
    if number < MIN_IMAGES:
        return Check(name, None, f"{number} images are too few to compare; give at least {MIN_IMAGES}, better 16")
    device = stem.projection.weight.device
    inputs = {suffix: tensor.to(device) for suffix, tensor in inputs.items()}
    table = None if spec.class_names is None else list(spec.class_names)
    finding = examine_stem(stem, spec, inputs, possible_orders(table, class_names))
    usual = f"distance {finding.distance:.3f} from the training's; {FAMILIAR + finding.noise:.3f} is usual"
    if finding.cause is None:
        return Check(name, True, usual)
    mended = "" if finding.mended is None else f" ({finding.mended:.3f} without this fault)"
    return Check(name, False, f"{finding.cause}. {usual[0].upper()}{usual[1:]}{mended}")


# ---- texts ----


@torch.inference_mode()
def _texts(
    model: PrismerForConditionalGeneration,
    processor: Any,
    images: list[Image.Image],
    labels: list[dict[str, Any]],
    question: str,
) -> list[str]:
    """A caption or an answer for each image; none for a checkpoint that only ranks."""
    task = find_task(processor.task_for(None))
    if task.is_ranked:
        return []
    texts: list[str] = []
    for start in range(0, len(images), BATCH_SIZE):
        some = slice(start, start + BATCH_SIZE)
        text = question if task.prompt is None else None
        inputs = processor(images[some], text, expert_labels=labels[some], task=task.name).to(model.device)
        generated = model.generate(**inputs, do_sample=False)
        texts += processor.post_process_generation(generated, inputs["input_ids"].shape[1], task=task.name)
    return texts


def _check_texts(texts: list[str]) -> Check:
    if not texts:
        return Check("texts", None, "the checkpoint ranks texts and generates none")
    if empty := texts.count(""):
        return Check("texts", False, f"{empty} of {len(texts)} are empty")
    if len(texts) >= MIN_IMAGES and len(set(texts)) == 1:
        return Check("texts", False, f"every image gets the same text: {texts[0]!r}")
    return Check("texts", True, f"{len(set(texts))} different texts for {len(texts)} images; read them below")
