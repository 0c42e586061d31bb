"""
Computes the scores of the COCO caption evaluation with pycocoevalcap: CIDEr, BLEU, METEOR, ROUGE-L and SPICE.

    caption_metrics = load_metric("caption_metrics")
    caption_metrics.compute(predictions=["a dog runs"], references=[["a dog is running", "the dog runs"]])
"""

import logging
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import datasets
import evaluate
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import get_stanford_models, spice
from pycocoevalcap.tokenizer import ptbtokenizer


logger = logging.getLogger(__name__)

_CITATION = """\
@article{chen2015coco,
  title   = {Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author  = {Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
             Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  journal = {arXiv preprint arXiv:1504.00325},
  year    = {2015}
}
@inproceedings{vedantam2015cider,
  title     = {{CIDEr}: Consensus-based Image Description Evaluation},
  author    = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {CVPR},
  year      = {2015}
}
@inproceedings{papineni2002bleu,
  title     = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author    = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle = {ACL},
  year      = {2002}
}
@inproceedings{denkowski2014meteor,
  title     = {Meteor Universal: Language Specific Translation Evaluation for Any Target Language},
  author    = {Denkowski, Michael and Lavie, Alon},
  booktitle = {EACL Workshop on Statistical Machine Translation},
  year      = {2014}
}
@inproceedings{lin2004rouge,
  title     = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author    = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year      = {2004}
}
@inproceedings{anderson2016spice,
  title     = {{SPICE}: Semantic Propositional Image Caption Evaluation},
  author    = {Anderson, Peter and Fernando, Basura and Johnson, Mark and Gould, Stephen},
  booktitle = {ECCV},
  year      = {2016}
}
"""

_DESCRIPTION = """\
The usual scores of image captions, exactly as in the COCO evaluation: CIDEr (in its variant CIDEr-D), BLEU-1 to
BLEU-4, METEOR, ROUGE-L and, on request, SPICE. Before scoring, Stanford's PTBTokenizer splits the texts and puts them
in lower case, and punctuation is removed. The tokeniser, METEOR and SPICE are Java programs.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): one caption per image.
    references (`list[list[str]]`): the captions that people wrote for each image, at least one; raw text.
    metrics (`list[str]`, *optional*): some of "cider", "bleu", "meteor", "rouge_l" and "spice". By default all except
        SPICE, which needs files that pycocoevalcap downloads separately.
    tokenizer (`str`, defaults to "ptb"): "ptb" is the tokeniser of all published scores; it needs Java. "regex"
        approximates it in Python, so that "cider", "bleu" and "rouge_l" need no Java. Its scores are close enough to
        follow a training, but not comparable with published ones.
    per_caption (`bool`, defaults to `False`): whether to return the scores of each image as well.
Returns:
    `dict` with a `float` for each of
    - cider: 0 to 10. Papers print it times 100: 1.351 is printed as 135.1. It weights words by how rare they are in
      the given references, so it is only meaningful for many images. It is 0 for a single image.
    - bleu_1, bleu_2, bleu_3, bleu_4, meteor, rouge_l, spice: 0 to 1. Papers print them times 100.
    With `per_caption=True`, also `<score>_per_caption` for each of them, a `list[float]` in the order of the
    predictions; and with BLEU, which is no mean over captions, `bleu_counts_per_caption`: right 1- to 4-grams, all 1-
    to 4-grams, length, and length of the nearest reference. BLEU of any captions is a formula of the sums of these.
Raises:
    `ValueError` for an unknown metric or tokenizer, or an image without references; `RuntimeError` if Java is missing
    or fails; `FileNotFoundError` if the files of SPICE are missing.
Examples:
    >>> caption_metrics = load_metric("caption_metrics")
    >>> predictions = ["a red bus waits here", "a dog runs on grass"]
    >>> references = [["a red bus waits there", "a bus"], ["a dog runs on grass"]]
    >>> caption_metrics.compute(predictions=predictions, references=references, metrics=["bleu", "rouge_l"])
"""

METRICS = ("cider", "bleu", "meteor", "rouge_l", "spice")
DEFAULT_METRICS = ("cider", "bleu", "meteor", "rouge_l")
TOKENIZERS = ("ptb", "regex")
SPICE_FILES = (f"{get_stanford_models.JAR}.jar", f"{get_stanford_models.JAR}-models.jar")

# a word before n't; a clitic; a word, which may be t-shirt or 2.5; any other character
TOKEN = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b|\w+(?:[-.,:&/]\w+)*|[^\w\s]")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CaptionMetrics(evaluate.Metric):
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
            homepage="https://cocodataset.org/#captions-eval",
            codebase_urls=["https://github.com/salaniz/pycocoevalcap", "https://github.com/tylin/coco-caption"],
            reference_urls=["https://arxiv.org/abs/1504.00325", "https://arxiv.org/abs/1411.5726"],
        )

    def _download_and_prepare(self, dl_manager):
        # warn when the metric is loaded, not after hours of captioning
        if shutil.which("java") is None:
            logger.warning(no_java("The tokeniser, METEOR and SPICE"))

    def _compute(self, predictions, references, metrics=None, tokenizer="ptb", per_caption=False):
        metrics = check_options(metrics, tokenizer)
        check_texts(predictions, references)
        if tokenizer == "ptb":
            require_java("The PTB tokeniser")
            tokenize = tokenize_ptb
        else:
            tokenize = tokenize_regex
        # As in the COCO evaluation, tokenise predictions and references separately: lines influence each other.
        flat = iter(tokenize([text for texts in references for text in texts]))
        references = {i: [next(flat) for _ in texts] for i, texts in enumerate(references)}
        predictions = {i: [text] for i, text in enumerate(tokenize(predictions))}

        results = {}
        for metric in metrics:
            scores = SCORERS[metric](references, predictions)
            results |= {name: float(score) for name, (score, _) in scores.items()}
            if per_caption:
                results |= {f"{name}_per_caption": [float(s) for s in each] for name, (_, each) in scores.items()}
        if per_caption and "bleu" in metrics:
            results["bleu_counts_per_caption"] = count_ngrams(references, predictions)
        return results


# ---- checks ----


def check_options(metrics, tokenizer):
    if metrics is None:
        metrics = DEFAULT_METRICS
    if isinstance(metrics, str):
        metrics = [metrics]
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics is {list(metrics)}; accepted are some of {list(METRICS)}")
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer is {tokenizer!r}; accepted are {list(TOKENIZERS)}")
    if "meteor" in metrics:
        require_java("METEOR")
    if "spice" in metrics:
        require_java("SPICE")
        require_spice_files()
    return list(dict.fromkeys(metrics))


def check_texts(predictions, references):
    for i, (prediction, texts) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"predictions[{i}] is None; a caption must be a str, which may be empty")
        if not texts or None in texts:
            raise ValueError(f"references[{i}] is {texts}; each image needs at least one reference caption")


def no_java(program):
    return (
        f"{program} cannot run: there is no `java` on the PATH. Install a Java runtime, such as Debian's "
        "`default-jre-headless` or conda-forge's `openjdk`. Without Java, "
        '`compute(..., metrics=["cider", "bleu", "rouge_l"], tokenizer="regex")` gives approximate scores.'
    )


def require_java(program):
    if shutil.which("java") is None:
        raise RuntimeError(no_java(program))


def require_spice_files():
    folder = Path(spice.__file__).with_name("lib")
    missing = [name for name in SPICE_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"SPICE needs {' and '.join(missing)} of Stanford CoreNLP 3.6.0 in {folder}. "
            "`python -m pycocoevalcap.spice.get_stanford_models` downloads them from nlp.stanford.edu. Or leave "
            '"spice" out of metrics.'
        )


# ---- tokens: n texts -> n texts of lower-case tokens, separated by spaces ----


def tokenize_ptb(texts):
    """
    Tokenises like PTBTokenizer of pycocoevalcap, but without writing a file into site-packages. The texts go through
    the standard input of the Java program, so that several processes can run at once.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # One line per text: a form feed or U+2028 would start a new line as well.
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    result = subprocess.run(command, input=lines, capture_output=True, encoding="utf-8")
    tokenized = result.stdout.split("\n")[:-1]
    if result.returncode != 0 or len(tokenized) != len(texts):
        raise RuntimeError(
            f"The PTB tokeniser (`{' '.join(command)}`) exited with status {result.returncode} and returned "
            f"{len(tokenized)} lines for {len(texts)} texts: {result.stderr.strip()}"
        )
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(token for token in line.split() if token not in dropped) for line in tokenized]


def tokenize_regex(texts):
    """Approximates `tokenize_ptb` without Java: equal for plain captions, but not for rare spellings."""
    return [" ".join(t for t in TOKEN.findall(text.lower()) if t not in "'`\"().?!,:;-–—…[]{}") for text in texts]


# ---- scorers: references {image: [texts]}, predictions {image: [text]} -> {name: (score, [score per image])} ----


def score_bleu(references, predictions):
    scores, per_caption = Bleu(4).compute_score(references, predictions, verbose=0)
    return {f"bleu_{n + 1}": (scores[n], per_caption[n]) for n in range(4)}


def count_ngrams(references, predictions):
    """For each image: right 1- to 4-grams, all 1- to 4-grams, length, and length of the nearest reference."""
    scorer = BleuScorer(n=4)
    for i, (prediction,) in predictions.items():
        scorer += (prediction, references[i])
    counts = []
    for own in scorer.ctest:
        nearest = min(own["reflen"], key=lambda length: (abs(length - own["testlen"]), length))
        counts.append([*own["correct"], *own["guess"], own["testlen"], nearest])
    return counts


def score_cider(references, predictions):
    return {"cider": Cider().compute_score(references, predictions)}


def score_rouge_l(references, predictions):
    return {"rouge_l": Rouge().compute_score(references, predictions)}


def score_meteor(references, predictions):
    scorer = Meteor()
    try:
        return {"meteor": scorer.compute_score(references, predictions)}
    except (OSError, ValueError) as error:  # the Java program ended, or its output is not a number
        scorer.meteor_p.kill()
        said = scorer.meteor_p.stderr.read().decode(errors="replace").strip()
        with suppress(OSError):
            scorer.meteor_p.stdin.close()
        if scorer.lock.locked():  # otherwise the scorer waits for it forever
            scorer.lock.release()
        raise RuntimeError(f"the Java program of METEOR failed ({error}): {said}") from error


def score_spice(references, predictions):
    with tempfile.TemporaryDirectory(prefix="spice-") as folder:
        before = spice.TEMP_DIR, spice.CACHE_DIR
        # absolute paths keep SPICE from writing into site-packages
        spice.TEMP_DIR, spice.CACHE_DIR = folder, str(Path(folder) / "cache")
        try:
            score, per_caption = spice.Spice().compute_score(references, predictions)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"the Java program of SPICE exited with status {error.returncode}; its output is above. It needs 8 GB "
                "of memory, and was written for Java 8."
            ) from error
        finally:
            spice.TEMP_DIR, spice.CACHE_DIR = before
    return {"spice": (score, [scores["All"]["f"] for scores in per_caption])}


SCORERS = {
    "cider": score_cider,
    "bleu": score_bleu,
    "meteor": score_meteor,
    "rouge_l": score_rouge_l,
    "spice": score_spice,
}
