"""studies/rivals.py: each method trains its own weights within the budget, trainings resume, the best rate wins."""

import json
import shutil

import numpy as np
import pytest
import torch

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor
from studies import rivals
from studies.rivals import METHODS, Training, answer, count_adaptors, parse_arguments, report, train, wanted, work


@pytest.fixture(scope="module")
def start(tmp_path_factory, checkpoint):
    """A small random Prismer for questions."""
    folder = tmp_path_factory.mktemp("start")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    processor = PrismerProcessor.from_pretrained(checkpoint)
    processor.task = "vqa"
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def args(start, tmp_path):
    (tmp_path / "runs").mkdir()
    sizes = ["--train_images", 4, "--eval_images", 3, "--steps", 2, "--batch_size", 2, "--texts_per_image", 2]
    rest = ["--learning_rates", 0.001, 0.01, 0.1, "--seeds", 2, "--start", start, "--output_dir", tmp_path]
    return parse_arguments(["--data", "easy-vqa", *map(str, [*sizes, *rest])])


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_its_own_weights(method, start):
    model = PrismerForConditionalGeneration.from_pretrained(start)
    budget, total = count_adaptors(model), model.num_parameters()
    adapted = METHODS[method](model, 20 * budget if method in ("LoRA", "DoRA") else budget)
    names = trained_names(adapted)
    number = sum(own.numel() for own in adapted.parameters() if own.requires_grad)
    marks = {"adaptors": ".adaptor.", "LoRA": "lora_", "DoRA": "lora_", "(IA)³": "ia3_l", "BitFit": "bias"}
    if method in marks:
        assert names and all(marks[method] in name for name in names)
    if method == "prefix tuning":
        assert names and all(name.startswith("prompt_encoder") for name in names)
    wanted_number = {
        "adaptors": budget,
        "LoRA": 20 * budget,
        "DoRA": 20 * budget,
        "prefix tuning": budget,
        "full": total,
    }
    if method in wanted_number:
        assert number == pytest.approx(wanted_number[method], rel=0.1)
    else:
        assert number < budget * 2


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns(method, args):
    torch.manual_seed(0)
    result = train(Training(method, 0.01, 0), args)
    assert result["trained"] > 0 and result["seconds_per_step"] > 0
    assert [len(hits) for hits in result["hits"].values()] == [3, 3]
    assert all(isinstance(hit, bool) for hits in result["hits"]["test"] for hit in hits)


def test_answers_are_those_of_greedy_generation(args):
    args.start, args.eval_images = "prismer-easy-vqa", 8
    rows = rivals.load_data(args)
    trainer = rivals.make(Training("full", 0.01, 0), args, rows["train"], "live")
    collator = trainer.eval_collator
    collator.experts = []  # without them, it is wrong more often
    hits = answer(trainer, rows["test"])
    collator.with_suffix = False
    for row, own in zip(rows["test"], hits):
        inputs = collator([row])
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12, "min_new_tokens": 0}
        generated = trainer.model.generate(**inputs, **settings)
        said = trainer.processing_class.post_process_generation(generated, inputs["input_ids"].shape[1])
        assert [text == suffix for text, suffix in zip(said, row["suffix"])] == own
    assert 0.5 < np.mean([hit for own in hits for hit in own]) < 0.95


def result(training, args, right):
    hits = [[True] * right + [False] * (10 - right)] * 3
    return {
        "training": {},
        "settings": rivals.settings_of(args),
        "trained": 100,
        "seconds_per_step": 0.5,
        "megabytes": 20.0,
        "hits": {"validation": hits, "test": hits},
        "minutes": 0.1,
    }


def test_the_best_rate_is_trained_with_all_seeds(args):
    args.methods = ["adaptors", "LoRA"]
    rights = {0.001: 3, 0.01: 7, 0.1: 5}
    done = []

    def start(training, args):
        done.append(training)
        rivals.write_json(rivals.file_of(args, training), result(training, args, rights[training.learning_rate]))

    work(args, start)
    assert done == [
        *(Training(method, rate, 0) for method in args.methods for rate in (0.001, 0.01, 0.1)),
        *(Training(method, 0.01, 1) for method in args.methods),
    ]
    done.clear()
    work(args, start)
    assert done == []
    args.steps = 3
    with pytest.raises(SystemExit, match="was made with .* use another folder"):
        wanted(args)


def test_the_table_has_intervals_and_what_is_missing(args, tmp_path):
    args.methods, args.seeds = ["adaptors", "LoRA", "BitFit"], 1
    for method, right in (("adaptors", 5), ("LoRA", 8)):
        for rate in args.learning_rates:
            training = Training(method, rate, 0)
            path = rivals.file_of(args, training)
            path.write_text(json.dumps(result(training, args, right - (rate != 0.01))))
    report(args, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "| adaptors | 100 | 0.01 | 0.001: 40.0; 0.01: 50.0; 0.1: 40.0 | 50.0 [50.0, 50.0] | – | 0.50 | 20 |" in text
    assert "| LoRA | 100 | 0.01 |" in text and "| +30.0 [+30.0, +30.0] |" in text
    assert "Missing: BitFit." in text
    assert "beyond" not in text


def test_the_table_has_what_a_method_forgets(args, tmp_path):
    args.methods, args.seeds = ["adaptors"], 2
    for rate in args.learning_rates:
        for seed in range(2):
            training = Training("adaptors", rate, seed)
            found = result(training, args, 5)
            found["hits"] |= {"old, before": [[True, True]] * 3, "old": [[True, seed == 1]] * 3}
            rivals.file_of(args, training).write_text(json.dumps(found))
    report(args, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "Δ on the original scenes" in text
    assert "| – | −25.0 [−25.0, −25.0] | 0.50 |" in text


def test_the_table_marks_rates_at_the_end_of_those_tried(args, tmp_path):
    args.methods, args.seeds = ["adaptors"], 1
    for rate, right in zip(args.learning_rates, (3, 5, 8)):
        training = Training("adaptors", rate, 0)
        rivals.file_of(args, training).write_text(json.dumps(result(training, args, right)))
    report(args, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "| adaptors | 100 | 0.1* |" in text
    assert "one beyond it may be better" in text


def test_methods_are_tuned_with_three_rates(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "easy-vqa", "--output_dir", "x", "--learning_rates", "0.1", "0.2"])
    assert "at least three values" in capsys.readouterr().err


def test_shifted_scenes_are_split(args, tmp_path):
    args.data, args.data_dir, args.train_images, args.eval_images = "shifted", str(tmp_path / "data"), 2, 1
    rows = rivals.load_data(args)
    assert {name: len(own) for name, own in rows.items()} == {"train": 2, "validation": 1, "test": 1, "old": 1}
    assert rows["old"]["image_id"][0].startswith("scenes/")
    assert len(rows["train"][0]["text"]) == len(rows["train"][0]["suffix"]) > 5
    assert np.array(rows["train"][0]["image"]).shape == (192, 192, 3)
