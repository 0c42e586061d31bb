"""A router learns from the results of `prismer worth` which experts a question needs."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import train_router
from modeling_prismer import PrismerProcessor
from modeling_prismer.processing.expert_router import ExpertRouter, RouterConfig
from router_evaluation import Samples, Setting, evaluate, table, with_interval
from tests.processing.tiny_lm_processors import IMAGE, make_processor
from train_router import RouterArguments, load_images, prompts_of, read_samples, train


SUBSETS = [[], ["edge"], ["ocr"], ["edge", "ocr"]]
COSTS = {"edge": {"seconds": 0.05, "needs": []}, "ocr": {"seconds": 0.11, "needs": []}}
SIGNS = ("what does the sign say?", "which word is on the sign?", "what is written on the left sign?")
SHAPES = ("what shape is in the image?", "is there a triangle?", "which shape is it?")
COLORS = ("what color is the shape?", "is it red?", "which color is it?")


def question(number):
    """A question, and the expert that it needs."""
    kind = number % 3
    return (SIGNS, SHAPES, COLORS)[kind][number // 3 % 3], ("ocr", "edge", None)[kind]


def write_worth(folder, images, number=180, task="vqa"):
    """What `prismer worth` writes for questions that one expert, or none, answers."""
    folder.mkdir()
    asked = [question(number) for number in range(number)]
    subsets = [{"experts": own} for own in SUBSETS]
    (folder / "worth.json").write_text(json.dumps({"task": task, "costs": COSTS, "subsets": subsets}))
    columns = {"image_id": [f"{number % images}.png" for number in range(number)], "text": [text for text, _ in asked]}
    for own in SUBSETS:
        columns["+".join(own) or "none"] = [float(need is None or need in own) for _, need in asked]
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    return folder


def samples_of(number=180, images=12):
    asked = [question(number) for number in range(number)]
    scores = [[float(need is None or need in own) for own in SUBSETS] for _, need in asked]
    names = [f"{number % images}.png" for number in range(number)]
    return Samples(names, [text for text, _ in asked], torch.tensor(scores), SUBSETS, [0.0, 0.05, 0.11, 0.16])


@pytest.fixture(scope="module")
def router():
    return train(samples_of(), folds=3)


@pytest.mark.parametrize("texts, experts", [(SIGNS, ["ocr"]), (SHAPES, ["edge"]), (COLORS, [])])
def test_question_runs_one_expert_alone(router, texts, experts):
    assert router.choose([[text] for text in texts]) == [experts] * 3


def test_prices_lead_from_all_that_helps_to_nothing(router):
    milliseconds = [own.milliseconds for own in router.config.prices]
    assert milliseconds == sorted(milliseconds, reverse=True) and milliseconds[-1] == 0
    assert all(math.isfinite(own.price) for own in router.config.prices)
    default = next(own for own in router.config.prices if own.price == router.config.default_price)
    assert default.score == 1.0 and default.milliseconds == pytest.approx((110 + 50) / 3, rel=0.01)
    assert router.choose([[SIGNS[0]], [SHAPES[0]]], price=router.config.price_for(20)) == [[], ["edge"]]


def test_evaluation_compares_with_fixed_subsets(router):
    settings = {own.name: own for own in evaluate(router, samples_of(), [20.0])}
    assert list(settings) == ["all", "none", "edge", "auto", "auto, 20 ms"]  # text is slower than edges and no better
    assert settings["all"].score[0] == 1 and settings["none"].score[0] == pytest.approx(1 / 3)
    assert settings["auto"].score[0] == 1 and settings["auto"].loss == (0, 0, 0)
    assert settings["auto"].expert_ms == pytest.approx((110 + 50) / 3, rel=0.01)
    assert settings["auto, 20 ms"].score[0] == pytest.approx(2 / 3) and settings["auto, 20 ms"].expert_ms <= 20
    low, value, high = (settings["none"].score[place] for place in (1, 0, 2))
    assert low <= value <= high


@pytest.mark.parametrize("tells", [True, False])
def test_images_are_seen_if_they_tell(tells):
    """Text helps for images with a sign, which a feature may show."""
    random = np.random.default_rng(0)
    has_sign = random.integers(0, 2, 400).astype(bool)
    features = random.normal(size=(400, 8))
    features[:, 3] += 6 * has_sign * tells
    scores = [[float(not sign or "ocr" in own) for own in SUBSETS] for sign in has_sign]
    names = [f"{number}.png" for number in range(400)]
    seconds = [0.0, 0.05, 0.11, 0.16]
    seen = torch.tensor(features).float()
    samples = Samples(names, ["what is it?"] * 400, torch.tensor(scores), SUBSETS, seconds, seen)
    router = train(samples, folds=3)
    assert bool(router.config.image_size) == tells
    if tells:
        chosen = router.choose([["what is it?"]] * 400, samples.features)
        right = [own == (["ocr"] if sign else []) for own, sign in zip(chosen, has_sign)]
        assert np.mean(right) > 0.95


def test_command_saves_the_checkpoint_with_its_router(tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "?", "answer": "yes"})
    (images / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    worth, output = write_worth(tmp_path / "worth", images=4), tmp_path / "routed"
    command = ["--model", "prismer-easy-vqa", "--worth", worth, "--data", images, "--output_dir", output]
    command += ["--eval_worth", worth, "--timed_rows", 2, "--budgets", 20, "--folds", 2]
    monkeypatch.setattr(sys, "argv", ["train_router.py", *map(str, command)])
    train_router.main()
    processor = PrismerProcessor.from_pretrained(output)
    assert processor.router.choose([[SIGNS[0]], [COLORS[0]]]) == [["ocr"], []]
    assert {"config.json", "model.safetensors"} <= {path.name for path in output.iterdir()}
    printed = capsys.readouterr().out
    assert "| auto, 20 ms |" in printed and Image.open(output / "router.png").width > 500
    settings = json.loads((output / "router_results.json").read_text())
    assert all(own["total_ms"] > 0 for own in settings)


@pytest.mark.parametrize(
    ("task", "row", "columns"),
    [
        ("caption", {"image": "a.png", "caption": "a dog"}, {}),
        (
            "vqa",
            {"image": "a.png", "frage": "?", "antwort": "ja"},
            {"text_column": "frage", "answer_column": "antwort"},
        ),
        ("classification", {"bild": "a.png", "art": "dog"}, {"image_column": "bild", "label_column": "art"}),
    ],
)
def test_images_are_those_of_the_measured_task(tmp_path, cache, task, row, columns):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    worth = write_worth(tmp_path / "worth", images=1, task=task)
    args = RouterArguments("model", worth, [], tmp_path / "out", **columns)
    assert load_images(args, [str(tmp_path / "own.jsonl")], worth) == {"a.png": str(tmp_path / "a.png")}


def test_the_checkpoint_is_not_overwritten(tmp_path, monkeypatch):
    command = ["--model", tmp_path, "--worth", tmp_path, "--data", tmp_path, "--output_dir", f"{tmp_path}/."]
    monkeypatch.setattr(sys, "argv", ["train_router.py", *map(str, command)])
    with pytest.raises(SystemExit, match="--output_dir .* is the folder of --model; name another one"):
        train_router.main()


@pytest.mark.parametrize("template", [True, False])
def test_prismer_lm_learns_from_the_prompts_that_it_gets(template):
    processor = make_processor()
    processor.chat_template = processor.chat_template if template else None
    processor.router = ExpertRouter(RouterConfig([[], ["depth"]], [0.0, 0.1]))
    asked = []
    processor.router.choose = lambda texts, images, price: asked.extend(texts) or [[]] * len(texts)
    if template:
        content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": SIGNS[0]}]
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            experts="auto",
        )
    else:
        processor(IMAGE, processor.prompt_for("vqa", SIGNS[0]), experts="auto")
    words_of = processor.router.words_of
    assert words_of(asked[0][0]) == words_of(prompts_of(processor, [SIGNS[0]])[0])


@pytest.mark.parametrize("folds", [1, 5])
def test_folds_need_images(tmp_path, monkeypatch, folds):
    worth = write_worth(tmp_path / "worth", images=4)
    command = ["--model", "prismer-easy-vqa", "--worth", worth, "--data", tmp_path, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["train_router.py", *map(str, [*command, "--folds", folds])])
    with pytest.raises(SystemExit, match=f"--folds is {folds}, and .* has 4 images; at least 2 folds are needed"):
        train_router.main()
    assert not (tmp_path / "out").exists()


def test_one_image_has_no_interval():
    setting = Setting("all", with_interval(np.array([1.0, 0.0]), ["0.png"] * 2), (0.0, None, None), 5.0)
    assert "| all | 50.0 | 0.0 | 5.0 | – |" in table([setting])
    assert "| all | 50.0 [25.0, 75.0] | 0.0 |" in table([replace(setting, score=(0.5, 0.25, 0.75))])


def test_unknown_times_are_refused(tmp_path):
    write_worth(tmp_path / "worth", images=4)
    report = json.loads((tmp_path / "worth" / "worth.json").read_text())
    report["costs"]["ocr"]["seconds"] = None
    (tmp_path / "worth" / "worth.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="the time of ocr is unknown"):
        read_samples(tmp_path / "worth")
