"""studies/rivals.py: each method trains its own weights within the budget, trainings resume, the best rate wins."""

import shutil

import numpy as np
import pytest
import torch

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor
from studies import rivals
from studies.adaptation import count_adaptors
from studies.rivals import METHODS, answer, parse_arguments, report, train, trials_of
from studies.trials import Training


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
    assert [len(counts) for counts in result["counts"].values()] == [3, 3]
    for right, total in (own["answers"] for own in result["counts"]["test"]):
        assert 0 <= right <= total > 0


def test_answers_are_those_of_greedy_generation(args):
    args.start, args.eval_images = "prismer-easy-vqa", 8
    rows = rivals.load_data(args)
    trainer = rivals.make(Training("full", 0.01, 0), args, rows["train"], "live")
    collator = trainer.eval_collator
    collator.experts = []  # without them, it is wrong more often
    counts = answer(trainer, rows["test"])
    collator.with_suffix = False
    for row, own in zip(rows["test"], counts):
        inputs = collator([row])
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12, "min_new_tokens": 0}
        generated = trainer.model.generate(**inputs, **settings)
        said = trainer.processing_class.post_process_generation(generated, inputs["input_ids"].shape[1])
        hits = [text == suffix for text, suffix in zip(said, row["suffix"])]
        assert own == {"answers": (sum(hits), len(hits))}
    right, total = np.sum([own["answers"] for own in counts], axis=0)
    assert 0.5 < right / total < 0.95


def write_result(args, training, right, **more):
    counts = {"validation": [{"answers": [right, 10]}] * 3, "test": [{"answers": [right, 10]}] * 3, **more}
    result = {"trained": 100, "seconds_per_step": 0.5, "megabytes": 20.0, "counts": counts}
    trials_of(args).train(training, lambda training: result)


def test_the_table_has_intervals_and_what_is_missing(args, tmp_path):
    args.methods, args.seeds = ["adaptors", "LoRA", "BitFit"], 1
    for method, right in (("adaptors", 5), ("LoRA", 8)):
        for rate in args.learning_rates:
            write_result(args, Training(method, rate, 0), right - (rate != 0.01))
    report(trials_of(args), tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "| adaptors | 100 | 0.01 | 0.001: 40.0; 0.01: 50.0; 0.1: 40.0 | 50.0 [50.0, 50.0] | – | 0.50 | 20 |" in text
    assert "| LoRA | 100 | 0.01 |" in text and "| +30.0 [+30.0, +30.0] |" in text
    assert "Missing: BitFit." in text
    assert "beyond" not in text


def test_the_table_has_what_a_method_forgets(args, tmp_path):
    args.methods, args.seeds = ["adaptors"], 2
    for rate in args.learning_rates:
        for seed in range(2):
            old = {"old, before": [{"answers": [2, 2]}] * 3, "old": [{"answers": [1 + seed, 2]}] * 3}
            write_result(args, Training("adaptors", rate, seed), 5, **old)
    report(trials_of(args), tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "Δ on the original scenes" in text
    assert "| – | −25.0 [−25.0, −25.0] | 0.50 |" in text


def test_the_table_marks_rates_at_the_end_of_those_tried(args, tmp_path):
    args.methods, args.seeds = ["adaptors"], 1
    for rate, right in zip(args.learning_rates, (3, 5, 8)):
        write_result(args, Training("adaptors", rate, 0), right)
    report(trials_of(args), tmp_path / "table.md")
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
