"""Multiple choice: the layouts of MMVP and MagnifierBench, and your own lists."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from modeling_prismer.processing.metrics import load_metric

from .arguments import CompareArguments
from .models import LETTERS, Model, NamedImage, Query
from .scores import Score
from .trials import Trial


_MMVP_OPTION = re.compile(r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|$)", re.DOTALL)  # "(a) Open (b) Closed"
_LETTERED = re.compile(r"(?:^|[\s,])\(?([A-Z])[.)]\s*(.*?)[\s,]*(?=[\s,]\(?[A-Z][.)]\s|$)", re.DOTALL)  # "A. a, B. b"


@dataclass(frozen=True)
class Choice:
    """
    A question with options.

    Args:
        images (`tuple[NamedImage]`): its images.
        question (`str`): the question.
        options (`tuple[str]`): the options, without their letters.
        answer (`str`): the letter of the right one.
        pair (`str`): questions with the same name count together.
    """

    images: tuple[NamedImage, ...]
    question: str
    options: tuple[str, ...]
    answer: str
    pair: str


def multiple_choice(args: CompareArguments) -> list[Trial]:
    if args.data is None:
        raise ValueError("--data is missing: the folder of MMVP, MagnifierBench, or a .jsonl with options")
    choices = list(read_choices(args.data, args.split))[: args.max_rows]
    if not choices:
        raise ValueError(f"--data {args.data} has no question with options")

    def ask(model: Model) -> list[str]:
        queries = [Query(choice.images, choice.question) for choice in choices]
        return model.choose(queries, [choice.options for choice in choices])

    number = len({image.image_id for choice in choices for image in choice.images})
    content = [
        [[image.image_id for image in own.images], own.question, own.options, own.answer, own.pair] for own in choices
    ]
    return [Trial("multiple_choice", ask, lambda said: score_choices(said, choices), number, content)]


def score_choices(said: list[str], choices: list[Choice]) -> list[Score]:
    """Accuracy, the accuracy of pairs as MMVP counts them, and the share of answers that name an option."""
    metric = load_metric("choice_accuracy")
    found = metric.compute(
        predictions=said,
        references=[choice.answer for choice in choices],
        options=[list(choice.options) for choice in choices],
        per_question=True,
    )
    pairs = [choice.pair for choice in choices]
    hits = found["is_right_per_question"]
    scores = [Score.of_samples("accuracy", hits, pairs)]
    if len(set(pairs)) < len(pairs):
        both: dict[str, bool] = {}
        for pair, hit in zip(pairs, hits):
            both[pair] = both.get(pair, True) and bool(hit)
        scores.insert(0, Score.of_samples("pairs", list(both.values()), list(both)))
    return [*scores, Score.of_samples("read", [letter is not None for letter in found["letters"]], pairs)]


def read_choices(source: str, split: str | None = None) -> Iterator[Choice]:
    """
    Reads questions with options.

    Args:
        source (`str`):
            - the folder of MMVP, with `Questions.csv` and `MMVP Images/`;
            - a `.jsonl` whose lines have `image` or `images`, `question`, `options`, `answer` (a letter, the text of
              an option, or its number from 0), and for pairs `pair`;
            - a data set with `instruction`, `images` and `answer`, as MagnifierBench: a folder of Parquet files or of
              `save_to_disk`, or a name on the Hub.
        split (`str`, *optional*): the split of a data set, by default `test`, or the only one.

    Raises:
        ValueError: if a row is damaged or has no options, or its answer is none of them.
    """
    path = Path(source)
    if (path / "Questions.csv").is_file():
        yield from _read_mmvp(path)
    elif path.suffix == ".jsonl":
        yield from _read_lines(path)
    else:
        yield from _read_magnifier(source, split)


def _read_mmvp(folder: Path) -> Iterator[Choice]:
    """Images are called by the number of their question. Questions 1 and 2 are a pair, 3 and 4, and so on."""
    with (folder / "Questions.csv").open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            number = int(row["Index"])
            options = dict(_MMVP_OPTION.findall(row["Options"]))
            answer = row["Correct Answer"].strip().strip("()").lower()
            where = f"{folder / 'Questions.csv'}, question {number}"
            letter = _letter(answer.upper(), [letter.upper() for letter in options], where)
            image = NamedImage(f"{number}.jpg", str(folder / "MMVP Images" / f"{number}.jpg"))
            yield Choice((image,), row["Question"], tuple(options.values()), letter, str((number + 1) // 2))


def _read_lines(path: Path) -> Iterator[Choice]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is {line.strip()[:40]}; an object with question and options is needed")
            names = row.get("images") or [row.get("image")]
            if not row.get("options") or not row.get("question") or names == [None]:
                raise ValueError(
                    f"{where} needs image or images, question, options and answer; it has {', '.join(row)}"
                )
            if not isinstance(row["options"], list):
                raise ValueError(f"{where} has the options {row['options']!r}; a list of texts is needed")
            options = [str(option) for option in row["options"]]
            if doubled := [option for option in options if options.count(option) > 1]:
                raise ValueError(f"{where} has the option {doubled[0]!r} twice; different texts are needed")
            answer = row.get("answer")
            if isinstance(answer, int) and not isinstance(answer, bool):
                answer = LETTERS[answer] if 0 <= answer < len(options) else answer
            elif answer in options:
                answer = LETTERS[options.index(answer)]
            letter = _letter(str(answer).strip().upper(), LETTERS[: len(options)], where)
            images = tuple(NamedImage(name, str(path.parent / name)) for name in names)
            yield Choice(images, row["question"], tuple(options), letter, str(row.get("pair", number)))


def _read_magnifier(source: str, split: str | None) -> Iterator[Choice]:
    """The options are the end of the instruction: "What is it? A. a cat, B. a dog"."""
    if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
        found: Any = datasets.load_from_disk(source)
    else:
        found = datasets.load_dataset(source)
    if isinstance(found, dict):
        name = split or ("test" if "test" in found or len(found) > 1 else next(iter(found)))
        if name not in found:
            raise ValueError(f"--data {source} has no split {name!r}; accepted are {', '.join(found)}")
        found = found[name]
    if missing := {"instruction", "images", "answer"} - set(found.column_names):
        raise ValueError(
            f"--data {source} has no column {', '.join(sorted(missing))}; accepted are MMVP's folder, a .jsonl with "
            "options, and data sets with instruction, images and answer"
        )
    found = found.cast_column("images", datasets.List(datasets.Image(decode=False)))
    known: set[str] = set()
    for number, row in enumerate(found):
        name = str(row.get("id", number))
        if name in known:  # the id names its images and its pair
            raise ValueError(
                f"--data {source}, row {number} has the id {name!r} of an earlier row; each needs its own"
            )
        known.add(name)
        first = _LETTERED.search(row["instruction"])
        options = dict(_LETTERED.findall(row["instruction"][first.start() :])) if first else {}
        where = f"--data {source}, row {name}"
        letter = _letter(row["answer"].strip().upper()[:1], list(options), where)
        images = tuple(NamedImage(f"{name}/{place}", image) for place, image in enumerate(row["images"]))
        yield Choice(images, row["instruction"][: first.start()].strip(), tuple(options.values()), letter, name)


def _letter(answer: str, letters: Any, where: str) -> str:
    if len(letters) < 2 or list(letters) != list(LETTERS[: len(letters)]):
        raise ValueError(
            f"{where} has the options {', '.join(letters) or 'none'}; A, B and so on are needed, two or more"
        )
    if answer not in list(letters):
        raise ValueError(f"{where} has the answer {answer!r}; accepted are {', '.join(letters)}")
    return answer
