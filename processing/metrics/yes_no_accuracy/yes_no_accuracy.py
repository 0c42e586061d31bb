"""
Computes the scores of POPE for questions that are answered by yes or no: accuracy, precision, recall, F1, yes ratio.

    yes_no_accuracy = load_metric("yes_no_accuracy")
    yes_no_accuracy.compute(predictions=["Yes, there is.", "no"], references=["yes", "yes"])
"""

from collections import Counter

import datasets
import evaluate


_CITATION = """\
@inproceedings{li2023evaluating,
  title     = {Evaluating Object Hallucination in Large Vision-Language Models},
  author    = {Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle = {EMNLP},
  year      = {2023}
}
"""

_DESCRIPTION = """\
The scores of POPE, which asks whether objects are in an image. "yes" is the positive class. As in POPE's program, only
the first sentence of an answer counts: it means no if one of its words is "no", "No" or "not", otherwise yes.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one answer per question.
    references (`list[str]`): "yes" or "no" for each question.
    question_ids (`list`, *optional*): the id of each question, to find questions that occur twice.
    per_question (`bool`, defaults to `False`): whether to return what each answer means as well.
Returns:
    `dict` with a `float` from 0 to 1 for each of
    - accuracy: the share of right answers.
    - precision: of the answers "yes", the share that is right; 0 without one.
    - recall: of the questions whose answer is "yes", the share that was answered so; 0 without one.
    - f1: the harmonic mean of precision and recall; 0 if both are 0.
    - yes_ratio: the share of answers "yes".
    With `per_question=True`, also `is_yes_per_question`, a `list[bool]`.
Raises:
    `ValueError` if a prediction is missing, a reference is neither "yes" nor "no", or an id occurs twice.
Examples:
    >>> yes_no_accuracy = load_metric("yes_no_accuracy")
    >>> yes_no_accuracy.compute(predictions=["Yes, there is.", "no"], references=["yes", "yes"])
    {'accuracy': 0.5, 'precision': 1.0, 'recall': 0.5, 'f1': 0.6666666666666666, 'yes_ratio': 0.5}
"""

NEGATIONS = {"no", "No", "not"}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class YesNoAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2305.10355"],
        )

    def _compute(self, predictions, references, question_ids=None, per_question=False):
        if question_ids is not None:
            if len(question_ids) != len(predictions):
                raise ValueError(
                    f"question_ids has {len(question_ids)} entries; there are {len(predictions)} predictions"
                )
            doubled = [question_id for question_id, number in Counter(question_ids).items() if number > 1]
            if doubled:
                raise ValueError(f"question_ids has {doubled[0]!r} twice; each question needs one prediction")
        for i, (prediction, reference) in enumerate(zip(predictions, references)):
            if prediction is None:
                raise ValueError(f"predictions[{i}] is None; an answer must be a str, which may be empty")
            if reference not in ("yes", "no"):
                raise ValueError(f"references[{i}] is {reference!r}; accepted are 'yes' and 'no'")
        says = [means_yes(prediction) for prediction in predictions]
        truth = [reference == "yes" for reference in references]
        both = sum(said and true for said, true in zip(says, truth))
        results = {
            "accuracy": sum(said == true for said, true in zip(says, truth)) / len(says),
            "precision": both / max(sum(says), 1),
            "recall": both / max(sum(truth), 1),
            "f1": 2 * both / max(sum(says) + sum(truth), 1),
            "yes_ratio": sum(says) / len(says),
        }
        return {**results, "is_yes_per_question": says} if per_question else results


def means_yes(answer):
    first_sentence = answer.split(".")[0].replace(",", "")
    return not NEGATIONS & set(first_sentence.split(" "))
