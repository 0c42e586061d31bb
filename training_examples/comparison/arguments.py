"""The arguments of compare.py."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from columns import ColumnOptions


@dataclass(frozen=True)
class ModelName:
    """
    A model as the command line names it: `NAME=PATH@EXPERTS`, of which only the path is needed.

    Args:
        name (`str`): its name in the report.
        path (`str`): a folder, a Hub id, or the name of a shipped checkpoint.
        experts (`str`, *optional*): the experts of a Prismer, as in `prismer caption --experts`.
    """

    name: str
    path: str
    experts: str | None = None

    @classmethod
    def read(cls, text: str) -> "ModelName":
        name, rest = "", text
        if "=" in text and not Path(text.partition("@")[0]).exists():  # a path may contain "="
            name, _, rest = text.partition("=")
        path, _, experts = rest.partition("@")
        if not path:
            raise ValueError(f"--models {text!r} names no model; accepted are PATH, NAME=PATH and PATH@EXPERTS")
        check_experts(path, experts)
        last = Path(path).name
        return cls(name or (f"{last}@{experts}" if experts else last), path, experts or None)

    @property
    def folder(self) -> str:
        """The name of the folder with its results."""
        return re.sub(r"[^\w.@,+-]+", "_", self.name)


def check_experts(path: str, experts: str | None) -> None:
    """Raises a `ValueError` if the experts are not fixed."""
    if experts == "auto":
        raise ValueError(
            f"--models {path}@auto: the router chooses for each question; name fixed experts: {path}@EXPERT,EXPERT"
        )


def read_models(texts: list[str]) -> list[ModelName]:
    """
    The models of `--models`.

    Raises:
        ValueError: if there are none, or if two have the same name or the same folder of results.
    """
    models = [ModelName.read(text) for text in texts]
    names = [model.name for model in models]
    if not models:
        raise ValueError("--models is missing: a folder, a Hub id or the name of a shipped checkpoint; several")
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--models has several models called {doubled[0]!r}; give names: NAME=PATH")
    folders = {model.folder: model.name for model in models}
    if lost := [model for model in models if folders[model.folder] != model.name]:
        raise ValueError(
            f"--models {lost[0].name!r} and {folders[lost[0].folder]!r} have the same folder of results, "
            f"{lost[0].folder}; give names that differ in more than such signs: NAME=PATH"
        )
    return models


@dataclass
class CompareArguments(ColumnOptions):
    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "The models: folders, Hub ids or names of shipped checkpoints. Differences are to the first one. "
            "NAME=PATH gives a name for the report, PATH@EXPERTS the experts of a Prismer (prismer-scenes@none)."
        },
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "The tasks; several. See docs/comparison.md."})
    data: str | None = field(
        default=None,
        metadata={"help": "The data, as --eval_data of the recipes; or easy-vqa, or scenes."},
    )
    split: str | None = field(default=None, metadata={"help": "Split of --data."})
    support_data: str | None = field(
        default=None,
        metadata={"help": "The data of examples, for --shots and few_shot_classes; by default the training split."},
    )
    support_split: str | None = field(default=None, metadata={"help": "Split of --support_data."})
    data_dir: str | None = field(default=None, metadata={"help": "The cache folder of --data scenes."})
    image_folder: str | None = field(default=None, metadata={"help": "The folder with the images of a list."})
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Measure on the first rows only; on the first images of easy-vqa and scenes."},
    )
    shots: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Numbers of examples in context for caption and vqa (0 4 8 16 32), by default none; images of "
            "each class for few_shot_classes, by default 1 4 16."
        },
    )
    shots_by: Literal["random", "similar"] = field(
        default="random",
        metadata={"help": "Whether examples in context are random, or of similar images (RICES)."},
    )
    similar_by: str | None = field(
        default=None,
        metadata={"help": "The model whose embeddings decide which images are similar; by default the first one."},
    )
    num_support: int = field(default=2048, metadata={"help": "Rows from which examples in context are taken."})
    text_examples: int = field(
        default=0,
        metadata={"help": "Examples without their images if --shots is 0. Flamingo's figures have 2."},
    )
    candidates: str | None = field(
        default=None,
        metadata={"help": "The answers that vqa_ranking ranks, a file; by default all answers of the data."},
    )
    class_names: str | None = field(default=None, metadata={"help": "JSON file {folder: name of the class}."})
    class_prompt: str = field(
        default="a photo of a {}.", metadata={"help": "The text of a class for CLIP and SigLIP."}
    )
    class_question: str | None = field(
        default=None, metadata={"help": "The question that class names answer; by default each model's own prompt."}
    )
    question_prompt: str | None = field(
        default=None, metadata={"help": "The prompt with {} for the question; by default that of each family."}
    )
    caption_prompt: str | None = field(
        default=None, metadata={"help": "The prompt for captions; by default that of each family."}
    )
    num_beams: int | None = field(
        default=None,
        metadata={"help": "Number of beams; by default that of a Prismer's checkpoint, and 1 for other models."},
    )
    labels: str = field(
        default="live", metadata={"help": "The labels of a Prismer's experts: live, or a label store."}
    )
    language: str | None = field(default=None, metadata={"help": "The language model of a PrismerLM."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, … or auto."})
    dtype: str = field(default="auto", metadata={"help": "float32, float16, bfloat16 or auto."})
    batch_size: int = field(default=8, metadata={"help": "Number of texts that run at once."})
    own_process: bool = field(
        default=True,
        metadata={"help": "Whether each model runs in its own process, so that memory is comparable."},
    )
    seed: int = field(default=0, metadata={"help": "The seed of examples and bootstrap."})
    output_dir: str | None = field(default=None, metadata={"help": "The folder of results, table and figure."})

    def __post_init__(self) -> None:
        for name in ("question_prompt", "class_prompt"):
            prompt = getattr(self, name)
            if prompt is not None and "{}" not in prompt:
                what = name.partition("_")[0]
                raise ValueError(f"--{name} is {prompt!r}; it needs {{}} in the place of the {what}")
        if negative := [shots for shots in self.shots if shots < 0]:
            raise ValueError(f"--shots is {negative[0]}; accepted are 0 and larger numbers")

    @property
    def torch_device(self) -> torch.device:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device(name)

    @property
    def torch_dtype(self) -> Any:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        # half precision on a CPU is slower than float32
        return torch.float32 if self.torch_device.type == "cpu" else "auto"
