"""
Computes the accuracy of the VQA challenge: an answer scores 1 if three people gave it.

    vqa_accuracy = load_metric("vqa_accuracy")
    vqa_accuracy.compute(predictions=["two"], references=[["2", "2", "2", "2", "3", "2", "two", "2", "2", "many"]])
"""

import re
from collections import Counter, defaultdict
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
predictions and references are processed as by the challenge's program: periods are removed except in front of a digit;
a mark of punctuation is removed if it stands next to a space anywhere in the answer, or if a number has a comma, and
else becomes a space; apostrophes and colons stay; all becomes lower case; number words become digits; articles are
removed; contractions get their missing apostrophe.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one answer per question.
    references (`list[list[str]]`): the answers that people gave to each question, with repetitions; ten in VQAv2. With
        fewer than four answers, all others must agree in place of three. A single answer is compared directly.
    answer_types (`list[str]`, *optional*): the type of each question, in the order of the predictions, to compute an
        accuracy for each type. Those of VQAv2 are "yes/no", "number" and "other".
    question_ids (`list`, *optional*): the id of each question, to find questions that occur twice.
    per_question (`bool`, defaults to `False`): whether to return the accuracy of each question as well.
Returns:
    `dict` with
    - vqa_accuracy (`float`): 0 to 1. Papers print it times 100.
    - vqa_accuracy_per_answer_type (`dict[str, float]`): only with `answer_types`.
    - vqa_accuracy_per_question (`list[float]`): only with `per_question=True`.
Raises:
    `ValueError` if a prediction is missing, a question has no references, an id occurs twice, or the lengths of
    `answer_types` or `question_ids` and the predictions differ.
Examples:
    >>> vqa_accuracy = load_metric("vqa_accuracy")
    >>> vqa_accuracy.compute(predictions=["Yes.", "a dog"], references=[["yes"] * 10, ["dog"] * 2 + ["cat"] * 8])
    {'vqa_accuracy': 0.8}
"""

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = '!"()+,-/;<=>?@[\\]_`{}'
MOST_PERIODS = 32  # the program removes no more from an answer
# Those that the program knows. Of those with "I", and of that'd, that'll and there'll, it mends no spelling.
CONTRACTIONS = """
ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've shouldn't shouldn't've should've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've weren't we've what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't wouldn't wouldn't've would've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
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

    def _compute(self, predictions, references, answer_types=None, question_ids=None, per_question=False):
        for name, values in (("answer_types", answer_types), ("question_ids", question_ids)):
            if values is not None and len(values) != len(predictions):
                raise ValueError(f"{name} has {len(values)} entries; there are {len(predictions)} predictions")
        if question_ids is not None:
            doubled = [question_id for question_id, number in Counter(question_ids).items() if number > 1]
            if doubled:
                raise ValueError(f"question_ids has {doubled[0]!r} twice; each question needs one prediction")
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
        if per_question:
            results["vqa_accuracy_per_question"] = scores
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
    """The answer as the challenge's program compares it."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_comma_in_number = re.search(r"\d,+\d", answer) is not None
    is_removed = {m: has_comma_in_number or f"{m} " in answer or f" {m}" in answer for m in PUNCTUATION}
    answer = answer.translate(str.maketrans({mark: "" if removed else " " for mark, removed in is_removed.items()}))
    answer = re.sub(r"\.(?!\d)", "", answer, count=MOST_PERIODS)
    words = (DIGITS.get(word, word) for word in answer.lower().split())
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def without_one_apostrophe(contraction):
    """couldn'tve and couldnt've for couldn't've."""
    for found in re.finditer("'", contraction):
        yield contraction[: found.start()] + contraction[found.end() :]


SPELLINGS = {spelling: word for word in CONTRACTIONS for spelling in without_one_apostrophe(word)}
SPELLINGS["somebody'd"] = "somebodyd"  # as in the program
