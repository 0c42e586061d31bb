"""`prismer worth` measures experts whose worth is known, shipped checkpoints and a PrismerLM."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from modeling_prismer import PrismerProcessor, pretrained_path, sample_image
from modeling_prismer.cli import app
from modeling_prismer.command_line.checkpoints import PrismerReader
from modeling_prismer.processing.experts import CannyEdges, Expert, ExpertSuite
from modeling_prismer.processing.labels import LabelStore

from .test_cli_prismer_lm import folder  # noqa: F401  a PrismerLM with edges


QUESTION = "Is it bright?"


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def worth(out, *arguments):
    result = run("worth", *arguments, "--out", out, "--resamples", 50, "--timed-images", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(out)
    return json.loads((out / "worth.json").read_text()), result


def write_questions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- experts whose worth is known ----


def say(told, image):
    """A map whose left half is white for yes, and whose right half is white for no."""
    label = np.zeros(image.size[::-1], np.uint8)
    half = image.width // 2
    label[:, :half] = 255 * told
    label[:, half:] = 255 * (not told)
    return label


class Bright(Expert):
    """Sees whether the image is bright: it carries the answer."""

    type, name, kind, channels = "test_bright", "bright", "dense", 1
    runs = 0

    def run(self, images, **others):
        Bright.runs += len(images)
        return [say(np.asarray(image).mean() > 128, image) for image in images]


class Copy(Expert):
    """A copy of the first expert, which it needs."""

    type, name, kind, channels, needs = "test_copy", "copy", "dense", 1, ("bright",)

    def run(self, images, bright):
        return bright


class Noise(Expert):
    """Sees something that half of the bright and half of the dark images have."""

    type, name, kind, channels = "test_noise", "noise", "dense", 1

    def run(self, images):
        return [say(np.asarray(image).max() % 2 == 1, image) for image in images]


class Oracle:
    """A network that says what an expert tells, and "no" without experts."""

    dtype = torch.float32

    def __init__(self, tokenizer):
        # the tokens of the shipped checkpoint's answers
        self.ids = {text: tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0] for text in ("Yes", "No")}

    def generate(self, input_ids, attention_mask, pixel_values, expert_mask, do_sample, **experts):
        each = len(input_ids) // len(pixel_values)
        assert not do_sample and {f"{name}_values" for name in ("bright", "copy", "noise")} >= set(experts)
        answers = []
        for row in range(len(input_ids)):
            image = row // each
            present = [name for name, known in zip(("bright", "copy", "noise"), expert_mask[image].tolist()) if known]
            told = bool(present) and experts[f"{present[0]}_values"][image, ..., 0].mean() > 0
            answers.append(self.ids["Yes" if told else "No"])
        return torch.cat([input_ids, torch.tensor(answers)[:, None]], dim=1)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A checkpoint with these experts, and questions about eight images; every second one is always answered no."""
    monkeypatch.setattr(Expert, "registry", dict(Expert.registry))
    for expert in (Bright, Copy, Noise):
        Expert.registry[expert.type] = expert
    monkeypatch.setattr(Bright, "runs", 0)
    shipped = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"), experts=None)
    suite = ExpertSuite([Bright(), Copy(), Noise()])
    shipped.image_processor.experts = suite.descriptions
    shipped.experts = suite
    shipped.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").write_text('{"model_type": "prismer"}')
    monkeypatch.setattr(PrismerReader, "load_network", lambda self: Oracle(self.processor.tokenizer))
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(8):
        shade = (200 if number % 2 else 50) + (number // 2 % 2)
        Image.new("RGB", (16, 12), (shade,) * 3).save(tmp_path / "images" / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "question": QUESTION, "answer": ["no", "yes"][number % 2], "kind": "light"}
        )
        if number % 2 == 0:
            rows.append({"image": f"{number}.png", "question": "Is it a dog?", "answer": "no", "kind": "dog"})
    write_questions(tmp_path / "images" / "questions.jsonl", rows)
    return tmp_path


def test_known_worths_are_measured(known):
    arguments = (known / "checkpoint", "--data", known / "images", "--type-column", "kind", "--budget-seconds", 1000)
    report, result = worth(known / "out", *arguments, "--batch-size", 3)
    light = report["types"]["light"]
    assert (light["samples"], light["with_none"]["value"], light["with_all"]["value"]) == (8, 0.5, 1.0)
    found = {name: (own["alone"]["value"], own["cur"]["value"]) for name, own in light["experts"].items()}
    assert found == {"bright": (1, 0), "copy": (1, 0), "noise": (0.5, 0)}
    shapley = {name: round(own["shapley"]["value"], 3) for name, own in light["experts"].items()}
    assert shapley == {"bright": 0.25, "copy": 0.25, "noise": 0.0}
    assert report["types"]["dog"]["samples"] == 4 and list(report["types"]) == ["all", "light", "dog"]
    # the noise spoils questions that need no expert
    assert report["types"]["dog"]["experts"]["noise"]["shapley"]["value"] < 0
    assert report["budget"]["score"]["value"] == max(subset["score"]["value"] for subset in report["subsets"])
    chosen = ",".join(report["budget"]["experts"])
    assert f"within 1000 s for each image: --experts {chosen} (" in result.stdout
    assert report["costs"]["copy"]["needs"] == ["bright"]
    assert len(report["subsets"]) == 8 and report["images"] == 8 and report["texts"] == 12
    for name in ("worth_by_type", "score_by_seconds"):
        with Image.open(known / "out" / f"{name}.png") as figure:
            assert figure.width > 500


def test_experts_run_once_and_samples_are_written(known):
    worth(known / "out", known / "checkpoint", "--data", known / "images", "--type-column", "kind")
    timed = 2 * 2  # two images: once to load, once to time
    assert Bright.runs == 8 + timed
    assert len(LabelStore(known / "out" / "labels")) == 8
    samples = pq.read_table(known / "out" / "samples.parquet").to_pydict()
    assert samples["text"].count(QUESTION) == 8 and samples["type"].count("dog") == 4
    is_light = np.array(samples["text"]) == QUESTION
    assert np.array(samples["bright"])[is_light].mean() == 1 and np.array(samples["none"])[is_light].mean() == 0.5
    assert set(samples) == {"image_id", "text", "type", "none", "bright", "copy", "noise"} | {
        *("bright+copy", "bright+noise", "copy+noise", "bright+copy+noise")
    }


def test_an_interrupted_run_continues(known, monkeypatch):
    arguments = (known / "checkpoint", "--data", known / "images", "--batch-size", 2)
    first, _ = worth(known / "out", *arguments)
    path = known / "out" / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    calls = []
    generate = Oracle.generate
    monkeypatch.setattr(Oracle, "generate", lambda self, **inputs: calls.append(1) or generate(self, **inputs))
    again, _ = worth(known / "out", *arguments)
    assert len(calls) == 8 * (3 + 1)  # five images in three batches, and the first one to warm up
    assert again["types"] == first["types"]
    # answers to other questions are not taken for these
    others = [{"image": f"{number}.png", "question": "Is it?", "answer": "no"} for number in range(8)]
    write_questions(known / "images" / "questions.jsonl", others)
    result = run("worth", *arguments, "--out", known / "out")
    assert result.exit_code == 1 and "answers.jsonl has answers to other texts about '" in result.stderr
    result = run("worth", *arguments, "--out", known / "out", "--beams", 2)
    assert result.exit_code == 1 and "answers.jsonl has results with settings" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [("weights", "results with weights"), ("labels", "results with labels"), ("dtype", "results with dtype")],
)
def test_answers_of_another_run_are_not_taken(known, change, message):
    weights = known / "checkpoint" / "model.safetensors"
    weights.write_bytes(b"first")
    arguments = [known / "checkpoint", "--data", known / "images"]
    worth(known / "out", *arguments)
    worth(known / "out", *arguments)  # the same again
    if change == "weights":
        weights.write_bytes(b"trained again")
    elif change == "labels":
        shutil.copytree(known / "out" / "labels", known / "store")
        arguments += ["--labels", known / "store"]
    else:
        arguments += ["--dtype", "bfloat16"]
    result = run("worth", *arguments, "--out", known / "out")
    assert result.exit_code == 1 and f"answers.jsonl has {message}" in result.stderr, result.stderr


def test_stored_labels_replace_the_experts(known):
    label = ("label", known / "images", "--experts", known / "checkpoint", "--out", known / "store")
    assert run(*label).exit_code == 0
    arguments = (known / "checkpoint", "--data", known / "images", "--labels", known / "store")
    report, _ = worth(known / "out", *arguments)
    assert report["types"]["all"]["experts"]["bright"]["alone"]["value"] == 1
    assert not (known / "out" / "labels").exists()


def test_random_orders_replace_all_subsets(known):
    arguments = (known / "checkpoint", "--data", known / "images", "--permutations", 1)
    report, result = worth(known / "out", *arguments)
    assert report["orders"] == 1 and "1 random orders" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--type-column", "sort"), "has no column 'sort'; it has image, question, answer, kind"),
        (("--budget-seconds", 0), "no subset runs in 0 seconds for each image; the fastest takes"),
        (("--experts", "none"), "uses no experts, so there is nothing to measure"),
        (("--experts", "edge"), "there is no 'edge'; the experts of"),
        (("--task", "caption"), "made for vqa"),
        (("--labels", "missing"), "missing"),
        (("--answer-column", "kind", "--data", "missing"), "missing"),
    ],
)
def test_bad_input_gets_one_clear_line(known, arguments, message):
    if "caption" in arguments:
        write_questions(known / "images" / "captions.jsonl", [{"image": "0.png", "caption": "a dog"}])
    result = run("worth", known / "checkpoint", "--data", known / "images", "--out", known / "out", *arguments)
    assert result.exit_code == 1 and message in result.stderr, result.stderr


# ---- shipped checkpoints ----


@pytest.fixture
def shapes(tmp_path):
    """Images of easy-VQA's kind with two questions, and one with three."""
    rows = []
    for number, (shape, color) in enumerate([("ellipse", "red"), ("rectangle", "blue"), ("ellipse", "teal")]):
        image = Image.new("RGB", (64, 64), (240, 244, 250))
        getattr(ImageDraw.Draw(image), shape)((16, 18, 46, 48), fill=color)
        image.save(tmp_path / f"{number}.png")
        name = "circle" if shape == "ellipse" else shape
        asked = [("what shape is in the image?", name), ("is there a blue shape?", ["no", "yes"][color == "blue"])]
        asked += [("what color is the shape?", color)] if number == 2 else []
        rows += [{"image": f"{number}.png", "question": text, "answer": answer} for text, answer in asked]
    write_questions(tmp_path / "questions.jsonl", rows)
    return tmp_path


def answers_of(out):
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return {row["file"]: dict(zip(row["subsets"], row["answers"])) | {"texts": row["texts"]} for row in rows}


def asked(image, experts, texts, *arguments):
    result = run("ask", image, "--experts", experts, "--json", *arguments, *(f"--question={text}" for text in texts))
    assert result.exit_code == 0, result.stderr
    row = json.loads(result.stdout)
    return [answer["text"] for answer in row.get("answers", [row])]


def test_answers_equal_those_of_prismer_ask(shapes, tmp_path):
    model = ("--model", "prismer-easy-vqa")
    report, _ = worth(tmp_path / "out", "prismer-easy-vqa", "--data", shapes)
    found = answers_of(tmp_path / "out")
    assert [len(own["texts"]) for own in found.values()] == [2, 2, 3]
    for name, subset in (("0.png", "none"), ("1.png", "edge"), ("2.png", "edge+ocr")):
        own = found[name]
        assert own[subset] == asked(shapes / name, subset.replace("+", ","), own["texts"], *model)
    assert report["types"]["all"]["with_all"]["value"] > 0.5
    assert report["score"] == "VQA accuracy" and 0 < report["costs"]["edge"]["label_bytes"] < 10_000


def test_candidates_are_ranked(shapes, tmp_path):
    (tmp_path / "answers.txt").write_text("circle\nteal\n")
    arguments = ("prismer-easy-vqa", "--data", shapes, "--candidates", tmp_path / "answers.txt", "--experts", "edge")
    worth(tmp_path / "out", *arguments)
    found = answers_of(tmp_path / "out")
    assert {text for own in found.values() for text in (*own["none"], *own["edge"])} == {"circle", "teal"}


def test_captions_are_scored_by_cider(tmp_path):
    sample_image("scene").save(tmp_path / "a.png")
    sample_image("scene").rotate(180).save(tmp_path / "b.png")
    rows = [{"image": "a.png", "caption": "a table with a frog"}, {"image": "b.png", "caption": "a green ball"}]
    write_questions(tmp_path / "captions.jsonl", rows)
    arguments = ("prismer-scenes", "--data", tmp_path, "--task", "caption", "--experts", "edge", "--beams", 1)
    report, result = worth(tmp_path / "out", *arguments)
    assert report["score"] == "CIDEr" and report["texts"] == 2 and "CIDEr × 100" in result.stdout
    assert all(own["texts"] is None and len(own["none"]) == 1 for own in answers_of(tmp_path / "out").values())


# ---- PrismerLM ----


@pytest.mark.parametrize("experts_as", ["tokens", "both"])
def test_prismer_lm_answers_as_prismer_ask(folder, tmp_path, experts_as):  # noqa: F811
    from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor

    from ..processing.tiny_lm_processors import EXPERTS_CONFIG

    checkpoint, text = tmp_path / "lm", str(folder / "language")
    suite = ExpertSuite([CannyEdges(), Shade()])
    torch.manual_seed(0)
    model = PrismerLMForConditionalGeneration.from_backbones(
        text, [str(folder / "vision")], suite.descriptions, experts_config=EXPERTS_CONFIG, experts_as=experts_as
    )
    model.set_class_features("shade", torch.randn(2, 8))
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(checkpoint)
    processor = PrismerLMProcessor.from_backbones(
        text, [str(folder / "vision")], suite, config=model.config, experts_as=experts_as
    )
    processor.save_pretrained(checkpoint)
    texts = ["What shape is it?", "Is it red?"]
    rows = [
        {"image": str(folder / f"{number}.png"), "question": text, "answer": "a circle"}
        for number in range(2)
        for text in texts
    ]
    data = write_questions(tmp_path / "questions.jsonl", rows)
    worth(tmp_path / "out", checkpoint, "--data", data)
    found = answers_of(tmp_path / "out")
    told = set()
    for image, own in found.items():
        for subset in ("none", "edge", "shade", "edge+shade"):
            expected = asked(image, subset.replace("+", ","), texts, "--model", checkpoint)
            assert own[subset] == [(text.splitlines() or [""])[0].strip() for text in expected]
            told.add(tuple(own[subset]))
    assert len(told) > 2
    result = run("worth", checkpoint, "--data", data, "--out", tmp_path / "out", "--task", "classification")
    assert result.exit_code == 1


class Shade(Expert):
    """Names the halves of an image."""

    type, name, kind, channels, num_classes = "test_shade", "shade", "label", 8, 2
    class_names = ["dog", "circle"]

    def run(self, images):
        labels = [np.zeros(image.size[::-1], np.uint8) for image in images]
        for label in labels:
            label[len(label) // 2 :] = 1
        return labels
