"""The twelve published checkpoints: where their files are, and their conversion in one call."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_prismer.configuration_prismer import PrismerConfig
from modeling_prismer.modeling_prismer import PrismerForConditionalGeneration

from .clip_pca import convert_clip_pca
from .convert_checkpoint import CLIP_PCA, convert_original_checkpoint
from .feature_tables import BACKGROUND_KEY, read_class_tables
from .output_folder import check_output_dir
from .tensor_files import CHECKPOINT_NAME


REPOSITORY = "shikunl/prismer"
LICENSE = "cc-by-nc-sa-4.0"
LICENSE_URL = "https://creativecommons.org/licenses/by-nc-sa/4.0/"
TABLES_URL = "https://github.com/NVlabs/prismer/tree/main/dataset"
TABLE_FILES = ("coco_features.pt", "detection_features.pt", "background_features.pt", f"{CLIP_PCA}.pkl")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """
    A published checkpoint.

    Args:
        name (`str`): its folder in the repository, such as `vqa_prismer_base`.
        variant (`str`): its network, for [`PrismerConfig.from_variant`].
        task (`str`): the name of its [`Task`].
        image_size (`int`): side of the image in its training, in pixels.

    Example:

    ```python
    >>> from modeling_prismer.conversion import PUBLISHED_CHECKPOINTS

    >>> PUBLISHED_CHECKPOINTS["vqa_prismer_base"]
    PublishedCheckpoint(name='vqa_prismer_base', variant='prismer_base', task='vqa', image_size=480)
    ```
    """

    name: str
    variant: str
    task: str
    image_size: int

    @property
    def has_experts(self) -> bool:
        return self.variant.startswith("prismer_")


_TRAININGS = {"pretrain": ("zero_shot_caption", 224), "caption": ("caption", 480), "vqa": ("vqa", 480)}
PUBLISHED_CHECKPOINTS = {
    f"{training}_{variant}": PublishedCheckpoint(f"{training}_{variant}", variant, *settings)
    for training, settings in _TRAININGS.items()
    for variant in ("prismer_base", "prismer_large", "prismerz_base", "prismerz_large")
}
"""The published checkpoints by name."""


def find_published(name: str) -> PublishedCheckpoint:
    """
    The published checkpoint of a name.

    Raises:
        ValueError: if there is none. The message lists the names.

    Example:

    ```python
    >>> from modeling_prismer.conversion import find_published

    >>> find_published("pretrain_prismerz_large").has_experts
    False
    ```
    """
    if name not in PUBLISHED_CHECKPOINTS:
        raise ValueError(
            f"no published checkpoint {name!r}; there are {', '.join(PUBLISHED_CHECKPOINTS)}. "
            "`prismer convert --list` describes them"
        )
    return PUBLISHED_CHECKPOINTS[name]


def published_name(checkpoint: str | Path) -> str | None:
    """The published checkpoint that a path or Hub id names by its last folder, such as `…/vqa_prismer_base`."""
    parts = Path(checkpoint).parts
    return next((part for part in parts[:-3:-1] if part in PUBLISHED_CHECKPOINTS), None)


def convert_published(
    name: str,
    output_dir: str | Path,
    feature_tables: str | Path | None = None,
    *,
    source: str | Path = REPOSITORY,
    without_feature_tables: bool = False,
    image_size: int | None = None,
    task: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    experts: Any = "published",
    dtype: torch.dtype | str = torch.float32,
    overwrite: bool = False,
    revision: str | None = None,
) -> PrismerForConditionalGeneration:
    """
    Converts a published checkpoint to a folder that is ready for use: model with class names and background,
    processor with tokenizer and live experts, the settings of its task, and a model card with licence and origin.

    Checkpoint and tokenizer are downloaded from the Hub. The feature tables are not on the Hub: see `feature_tables`.

    Args:
        name (`str`): a name of `PUBLISHED_CHECKPOINTS`, such as `"vqa_prismer_base"`.
        output_dir (`str` or `Path`): the folder to write. It appears when it is complete.
        feature_tables (`str` or `Path`, *optional*):
            A folder with the published files `coco_features.pt`, `detection_features.pt`, `background_features.pt` and
            `clip_pca.pkl`. A checkpoint without experts (`prismerz`) needs none.
        source (`str` or `Path`, *optional*, defaults to `"shikunl/prismer"`):
            A Hub id or a local copy of the repository, with a folder for each checkpoint; the folder of the
            checkpoint, or its file.
        without_feature_tables (`bool`, *optional*, defaults to `False`):
            Whether to convert a checkpoint with experts although `feature_tables` is missing. Its ids then have no
            features until you call `set_class_features`.
        image_size (`int`, *optional*): side of the image in pixels, by default that of the checkpoint's training.
        task (`str`, *optional*): the name of a [`Task`], by default that of the checkpoint.
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*): by default that of its RoBERTa.
        experts ([`ExpertSuite`] or `str`, *optional*, defaults to `"published"`):
            The live experts to save with the processor; `None` for none. In `"published"`, the words get the features
            of the published analysis.
        dtype, overwrite, revision: see [`convert_original_checkpoint`].

    Returns:
        [`PrismerForConditionalGeneration`] in evaluation mode, on the CPU.

    Raises:
        ValueError: if there is no such checkpoint, or a file does not fit it.
        FileNotFoundError: if a file is missing. The message tells where it is published.
        FileExistsError: if `output_dir` is not empty.

    Example:

    ```python
    >>> from modeling_prismer.conversion import convert_published

    >>> try:  # download the tables first
    ...     convert_published("vqa_prismer_base", "prismer-vqa")
    ... except FileNotFoundError as error:
    ...     print(str(error)[:56])
    vqa_prismer_base has experts and needs the published fea
    ```
    """
    published = find_published(name)
    output_dir = check_output_dir(output_dir, overwrite)
    if not published.has_experts:
        feature_tables, experts = None, None
    elif feature_tables is not None:
        _require_tables(published, Path(feature_tables).expanduser())
    elif not without_feature_tables:
        raise FileNotFoundError(
            f"{name} has experts and needs the published feature tables. Download {', '.join(TABLE_FILES)} from "
            f"{TABLES_URL} into a folder, and pass it as --feature-tables. (--without-feature-tables converts without "
            "them; the ids of segmentation and detection then cannot be used)"
        )
    task = published.task if task is None else task
    with tempfile.TemporaryDirectory() as scratch:
        return convert_original_checkpoint(
            _checkpoint_in(source, name),
            published.variant,
            output_dir,
            feature_tables,
            image_size=image_size,
            task=task,
            tokenizer=_load_tokenizer(published) if tokenizer is None else tokenizer,
            dtype=dtype,
            overwrite=overwrite,
            revision=revision,
            experts=_suite(experts, feature_tables, Path(scratch)),
            model_card=_model_card(published, task, image_size, source, revision, feature_tables is not None),
        )


def _require_tables(published: PublishedCheckpoint, folder: Path) -> None:
    experts = PrismerConfig.from_variant(published.variant).experts
    where = f"The files {', '.join(TABLE_FILES)} are published at {TABLES_URL}"
    if not folder.is_dir():
        raise FileNotFoundError(f"--feature-tables {folder} is not a folder. {where}")
    try:
        tables = read_class_tables(folder, experts)
    except ValueError as error:
        raise ValueError(f"{error}. {where}") from error
    needed = [*(expert["name"] for expert in experts if expert.get("num_classes")), BACKGROUND_KEY]
    if missing := [name for name in needed if name not in tables]:
        raise FileNotFoundError(f"{folder} has no table of {', '.join(missing)}. {where}")


def _checkpoint_in(source: str | Path, name: str) -> str | Path:
    """The place of a checkpoint, for [`find_checkpoint`]."""
    path = Path(source).expanduser()
    if (path / name).is_dir():
        return path / name
    if path.exists() or isinstance(source, Path) or str(source).count("/") != 1:
        return source
    return f"{source}/{name}/{CHECKPOINT_NAME}"


def _load_tokenizer(published: PublishedCheckpoint) -> PreTrainedTokenizerBase:
    model_id = f"FacebookAI/roberta-{published.variant.partition('_')[2]}"
    try:
        return AutoTokenizer.from_pretrained(model_id)
    except OSError as error:
        raise FileNotFoundError(
            f"the tokenizer {model_id} is not in the local cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is "
            "set). Download it elsewhere and pass its folder as --tokenizer"
        ) from error


def _suite(experts: Any, feature_tables: str | Path | None, scratch: Path) -> Any:
    """The live experts. Those of `"published"` paint words with the published analysis, if there is one."""
    from modeling_prismer.processing.experts import ClipTextFeatures
    from modeling_prismer.processing.experts_processor import as_suite

    suite = as_suite(experts)
    analysis = None if feature_tables is None else Path(feature_tables).expanduser() / f"{CLIP_PCA}.pkl"
    if experts == "published" and analysis is not None and analysis.is_file():
        pca = convert_clip_pca(analysis, scratch / f"{CLIP_PCA}.safetensors")
        suite["ocr"].word_features = ClipTextFeatures(pca=str(pca))
    return suite


# ---- model card ----

_USES = {
    "zero_shot_caption": 'text=""',
    "caption": 'text="A picture of"',
    "vqa": 'text="What is in the image?"',
    "classification": 'text="A photo of a"',
}
_CARD = Path(__file__).with_name("model_card.txt")
_TASK_NOTES = {
    "zero_shot_caption": "It was pre-trained on images and captions, and captions images from an empty prompt.",
    "caption": "It was fine-tuned on COCO captions. Its prompt is `A picture of`.",
    "vqa": (
        "It was fine-tuned on VQAv2. The published figures come from ranking the authors' list of answers, not from "
        "generation: `model.rank_candidates(**processor.prepare_candidates(answers), k=16, **inputs)`."
    ),
}
_WITH_TABLES = "The names and features of its classes, and the feature of the background, are saved with the model."
_WITHOUT_TABLES = (
    "It was converted without feature tables: call `model.set_class_features` before you use the ids of segmentation "
    "and detection."
)


def _model_card(
    published: PublishedCheckpoint,
    task: str,
    image_size: int | None,
    source: str | Path,
    revision: str | None,
    has_tables: bool,
) -> str:
    metadata = ModelCardData(
        license=LICENSE,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        base_model=REPOSITORY,
        tags=["prismer"],
    )
    folder = f"[{REPOSITORY}](https://huggingface.co/{REPOSITORY}/tree/{revision or 'main'}/{published.name})"
    resized = ""
    if image_size not in (None, published.image_size):
        resized = f", except that the position embeddings were resized to images of {image_size}×{image_size} pixels"
    experts = "It has no experts." if not published.has_experts else _WITH_TABLES if has_tables else _WITHOUT_TABLES
    return _CARD.read_text(encoding="utf-8").format(
        metadata=metadata.to_yaml(),
        name=published.name,
        origin=folder if str(source) == REPOSITORY else f"a copy of {folder}",
        resized=resized,
        license_url=LICENSE_URL,
        variant=published.variant,
        text=_USES.get(task, 'text="…"'),
        task=_TASK_NOTES[published.task],
        experts=experts,
    )
