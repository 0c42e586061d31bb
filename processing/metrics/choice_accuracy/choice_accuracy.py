"""
Computes the accuracy of multiple choice from written answers, and the accuracy of pairs as MMVP counts them.

    choice_accuracy = load_metric("choice_accuracy")
    choice_accuracy.compute(predictions=["B.", "(a)"], references=["B", "B"], options=[["cat", "dog"]] * 2)
"""

import re
from collections import Counter

import datasets
import evaluate


_CITATION = """\
@inproceedings{tong2024eyes,
  title     = {Eyes Wide Shut? {E}xploring the Visual Shortcomings of Multimodal {LLMs}},
  author    = {Tong, Shengbang and Liu, Zhuang and Zhai, Yuexiang and Ma, Yi and LeCun, Yann and Xie, Saining},
  booktitle = {CVPR},
  year      = {2024}
}
@article{li2023otterhd,
  title   = {{OtterHD}: A High-Resolution Multi-modality Model},
  author  = {Li, Bo and Zhang, Peiyuan and Yang, Jingkang and Zhang, Yuanhan and Pu, Fanyi and Liu, Ziwei},
  journal = {arXiv preprint arXiv:2311.04219},
  year    = {2023}
}
"""

_DESCRIPTION = """\
The accuracy of multiple choice, and that of pairs: as in MMVP, a pair counts if both of its questions are answered
right. The letter of an answer is, in this order: that of the option to which it is equal, unless it is only a letter;
the letter after "answer is" or "answer:"; the letter with which it begins; the only option whose text it has, where
"top left" does not have "left"; the only capital letter of an option that is a word of its own. An answer without a
letter is wrong.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one answer per question.
    references (`list[str]`): the letter of the right option, "A", "B" and so on.
    options (`list[list[str]]`): the texts of the options of each question, in the order of their letters.
    pairs (`list[str]`, *optional*): the name of the pair of each question, to compute the accuracy of pairs.
    question_ids (`list`, *optional*): the id of each question, to find questions that occur twice.
    per_question (`bool`, defaults to `False`): whether to return the letters and which are right as well.
Returns:
    `dict` with a `float` from 0 to 1 for each of
    - accuracy: the share of right answers.
    - pair_accuracy: the share of pairs with right answers only; with `pairs`.
    - read: the share of answers with a letter.
    With `per_question=True`, also `letters`, a `list` of `str` or `None`, and `is_right_per_question`, a `list[bool]`.
Raises:
    `ValueError` if a prediction is missing, a reference is none of the options, or an id occurs twice.
Examples:
    >>> choice_accuracy = load_metric("choice_accuracy")
    >>> choice_accuracy.compute(predictions=["B.", "(a)"], references=["B", "B"], options=[["cat", "dog"]] * 2)
    {'accuracy': 0.5, 'read': 1.0}
"""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NO_NOUN = "is|was|because|since|as|and|or"  # after these words, "A" is no article


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ChoiceAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2401.06209", "https://arxiv.org/abs/2311.04219"],
        )

    def _compute(self, predictions, references, options, pairs=None, question_ids=None, per_question=False):
        for name, values in (("options", options), ("pairs", pairs), ("question_ids", question_ids)):
            if values is not None and len(values) != len(predictions):
                raise ValueError(f"{name} has {len(values)} entries; there are {len(predictions)} predictions")
        if question_ids is not None:
            doubled = [question_id for question_id, number in Counter(question_ids).items() if number > 1]
            if doubled:
                raise ValueError(f"question_ids has {doubled[0]!r} twice; each question needs one prediction")
        for i, (prediction, reference, own) in enumerate(zip(predictions, references, options)):
            if prediction is None:
                raise ValueError(f"predictions[{i}] is None; an answer must be a str, which may be empty")
            if len(own) < 2 or not all(text.strip() for text in own):
                raise ValueError(f"options[{i}] is {own}; at least two are needed, and none is empty")
            if reference not in list(LETTERS[: len(own)]):
                raise ValueError(f"references[{i}] is {reference!r}; accepted are {', '.join(LETTERS[: len(own)])}")
        letters = [read_letter(prediction, own) for prediction, own in zip(predictions, options)]
        hits = [letter == reference for letter, reference in zip(letters, references)]
        results = {"accuracy": sum(hits) / len(hits)}
        if pairs is not None:
            both = {}
            for pair, hit in zip(pairs, hits):
                both[pair] = both.get(pair, True) and hit
            results["pair_accuracy"] = sum(both.values()) / len(both)
        results["read"] = sum(letter is not None for letter in letters) / len(letters)
        if per_question:
            results |= {"letters": letters, "is_right_per_question": hits}
        return results


def read_letter(answer, options):
    """The letter of an answer, or `None`."""
    letters = LETTERS[: len(options)]
    same = [letter for letter, option in zip(letters, options) if tidy(option) == tidy(answer)]
    if len(same) == 1 and len(tidy(answer)) > 1:
        return same[0]
    named = {letter: option for letter, option in zip(letters, options) if has_text(answer, option)}
    for letter, option in list(named.items()):
        if any(has_text(other, option) and tidy(other) != tidy(option) for other in named.values()):
            del named[letter]
    accepted = f"[{letters}{letters.lower()}]"
    for pattern in (rf"(?i:answer(?:\s+is|:))\s*:?\s*\(?({accepted})\b", rf"^\W*({accepted})(?:\W|$)"):
        found = re.search(pattern, answer)
        if found and not is_article(found[1], answer[found.end(1) :], named.get("A")):
            return found[1].upper()
    if len(named) == 1:
        return next(iter(named))
    # "A dog" at the beginning of a sentence, and "I see", have no letter
    alone = set(re.findall(rf"(?<!\w)([{letters}])(?!\w)", re.sub(r"(?:(?:^|[.!?]\s+)A|\bI)\s+(?=\w)", "", answer)))
    return alone.pop() if len(alone) == 1 else None


def is_article(letter, rest, first_option):
    """Whether a letter is the article of the words that follow. "A dog, no cat" is option A if that is "dog"."""
    if letter not in "Aa" or not re.match(r"\s+\w", rest) or re.match(rf"\s+(?:{_NO_NOUN})\b", rest):
        return False
    begins = first_option is not None and re.match(rf"\s+{re.escape(tidy(first_option))}(?!\w)", rest, re.IGNORECASE)
    return letter == "a" or not begins


def has_text(answer, option):
    return re.search(rf"(?<!\w){re.escape(option.strip().rstrip('.'))}(?!\w)", answer, re.IGNORECASE) is not None


def tidy(text):
    return text.strip().rstrip(".").strip().casefold()
