"""studies/claims.py: trainings of every condition, its labels, the words that count, and the verdicts."""

import json
import sys

import numpy as np
import pytest
import torch


pytest.importorskip("datasets")

from comparison.scores import Interval  # noqa: E402
from modeling_prismer import DataCollatorForPrismer  # noqa: E402
from modeling_prismer.processing.labels import label_images  # noqa: E402
from scenes import train_backbones  # noqa: E402
from scenes.run_scenes import TrueLabels, freeze_patches, training_rows  # noqa: E402
from scenes.scenes import open_scenes  # noqa: E402
from scenes.train_vision import new_tower  # noqa: E402
from studies import claims as study  # noqa: E402
from studies.adaptation import count_adaptors  # noqa: E402
from studies.answers import right_words  # noqa: E402
from studies.claims import CLAIMS, CONDITIONS, LYING, NONE, SIX, Condition, parse_arguments, trials_of  # noqa: E402
from studies.trials import Training  # noqa: E402
from studies.wrong_labels import coarse  # noqa: E402
from tests.training_examples.simple_experts import simple_suite  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes 2, small untrained backbones, and labels of simple experts."""
    folder = tmp_path_factory.mktemp("claims")
    splits = open_scenes(str(folder / "data"), "scenes2", 4, 2, 2)
    suite = simple_suite()
    for rows in splits.values():
        images = rows.select_columns(["image_id", "image"])
        label_images(images, suite, folder / "labels", image_column="image", key_column="image_id", progress=False)
    train_backbones.train_tokenizer(train_backbones.texts_of(splits["train"]), folder / "tokenizer")
    tokenizer = train_backbones.RobertaTokenizer.from_pretrained(folder / "tokenizer")
    new_tower(patch_size=16, width=32, layers=1).save_pretrained(folder / "clip")
    train_backbones.new_roberta(tokenizer, width=32, layers=2).save_pretrained(folder / "roberta")
    return folder


@pytest.fixture(scope="module")
def splits(folder):
    return open_scenes(str(folder / "data"), "scenes2", 4, 2, 2)


def command(folder, output_dir, *more):
    own = {"output_dir": output_dir, "backbones": folder, "labels": folder / "labels", "data_dir": folder / "data"}
    own |= {"train": 4, "validation": 2, "test": 2, "steps": 2, "batch_size": 2, "texts_per_image": 2}
    return [*(f"--{name}={value}" for name, value in own.items()), *map(str, more)]


@pytest.fixture
def args(folder, tmp_path):
    return parse_arguments(command(folder, tmp_path))


# ---- trainings ----


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_is_trained_and_evaluated(name, args, monkeypatch):
    monkeypatch.setattr(study, "LATER", (1,))
    result = json.loads(json.dumps(study.train(Training(name, 0.01, 1), args)))
    condition = CONDITIONS[name]
    expected = {"validation", "test"} | ({LYING} if name in (SIX, "lies in training") else set())
    expected |= {"test, 0 steps later", "test, 1 steps later"} if condition.later else set()
    assert result["counts"].keys() == expected
    for counts in result["counts"].values():
        assert len(counts) == 2
        assert all(own.keys() == study.ATTRIBUTES.keys() for own in counts)
        assert all(0 <= right <= total for own in counts for right, total in own.values())
    assert result["seconds_per_step"] > 0 and result["megabytes"] >= 0
    assert (result["trained"] == result["total"]) == (name == "everything trained")


def trained_parts(name, args, splits, monkeypatch):
    """The parts of a model that a training of a condition changes."""
    condition = CONDITIONS[name]
    torch.manual_seed(0)
    model, processor = study.new_model(condition, args.backbones)
    rows = training_rows(splits["train"], "objects")
    trainer = study.trainer_of(
        model, processor, condition, Training(name, 0.01, 0), args, rows, TrueLabels(splits["train"])
    )
    before = {key: weights.detach().clone() for key, weights in model.named_parameters()}
    trainer.train()
    parts = ("lora_", "ia3_", ".adaptor.", "resampler", "embeddings.patch", "vision_model.layers", "text_model.layers")
    changed = [key for key, weights in model.named_parameters() if not weights.equal(before[key])]
    return {next((part for part in parts if part in key and "cross_attn" not in key), "other") for key in changed}


@pytest.mark.parametrize(
    "name, expected",
    [
        (SIX, {".adaptor.", "resampler"}),
        ("patch embedding trained", {".adaptor.", "resampler", "embeddings.patch"}),
        ("language trained", {".adaptor.", "resampler", "text_model.layers"}),
        ("no resampler", {".adaptor."}),
        ("LoRA", {"lora_", "resampler"}),
        ("DoRA", {"lora_", "resampler"}),
        ("(IA)³", {"ia3_", "resampler"}),
    ],
)
def test_a_condition_trains_its_own_parts(name, expected, args, splits, monkeypatch):
    args.steps = 4  # new adaptors and LoRA change nothing in the first step
    assert trained_parts(name, args, splits, monkeypatch) - {"other", "text_model.layers"} == expected - {
        "text_model.layers"
    }


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_lora_has_about_as_many_weights_as_the_adaptors(folder, method):
    model, _ = study.new_model(Condition(adaptation=method), folder)
    number = sum(own.numel() for name, own in model.named_parameters() if "lora_" in name and own.requires_grad)
    assert number == pytest.approx(count_adaptors(model), rel=0.25)
    assert not any(own.requires_grad for name, own in model.named_parameters() if ".adaptor." in name)


def test_the_stem_of_a_new_expert_is_trained_alone(args, splits):
    condition = CONDITIONS["detection later"]
    model, processor = study.new_model(condition, args.backbones)
    freeze_patches(model)
    processor = study.add_stem(model, processor, "detection")
    assert [each["name"] for each in processor.image_processor.experts][-1] == "detection"
    rows, known = training_rows(splits["train"], "objects"), TrueLabels(splits["train"])
    trainer = study.trainer_of(model, processor, Condition(), Training("detection later", 0.01, 0), args, rows, known)
    before = {name: weights.detach().clone() for name, weights in model.named_parameters()}
    trainer.train()
    changed = {name for name, weights in model.named_parameters() if not weights.equal(before[name])}
    assert changed and all("expert_stems.detection" in name for name in changed)


# ---- labels ----


def test_conditions_have_their_labels(splits, folder):
    ids = splits["test"]["image_id"][:]
    known = TrueLabels(splits["test"])
    true = dict(zip(ids, known(ids)))

    def labels(condition, lies=0.0):
        return dict(zip(ids, study.labels_for(condition, known, lies)(ids)))

    assert all(own.keys() == {"depth", "ocr"} for own in labels(Condition(experts=("depth", "ocr"))).values())
    assert all(own == {} for own in labels(CONDITIONS[NONE]).values())
    np.testing.assert_equal(labels(Condition()), true)
    np.testing.assert_equal(
        labels(Condition(labels="coarse")), {name: coarse(own, name) for name, own in true.items()}
    )
    maps = [own["noise"] for own in labels(Condition(noise=True)).values()]
    assert maps[0].shape == (128, 128) and not np.array_equal(*maps)
    lying = labels(Condition(), lies=1.0)
    for name, own in true.items():
        assert all(a != b for a, b in zip(own["detection"]["classes"], lying[name]["detection"]["classes"]))
        assert np.array_equal(lying[name]["depth"], own["depth"])
        assert lying[name]["ocr"]["words"] == own["ocr"]["words"]


def test_a_share_of_the_images_lies():
    ids = [f"image {number}" for number in range(400)]
    label = {"detection": {"ids": None, "classes": [1]}}
    read = study.labels_for(Condition(), lambda image_ids: [label] * len(image_ids), lies=0.3)
    liars = [own["detection"]["classes"] != [1] for own in read(ids)]
    assert 0.2 < np.mean(liars) < 0.4
    assert liars[5:9] == [own["detection"]["classes"] != [1] for own in read(ids[5:9])]


# ---- words ----


def test_each_word_counts_if_all_its_tokens_are_right(folder, splits):
    model, processor = study.new_model(Condition(experts=()), folder)
    rows = training_rows(splits["test"], "objects")
    collator = DataCollatorForPrismer(processor)
    vocabulary = len(processor.tokenizer)

    class Knows(torch.nn.Module):
        """Says the right tokens, except one."""

        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong
            self.device = torch.device("cpu")

        def forward(self, input_ids, **inputs):
            said = torch.nn.functional.one_hot(input_ids.roll(-1, dims=1), vocabulary).float()
            if self.wrong is not None:
                said[(input_ids.roll(-1, dims=1) == self.wrong)] = 0
            return type("Output", (), {"logits": said})

    (all_right, _) = right_words(Knows(None), collator, rows, study.KINDS.get)
    kinds = [study.KINDS.get(word) for word in " ".join(rows[0]["suffix"]).replace(",", "").lower().split()]
    number = {kind: kinds.count(kind) for kind in all_right}
    assert all_right == {kind: (own, own) for kind, own in number.items()} and number["color"] >= 12
    word = rows[0]["suffix"][0].split()[0]  # a size
    token = processor.tokenizer(f" {word.capitalize()}", add_special_tokens=False)["input_ids"][-1]
    (some_wrong, _) = right_words(Knows(token), collator, rows, study.KINDS.get)
    assert some_wrong["size"][0] < some_wrong["size"][1] == all_right["size"][1]
    assert some_wrong["color"] == all_right["color"]


# ---- verdicts and the report ----


@pytest.mark.parametrize(
    "found, seeds, margin, expected",
    [
        ((2, 1, 3), (1, 2, 3), 0, "confirmed"),
        ((2, 1, 3), (-1, 2, 3), 0, "undecided"),  # the seeds do not agree
        ((2, -1, 3), (1, 2, 3), 0, "undecided"),
        ((-2, -3, -1), (-1, -2, -3), 0, "refuted"),
        ((-0.2, -0.8, 0.4), (-0.5, 0, 0.1), 1, "confirmed"),
        ((-0.2, -1.4, 0.4), (-0.5, 0, 0.1), 1, "undecided"),
        ((-3, -4, -1.5), (-2, -3, -4), 1, "refuted"),
        ((2, None, None), (1, 2, 3), 0, "undecided"),  # a single image
    ],
)
def test_verdicts(found, seeds, margin, expected):
    assert study.verdict(Interval(*found), seeds, margin) == expected


def test_claims_name_conditions():
    names = {name for claim in CLAIMS for name in (claim.better, claim.worse)}
    assert names == set(CONDITIONS)


def test_the_report_has_claims_with_all_their_trainings(args, tmp_path):
    trials = trials_of(args)
    for name, right in ((SIX, 60), (NONE, 50), ("detection", 60)):
        for rate in args.learning_rates:
            for seed in range(3):
                good = right - 5 * (rate != 0.003) + seed
                counts = [{kind: [good, 100] for kind in study.ATTRIBUTES}] * 4
                result = {"counts": dict.fromkeys(("validation", "test", LYING), counts), "trained": 3, "total": 4}
                result |= {"seconds_per_step": 0.5, "megabytes": 100.0}
                trials.train(Training(name, rate, seed), lambda training, result=result: result)
    study.report(trials, tmp_path / "claims.md")
    text = (tmp_path / "claims.md").read_text()
    assert "| More experts help: six against none | +10.0 [+10.0, +10.0] | +10.0, +10.0, +10.0 | confirmed |" in text
    assert "six against detection | +0.0 [+0.0, +0.0] | +0.0, +0.0, +0.0 | undecided |" in text
    assert "| six experts | 61.0 [61.0, 61.0] | 60.0, 61.0, 62.0 |" in text and "| 0.003 |" in text
    assert "coarse" not in text.split("Missing:")[0] and "coarse labels" in text.split("Missing:")[1]
    assert (tmp_path / "claims.png").stat().st_size > 1000


def test_command_trains_one(folder, tmp_path, monkeypatch):
    name = "no-experts-0.003-seed0"
    monkeypatch.setattr(sys, "argv", ["claims", *command(folder, tmp_path, "--training", name)])
    study.main()
    assert json.loads((tmp_path / "runs" / f"{name}.json").read_text())["training"]["condition"] == NONE
