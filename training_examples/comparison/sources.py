"""The rows of a comparison: any data of the recipes, easy-VQA, and Scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from modeling_prismer.processing.data import leave_undecoded, load_rows
from modeling_prismer.processing.data.grouping import draw_shots

from .arguments import CompareArguments
from .models import NamedImage


SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Sample:
    """
    An image with a text.

    Args:
        image ([`NamedImage`]): the image.
        text (`str`, *optional*): the question.
        references (`tuple[str]`): the captions, answers or the class that are right.
    """

    image: NamedImage
    text: str | None
    references: tuple[str, ...]

    @property
    def content(self) -> list[Any]:
        """For [`Trial`]: the id of the image, the text, and the references."""
        return [self.image.image_id, self.text, self.references]


def load_samples(args: CompareArguments, task: str) -> list[Sample]:
    """
    The samples to measure on.

    Args:
        task (`str`): `"caption"`, `"vqa"` or `"classification"`.

    Raises:
        ValueError: if the data cannot be read, or have no references.
    """
    if args.data is None:
        raise ValueError("--data is missing: a folder, a list, a data set, easy-vqa or scenes")
    samples = _read(args, task, args.data, args.split, args.max_rows, train=False)
    if missing := [sample.image.image_id for sample in samples if not sample.references]:
        raise ValueError(f"--data has no references for {len(missing)} rows, such as {missing[0]}; scores need them")
    return samples


def load_support(args: CompareArguments, task: str, number: int | None = None) -> list[Sample]:
    """The samples of which examples are made, the first `number` of them."""
    source = args.support_data or args.data
    if source is None:
        raise ValueError("--support_data is missing, and so is --data")
    split = args.support_split or ("train" if args.support_data is None else None)
    return _read(args, task, source, split, number, train=True)


def _read(
    args: CompareArguments,
    task: str,
    source: str,
    split: str | None,
    number: int | None,
    train: bool,
) -> list[Sample]:
    named = {"easy-vqa": _easy_vqa, "scenes": _scenes}
    if source in named:
        rows: Any = named[source](args, task, split or ("train" if train else "test"), number)
    else:
        rows = load_rows(
            source,
            task,
            split,
            train=train,
            image_folder=args.image_folder,
            class_names=args.class_names,
            max_rows=number,
            **args.columns_of(task),
        )
        rows = leave_undecoded(rows)
    return [_sample(row) for row in rows]


def _sample(row: dict[str, Any]) -> Sample:
    references = row["references"] if "references" in row else [row["suffix"]] if "suffix" in row else []
    return Sample(NamedImage(row["image_id"], row["image"]), row.get("text"), tuple(references))


def draw(samples: Sequence[Sample], shots: int, seed: int) -> list[Sample]:
    """Draws `shots` samples of each class, as [`load_rows`] does."""
    columns = {
        "image_id": [sample.image.image_id for sample in samples],
        "suffix": [sample.references[0] for sample in samples],
        "place": list(range(len(samples))),
    }
    return [samples[place] for place in draw_shots(Dataset.from_dict(columns), shots, seed)["place"][:]]


def _easy_vqa(args: CompareArguments, task: str, split: str, number: int | None) -> list[dict[str, Any]]:
    from run_easy_vqa import load_easy_vqa

    if task == "caption":
        raise ValueError("--data easy-vqa has questions and shapes, but no captions")
    rows: list[dict[str, Any]] = []
    for row in leave_undecoded(load_easy_vqa(split, number)):
        image = {"image_id": row["image_id"], "image": row["image"]["path"]}
        if task == "vqa":
            rows += [{**image, "text": q, "references": [a]} for q, a in zip(row["text"], row["suffix"])]
            continue
        shapes = [answer for answer in row["suffix"] if answer in SHAPES]
        rows += [{**image, "references": shapes[:1]}] if shapes else []
    return rows


def _scenes(args: CompareArguments, task: str, split: str, number: int | None) -> list[dict[str, Any]]:
    from scenes.run_scenes import evaluation_splits
    from scenes.scenes import Scenes

    if task not in ("caption", "vqa"):
        raise ValueError("--data scenes has captions and questions, but no classes")
    builder = Scenes(cache_dir=args.data_dir)
    if number is not None and not Path(builder.cache_dir).is_dir():  # make no more than are needed
        sizes = {"train": 0, "validation": 0, "test": 0, split.replace("held_out", "test"): number}
        sizes["test"] *= 2  # every other scene is held out
        builder = Scenes(cache_dir=args.data_dir, **sizes)
    builder.download_and_prepare()
    splits = builder.as_dataset()
    scenes = {**splits, **evaluation_splits(splits)} if "test" in splits else splits
    if split not in scenes:
        raise ValueError(f"--data scenes has no split {split!r}; accepted are {', '.join(scenes)}")
    rows: list[dict[str, Any]] = []
    for row in leave_undecoded(scenes[split].select(range(min(number or len(scenes[split]), len(scenes[split]))))):
        image = {name: row[name] for name in ("image_id", "image")}
        if task == "caption":
            rows.append({**image, "references": row["captions"]})
        else:
            rows += [{**image, "text": own["question"], "references": [own["answer"]]} for own in row["questions"]]
    return rows
