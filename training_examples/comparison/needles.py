"""A needle in many images: the layout of Visual Haystacks."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .answers import MAX_NEW_TOKENS
from .arguments import CompareArguments
from .models import NamedImage, Query
from .scores import Score
from .trials import Trial


_FILE = re.compile(r"visual_haystack_(oracle|\d+)\.json")


@dataclass(frozen=True)
class Haystack:
    """A question about images of which some matter; the answer is yes or no."""

    images: tuple[NamedImage, ...]
    question: str
    answer: str


def needle(args: CompareArguments) -> list[Trial]:
    """A trial for each file `visual_haystack_{oracle,2,…}.json` of a folder such as `VHs_full/single_needle`."""
    folder = Path(args.data or "")
    files = {found[1]: path for path in folder.glob("*.json") if (found := _FILE.fullmatch(path.name))}
    if args.data is None or not files:
        raise ValueError(
            f"--data {args.data} has no visual_haystack_….json; name a folder of Visual Haystacks, such as "
            "VHs_full/single_needle, and that of the images: --image_folder"
        )
    trials = []
    for name, path in sorted(files.items(), key=lambda item: -1 if item[0] == "oracle" else int(item[0])):
        haystacks = read_haystacks(path, args.image_folder or folder, args.seed)[: args.max_rows]
        queries = [Query(haystack.images, haystack.question) for haystack in haystacks]
        trials.append(
            Trial(
                "needle",
                lambda model, queries=queries: model.answer(queries, MAX_NEW_TOKENS),
                lambda said, haystacks=haystacks: score_haystacks(said, haystacks),
                sum(len(haystack.images) for haystack in haystacks),
                [[query.content, haystack.answer] for query, haystack in zip(queries, haystacks, strict=True)],
                name if name == "oracle" else int(name),
                "images",
            )
        )
    return trials


def read_haystacks(path: Path, image_folder: str | Path, seed: int) -> list[Haystack]:
    """The haystacks of a file. The images that matter are at random places among the others."""
    haystacks = []
    for number, row in enumerate(json.loads(path.read_text())):
        names = [*row["pos_image"], *row.get("neg_image", [])]
        order = np.random.default_rng([seed, number]).permutation(len(names))
        images = tuple(NamedImage(names[place], str(Path(image_folder, names[place]))) for place in order)
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        haystacks.append(Haystack(images, question.replace("<image>", "").strip(), answer.strip().lower()))
    if not haystacks:
        raise ValueError(f"{path} has no questions")
    return haystacks


def score_haystacks(said: list[str], haystacks: Sequence[Haystack]) -> list[Score]:
    """The share of answers with the right word, and of those with "yes" or "no" at all. Chance is 50 %."""
    words = [re.findall(r"\w+", text.lower()) for text in said]
    groups = [str(number) for number in range(len(haystacks))]
    right = [haystack.answer in own for haystack, own in zip(haystacks, words, strict=True)]
    answered = ["yes" in own or "no" in own for own in words]
    return [Score.of_samples("accuracy", right, groups), Score.of_samples("yes or no", answered, groups)]
