"""compare.py asks models of every kind, scores what they say, and reports it with intervals."""

import json
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import compare
from comparison import examples as context_examples
from comparison.answers import yes_no
from comparison.arguments import CompareArguments, ModelName, read_models
from comparison.choices import read_choices
from comparison.classes import few_shot_classes, training_samples
from comparison.contrastive import ContrastiveModel
from comparison.examples import Examples
from comparison.generative import GenerativeModel
from comparison.language import LanguageModel
from comparison.measuring import measure_cost
from comparison.models import CannotDo, Example, NamedImage, Query, open_model
from comparison.needles import needle, read_haystacks, score_haystacks
from comparison.prismer_model import PrismerModel
from comparison.report import Result
from comparison.retrieval import hits
from comparison.scores import Score, difference, interval
from comparison.sources import Sample, draw, load_samples, load_support
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.command_line.arguments import weight_fingerprint
from modeling_prismer.processing.metrics import load_metric
from tests.training_examples.conftest import COLORS, NUM_IMAGES, color_of
from tests.training_examples.tiny_contenders import BUILDERS, prismer_lm


KINDS = ("prismer", "prismer_lm", "language", *BUILDERS)
WRITES = {"prismer", "prismer_lm", "language", "git", "blip_2", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl"}
MANY_IMAGES = {"prismer_lm", "language", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl"}
SEES = set(KINDS) - {"language"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint, language, vision):
    """A function from a kind of model to the folder of a tiny one."""
    made = {"language": language}

    def folder_of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            if kind == "prismer":
                shutil.copytree(checkpoint, made[kind], dirs_exist_ok=True)
                processor = PrismerProcessor.from_pretrained(checkpoint)
                processor.task, processor.tasks = "vqa", ["caption", "vqa"]
                processor.save_pretrained(made[kind])
            elif kind == "prismer_lm":
                prismer_lm(made[kind], language, vision)
            else:
                BUILDERS[kind](made[kind])
        return made[kind]

    return folder_of


@pytest.fixture(scope="module")
def class_folder(image_folder, tmp_path_factory):
    """The images in a folder for each color."""
    folder = tmp_path_factory.mktemp("classes")
    for number in range(NUM_IMAGES):
        target = folder / color_of(number)
        target.mkdir(exist_ok=True)
        shutil.copy(image_folder / f"{number:02}.png", target)
    return folder


@pytest.fixture(scope="module")
def training_classes(class_folder, tmp_path_factory):
    """Other images of the same classes."""
    folder = tmp_path_factory.mktemp("training_classes")
    for path in class_folder.glob("*/*.png"):
        target = folder / path.parent.name
        target.mkdir(exist_ok=True)
        with Image.open(path) as own:
            own.rotate(180).save(target / f"train-{path.name}")
    return folder


@pytest.fixture
def run(monkeypatch, cache, tmp_path):
    """Runs the script in this process, and returns its results.json."""

    monkeypatch.setattr("comparison.captions.shutil.which", lambda name: None)  # the metrics that need no Java

    def start(*arguments, out=tmp_path / "out"):
        shared = ["--no_own_process", "--output_dir", out, "--device", "cpu", "--batch_size", "4"]
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments), *map(str, shared)])
        compare.main()
        return json.loads((out / "results.json").read_text())

    return start


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return NamedImage("a", Image.fromarray(pixels))


@pytest.fixture(scope="module")
def other_image():
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return NamedImage("b", Image.fromarray(pixels))


def reasons(results):
    return {title: trial[0]["reason"] for title, trial in results["trials"].items()}


# ---- models of every kind ----


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_model_is_compared(kind, run, folders, image_folder, class_folder, training_classes):
    folder = folders(kind)
    shared = ("--models", f"tiny={folder}", "--max_rows", 4)
    texts = run(
        *shared, "--tasks", "caption", "vqa", "--shots", 0, 2, "--data", image_folder, "--support_split", "train"
    )
    can = {title for title, reason in reasons(texts).items() if reason is None}
    written = {"caption, 0 shots", "vqa, 0 shots"} if kind in WRITES else set()
    shown = {"caption, 2 shots", "vqa, 2 shots"} if kind in MANY_IMAGES else set()
    assert can == written | shown

    ranked = run(*shared, "--tasks", "vqa_ranking", "yes_no", "retrieval", "--data", image_folder)
    assert reasons(ranked)["retrieval"] is None
    assert (reasons(ranked)["vqa_ranking"] is None) == (kind in WRITES) == (reasons(ranked)["yes_no"] is None)

    classes = ("--tasks", "classification", "few_shot_classes", "--shots", 1, "--data", class_folder)
    classes += ("--support_data", training_classes)
    found = run("--models", f"tiny={folder}", *classes)
    assert reasons(found)["classification"] is None
    assert (reasons(found)["few_shot_classes, 1 images of each class"] is None) == (kind in SEES)

    (model,) = found["models"]
    assert 0 < model["trained"] <= model["parameters"]
    assert (model["trained"] < model["parameters"]) == kind.startswith("prismer")
    assert model["experts"] == (["edge"] if kind == "prismer" else [])
    for title, trial in {**texts["trials"], **ranked["trials"], **found["trials"]}.items():
        if trial[0]["reason"] is None:
            assert trial[0]["seconds_per_image"] > 0, title
            for cell in trial[0]["scores"].values():
                assert cell["value"]["low"] <= cell["value"]["value"] <= cell["value"]["high"]


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm", "qwen2_5_vl", "language"])
def test_ranking_is_the_probability_of_the_tokens(kind, folders, image):
    model = open_model(ModelName.read(str(folders(kind))), CompareArguments(batch_size=3, device="cpu"))
    query, candidates = Query((image,), "is it red"), ["yes", "no it is", "a dog"]
    expected = []
    for candidate in candidates:
        inputs = model.prepare([query])
        ids = torch.tensor([model.candidate_tokens(candidate)])
        start = inputs["input_ids"].shape[1]
        whole = {name: tensor for name, tensor in inputs.items() if tensor.shape != inputs["input_ids"].shape}
        whole["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "mm_token_type_ids" in inputs:
            whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], dim=1)
        with torch.no_grad():
            logs = model.network(**whole).logits[0, start - 1 : -1].log_softmax(dim=-1)
        expected.append(logs.gather(1, ids[0][:, None]).mean().item())
    assert model.rank([query], candidates)[0] == pytest.approx(expected, abs=2e-4)
    assert GenerativeModel.rank(model, [query], candidates)[0] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("kind", sorted(SEES))
def test_images_change_what_a_model_finds(kind, folders, image, other_image):
    model = open_model(ModelName.read(str(folders(kind))), CompareArguments(batch_size=4, device="cpu"))
    first, second = model.match([image, other_image], ["a red dog", "yes"])
    assert np.abs(first - second).max() > 1e-5
    vectors = model.embed([image, other_image])
    assert vectors.shape[0] == 2 and np.abs(vectors[0] - vectors[1]).max() > 1e-5


@pytest.mark.parametrize("kind", sorted(WRITES))
def test_batches_do_not_change_answers(kind, folders, image, other_image):
    queries = [
        Query((image,), "is it red"),
        Query((other_image,), "what color is it?"),
        Query((image,), "is it a dog"),
    ]
    found = []
    for size in (1, 3):
        model = open_model(ModelName.read(str(folders(kind))), CompareArguments(batch_size=size, device="cpu"))
        found.append((model.answer(queries, 4), model.rank(queries, ["yes", "red dog"])))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=2e-4)


def test_a_language_model_reads_texts_alone(folders, image, other_image):
    model = LanguageModel(str(folders("language")), CompareArguments(device="cpu"))
    scores = model.rank([Query((image,), "is it red"), Query((other_image,), "is it red")], ["yes", "no"])
    assert (scores[0] == scores[1]).all()
    shown = model.write(Query((image,), "is it red", (Example("is it blue", "no", other_image),)))
    assert shown.index("is it blue") < shown.index("no</s>") < shown.index("is it red")


def test_experts_of_a_prismer_are_chosen_after_the_at_sign(folders, image):
    path = str(folders("prismer"))
    args = CompareArguments(device="cpu")
    with_all, without = (open_model(ModelName.read(path + end), args) for end in ("", "@none"))
    assert (with_all.experts, without.experts) == (["edge"], [])
    assert np.abs(with_all.embed([image]) - without.embed([image])).max() > 1e-5


def test_experts_of_a_prismer_are_fixed(run, folders, image_folder):
    path = str(folders("prismer"))
    message = "@auto: the router chooses for each question; name fixed experts"
    with pytest.raises(SystemExit, match=message):
        run("--models", f"{path}@auto", "--tasks", "vqa", "--data", image_folder)
    with pytest.raises(ValueError, match=message):
        PrismerModel(path, CompareArguments(device="cpu"), "auto")


def test_a_prismer_says_why_it_cannot(folders, checkpoint, image):
    args = CompareArguments(device="cpu")
    with pytest.raises(CannotDo, match="one image and one question"):
        PrismerModel(str(folders("prismer")), args).answer([Query((image, image), "is it red")], 4)
    with pytest.raises(CannotDo, match="made for caption"):
        PrismerModel(str(checkpoint), args).answer([Query((image,), "is it red")], 4)


def test_a_prismer_chooses_the_best_text(folders, image):
    model = PrismerModel(str(folders("prismer")), CompareArguments(device="cpu"))
    query, options = Query((image,), "what color is it"), ["red", "blue", "white"]
    best = int(model.rank([query], options)[0].argmax())
    assert model.choose([query], [options]) == ["ABC"[best]]


def test_prompts_of_a_prismer_lm_are_used_once(folders, image, other_image):
    args = CompareArguments(device="cpu", question_prompt="Question: {} Answer:")
    model = PrismerModel(str(folders("prismer_lm")), args)
    query = Query((image,), "is it red", (Example("is it blue", "no", other_image),))
    for is_chat in (True, False):
        model.is_chat = model.collator.as_chat = is_chat
        for asked, number in (
            (query, 2),
            (Query((image, other_image), "is it red"), 1),
            (Query((image,), "is it red"), 1),
        ):
            inputs = model.collator([model.row([asked], None)])
            text = model.processor.decode(inputs["input_ids"][0])
            assert text.count("Question: ") == text.count(" Answer:") == number
            assert "Question: is it red Answer:" in text


def test_classes_of_clip_are_put_into_the_prompt(folders, image):
    model = ContrastiveModel(str(folders("clip")), CompareArguments(device="cpu", class_prompt="is it a {}?"))
    assert model.classify([image], ["dog"]) == pytest.approx(model.match([image], ["is it a dog?"]))


# ---- scores ----


def test_scores_agree_with_hand_computed_ones():
    groups = ["a", "a", "b", "c"]
    assert Score.of_samples("accuracy", [1, 0, 1, 1], groups).value == 75
    # says yes: 3 of 4, right: 2; the answer is yes: 2 of 4
    says, right = np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1])
    f1 = Score.of_samples("F1", np.stack([says * right, says, right], axis=1), groups, "f1")
    assert f1.value == pytest.approx(100 * 2 * 2 / (3 + 2))
    never = np.zeros((4, 3))
    assert Score.of_samples("F1", never, groups, "f1").value == 0


def test_bleu_of_sums_is_that_of_the_corpus():
    predictions = ["a red bus waits", "one dog runs fast there", "yes", ""]
    references = [["a red bus stops", "the bus"], ["one dog runs fast"], ["no"], ["a b"]]
    found = load_metric("caption_metrics").compute(
        predictions=predictions, references=references, metrics=["bleu"], tokenizer="regex", per_caption=True
    )
    counts = np.array(found["bleu_counts_per_caption"])
    for order in (1, 2, 3, 4):
        columns = [*range(order), *range(4, 4 + order), 8, 9]
        score = Score.of_samples("BLEU", counts[:, columns], list("abcd"), "bleu")
        assert score.value / 100 == pytest.approx(found[f"bleu_{order}"], abs=1e-6)


def test_interval_of_a_share_is_that_of_the_binomial():
    random = np.random.default_rng(0)
    values = random.random(400) < 0.7
    found = interval(Score.of_samples("accuracy", values, [str(number) for number in range(400)]))
    half = 196 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert found.low == pytest.approx(found.value - half, abs=0.7)
    assert found.high == pytest.approx(found.value + half, abs=0.7)


def test_questions_about_an_image_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).random(40) < 0.5, 10)  # all ten answers are the same
    grouped = interval(Score.of_samples("accuracy", values, np.repeat(np.arange(40), 10)))
    single = interval(Score.of_samples("accuracy", values, np.arange(400)))
    assert grouped.high - grouped.low > 2.5 * (single.high - single.low)


def test_difference_is_paired():
    random = np.random.default_rng(0)
    first = random.random(300) < 0.5
    second = first.copy()
    second[:15] = ~second[:15]
    groups = [str(number) for number in range(300)]
    a, b = (Score.of_samples("accuracy", values, groups) for values in (first, second))
    found = difference(b, a)
    assert found.value == pytest.approx(100 * (second.mean() - first.mean()))
    assert found.low <= found.value <= found.high and found.high - found.low < 7  # unpaired: 16
    with pytest.raises(ValueError, match="300 groups and accuracy of 2: a paired difference needs"):
        difference(a, Score.of_samples("accuracy", [1, 0], ["0", "1"]))


def test_a_single_image_has_no_interval():
    assert interval(Score.of_samples("accuracy", [1], ["a"])).low is None


# ---- tasks ----


def test_recall_counts_equal_candidates_by_their_probability():
    scores = np.array([[0.9, 0.1, 0.5, 0.3], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.3]])
    own = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]], dtype=bool)
    assert hits(scores, own, 1) == pytest.approx([1, 2 / 4, 1 / 2])
    # of four equal candidates two are drawn: none of the own two with 2/4 · 1/3
    assert hits(scores, own, 2) == pytest.approx([1, 1 - 1 / 6, 1])
    assert hits(np.array([[0.4, 0.6, 0.5]]), np.array([[True, False, False]]), 2) == pytest.approx([0])


def test_constant_scores_give_the_recall_of_chance():
    found = hits(np.zeros((10, 10)), np.eye(10, dtype=bool), 5)
    assert found == pytest.approx([0.5] * 10)


@pytest.fixture
def mmvp(tmp_path):
    (tmp_path / "MMVP Images").mkdir()
    rows = ["Index,Question,Options,Correct Answer"]
    for number, (question, options, answer) in enumerate(
        [
            ("Is the door open?", "(a) Open (b) Closed", "(a)"),
            ("Is the door open?", "(a) Open (b) Closed", "(b)"),
            ("How many, please?", "(a) 1 or (2) (b) none", "(b)"),
            ("How many, please?", "(a) 1 or (2) (b) none", "(a)"),
        ],
        1,
    ):
        rows.append(f'{number},"{question}","{options}",{answer}')
        Image.new("RGB", (40, 30), (60 * number, 10, 200)).save(tmp_path / "MMVP Images" / f"{number}.jpg")
    (tmp_path / "Questions.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_mmvp_has_pairs(mmvp):
    choices = list(read_choices(str(mmvp)))
    assert [choice.pair for choice in choices] == ["1", "1", "2", "2"]
    assert [choice.answer for choice in choices] == ["A", "B", "B", "A"]
    assert choices[0].options == ("Open", "Closed") and choices[2].options == ("1 or (2)", "none")
    assert choices[3].images[0].open().size == (40, 30)


def test_pairs_of_mmvp_are_compared(run, folders, mmvp):
    results = run("--models", folders("prismer"), folders("qwen2_5_vl"), "--tasks", "multiple_choice", "--data", mmvp)
    first, second = results["trials"]["multiple_choice"]
    assert list(first["scores"]) == list(second["scores"]) == ["pairs", "accuracy", "read"]
    assert first["scores"]["read"]["value"]["value"] == 100  # it ranks the options
    assert first["scores"]["pairs"]["difference"] is None and second["scores"]["pairs"]["difference"] is not None


def test_magnifier_bench_is_read(tmp_path, image):
    rows = {
        "id": ["x", "y"],
        "instruction": ["What is it? A. a cat, B. a red dog, C. none.", "How many? (A) 2 (B) 3"],
        "answer": ["B", "A"],
        "images": [[image.content], [image.content, image.content]],
    }
    features = {name: datasets.Value("string") for name in ("id", "instruction", "answer")}
    features["images"] = datasets.List(datasets.Image())
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "set")
    first, second = read_choices(str(tmp_path / "set"))
    assert (first.question, first.options, first.answer) == ("What is it?", ("a cat", "a red dog", "none."), "B")
    assert (second.options, second.answer, len(second.images)) == (("2", "3"), "A", 2)
    assert second.images[1].open().size == image.content.size


def test_rows_of_magnifier_bench_have_their_own_ids(tmp_path, image):
    rows = {"id": ["7", "7"], "instruction": ["What? A. a cat, B. a dog"] * 2, "answer": ["A", "B"]}
    features = datasets.Features({**dict.fromkeys(rows, datasets.Value("string"))})
    features["images"] = datasets.List(datasets.Image())
    rows["images"] = [[image.content]] * 2
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="row 1 has the id '7' of an earlier row; each needs its own"):
        list(read_choices(str(tmp_path / "set")))


@pytest.mark.parametrize(("answer", "letter"), [("B", "B"), ("none", "C"), (0, "A")])
def test_own_choices_name_the_answer_in_three_ways(tmp_path, answer, letter):
    row = {"image": "a.png", "question": "Which?", "options": ["one", "two", "none"], "answer": answer}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8-sig")  # as Windows writes it
    (choice,) = read_choices(str(tmp_path / "own.jsonl"))
    assert choice.answer == letter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": []}, "line 1 needs image or images, question, options and answer"),
        ({"answer": "D"}, "line 1 has the answer 'D'; accepted are A, B"),
        ({"answer": 2}, "line 1 has the answer '2'; accepted are A, B"),
        ({"options": ["one"]}, "line 1 has the options A; A, B and so on are needed, two or more"),
        ({"question": None}, "line 1 needs image or images, question, options and answer"),
        ({"options": "one, two"}, "line 1 has the options 'one, two'; a list of texts is needed"),
        ({"options": ["one", "one"]}, "line 1 has the option 'one' twice; different texts are needed"),
    ],
)
def test_faulty_choices_are_named(tmp_path, change, message):
    row = {"image": "a.png", "question": "Which?", "options": ["one", "two"], "answer": "A", **change}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_choices(str(tmp_path / "own.jsonl")))


@pytest.mark.parametrize(("line", "message"), [("{oops", "line 3 is no JSON"), ("[1]", r"line 3 is \[1\]; an object")])
def test_lines_without_an_object_are_named(tmp_path, line, message):
    row = {"image": "a.png", "question": "Which?", "options": ["one", "two"], "answer": "A"}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(row)}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"own.jsonl, {message}"):
        list(read_choices(str(tmp_path / "own.jsonl")))


@pytest.fixture
def haystacks(tmp_path):
    """As in Visual Haystacks: a file for each number of images."""
    for number in range(6):
        Image.new("RGB", (30, 30), (40 * number, 10, 10)).save(tmp_path / f"{number}.jpg")
    for name, size in {"oracle": 1, "2": 2, "5": 5}.items():
        rows = []
        for number, answer in enumerate(["yes", "no", "yes"]):
            others = [f"{(number + step) % 6}.jpg" for step in range(1, size)]
            turns = [
                {"from": "human", "value": "For the image with a dog, is there a red ball?"},
                {"from": "gpt", "value": answer},
            ]
            rows.append({"pos_image": [f"{number}.jpg"], "neg_image": others, "conversations": turns})
        (tmp_path / f"visual_haystack_{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_needles_are_at_every_place(haystacks):
    path, places = haystacks / "visual_haystack_5.json", set()
    for seed in range(20):
        found = read_haystacks(path, haystacks, seed)
        assert all(len(own.images) == 5 for own in found) and found == read_haystacks(path, haystacks, seed)
        places |= {
            (number, [image.image_id for image in own.images].index(f"{number}.jpg"))
            for number, own in enumerate(found)
        }
    assert places == {(number, place) for number in range(3) for place in range(5)}
    assert score_haystacks(["Yes, it is.", "I cannot see", "No yes"], found)[0].value == pytest.approx(200 / 3)
    assert score_haystacks(["Yes, it is.", "I cannot see", "nothing"], found)[1].value == pytest.approx(100 / 3)


def test_models_look_for_needles(run, folders, haystacks):
    results = run(
        "--models",
        folders("idefics3"),
        folders("prismer_lm"),
        folders("prismer"),
        "--tasks",
        "needle",
        "--data",
        haystacks,
    )
    assert list(results["trials"]) == ["needle, oracle images", "needle, 2 images", "needle, 5 images"]
    reason = {trial["model"]: trial["reason"] for trial in results["trials"]["needle, 5 images"]}
    assert [reason[folders(kind).name] is None for kind in ("idefics3", "prismer_lm", "prismer")] == [
        True,
        True,
        False,
    ]


def test_needles_are_named_by_their_file(haystacks):
    rows = json.loads((haystacks / "visual_haystack_oracle.json").read_text())
    rows[0]["pos_image"].append("5.jpg")  # two images, as those of the file for 2
    (haystacks / "visual_haystack_oracle.json").write_text(json.dumps(rows))
    trials = needle(arguments(data=str(haystacks)))
    assert [trial.file_name for trial in trials] == ["needle-oracle", "needle-2", "needle-5"]


def test_most_answers_decide_between_yes_and_no(tmp_path, cache):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def ask(*answers):
        rows = [{"image": "a.png", "question": f"Is it {n}?", "answer": own} for n, own in enumerate(answers)]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (trial,) = yes_no(arguments(data=str(tmp_path / "own.jsonl")))
        return trial

    trial = ask(["no", *["yes"] * 9], ["yes", "no"], ["No.", "no", "yes"], ["yes", "maybe"])
    assert [text for _, text, _ in trial.content] == ["Is it 0?", "Is it 2?"]
    assert trial.score(["yes", "no"])[0].value == 100
    with pytest.raises(ValueError, match="no question whose answers are yes or no"):
        ask(["yes", "no"])


def test_yes_no_leaves_other_questions_out(run, folders, image_folder, capsys):
    results = run("--models", folders("language"), "--tasks", "yes_no", "--data", image_folder)
    assert f"yes_no: {NUM_IMAGES} of {2 * NUM_IMAGES} questions" in capsys.readouterr().out
    assert list(results["trials"]["yes_no"][0]["scores"]) == ["accuracy", "F1", "yes ratio"]


def test_pope_is_read_and_scored(run, folders, tmp_path):
    rows = []
    for number, answer in enumerate(["yes", "no", "no"]):
        name = f"COCO_val2014_{number // 2:012d}.jpg"
        Image.new("RGB", (40, 30), (80 * number, 10, 10)).save(tmp_path / name)
        rows.append({"question_id": number + 1, "image": name, "text": f"Is there a dog {number}?", "label": answer})
    path = tmp_path / "coco_pope_random.json"  # lines, in spite of its name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    columns = ("--question_column", "text", "--answer_column", "label")
    results = run("--models", folders("git"), "--tasks", "yes_no", "--data", path, *columns)
    said = Result.load(tmp_path / "out" / "runs" / folders("git").name / "yes_no.json").said
    expected = load_metric("yes_no_accuracy").compute(predictions=said, references=["yes", "no", "no"])
    scores = {name: cell["value"]["value"] / 100 for name, cell in results["trials"]["yes_no"][0]["scores"].items()}
    assert scores == pytest.approx(
        {"accuracy": expected["accuracy"], "F1": expected["f1"], "yes ratio": expected["yes_ratio"]}
    )


# ---- data and examples ----


def arguments(**kwargs):
    return CompareArguments(device="cpu", **kwargs)


def test_samples_are_rows_of_the_recipes(image_folder, cache):
    samples = load_samples(arguments(data=str(image_folder)), "vqa")
    assert len(samples) == 2 * NUM_IMAGES
    assert (samples[0].text, samples[0].references) == ("what color is it", ("red",))
    assert samples[0].image.open().size == (64, 48)


def test_easy_vqa_has_questions_and_shapes():
    samples = load_samples(arguments(data="easy-vqa", max_rows=3), "vqa")
    assert len({sample.image.image_id for sample in samples}) == 3 and len(samples) > 20
    classes = load_samples(arguments(data="easy-vqa", max_rows=3), "classification")
    assert {name for sample in classes for name in sample.references} <= {"circle", "rectangle", "triangle"}


def test_scenes_are_made_as_needed(tmp_path):
    samples = load_samples(arguments(data="scenes", data_dir=str(tmp_path), max_rows=2), "caption")
    assert len(samples) == 2 and len(samples[0].references) == 5
    asked = load_samples(arguments(data="scenes", data_dir=str(tmp_path), max_rows=2), "vqa")
    assert {sample.image.image_id for sample in asked} == {sample.image.image_id for sample in samples}


def test_support_has_shots_of_each_class(class_folder, training_classes, cache):
    args = arguments(data=str(class_folder), support_data=str(training_classes))
    known = training_samples(load_support(args, "classification"), load_samples(args, "classification"), 2)
    support = draw(known, 2, seed=0)
    assert sorted(sample.references[0] for sample in support) == sorted([*COLORS] * 2)


def test_measured_images_are_not_trained_on(class_folder, cache):
    args = arguments(data=str(class_folder), shots=[1], max_rows=2)
    asked, support = load_samples(args, "classification"), load_support(args, "classification")
    assert len(support) == NUM_IMAGES
    own = {sample.image.image_id for sample in asked}
    kept = training_samples(support, asked, 1)
    assert len(kept) == NUM_IMAGES - 2 and not own & {sample.image.image_id for sample in kept}
    (trial,) = few_shot_classes(args)
    seen = []

    class Remembers:
        def embed(self, images):
            seen.append([image.image_id for image in images])
            return np.random.default_rng(0).random((len(images), 3))

    trial.ask(Remembers())
    trained, measured = seen
    assert set(measured) == own and len(trained) == len(COLORS) and not own & set(trained)


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        (1, "class 'blue' has 0 images to train on, .*name training images: --support_data/--support_split"),
        (0, "--shots 0: few_shot_classes needs at least 1 image of each class"),
    ],
)
def test_missing_training_images_are_named(run, folders, class_folder, shots, message):
    classes = ("--tasks", "few_shot_classes", "--shots", shots, "--data", class_folder)
    with pytest.raises(SystemExit, match=message):
        run("--models", folders("clip"), *classes)


def samples_of(number, start=0):
    return [Sample(NamedImage(f"{start + i}", None), f"question {i}", (f"answer {i}",)) for i in range(number)]


def test_random_examples_are_the_same_for_all_models(monkeypatch):
    asked, support = samples_of(3), samples_of(9)
    monkeypatch.setattr(context_examples, "load_support", lambda *_: support)
    args = arguments(shots=[0, 4], text_examples=2)
    queries = Examples(args, "vqa", asked).queries(4)
    assert queries == Examples(args, "vqa", asked).queries(4)
    for query, sample in zip(queries, asked):
        shown = [example.image.image_id for example in query.examples]
        assert len(set(shown)) == 4 and not set(shown) & {"0", "1", "2"}
        assert query.text == sample.text and query.images == (sample.image,)
    assert queries[0].examples != queries[1].examples
    of_text = Examples(args, "vqa", asked).queries(0)[0].examples
    assert len(of_text) == 2 and all(example.image is None for example in of_text)
    with pytest.raises(ValueError, match="--shots 7: the support has 6 images only"):
        Examples(args, "vqa", asked).queries(7)


def test_similar_examples_end_with_the_nearest(monkeypatch, tmp_path):
    asked, support = samples_of(1, start=20), samples_of(5)

    class Angles:
        def embed(self, images):
            angles = [{"20": 0.0}.get(image.image_id, 0.5 * int(image.image_id)) for image in images]
            return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    monkeypatch.setattr(context_examples, "load_support", lambda *_: support)
    monkeypatch.setattr(context_examples, "open_model", lambda *_: Angles())
    monkeypatch.setattr(context_examples, "weight_fingerprint", lambda path: "first")
    args = arguments(shots=[3], shots_by="similar", similar_by="angles", output_dir=str(tmp_path))
    (query,) = Examples(args, "vqa", asked).queries(3)
    assert [example.image.image_id for example in query.examples] == ["2", "1", "0"]
    monkeypatch.setattr(context_examples, "open_model", None)  # the next model reads the file
    assert Examples(args, "vqa", asked).queries(3) == [query]
    monkeypatch.setattr(context_examples, "weight_fingerprint", lambda path: "trained again")
    with pytest.raises(TypeError):  # the file is not read
        Examples(args, "vqa", asked).queries(3)


# ---- the course of a comparison, and its report ----


def test_a_second_start_runs_what_is_missing(run, folders, image_folder, monkeypatch):
    questions = ("--tasks", "vqa", "--data", image_folder, "--max_rows", 4)
    run("--models", folders("language"), *questions)
    opened = []
    monkeypatch.setattr(compare, "open_model", lambda name, args: opened.append(name.name) or open_model(name, args))
    both = run("--models", folders("language"), folders("git"), *questions)
    assert opened == [folders("git").name]
    assert [trial["model"] for trial in both["trials"]["vqa"]] == [folders("language").name, folders("git").name]
    run("--models", folders("language"), *questions, "--question_prompt", "Is {}?")
    assert opened[1:] == [folders("language").name]


@pytest.mark.parametrize("change", ["weights", "answers"])
def test_changed_weights_and_data_are_measured_again(change, run, folders, image_folder, tmp_path, monkeypatch):
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(image_folder, data)
    shutil.copytree(folders("language"), model)
    start = ("--models", model, "--tasks", "vqa", "--data", data, "--max_rows", 4)
    run(*start)
    opened = []
    monkeypatch.setattr(compare, "open_model", lambda name, args: opened.append(name.name) or open_model(name, args))
    run(*start)
    assert not opened
    if change == "weights":
        os.utime(model / "model.safetensors", (1, 1))
    else:
        text = (data / "questions.jsonl").read_text()
        (data / "questions.jsonl").write_text(text.replace('"red"', '"pink"', 1))
    run(*start)
    assert opened == ["model"]


def test_weights_of_a_model_have_a_fingerprint(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders("prismer"), model)
    first = weight_fingerprint(str(model))
    (model / "checkpoint-2").mkdir()
    (model / "checkpoint-2" / "model.safetensors").write_text("a checkpoint of the training")
    (model / "README.md").write_text("no weights")
    assert weight_fingerprint(str(model)) == first
    (tmp_path / "adapter").mkdir()
    config = json.dumps({"base_model_name_or_path": str(model)})
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    adapted = weight_fingerprint(str(tmp_path / "adapter"))
    os.utime(model / "model.safetensors", (1, 1))
    assert weight_fingerprint(str(model)) != first and weight_fingerprint(str(tmp_path / "adapter")) != adapted


def test_the_report_has_no_results_of_other_settings(run, folders, image_folder, tmp_path, monkeypatch):
    models = ("--models", folders("language"), folders("git"), "--tasks", "vqa", "--data", image_folder)
    run(*models, "--max_rows", 4)

    def fail(self, *_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LanguageModel, "answer", fail)
    with pytest.raises(SystemExit, match="failed"):
        run(*models, "--max_rows", 6)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [trial["model"] for trial in results["trials"]["vqa"]] == [folders("git").name]


def test_the_table_has_intervals_differences_and_reasons(run, folders, image_folder, tmp_path):
    models = (f"a={folders('prismer')}", f"b={folders('prismer')}@none", f"c={folders('clip')}")
    results = run("--models", *models, "--tasks", "vqa_ranking", "--data", image_folder)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| a | Prismer |" in table and "| c | contrastive |" in table
    first, second, third = results["trials"]["vqa_ranking"]
    accuracy = first["scores"]["VQA accuracy"]["value"]
    assert f"{accuracy['value']:.1f} [{accuracy['low']:.1f}, {accuracy['high']:.1f}]" in table
    assert table.count("<br>Δ ") == 2  # two scores of b
    assert "c: contrastive models do not rank answers to questions." in table
    change = second["scores"]["exact match"]["difference"]["value"]
    values = [own["scores"]["exact match"]["value"]["value"] for own in (first, second)]
    assert change == pytest.approx(values[1] - values[0])
    assert third["scores"] == {} and third["seconds_per_image"] is None
    with Image.open(tmp_path / "out" / "scores.png") as figure:
        assert figure.width > 300 and len(figure.convert("RGB").getcolors(2**20)) > 20


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("image tokens do not match")])
def test_a_model_that_fails_leaves_the_others(error, run, folders, image_folder, tmp_path, monkeypatch):
    def fail(self, *_):
        raise error

    monkeypatch.setattr(LanguageModel, "answer", fail)
    models = ("--models", folders("language"), folders("git"))
    with pytest.raises(SystemExit, match=f"{folders('language').name} failed"):
        run(*models, "--tasks", "vqa", "--data", image_folder, "--max_rows", 2)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [trial["model"] for trial in results["trials"]["vqa"]] == [folders("git").name]


def test_each_model_may_run_in_its_own_process(folders, image_folder, tmp_path, cache):
    args = arguments(data=str(image_folder), tasks=["classification"], output_dir=str(tmp_path), batch_size=4)
    args.data, args.tasks = str(image_folder / "captions.csv"), ["retrieval"]
    name = ModelName.read(str(folders("clip")))
    compare.in_own_process(name, args)
    (path,) = Path(tmp_path, "runs").rglob("*.json")
    result = Result.load(path)
    assert result.trial == "retrieval" and [score.name for score in result.scores][0] == "text R@1"


def test_memory_of_the_work_is_measured():
    def work():
        return torch.ones(30_000_000).sum().item()  # 120 MB

    _, cost = measure_cost(work, torch.device("cpu"))
    assert cost.seconds > 0
    if sys.platform == "linux":
        assert 80 < cost.megabytes < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "vqa"), "--models is missing"),
        (("--models", "a=x", "a=y", "--tasks", "vqa"), "several models called 'a'"),
        (("--models", "m (1)=x", "m [1]=y", "--tasks", "vqa"), r"'m \(1\)' and 'm \[1\]' have the same folder"),
        (("--question_prompt", "Answer with one word."), "--question_prompt is .*; it needs {} in the place of the q"),
        (("--class_prompt", "a photo"), "--class_prompt is 'a photo'; it needs {} in the place of the class"),
        (("--shots", "4", "-1"), "--shots is -1; accepted are 0 and larger numbers"),
        (("--models", "prismer-scenes", "--tasks", "chess", "--data", "x"), "--tasks is chess; accepted are caption"),
        (("--models", "prismer-scenes"), "--tasks is missing; accepted are caption"),
        (("--models", "prismer-scenes", "--tasks", "vqa"), "--data is missing"),
        (("--models", "prismer-scenes", "--tasks", "needle", "--data", "/"), "has no visual_haystack_"),
        (
            ("--models", "no/such-model", "--tasks", "caption", "--data", "{folder}"),
            "'no/such-model' is neither",
        ),
    ],
)
def test_wrong_arguments_are_named(run, arguments, message, image_folder):
    with pytest.raises(SystemExit, match=message):
        run(*(argument.replace("{folder}", str(image_folder)) for argument in arguments))


def test_another_kind_of_model_is_refused(vision, folders):
    with pytest.raises(ValueError, match="is a siglip_vision_model; accepted are Prismer, PrismerLM"):
        open_model(ModelName.read(str(vision)), CompareArguments())


def test_an_adapter_of_a_prismer_is_opened(folders, tmp_path, image):
    model = PrismerModel(str(folders("prismer")), arguments())
    adapted = get_peft_model(PrismerForConditionalGeneration.from_pretrained(folders("prismer")), LoraConfig())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    adapted.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    adapter = open_model(ModelName.read(str(tmp_path)), arguments())
    first, second = (own.rank([Query((image,), "is it red")], ["yes", "no"]) for own in (model, adapter))
    assert np.abs(first - second).max() > 1e-3


def test_models_are_named(folders, tmp_path):
    names = read_models(["runs/a", "b=owner/model", "prismer-scenes@none"])
    assert [name.name for name in names] == ["a", "b", "prismer-scenes@none"]
    assert names[2] == ModelName("prismer-scenes@none", "prismer-scenes", "none")
    assert read_models(["mine=runs/lr=0.1/final@none"]) == [ModelName("mine", "runs/lr=0.1/final", "none")]
    (tmp_path / "lr=0.1").mkdir()
    assert ModelName.read(f"{tmp_path}/lr=0.1@none") == ModelName("lr=0.1@none", f"{tmp_path}/lr=0.1", "none")
    with pytest.raises(ValueError, match="a clip has no experts"):
        open_model(ModelName.read(f"{folders('clip')}@none"), CompareArguments())
