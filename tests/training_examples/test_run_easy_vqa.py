"""run_easy_vqa.py trains on easy-VQA, resumes, evaluates by generation and ranking, and publishes a checkpoint."""

import json
import sys

import pytest
import torch
from datasets import Dataset
from PIL import Image

import run_easy_vqa
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor


pytest.importorskip("easy_vqa")
IMAGES = 20


def run(monkeypatch, output_dir, *arguments):
    command = ["run_easy_vqa.py", "--output_dir", str(output_dir)]
    command += ["--max_train_rows", str(IMAGES), "--max_eval_rows", str(IMAGES), "--logging_steps", "1"]
    command += ["--per_device_train_batch_size", "6", "--dataloader_num_workers", "0"]
    monkeypatch.setattr(sys, "argv", [*command, *map(str, arguments)])
    run_easy_vqa.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of two epochs (six steps) with precomputed labels, evaluated and published."""
    output_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = ("--do_train", "--do_eval", "--num_train_epochs", 2, "--publish_to", output_dir / "published")
        run(monkeypatch, output_dir, *arguments)
    return output_dir


def test_results_have_every_type_of_question(trained):
    results = json.loads((trained / "test_results.json").read_text())
    assert results["images"] == IMAGES and results["questions"] > IMAGES
    for way in ("generate", "rank"):
        assert set(results[way]) == {"exact_match", *(f"exact_match {t}" for t in ("color", "shape", "yes/no"))}
        assert all(0 <= value <= 1 for value in results[way].values())


def test_published_folder_answers_with_live_experts(trained):
    processor = PrismerProcessor.from_pretrained(trained / "published")
    model = PrismerForConditionalGeneration.from_pretrained(trained / "published", dtype=torch.float32)
    assert processor.task == "vqa" and list(processor.experts) == ["edge", "ocr"]
    inputs = processor(images=Image.new("RGB", (64, 64), "white"), text="Is there a circle?")
    generated = model.generate(**inputs)
    assert generated.shape[1] <= inputs["input_ids"].shape[1] + 6
    assert isinstance(processor.post_process_generation(generated, inputs["input_ids"].shape[1])[0], str)


def test_published_weights_are_half_precision(trained):
    model = PrismerForConditionalGeneration.from_pretrained(trained / "published", dtype="auto")
    assert model.dtype == torch.float16


def test_resumed_training_reuses_labels(trained, monkeypatch, capfd):
    def fail(*args):
        raise AssertionError("the experts ran again")

    monkeypatch.setattr(run_easy_vqa.ExpertSuite, "__call__", fail)
    resume = ("--resume_from_checkpoint", trained / "checkpoint-6")
    run(monkeypatch, trained, "--do_train", "--num_train_epochs", 3, *resume)
    state = json.loads((trained / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["global_step"] == 9
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 10))


def test_exact_match_is_given_in_total_and_by_type():
    rows = Dataset.from_dict({"suffix": ["yes", "red", "circle", "no"]})
    assert run_easy_vqa.exact_match(["yes", "blue", "circle", "yes"], rows) == {
        "exact_match": 0.5,
        "exact_match color": 0.0,
        "exact_match shape": 1.0,
        "exact_match yes/no": 0.5,
    }


def test_evaluation_can_mask_out_experts(trained, monkeypatch):
    masks = []
    generate = PrismerForConditionalGeneration.generate

    def record(self, **inputs):
        masks.append(inputs["expert_mask"].any(0).tolist())
        return generate(self, **inputs)

    monkeypatch.setattr(PrismerForConditionalGeneration, "generate", record)
    for experts, mask in (("edge", [True, False]), ("none", [False, False])):
        masks.clear()
        run(monkeypatch, trained, "--model", trained / "published", "--do_eval", "--experts", experts)
        assert masks == [mask]
