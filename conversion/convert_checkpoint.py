"""Strict conversion of a published checkpoint to a model of this package, and of a model to the published names."""

import copy
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_prismer.configuration_prismer import VARIANTS, PrismerConfig
from modeling_prismer.modeling_prismer import PrismerForConditionalGeneration
from modeling_prismer.processing.tasks import find_task

from .clip_pca import read_clip_pca
from .feature_tables import BACKGROUND_KEY, ClassTable, read_class_tables
from .original_names import EXPERT_NAMES, IGNORED_NAMES, POSITION_IDS, TIED_NAMES, original_names
from .output_folder import check_output_dir, written_whole
from .tensor_files import find_checkpoint, load_state_dict


logger = logging.get_logger(__name__)

PUBLISHED_IMAGE_SIZES = (224, 384, 480)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

TOKENIZERS = {768: "FacebookAI/roberta-base", 1024: "FacebookAI/roberta-large"}  # by the width of the text decoder

CLIP_PCA = "clip_pca"
_POSITIONS = "expert_encoder.positional_embedding"
_EMBEDDINGS = "model.text_model.embeddings.word_embeddings.weight"
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
MAX_DIFFERENT = 12  # a wrong width shows in every tensor


@torch.no_grad()
def convert_original_checkpoint(
    checkpoint: str | Path,
    config: PrismerConfig | str,
    output_dir: str | Path | None = None,
    feature_tables: Mapping[str, Any] | str | Path | None = None,
    *,
    image_size: int | None = None,
    task: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    overwrite: bool = False,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    experts: Any = None,
    model_card: str | None = None,
) -> PrismerForConditionalGeneration:
    """
    Reads a checkpoint with the published names into a [`PrismerForConditionalGeneration`].

    The conversion is strict. It uses every tensor of the checkpoint, except copies and constants, which it checks, and
    it fills every parameter of the model. It needs the memory of one checkpoint and one tensor.

    Args:
        checkpoint (`str` or `Path`):
            A file; a folder with a `pytorch_model.bin`; or a path on the Hub: `owner/name`, `owner/name/folder` or
            `owner/name/folder/file.bin`. Only tensors are unpickled.
        config ([`PrismerConfig`] or `str`):
            The network, or the name of one in the paper: `prismer_base`, `prismerz_base`, `prismer_large`,
            `prismerz_large`. It is not changed.
        output_dir (`str` or `Path`, *optional*):
            The folder for model, processor and tokenizer. It appears when it is complete.
        feature_tables (`dict`, `str` or `Path`, *optional*):
            The tables of class features, which are not in a checkpoint: the folder of the published tables, or
            another source that [`read_class_tables`] reads. [`class_features_from_names`] creates new tables. The
            names of the classes are saved in the configuration. A `clip_pca.pkl` in the folder is saved as
            `clip_pca.safetensors`, for the words of the text detector. A label expert without a table loses its
            `num_classes`, and the features of its ids must come with each sample.
        image_size (`int`, *optional*):
            Side of the image in pixels. If the checkpoint has another size, its position embeddings are resized as
            by `resize_position_embeddings`. By default the size in `config`, if it is a [`PrismerConfig`], or that of
            the checkpoint.
        task (`str`, *optional*):
            `"caption"`, `"zero_shot_caption"`, `"vqa"` or `"classification"`. Writes the task's generation settings
            into `generation_config`, and the task into the processor.
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*):
            A tokenizer to save, its folder or its Hub id. By default the tokenizer of the RoBERTa of this size. If it
            is not available, only the image processor is saved, with a warning.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            `float32`, `float16` or `bfloat16`; the checkpoint may have another type.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a Prismer in `output_dir`, with everything else in that folder.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            The largest size of a file of weights.
        experts ([`ExpertSuite`], `list[Expert]` or `str`, *optional*):
            The live experts to save with the processor.
        model_card (`str`, *optional*):
            The text of README.md in `output_dir`.

    Returns:
        [`PrismerForConditionalGeneration`] in evaluation mode, on the CPU.

    Raises:
        ValueError: if checkpoint and configuration do not fit, with a list of all missing, unused and different
            tensors; if the file has more than tensors; if a table or an argument does not fit.
        FileNotFoundError: if the checkpoint or a table does not exist, or cannot be downloaded.
        FileExistsError: if `output_dir` is not empty.

    Example:

    ```python
    >>> import torch
    >>> from modeling_prismer.conversion import convert_original_checkpoint, to_original_state_dict

    >>> torch.save(to_original_state_dict(model), "pytorch_model.bin")
    >>> converted = convert_original_checkpoint(  # of a published file: "prismer_base" and feature_tables="tables"
    ...     "pytorch_model.bin", model.config, "converted", task="vqa", tokenizer=processor.tokenizer
    ... )
    >>> torch.equal(converted.lm_head.dense.weight, model.lm_head.dense.weight)
    True
    ```
    """
    config, image_size = _read_config(config, image_size)
    dtype = _read_dtype(dtype)
    generation = {} if task is None else find_task(task).generation
    if output_dir is not None:
        output_dir = check_output_dir(output_dir, overwrite)
    tables, without_table = _set_tables(config, feature_tables)
    analysis = _find_analysis(feature_tables)
    path = find_checkpoint(checkpoint, revision)
    if output_dir is not None:  # last, because it takes long to fail without a connection
        loaded_tokenizer = _load_tokenizer(tokenizer, config)

    # The file is mapped first, so that a misfit is found before gigabytes are read.
    model = _empty_model(load_state_dict(path, mmap=True), config, path)
    _warn_about_tables(model.config, tables, without_table)
    _fill(model, load_state_dict(path), tables, dtype)
    if image_size is None:
        image_size = _published_image_size(model.config)
    if image_size != model.config.vision_config.image_size:
        model.resize_position_embeddings(image_size)
    model.generation_config.update(**generation)
    model.eval()
    if output_dir is not None:
        _save(model, output_dir, loaded_tokenizer, task, max_shard_size, analysis, experts, model_card)
    return model


def to_original_state_dict(model: PrismerForConditionalGeneration) -> dict[str, torch.Tensor]:
    """
    Returns the tensors of a model under the published names, including those that the published files hold twice.

    The published format has no tables of class features. `torch.save` of the result is a checkpoint for
    [`convert_original_checkpoint`].

    Args:
        model ([`PrismerForConditionalGeneration`]): the model.

    Returns:
        `dict[str, torch.Tensor]`: in the model's type. Packed projections are new tensors; the others are the model's.

    Example:

    ```python
    >>> from modeling_prismer.conversion import to_original_state_dict

    >>> tensors = to_original_state_dict(model)
    >>> tensors["expert_encoder.ln_pre.weight"].shape
    torch.Size([128])
    ```
    """
    ours = model.state_dict()
    state: dict[str, torch.Tensor] = {}
    thirds: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, source in original_names(model.config).items():
        if source.third is not None:
            thirds[source.name][source.third] = ours[name]
        else:
            state[source.name] = ours[name]
    for name, parts in thirds.items():
        state[name] = torch.cat([parts[third] for third in range(3)])
    for name, kept in TIED_NAMES.items():
        state[name] = state[kept]
    state[POSITION_IDS] = torch.arange(model.config.text_config.max_position_embeddings)[None]
    return state


def _read_config(config: PrismerConfig | str, image_size: int | None) -> tuple[PrismerConfig, int | None]:
    """Returns a copy of the configuration, and the final image size if one is given."""
    own = PrismerConfig.from_variant(config) if isinstance(config, str) else copy.deepcopy(config)
    if image_size is not None:
        own.vision_config.image_size = image_size
        own.vision_config.validate_architecture()
    return own, image_size if isinstance(config, str) else own.vision_config.image_size


def _read_dtype(dtype: torch.dtype | str) -> torch.dtype:
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; accepted are {', '.join(DTYPES)}")
    return dtype


def _set_tables(
    config: PrismerConfig, feature_tables: Mapping[str, Any] | str | Path | None
) -> tuple[dict[str, ClassTable], list[str]]:
    """Reads the tables and sets the classes accordingly. Also returns the experts without a table."""
    tables = {} if feature_tables is None else read_class_tables(feature_tables, config.experts)
    without = []
    for index, spec in enumerate(config.expert_specs):
        if spec.name in tables:
            table = tables[spec.name]
            config.experts[index] = spec.with_classes(len(table.features), table.class_names).to_dict()
        elif spec.num_classes:
            config.experts[index] = spec.with_classes(0).to_dict()
            without.append(spec.name)
    return tables, without


def _find_analysis(feature_tables: Mapping[str, Any] | str | Path | None) -> dict[str, torch.Tensor] | None:
    """Reads the published analysis of CLIP's embeddings, if it is next to the tables."""
    if not isinstance(feature_tables, str | Path):
        return None
    path = Path(feature_tables).expanduser() / f"{CLIP_PCA}.pkl"
    return read_clip_pca(path) if path.is_file() else None


def _warn_about_tables(config: PrismerConfig, tables: dict[str, ClassTable], without: list[str]) -> None:
    if without:
        logger.warning(
            f"No table of class features for {', '.join(without)}: the features of their ids have to come with each "
            f"sample (`{without[0]}_features`), or their painted maps (`{without[0]}_values`). If you have tables, "
            "convert again with `feature_tables`, or call `model.set_class_features(expert, table, background)`."
        )
    labels = [spec.name for spec in config.expert_specs if spec.is_label]
    if labels and not tables:
        logger.warning(
            f"No feature of the background for {', '.join(labels)}: it is zero, but published checkpoints were "
            "trained with another one. `feature_tables` has it as `background`."
        )


def _empty_model(
    tensors: dict[str, torch.Tensor], config: PrismerConfig, path: Path
) -> PrismerForConditionalGeneration:
    """
    Returns the model on the meta device, with as many position embeddings as the checkpoint has.

    Raises:
        ValueError: listing all differences between the checkpoint and the configuration.
    """
    positions = tensors.get(_POSITIONS)
    if positions is not None and positions.ndim == 2 and math.isqrt(len(positions)) ** 2 == len(positions) > 0:
        grid_size, patch_size = math.isqrt(len(positions)), config.vision_config.patch_size
        if config.vision_config.image_size // patch_size != grid_size:
            config.vision_config.image_size = grid_size * patch_size
    with torch.device("meta"):
        model = PrismerForConditionalGeneration(config)

    expected = original_tensors(model)
    known = {*expected, *tensors} - {*IGNORED_NAMES}
    lines = []
    if missing := [name for name in expected if name not in tensors]:
        lines += [f"missing in the checkpoint ({len(missing)}):", *_summarize(missing, known)]
    if left_over := [name for name in tensors if name in known and name not in expected]:
        lines += [f"left over in the checkpoint ({len(left_over)}):", *_summarize(left_over, known)]
    different = []
    for name, needed in expected.items():
        tensor = tensors.get(name, needed)
        if tensor.shape != needed.shape:
            different.append(f"  {name}: {tuple(tensor.shape)}, the config needs {tuple(needed.shape)}")
        elif tensor.is_floating_point() != needed.is_floating_point():
            different.append(f"  {name}: {tensor.dtype}, the config needs {needed.dtype}")
    if different:
        lines += [f"of another shape or type ({len(different)}):", *different[:MAX_DIFFERENT]]
        if len(different) > MAX_DIFFERENT:
            lines.append(f"  … and {len(different) - MAX_DIFFERENT} more")
    if changed := [name for name in IGNORED_NAMES if name in tensors and not _is_copy(name, tensors, config)]:
        lines.append("not the copy or constant that it should be:")
        lines += [f"  {name}: {IGNORED_NAMES[name]}" for name in changed]
    if lines:
        variant = _similar_variant(tensors)
        hint = f" (it looks like a {variant})" if variant else ""
        raise ValueError(f"{path} does not fit the configuration{hint}:\n" + "\n".join(lines))
    return model


def original_tensors(model: PrismerForConditionalGeneration) -> dict[str, torch.Tensor]:
    """
    The tensors that a published checkpoint must have to fill `model`, by original name, on the meta device.
    """
    ours = model.state_dict()
    expected = {}
    for name, source in original_names(model.config).items():
        tensor = ours[name].to("meta")
        if source.third is not None:
            tensor = tensor.new_empty(3 * tensor.shape[0], *tensor.shape[1:])
        expected[source.name] = tensor
    return expected


def _is_copy(name: str, tensors: dict[str, torch.Tensor], config: PrismerConfig) -> bool:
    """Whether an ignored tensor is the expected copy or constant."""
    tensor = tensors[name]
    if name == POSITION_IDS:
        return torch.equal(tensor.flatten().long(), torch.arange(config.text_config.max_position_embeddings))
    kept = tensors.get(TIED_NAMES[name])
    if kept is None:  # this is reported as a missing tensor
        return True
    return tensor.dtype == kept.dtype and torch.equal(tensor, kept)


def _summarize(names: list[str], known: set[str]) -> list[str]:
    """
    Lines that summarise `names`, some of the `known` names. `a.b.*` stands for all names that begin so, and one line
    covers several layers.
    """
    chosen = set(names)
    whole: Counter[str] = Counter()
    listed: Counter[str] = Counter()
    for name in known:
        for prefix in _prefixes(name):
            whole[prefix] += 1
            listed[prefix] += name in chosen
    layers: dict[str, list[int]] = {}
    for name in names:
        group = next((f"{prefix}.*" for prefix in _prefixes(name) if 1 < whole[prefix] == listed[prefix]), name)
        number = _LAYER_NUMBER.search(group)
        numbers = layers.setdefault(_LAYER_NUMBER.sub("#", group, count=1), [])
        if number and int(number[0]) not in numbers:
            numbers.append(int(number[0]))
    experts = {original: name for name, original in EXPERT_NAMES.items()}
    lines = []
    for pattern, numbers in layers.items():
        if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            which = f"{{{numbers[0]}…{numbers[-1]}}}"
        else:
            which = ",".join(map(str, numbers)) if len(numbers) < 2 else f"{{{','.join(map(str, numbers))}}}"
        line = pattern.replace("#", which)
        if line.startswith("expert_encoder.conv1."):
            expert = line.split(".")[2]
            line += f" (expert '{experts.get(expert, expert)}')"
        lines.append(f"  {line}")
    return lines


def _prefixes(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`"""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _similar_variant(tensors: dict[str, torch.Tensor]) -> str | None:
    """Returns the published network with the widths and experts of a checkpoint, if there is one."""
    words, positions = tensors.get(TIED_NAMES["text_decoder.lm_head.decoder.weight"]), tensors.get(_POSITIONS)
    if words is None or positions is None:
        return None
    has_experts = any(name.startswith("expert_encoder.resampler.") for name in tensors)
    for variant in VARIANTS:
        config = PrismerConfig.from_variant(variant)
        widths = (config.vision_config.hidden_size, config.text_config.hidden_size)
        if bool(config.experts) == has_experts and widths == (positions.shape[-1], words.shape[-1]):
            return variant
    return None


def _fill(
    model: PrismerForConditionalGeneration,
    tensors: dict[str, torch.Tensor],
    tables: dict[str, ClassTable],
    dtype: torch.dtype,
) -> None:
    """Moves the checkpoint's tensors to the model, which is on the meta device. They are removed from `tensors`."""
    state: dict[str, torch.Tensor] = {}

    def give(name: str, tensor: torch.Tensor, copy: bool = False) -> None:
        state[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=copy).contiguous()

    packed: dict[str, list[str]] = defaultdict(list)  # original name -> the three names in this package, in order
    for name, source in original_names(model.config).items():
        if source.third is None:
            give(name, tensors.pop(source.name).detach())
        else:
            packed[source.name].append(name)
    for original_name, names in packed.items():
        # copies, so that the three do not keep the packed tensor in memory
        for name, tensor in zip(names, tensors.pop(original_name).detach().chunk(3)):
            give(name, tensor, copy=True)
    tensors.clear()
    for spec in model.config.expert_specs:
        if spec.is_label:
            background = tables.get(BACKGROUND_KEY, ClassTable(torch.zeros(1, spec.channels)))
            table = tables.get(spec.name, ClassTable(torch.empty(0, spec.channels)))
            give(
                f"model.vision_model.expert_stems.{spec.name}.class_features",
                torch.cat([table.features, background.features]),
            )
    state["lm_head.decoder.weight"] = state[_EMBEDDINGS]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()


def _published_image_size(config: PrismerConfig) -> int:
    """
    The resolution of a checkpoint: the published one with as many patches, else the smallest. At 480 pixels with
    patches of 14, four pixels remain at the edge.
    """
    patch_size, image_size = config.vision_config.patch_size, config.vision_config.image_size
    fitting = (size for size in PUBLISHED_IMAGE_SIZES if size // patch_size == image_size // patch_size)
    return next(fitting, image_size)


def _load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | Path | None, config: PrismerConfig
) -> PreTrainedTokenizerBase | None:
    text_config = config.text_config
    loaded: Any = tokenizer
    if tokenizer is None:
        default = TOKENIZERS.get(text_config.hidden_size)
        if default is None or text_config.vocab_size != 50265:
            logger.warning("No tokenizer is saved: the network has no published size, so pass `tokenizer`.")
            return None
        try:
            loaded = AutoTokenizer.from_pretrained(default)
        except OSError:
            logger.warning(
                f"No tokenizer is saved: {default} is not in the local cache and could not be downloaded. Pass "
                "`tokenizer`, or save it next to the model later."
            )
            return None
    elif not isinstance(tokenizer, PreTrainedTokenizerBase):
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    if len(loaded) > text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(loaded)} tokens; the model's vocabulary has {text_config.vocab_size}"
        )
    for token in ("bos_token_id", "pad_token_id", "eos_token_id"):
        if getattr(loaded, token) != getattr(config, token):
            raise ValueError(
                f"the tokenizer's {token} is {getattr(loaded, token)}; the config's is {getattr(config, token)}"
            )
    return loaded


def _save(
    model: PrismerForConditionalGeneration,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str | None,
    max_shard_size: int | str,
    analysis: dict[str, torch.Tensor] | None,
    experts: Any,
    model_card: str | None,
) -> None:
    """Saves everything next to `output_dir`, and moves it there when it is complete."""
    from modeling_prismer.processing import PrismerImageProcessor, PrismerProcessor

    image_size = model.config.vision_config.image_size
    processor: Any = PrismerImageProcessor(
        size={"height": image_size, "width": image_size}, experts=copy.deepcopy(model.config.experts)
    )
    if tokenizer is not None:
        processor = PrismerProcessor(processor, tokenizer, experts=experts, task=task or "caption")
    with written_whole(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        if analysis is not None:
            save_file(analysis, folder / f"{CLIP_PCA}.safetensors")
        if model_card is not None:
            (folder / "README.md").write_text(model_card, encoding="utf-8")
