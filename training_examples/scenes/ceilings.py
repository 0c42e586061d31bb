"""
Measures what the questions of Scenes 2 demand: how many a perfect reader of the expert labels answers, and how many a
reader that sees only the questions does.

    export PYTHONPATH=training_examples
    python -m scenes.scenes --generate --config scenes2 --cache_dir runs/scenes-data --num_proc 2
    python -m scenes.ceilings --data_dir runs/scenes-data

| column | reader |
| --- | --- |
| questions | a linear classifier of the questions' words, trained on the training split |
| labels | runs the question's program on the objects in the labels; guesses colors, materials and sizes |
| labels and image | the same, with the true colors, materials and sizes, which are in the image and in no label |
"""

import argparse
import json
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torchvision.ops import box_iou

from comparison.report import markdown, write_interval
from comparison.scores import Interval, Score, interval

from .composition import TYPES, VALUES
from .labels import DETECTION_CLASSES
from .programs import Reader, Unclear
from .render import CLASSES
from .scenes import add_data_arguments, open_data


IN_IMAGE = ("color", "material", "size")  # attributes that no label has


# ---- facts in the labels ----


def facts_of_labels(row: dict[str, Any], attributes: list[dict[str, str]], marked: int | None) -> dict[str, Any]:
    """
    What the labels of a row tell about its scene, in the form of [`describe`]: the shape, place and depth of each
    detected object, and the words on signs.

    Args:
        row (`dict`): a row of the data set, or one with the predictions of experts in place of the labels.
        attributes (`list[dict]`): `color`, `material` and `size` of each detected instance, from elsewhere.
        marked (`int`, *optional*): the marked instance.
    """
    depth, segmentation, words = (np.asarray(row[name]) for name in ("depth", "segmentation", "ocr"))
    objects, signs, found = [], [], None
    for number, (label, box) in enumerate(zip(row["detection_classes"], row["detection_boxes"], strict=True)):
        left, top, right, bottom = box
        inside = (slice(top, bottom), slice(left, right))
        name = DETECTION_CLASSES[label]
        mask = segmentation[inside] == CLASSES.index(name)
        nearness = float(np.median(depth[inside][mask] if mask.any() else depth[inside]))
        place = {"center": [(left + right) / 2, (top + bottom) / 2], "depth": -nearness, "distance": -nearness}
        if name == "sign":
            ids = words[inside][words[inside] < len(row["ocr_words"])]
            if len(ids):
                signs.append({**place, "word": row["ocr_words"][int(np.bincount(ids).argmax())]})
        else:
            found = len(objects) if number == marked else found
            objects.append({**place, "shape": name, **attributes[number]})
    return {"objects": objects, "signs": signs, "marked": found}


def match(row: dict[str, Any]) -> list[int]:
    """The object in `facts` that each detected instance overlaps most."""
    boxes = torch.tensor(row["detection_boxes"], dtype=torch.float32).reshape(-1, 4)
    true = torch.tensor([thing["box"] for thing in row["facts"]["objects"]], dtype=torch.float32)
    return box_iou(boxes, true).argmax(1).tolist()


def answer_from_labels(row: dict[str, Any], with_image: bool, random: np.random.Generator) -> list[str]:
    """
    The answers of a perfect reader of a row's labels.

    Args:
        row (`dict`): a row of the data set.
        with_image (`bool`): whether it knows the true colors, materials and sizes. Else it guesses them.
        random (`np.random.Generator`): the source of guesses.
    """
    matched, things = match(row), row["facts"]["objects"]
    if with_image:
        attributes = [{name: things[own][name] for name in IN_IMAGE} for own in matched]
    else:
        attributes = [{name: str(random.choice(VALUES[name])) for name in IN_IMAGE} for _ in matched]
    instances = [k for k, own in enumerate(matched) if own == row["facts"]["marked"]]
    shapes = [DETECTION_CLASSES[row["detection_classes"][k]] for k in instances]
    marked = next((k for k, shape in zip(instances, shapes) if shape != "sign"), None)
    reader = Reader(facts_of_labels(row, attributes, marked), margins=False)
    answers = []
    for question in row["questions"]:
        try:
            answers.append(reader.read(json.loads(question["program"])))
        except Unclear:
            answers.append("")
    return answers


# ---- the questions alone ----


def answer_from_questions(train: Dataset, test: Dataset) -> list[list[str]]:
    """The answers of a linear classifier of words and pairs of words, for each row of `test`."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    asked = [(each["question"], each["answer"]) for questions in train["questions"] for each in questions]
    texts, answers = zip(*asked)
    classifier = make_pipeline(
        CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\w+"),
        SGDClassifier(loss="log_loss", alpha=1e-5, random_state=0),
    )
    classifier.fit(texts, answers)
    return [list(classifier.predict([each["question"] for each in questions])) for questions in test["questions"]]


# ---- results ----


def share_right(rows: Dataset, answers: list[list[str]]) -> dict[str, Interval]:
    """The percentage of right answers by type, and of all, with the 95 % interval of a bootstrap over scenes."""
    hits: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for questions, given in zip(rows["questions"], answers, strict=True):
        by_type: dict[str, list[bool]] = defaultdict(list)
        for question, answer in zip(questions, given, strict=True):
            for name in ("all", question["type"]):
                by_type[name].append(question["answer"] == answer)
        for name, right in by_type.items():
            hits[name].append((sum(right), len(right)))
    scores = {name: Score(name, np.array(hits[name], dtype=float)) for name in ("all", *TYPES) if hits[name]}
    return {name: interval(score) for name, score in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_data_arguments(parser, "scenes2")
    splits = open_data(parser.parse_args())
    train, test = splits["train"].select_columns(["questions"]), splits["test"]
    parts = {
        "like the training": test.select([k for k, is_held_out in enumerate(test["held_out"]) if not is_held_out]),
        "held-out": test.select([k for k, is_held_out in enumerate(test["held_out"]) if is_held_out]),
    }
    for name, rows in parts.items():
        random = np.random.default_rng(0)
        columns = [share_right(rows, answer_from_questions(train, rows))]
        for with_image in (False, True):
            columns.append(share_right(rows, [answer_from_labels(row, with_image, random) for row in rows]))
        table = [[kind, *(write_interval(column[kind]) for column in columns)] for kind in columns[0]]
        print(f"\n{name}, {len(rows)} scenes\n")
        print(markdown(["right answers, %", "questions", "labels", "labels and image"], table))


if __name__ == "__main__":
    main()
