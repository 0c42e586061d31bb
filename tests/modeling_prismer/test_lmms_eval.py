"""Evaluation with lmms-eval, on tasks from local files: generated answers, ranked answers, options, and captions."""

from importlib.metadata import entry_points

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image, ImageDraw

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path, sample_image

from ..processing.tiny_lm_processors import make_model, make_processor


try:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model, list_available_models
    from lmms_eval.tasks import TaskManager

    from modeling_prismer.lmms_eval_model import Prismer, Question
except ImportError as error:
    pytest.skip(f"lmms-eval is not installed: {error}", allow_module_level=True)


COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
TASK = """\
task: {name}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: {kind}
doc_to_visual: !function utils.to_visual
doc_to_text: !function utils.{text}
doc_to_target: answer
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
def to_visual(doc):
    return [doc["image"].convert("RGB")]

def question(doc):
    return doc["question"] + "\\nAnswer the question using a single word or phrase."

def caption(doc):
    return "Provide a one-sentence caption for the provided image."

def letters(doc):
    return "Note: respond with A, B.\\n\\n" + doc["question"] + " Select from these.\\n(A) blue\\n(B) red"

def to_letter(doc):
    return "B" if doc["answer"] == "red" else "A"
"""
GENERATION = "generation_kwargs:\n  max_new_tokens: 3\n  temperature: 0\n  top_p: 1.0\n  until: ['ASSISTANT:']"


def drawing(color):
    image = Image.new("RGB", (64, 64), (240, 244, 250))
    ImageDraw.Draw(image).rectangle((14, 20, 44, 40), fill=COLORS[color])
    return image


@pytest.fixture(scope="module")
def scene_caption():
    path = pretrained_path("prismer-scenes")
    processor = PrismerProcessor.from_pretrained(path)
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    inputs = processor(sample_image(), task="caption", experts=[])
    (text,) = processor.post_process_generation(model.generate(**inputs), inputs["input_ids"].shape[1])
    return text


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, scene_caption):
    """A folder of tasks on local data."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = [
        {"image": drawing(color), "question": "What color is the shape?", "answer": color, "choices": list(COLORS)}
        for color in COLORS
    ]
    DatasetDict({"test": Dataset.from_list(docs)}).save_to_disk(folder / "shapes")
    scene = {"image": sample_image(), "question": "", "answer": scene_caption}
    DatasetDict({"test": Dataset.from_list([scene])}).save_to_disk(folder / "scenes")
    (folder / "utils.py").write_text(UTILS)
    for name, data, kind, text, metric, more in (
        ("local_vqa", "shapes", "generate_until", "question", "exact_match", GENERATION),
        ("local_ranking", "shapes", "multiple_choice", "question", "acc", "doc_to_choice: choices"),
        ("local_options", "shapes", "generate_until", "letters", "exact_match", GENERATION),
        ("local_captions", "scenes", "generate_until", "caption", "exact_match", GENERATION),
    ):
        task = TASK.format(name=name, data=folder / data, kind=kind, text=text, metric=metric, more=more)
        if name == "local_options":
            task = task.replace("doc_to_target: answer", "doc_to_target: !function utils.to_letter")
        (folder / f"{name}.yaml").write_text(task)
    return folder


def evaluate(tasks, names, **model_args):
    arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False, model_name="prismer")
    return simple_evaluate(
        model="prismer", model_args=arguments, tasks=names, task_manager=manager, batch_size=2, device="cpu"
    )


def score(results, task):
    return next(
        value for name, value in results["results"][task].items() if name.split(",")[0] in ("exact_match", "acc")
    )


def test_lmms_eval_finds_the_model():
    assert [point.name for point in entry_points(group="lmms_eval.models")] == ["prismer"]
    assert {"prismer", "prismer_lm"} <= set(list_available_models(include_aliases=True))
    assert get_model("prismer") is get_model("prismer_lm") is Prismer


def test_answers_are_generated_ranked_and_chosen(tasks):
    names = ["local_vqa", "local_ranking", "local_options"]
    results = evaluate(tasks, names, pretrained="prismer-easy-vqa", experts="edge")
    assert [score(results, name) for name in names] == [1.0, 1.0, 1.0]
    samples = results["samples"]["local_vqa"]
    assert [sample["filtered_resps"] for sample in samples] == [["red"], ["blue"]]


def test_captions_are_those_of_generate(tasks):
    results = evaluate(tasks, ["local_captions"], pretrained="prismer-scenes", experts="none")
    assert score(results, "local_captions") == 1.0
    results = evaluate(tasks, ["local_captions"], pretrained="prismer-scenes", experts="none", generation="task")
    assert score(results, "local_captions") == 0.0  # the task's limit of 3 tokens


def test_a_prismer_lm_is_evaluated(tasks, tmp_path):
    processor = make_processor()
    make_model(len(processor.tokenizer), image_token_id=processor.image_token_id).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    results = evaluate(tasks, ["local_vqa", "local_ranking"], pretrained=tmp_path, experts="none")
    sample = results["samples"]["local_ranking"][0]
    (first, _), (second, _) = sample["filtered_resps"]
    assert first > 0 and second > 0 and first != second
    model = Prismer(str(tmp_path), device="cpu", experts="none")
    conversation = model._conversation(sample["arguments"][0], [drawing("red")])
    assert model._losses(conversation, ["red", "blue"]) == pytest.approx([first, second], rel=1e-4)
    assert model._losses(conversation, ["blue", "red"]) == pytest.approx([second, first], rel=1e-4)


@pytest.mark.parametrize(
    "context, text, options",
    [
        ("Is it red?\nAnswer the question using a single word or phrase.", "Is it red?", {}),
        ("Provide a one-sentence caption for the provided image.", "", {}),
        ("Is there a cat in the image?", "Is there a cat in the image?", {}),
        ("Are they long?\nA. Yes\nB. No\nAnswer with the option's letter.", "Are they long?", {"A": "Yes", "B": "No"}),
        (
            "Note: You only need to respond with A, B.\n\nHow many are there? Select one.\n(A) 3\n(B) 2",
            "How many are there?",
            {"A": "3", "B": "2"},
        ),
        ("Name the animal.\nBe brief.", "Name the animal.", {}),
    ],
)
def test_prompts_become_questions(context, text, options):
    assert Question.read(context) == Question(text, options)


def test_settings_of_checkpoint_and_task():
    model = Prismer("prismer-scenes", device="cpu", experts="none")
    given = {"max_new_tokens": 5, "num_beams": 1, "temperature": 0, "until": ["x"]}
    assert model._settings(given) == {"do_sample": False}  # 3 beams and 30 tokens, by its generation_config.json
    model.generation = "task"
    assert model._settings(given) == {"max_new_tokens": 5, "num_beams": 1, "do_sample": False}
    model.num_beams = 4
    assert model._settings({"temperature": 0.5})["num_beams"] == 4
    with pytest.raises(ValueError, match="accepted are 'checkpoint' and 'task'"):
        Prismer(generation="other")
