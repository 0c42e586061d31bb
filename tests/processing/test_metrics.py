"""The metrics load from their folders offline, and agree with hand-computed scores and the original programs."""

import importlib.util
import logging
import math
import random
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest


evaluate = pytest.importorskip("evaluate")
pytest.importorskip("pycocoevalcap")
from pycocoevalcap.spice import spice  # noqa: E402
from pycocoevalcap.tokenizer import ptbtokenizer  # noqa: E402

from modeling_prismer.processing.metrics import load_metric  # noqa: E402
from modeling_prismer.processing.metrics.caption_metrics.caption_metrics import tokenize_regex  # noqa: E402
from modeling_prismer.processing.metrics.choice_accuracy.choice_accuracy import read_letter  # noqa: E402
from modeling_prismer.processing.metrics.vqa_accuracy.vqa_accuracy import (  # noqa: E402
    CONTRACTIONS,
    PUNCTUATION,
    SPELLINGS,
    normalize_answer,
    soft_accuracy,
)
from modeling_prismer.processing.metrics.yes_no_accuracy.yes_no_accuracy import means_yes  # noqa: E402


METRICS = Path(__file__).parents[2] / "processing" / "metrics"
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

# The first is the example in cocoEvalCapDemo.ipynb of coco-caption; the others are difficult for a tokeniser.
PREDICTIONS = [
    "train traveling down a track in front of a road",
    "a white cake isn't on the table.",
    "Two dogs play with a red ball",
]
REFERENCES = [
    [
        "A train traveling down tracks next to lights.",
        "A blue and silver train next to train station and trees.",
        "A blue train is next to a sidewalk on the rails.",
        "A passenger train pulls into a train station.",
        "A train coming down the tracks arriving at a station.",
    ],
    ["A baker's cake, half-eaten, isn't on the table.", 'The "wedding" cake sits on a plate (white).'],
    ["Two dogs run; one doesn't.\n", "A dog's ball -- it's red!", "The dogs play near a 2.5 m fence at 10:30 a.m."],
]
# From COCOEvalCap of pycocoevalcap 1.2, without SPICE: CIDEr of these captions, and all scores of these together with
# the degenerate ones.
COCO_CIDER = 1.5052149592778292
COCO_SCORES = {
    "cider": 0.4585095933671904,
    "bleu_1": 0.4198250728850734,
    "bleu_2": 0.22243961785133917,
    "bleu_3": 0.12054113492502815,
    "bleu_4": 0.06669843432469776,
    "meteor": 0.15520221682642654,
    "rouge_l": 0.25866513461507795,
}


@pytest.fixture(scope="module", autouse=True)
def own_caches(tmp_path_factory):
    """Moves the caches of evaluate into a temporary folder, and restores its imported modules afterwards."""
    folder = tmp_path_factory.mktemp("huggingface")
    imported = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "evaluate_modules"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        monkeypatch.setattr(sys, "path", list(sys.path))
        yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]
    sys.modules.update(imported)


def load(name, keep_in_memory=True):
    """Loads a metric. In memory, since evaluate keeps its file locked after an error, which costs a second."""
    return evaluate.load(str(METRICS / name), keep_in_memory=keep_in_memory)


@pytest.fixture(scope="module")
def caption_metrics():
    return load("caption_metrics")


@pytest.fixture(scope="module")
def vqa_accuracy():
    return load("vqa_accuracy")


@pytest.fixture(scope="module")
def top_accuracy():
    return load("top_accuracy")


@pytest.fixture(scope="module")
def yes_no_accuracy():
    return load("yes_no_accuracy")


@pytest.fixture(scope="module")
def choice_accuracy():
    return load("choice_accuracy")


@pytest.fixture
def program_instead_of_java(tmp_path, monkeypatch):
    """Puts a Python program named `java` on the PATH, and nothing else."""

    def put(source):
        path = tmp_path / "bin" / "java"
        path.parent.mkdir()
        path.write_text(f"#!{sys.executable}\n{source}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))

    return put


@pytest.fixture
def no_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))


# ---- all metrics ----


@pytest.mark.parametrize(
    "name", ["caption_metrics", "vqa_accuracy", "top_accuracy", "yes_no_accuracy", "choice_accuracy"]
)
def test_metric_describes_itself(name, request):
    metric = request.getfixturevalue(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert (
        metric.citation.startswith("@") and metric.description and metric.inputs_description in metric.compute.__doc__
    )
    features = metric.features if isinstance(metric.features, list) else [metric.features]
    assert all(set(feature) == {"predictions", "references"} for feature in features)


def test_metric_needs_no_other_files(caption_metrics, own_caches):
    assert Path(sys.modules[type(caption_metrics).__module__].__file__).is_relative_to(own_caches)


def test_batches_give_the_result_of_one_call(vqa_accuracy):
    answers = [["red", "red", "red", "blue"], ["no"] * 4, ["two", "2", "3", "4"]]
    predictions = ["blue", "no", "2"]
    vqa_accuracy.add_batch(predictions=predictions[:2], references=answers[:2])
    vqa_accuracy.add(prediction=predictions[2], reference=answers[2])
    assert vqa_accuracy.compute() == vqa_accuracy.compute(predictions=predictions, references=answers)


def test_parallel_evaluations_are_independent(caption_metrics):
    def score(number):
        metric = load("caption_metrics", keep_in_memory=False)
        for prediction, texts in zip(PREDICTIONS, REFERENCES):
            metric.add(prediction=prediction if number else texts[0], reference=texts)
        return metric.compute(metrics=["rouge_l"], tokenizer="regex")["rouge_l"]

    with ThreadPoolExecutor(2) as pool:
        same, other = pool.map(score, [0, 1])
    assert same == 1.0 and 0 < other < 0.7


# ---- captions ----


def test_caption_scores_agree_with_hand_computed_ones(caption_metrics):
    # The images share no word, so each n-gram has the same idf. The cosines of the 1-, 2-, 3- and 4-grams are 3/4,
    # 2/3, 1/2 and 0 for the first image, and 1 for the second.
    scores = caption_metrics.compute(
        predictions=["a red bus waits", "one dog runs fast"],
        references=[["a red bus stops"], ["one dog runs fast"]],
        metrics=["cider", "bleu", "rouge_l"],
        tokenizer="regex",
        per_caption=True,
    )
    assert scores["cider_per_caption"] == pytest.approx([10 * (3 / 4 + 2 / 3 + 1 / 2) / 4, 10])
    assert scores["cider"] == pytest.approx(np.mean(scores["cider_per_caption"]))
    precisions = [7 / 8, 5 / 6, 3 / 4, 1 / 2]  # over both captions
    for n in range(1, 5):
        assert scores[f"bleu_{n}"] == pytest.approx(math.prod(precisions[:n]) ** (1 / n))
    assert scores["bleu_1_per_caption"] == pytest.approx([3 / 4, 1])
    assert scores["rouge_l_per_caption"] == pytest.approx([3 / 4, 1])


def test_bleu_and_cider_lower_scores_of_other_lengths(caption_metrics):
    scores = caption_metrics.compute(
        predictions=["a red bus", "one dog runs fast"],
        references=[["a red bus waits here"], ["one dog runs fast"]],
        metrics=["bleu", "cider"],
        tokenizer="regex",
        per_caption=True,
    )
    assert scores["bleu_1_per_caption"][0] == pytest.approx(math.exp(1 - 5 / 3))
    cosines = [math.sqrt(3 / 5), math.sqrt(2 / 4), math.sqrt(1 / 3), 0]
    # the length is the number of 2-grams; sigma is 6
    assert scores["cider_per_caption"][0] == pytest.approx(10 * sum(cosines) / 4 * math.exp(-((2 - 4) ** 2) / 72))


def degenerate_captions():
    """Predictions and references of random words and marks, some of them empty."""
    source = random.Random(0)
    words = "a the red dog's cat runs, on ( grass ) -- 2.5 it's U.S. . ! couldn't \u00e9 T-shirt".split(" ")

    def caption():
        return " ".join(source.choices(words, k=source.randint(1, 9)))

    predictions = [caption() for _ in range(60)] + ["", "?!", " ", "a dog"]
    references = [[caption() for _ in range(source.randint(1, 4))] for _ in range(60)]
    return predictions, references + [["a dog"], ["a dog", ""], [""], ["...", "!"]]


@needs_java
def test_scores_equal_those_of_the_coco_evaluation(caption_metrics):
    predictions, references = degenerate_captions()
    before = set(Path(ptbtokenizer.__file__).parent.iterdir())
    scores = caption_metrics.compute(predictions=PREDICTIONS + predictions, references=REFERENCES + references)
    assert scores == pytest.approx(COCO_SCORES, rel=1e-9)
    assert set(Path(ptbtokenizer.__file__).parent.iterdir()) == before


@needs_java
def test_any_characters_keep_texts_separate(caption_metrics):
    predictions = ["", "a\u2028red\x0cbus\n", ".", "a red bus", ""]
    scores = caption_metrics.compute(
        predictions=predictions, references=[["a red bus"]] * 5, metrics="rouge_l", per_caption=True
    )
    assert scores["rouge_l_per_caption"] == [0, 1, 0, 1, 0]


def test_regex_and_ptb_agree_on_plain_captions():
    texts = ["A baker's cake, half-eaten, isn't on the table.", 'The "old" cake -- it\'s 2.5 m; a/b & $ 3!', "I can't"]
    assert tokenize_regex(texts) == [
        "a baker 's cake half-eaten is n't on the table",
        "the old cake it 's 2.5 m a/b & $ 3",
        "i ca n't",
    ]


def test_loading_without_java_warns(no_java, caplog):
    with caplog.at_level(logging.WARNING):
        load("caption_metrics")
    assert "no `java` on the PATH" in caplog.text


@pytest.mark.parametrize(
    ("options", "program"),
    [
        ({"metrics": ["cider"]}, "The PTB tokeniser"),
        ({"metrics": ["cider", "meteor"], "tokenizer": "regex"}, "METEOR"),
        ({"metrics": ["spice"], "tokenizer": "regex"}, "SPICE"),
    ],
)
def test_missing_java_names_the_program(caption_metrics, no_java, options, program):
    with pytest.raises(RuntimeError, match=f'{program} cannot run: .*default-jre-headless.*tokenizer="regex"'):
        caption_metrics.compute(predictions=PREDICTIONS, references=REFERENCES, **options)


def test_regex_tokenizer_needs_no_java(caption_metrics, no_java):
    metrics = ["rouge_l", "bleu", "cider"]
    scores = caption_metrics.compute(
        predictions=PREDICTIONS, references=REFERENCES, metrics=metrics, tokenizer="regex"
    )
    assert scores["cider"] == pytest.approx(COCO_CIDER, abs=0.1)
    assert list(scores) == ["rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider"]


@pytest.mark.parametrize("options", [{"metrics": ["bleu"]}, {"metrics": ["meteor"], "tokenizer": "regex"}])
def test_failure_of_a_java_program_shows_its_message(caption_metrics, program_instead_of_java, options):
    program_instead_of_java('import sys; sys.exit("no memory left")')
    with pytest.raises(RuntimeError, match="no memory left"):
        caption_metrics.compute(predictions=PREDICTIONS, references=REFERENCES, **options)


def test_missing_files_of_spice_are_named(caption_metrics, program_instead_of_java, tmp_path, monkeypatch):
    program_instead_of_java("")
    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stanford-corenlp-3.6.0.jar").touch()
    with pytest.raises(FileNotFoundError, match="SPICE needs stanford-corenlp-3.6.0-models.jar .*get_stanford_models"):
        caption_metrics.compute(predictions=PREDICTIONS, references=REFERENCES, metrics=["spice"])


def test_spice_runs_and_writes_nothing_next_to_its_files(
    caption_metrics, program_instead_of_java, tmp_path, monkeypatch
):
    # this program reads and writes like SPICE, and scores 1 if the caption is a reference
    program_instead_of_java(
        "import json, sys\n"
        "rows = json.load(open(sys.argv[4]))\n"
        "of = lambda row: [{'f': float(row['test'] in row['refs'])}] * 3\n"
        "scores = [{'image_id': r['image_id'], 'scores': dict(zip(['All', 'Color', 'Size'], of(r)))} for r in rows]\n"
        "json.dump(scores, open(sys.argv[sys.argv.index('-out') + 1], 'w'))\n"
    )
    package = tmp_path / "spice"
    (package / "lib").mkdir(parents=True)
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (package / "lib" / name).touch()
    monkeypatch.setattr(spice, "__file__", str(package / "spice.py"))
    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    scores = caption_metrics.compute(
        predictions=["a dog", "a cat"],
        references=[["A dog."], ["a bird"]],
        metrics=["spice"],
        tokenizer="regex",
        per_caption=True,
    )
    assert scores == {"spice": 0.5, "spice_per_caption": [1, 0]}
    assert [path.name for path in package.iterdir()] == ["lib"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["cider", "bleau"]}, r"metrics is \['cider', 'bleau'\]; accepted are some of"),
        ({"metrics": []}, "metrics is "),
        ({"tokenizer": "wordpiece"}, r"tokenizer is 'wordpiece'; accepted are \['ptb', 'regex'\]"),
        ({"references": [["a"], [], ["c"]]}, r"references\[1\] is \[\]"),
        ({"predictions": ["a", "b", None]}, r"predictions\[2\] is None"),
    ],
)
def test_invalid_captions_and_options_are_refused(caption_metrics, arguments, message):
    texts = {"predictions": PREDICTIONS, "references": REFERENCES, "metrics": ["bleu"], "tokenizer": "regex"}
    with pytest.raises(ValueError, match=message):
        caption_metrics.compute(**(texts | arguments))


# ---- answers ----


@pytest.mark.parametrize(("people", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten_answers(people, accuracy):
    # one person: 9 of the 10 sets of nine have the answer, once: 9/10 * 1/3; three: 3/10 * 2/3 + 7/10 * 1
    assert soft_accuracy("red", ["red"] * people + ["blue"] * (10 - people)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answers", "accuracy"),
    [(["red"], 1), (["blue"], 0), (["red", "red"], 1), (["red", "blue"], 0.5), (["red"] * 3, 1), (["red"] * 4, 1)],
)
def test_soft_accuracy_of_few_answers_needs_agreement(answers, accuracy):
    assert soft_accuracy("red", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        # the examples on https://visualqa.org/evaluation.html
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        # one for each of its rules
        ("Yes.", "yes"),
        ("3.5 miles.", "3.5 miles"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("the man on a horse", "man on horse"),
        ("couldn'tve", "couldn't've"),
        ("well", "well"),
        ("red,white/blue (mostly)!", "red white blue mostly"),
        ("\tblack \n and white", "black and white"),
        # what the challenge's program makes of rare spellings
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("im an artist", "im artist"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("red, white", "red white"),
        ("3. 5.", "3 5"),
        (".5 U.S.A.", ".5 usa"),
        ("what?!", "what"),
        ("50% #1 a&b", "50% #1 a&b"),
        # nothing is left of these
        ("", ""),
        (" \n", ""),
        ("?!", ""),
        ("the", ""),
    ],
)
def test_answer_normalization(answer, normalized):
    assert normalize_answer(answer) == normalized


def generated_answers(number):
    """Answers with all that the processing is about."""
    source = random.Random(0)
    words = [*CONTRACTIONS, *SPELLINGS, "A", "an", "the", "none", "Two", "ten", "eleven", "I'm", "im", "T-shirt", ""]
    words += ["1,000", "10,9,8", "3.5", "2:50", "u.s.a", "girl's", "."]
    marks = [*PUNCTUATION, *".:'&%$#*~^|", *[" "] * 20, "\n", "\t", "  "]
    for _ in range(number):
        pieces = [
            source.choice(words) + source.choice([source.choice(marks), ""]) for _ in range(source.randint(0, 6))
        ]
        yield "".join(pieces) + source.choice(["", "", "", "." * 40 + " x."])


def test_processing_equals_that_of_lmms_eval():
    package = importlib.util.find_spec("lmms_eval")
    if package is None:
        pytest.skip("needs lmms-eval")
    path = Path(package.submodule_search_locations[0], "tasks", "_task_utils", "vqa_eval_metric.py")
    spec = importlib.util.spec_from_file_location("vqa_eval_metric", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.EvalAIAnswerProcessor()
    answers = list(generated_answers(1000))
    expected = []
    for answer in answers:  # as its task vqav2 does
        answer = answer.replace("\n", " ").replace("\t", " ").strip()
        expected.append(theirs.process_digit_article(theirs.process_punctuation(answer)))
    assert len(set(expected)) > 800
    assert [normalize_answer(answer) for answer in answers] == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "accuracy"),
    [
        ("", ["", "", "", "red"], 1),  # an empty answer is an answer that people may have given
        ("?", ["!"], 1),
        ("red", ["", "?"], 0),
        ("", ["red"] * 10, 0),
    ],
)
def test_empty_answers_are_compared_as_any_other(vqa_accuracy, prediction, answers, accuracy):
    scores = vqa_accuracy.compute(predictions=[prediction], references=[answers])
    assert scores["vqa_accuracy"] == pytest.approx(accuracy, abs=0.26 if len(answers) == 4 else 0)


def test_accuracy_of_each_question(vqa_accuracy):
    scores = vqa_accuracy.compute(
        predictions=["red", "no"], references=[["red"] * 3, ["yes"]], question_ids=[7, 8], per_question=True
    )
    assert scores == {"vqa_accuracy": 0.5, "vqa_accuracy_per_question": [1, 0]}


def test_vqa_accuracy_averages_over_questions_and_types(vqa_accuracy):
    scores = vqa_accuracy.compute(
        predictions=["Yes.", "a dog", "3"],
        references=[["yes"] * 10, ["dog"] * 2 + ["cat"] * 8, ["three"] + ["4"] * 9],
        answer_types=["yes/no", "other", "other"],
    )
    assert scores["vqa_accuracy"] == pytest.approx((1 + 0.6 + 0.3) / 3)
    assert scores["vqa_accuracy_per_answer_type"] == pytest.approx({"other": 0.45, "yes/no": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"references": [["a"], []]}, r"references\[1\] is \[\]"),
        ({"predictions": ["a", None]}, r"predictions\[1\] is None"),
        ({"answer_types": ["other"]}, "answer_types has 1 entries; there are 2 predictions"),
        ({"question_ids": [7]}, "question_ids has 1 entries; there are 2 predictions"),
        ({"question_ids": [7, 7]}, "question_ids has 7 twice; each question needs one prediction"),
    ],
)
def test_invalid_answers_are_refused(vqa_accuracy, arguments, message):
    with pytest.raises(ValueError, match=message):
        vqa_accuracy.compute(**({"predictions": ["a", "b"], "references": [["a"], ["b"]]} | arguments))


# ---- yes and no ----


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("Yes, there is a dog in the image.", True),
        ("No, there is no dog in the image.", False),
        ("no", False),
        ("There is not a dog.", False),
        ("There is a dog. But no cat.", True),  # the first sentence counts
        ("I do not know", False),
        ("nobody", True),
        ("NO", True),  # as POPE's program reads it
        ("No!", True),
        ("", True),
    ],
)
def test_answers_mean_yes_or_no_as_in_pope(answer, is_yes):
    assert means_yes(answer) == is_yes


def test_pope_scores_agree_with_hand_computed_ones(yes_no_accuracy):
    # yes is right: 3 answers yes (2 of them right), 2 answers no (1 of them right), 1 answer without either word
    predictions = ["Yes.", "Yes, a dog", "yes", "No, there is none", "no", "A dog"]
    references = ["yes", "yes", "no", "no", "yes", "no"]
    scores = yes_no_accuracy.compute(predictions=predictions, references=references, per_question=True)
    assert scores.pop("is_yes_per_question") == [True, True, True, False, False, True]
    # says yes 4 times, right 2 times; the answer is yes 3 times
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 6,
            "precision": 2 / 4,
            "recall": 2 / 3,
            "f1": 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3),
            "yes_ratio": 4 / 6,
        }
    )
    never = yes_no_accuracy.compute(predictions=["no", "no"], references=["yes", "no"])
    assert never == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": ["yes", None]}, r"predictions\[1\] is None"),
        ({"references": ["yes", "maybe"]}, r"references\[1\] is 'maybe'; accepted are 'yes' and 'no'"),
        ({"references": ["yes", ""]}, r"references\[1\] is ''"),
        ({"question_ids": ["a", "a"]}, "question_ids has 'a' twice"),
        ({"question_ids": ["a"]}, "question_ids has 1 entries; there are 2 predictions"),
    ],
)
def test_invalid_yes_and_no_are_refused(yes_no_accuracy, arguments, message):
    with pytest.raises(ValueError, match=message):
        yes_no_accuracy.compute(**({"predictions": ["yes", "no"], "references": ["yes", "no"]} | arguments))


# ---- multiple choice ----


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(a) Open", "A"),
        ("A. Open", "A"),
        ("The answer is (B).", "B"),
        ("Answer: a", "A"),
        ("I would say the answer is B, since it is closed", "B"),
        ("It is closed.", "B"),
        ("a closed door", "B"),  # an article is no letter
        ("I choose option B", "B"),
        ("It must be A", "A"),
        ("open or closed?", None),
        ("A or B", "A"),
        ("Either option A or option B", None),
        ("disclosed", None),
        ("C", None),
        ("", None),
        ("?", None),
    ],
)
def test_letter_of_an_answer(answer, letter):
    assert read_letter(answer, ["Open", "Closed"]) == letter


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("top left", ["left", "top left", "right"], "B"),
        ("It is at the top left.", ["left", "top left", "right"], "B"),
        ("two dogs", ["dogs", "two dogs"], "B"),
        ("The left.", ["left", "top left", "right"], "A"),
        ("left and right", ["left", "top left", "right"], None),
        ("Left or top left.", ["left", "left or top left"], "B"),
        ("a dog", ["a cat", "A dog."], "B"),
        ("B", ["B", "C"], "B"),  # a letter, as the prompt asks for one
        ("dog", ["dog", "dog"], None),
    ],
)
def test_the_longest_option_counts(answer, options, letter):
    assert read_letter(answer, options) == letter


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("A cat.", ["dog", "cat"], "B"),
        ("A black cat is on the sofa.", ["dog", "cat"], "B"),
        ("The answer is A cat", ["dog", "cat"], "B"),
        ("A dog, not a cat", ["dog", "cat"], "A"),
        ("A red ball", ["red", "red ball"], "B"),
        ("A bird", ["dog", "cat"], None),
        ("A is right", ["dog", "cat"], "A"),
        ("A: a cat would be smaller", ["dog", "cat"], "A"),
    ],
)
def test_an_article_is_no_letter(answer, options, letter):
    assert read_letter(answer, options) == letter


def test_pairs_agree_with_hand_computed_ones(choice_accuracy):
    # MMVP: a pair counts if both are right: here the first and not the second; 5 of 6 are right, 6 have a letter
    scores = choice_accuracy.compute(
        predictions=["(a)", "B. closed", "(a)", "(a) open", "closed", "open"],
        references=["A", "B", "A", "B", "B", "A"],
        options=[["open", "closed"]] * 6,
        pairs=["1", "1", "2", "2", "3", "3"],
        per_question=True,
    )
    assert scores["accuracy"] == pytest.approx(5 / 6) and scores["pair_accuracy"] == pytest.approx(2 / 3)
    assert scores["read"] == 1 and scores["letters"] == ["A", "B", "A", "A", "B", "A"]
    assert scores["is_right_per_question"] == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": ["A", None]}, r"predictions\[1\] is None"),
        ({"references": ["A", "C"]}, r"references\[1\] is 'C'; accepted are A, B"),
        ({"options": [["x", "y"], ["x"]]}, r"options\[1\] is \['x'\]; at least two"),
        ({"options": [["x", "y"], ["x", " "]]}, r"options\[1\] is .* none is empty"),
        ({"options": [["x", "y"]]}, "options has 1 entries; there are 2 predictions"),
        ({"pairs": ["1"]}, "pairs has 1 entries"),
        ({"question_ids": [1, 1]}, "question_ids has 1 twice"),
    ],
)
def test_invalid_choices_are_refused(choice_accuracy, arguments, message):
    given = {"predictions": ["A", "B"], "references": ["A", "B"], "options": [["x", "y"]] * 2}
    with pytest.raises(ValueError, match=message):
        choice_accuracy.compute(**(given | arguments))


# ---- rankings ----


def test_top_accuracy_counts_the_first_k_classes(top_accuracy):
    rankings = np.array([[3, 1, 7], [5, 4, 1], [0, 2, 9], [8, 6, 4]])
    scores = top_accuracy.compute(predictions=rankings, references=[3, 4, 9, 1], k=(1, 2, 3))
    assert scores == {"top_1": 0.25, "top_2": 0.5, "top_3": 0.75}


def test_top_accuracy_accepts_class_names(top_accuracy):
    assert top_accuracy.compute(predictions=[["tench", "eel"], ["eel", "tench"]], references=["eel", "eel"]) == {
        "top_1": 0.5
    }


@pytest.mark.parametrize(
    ("k", "message"), [(0, "k is 0; accepted"), (3, r"predictions\[0\] ranks 2 classes; k = 3 needs")]
)
def test_k_must_fit_the_rankings(top_accuracy, k, message):
    with pytest.raises(ValueError, match=message):
        top_accuracy.compute(predictions=[[3, 1], [5, 4]], references=[1, 5], k=k)


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match="no metric 'bleu'; there are caption_metrics, choice_accuracy, top_acc"):
        load_metric("bleu")
    assert load_metric("top_accuracy").compute(predictions=[["a"]], references=["a"]) == {"top_1": 1.0}
