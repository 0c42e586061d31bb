"""
Computes the accuracy of the VQA challenge: an answer scores 1 if three people gave it.

    vqa_accuracy = load_metric("vqa_accuracy")
    vqa_accuracy.compute(predictions=["two"], references=[["2", "2", "2", "2", "3", "2", "two", "2", "2", "many"]])
"""

import itertools
import re
from collections import defaultdict
from functools import lru_cache

import datasets
import evaluate


_CITATION = """\
@inproceedings{antol2015vqa,
  title     = {{VQA}: Visual Question Answering},
  author    = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
               Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {ICCV},
  year      = {2015}
}
@inproceedings{goyal2017making,
  title     = {Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
  author    = {Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
  booktitle = {CVPR},
  year      = {2017}
}
"""

_DESCRIPTION = """\
The soft accuracy of the VQA challenge, by the rule at https://visualqa.org/evaluation.html. An answer scores
min(number of people who gave it / 3, 1), averaged over all ways to leave out one of the ten people. Before that,
predictions and references are normalised in the same way: they are put in lower case; periods are removed except in
decimals, and commas between digits; other punctuation except apostrophes and colons becomes a space; number words
become digits; articles are removed; contractions get their missing apostrophes.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one answer per question.
    references (`list[list[str]]`): the answers that people gave to each question, with repetitions; ten in VQAv2. With
        fewer than four answers, all others must agree in place of three. A single answer is compared directly.
    answer_types (`list[str]`, *optional*): the type of each question, in the order of the predictions, to compute an
        accuracy for each type. Those of VQAv2 are "yes/no", "number" and "other".
Returns:
    `dict` with
    - vqa_accuracy (`float`): 0 to 1. Papers print it times 100.
    - vqa_accuracy_per_answer_type (`dict[str, float]`): only with `answer_types`.
Raises:
    `ValueError` if a question has no references, or the lengths of `answer_types` and the predictions differ.
Examples:
    >>> vqa_accuracy = load_metric("vqa_accuracy")
    >>> vqa_accuracy.compute(predictions=["Yes.", "a dog"], references=[["yes"] * 10, ["dog"] * 2 + ["cat"] * 8])
    {'vqa_accuracy': 0.8}
"""

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION_TO_SPACES = str.maketrans(dict.fromkeys('!"()+,-/;<=>?@[\\]_`{}', " "))
# without those that are another word if the apostrophe is missing: we'd, she'll, it's, let's, ...
CONTRACTIONS = """
ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't shan't she'd've she's shouldn't shouldn't've should've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that'd that'll
that's there'd there'd've there'll there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
weren't we've what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't wouldn't wouldn't've would've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            homepage="https://visualqa.org/evaluation.html",
            reference_urls=["https://arxiv.org/abs/1505.00468", "https://arxiv.org/abs/1612.00837"],
        )

    def _compute(self, predictions, references, answer_types=None):
        if answer_types is not None and len(answer_types) != len(predictions):
            raise ValueError(f"answer_types has {len(answer_types)} entries; there are {len(predictions)} predictions")
        scores, by_type = [], defaultdict(list)
        for i, (prediction, answers) in enumerate(zip(predictions, references)):
            if prediction is None:
                raise ValueError(f"predictions[{i}] is None; an answer must be a str, which may be empty")
            if not answers or None in answers:
                raise ValueError(f"references[{i}] is {answers}; each question needs at least one reference answer")
            scores.append(soft_accuracy(prediction, answers))
            if answer_types is not None:
                by_type[answer_types[i]].append(scores[-1])
        results = {"vqa_accuracy": mean(scores)}
        if answer_types is not None:
            results["vqa_accuracy_per_answer_type"] = {name: mean(by_type[name]) for name in sorted(by_type)}
        return results


def mean(scores):
    return sum(scores) / len(scores)


def soft_accuracy(prediction, answers):
    """min(matches / 3, 1) among all answers except one, averaged over the answer that is left out."""
    prediction = normalize_answer(prediction)
    matches = sum(normalize_answer(answer) == prediction for answer in answers)
    if len(answers) == 1:
        return float(matches)
    needed = min(3, len(answers) - 1)
    others = len(answers) - matches
    # leaving out a matching answer leaves one match fewer
    total = matches * min((matches - 1) / needed, 1) + others * min(matches / needed, 1)
    return total / len(answers)


@lru_cache(maxsize=2**16)
def normalize_answer(answer):
    answer = re.sub(r"(?<=\d),(?=\d)", "", answer.lower())
    answer = answer.translate(PUNCTUATION_TO_SPACES)
    answer = re.sub(r"\.(?!\d)", "", answer)
    words = (DIGITS.get(word, word) for word in answer.split() if word not in ARTICLES)
    return " ".join(WITH_APOSTROPHES.get(word, word) for word in words)


def lacking_apostrophes(contraction):
    """The spellings of a contraction without one or more apostrophes: couldntve, couldn'tve and couldnt've."""
    parts = contraction.split("'")
    for marks in itertools.product(("", "'"), repeat=len(parts) - 1):
        spelling = parts[0] + "".join(mark + part for mark, part in zip(marks, parts[1:]))
        if spelling != contraction:
            yield spelling


WITH_APOSTROPHES = {spelling: word for word in CONTRACTIONS for spelling in lacking_apostrophes(word)}
