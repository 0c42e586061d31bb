"""Faulty rows, long answers and named columns in the recipes."""

import json
import logging
import pickle
import re
import sys

import datasets
import pytest
from datasets import Features, Value
from PIL import Image

import run_captioning
import run_vqa
import training
from modeling_prismer import DataCollatorForPrismer, PrismerConfig, PrismerProcessor
from modeling_prismer.processing.data import leave_undecoded, load_rows, shorten_answers
from tests.processing.data.data_files import (
    captioned,
    columns,
    example_image,
    png,
    write_csv,
    write_images,
    write_json,
    write_tar,
)


pytestmark = pytest.mark.usefixtures("cache")


def truncate(path):
    """Cuts a file with a noisy image in the middle, so that its header stays whole."""
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def run(script, checkpoint, folder, *arguments):
    command = [script.__name__, "--model", checkpoint, "--image_size", 32, "--train_data", folder, "--do_train"]
    command += ["--total_batch_size", 2, "--per_device_train_batch_size", 2, "--max_steps", 2, "--save_strategy", "no"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", list(map(str, [*command, *arguments])))
        script.main()


@pytest.mark.parametrize("labels", ["precomputed", "live"])
def test_training_can_skip_damaged_images(checkpoint, folder, tmp_path, labels):
    captioned(folder)
    truncate(folder / "torn.png")
    with open(folder / "captions.csv", "a") as file:
        file.write("torn.png,a torn photo\n")
    arguments = ("--labels", labels, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=r"row 3: .*torn\.png' is truncated"):
        run(run_captioning, checkpoint, folder, *arguments)
    run(run_captioning, checkpoint, folder, *arguments, "--bad_rows", "skip")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_image_damaged_later_is_named_during_training(checkpoint, folder, tmp_path):
    rows = leave_undecoded(load_rows(captioned(folder)))
    truncate(folder / "b.png")
    collate = DataCollatorForPrismer(PrismerProcessor.from_pretrained(checkpoint))
    with pytest.raises(ValueError, match=r"'b\.png' is truncated or damaged"):
        collate([rows[0], rows[1]])
    truncate(folder / "a.png")
    with pytest.raises(ValueError, match=r"'(a|b)\.png' is truncated or damaged"):
        run(run_captioning, checkpoint, folder, "--no_check_images", "--labels", "live", "--output_dir", tmp_path)


def test_faults_of_both_data_sets_are_reported_together(folder, monkeypatch):
    write_images(folder, "a.png")
    write_csv(folder / "train.csv", ("image", "caption"), ("a.png", ""))
    write_csv(folder / "val.csv", ("image", "caption"), ("a.png", " "))
    command = ["run", "--output_dir", "x", "--do_train", "--do_eval", "--train_data", f"{folder}/train.csv"]
    monkeypatch.setattr(sys, "argv", [*command, "--eval_data", f"{folder}/val.csv"])
    with pytest.raises(ValueError, match=r"(?s)train\.csv, row 1.*val\.csv, row 1"):
        training.load_data(*training.parse_arguments(), "caption")


def test_columns_can_be_named_on_the_command_line(folder, monkeypatch):
    write_images(folder, "a.png")
    path = write_csv(
        folder / "c.csv", ("bild", "frage", "antwort", "teil"), ("a.png", "q", "x", "a"), ("b", "", "", "b")
    )
    command = ["run", "--output_dir", "x", "--do_train", "--train_data", path, "--train_split", "a"]
    names = ["--image_column", "bild", "--answer_column", "antwort", "--split_column", "teil"]
    for name in ("--text_column", "--question_column"):
        monkeypatch.setattr(sys, "argv", [*command, *names, name, "frage"])
        rows, _ = training.load_data(*training.parse_arguments(), "vqa")
        assert columns(rows, "text", "suffix") == [("q", "x")]
    monkeypatch.setattr(sys, "argv", [*command, *names, "--caption_column", "antwort"])
    assert columns(training.load_data(*training.parse_arguments(), "caption")[0], "suffix") == ["x"]
    monkeypatch.setattr(sys, "argv", [*command, *names, "--label_column", "antwort"])
    assert columns(training.load_data(*training.parse_arguments(), "classification")[0], "suffix") == ["x"]
    dataset = datasets.Dataset.from_dict({"image": [{"bytes": png(0)}], "caption": ["p"], "name": ["n7"]})
    dataset.cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    monkeypatch.setattr(sys, "argv", [*command[:5], str(folder / "saved"), "--id_column", "name"])
    assert columns(training.load_data(*training.parse_arguments(), "caption")[0], "image_id") == ["n7"]


@pytest.mark.parametrize("arguments", [(), ("--questions_per_image", 2), ("--streaming", "--labels", "live")])
def test_too_long_answer_is_cut_with_a_warning(checkpoint, folder, tmp_path, caplog, arguments):
    write_images(folder, "a.png", "b.png")
    answers = [("a.png", "red " * 600), ("b.png", "blue"), ("a.png", "green")]
    lines = [{"image": image, "question": "what?", "answer": answer} for image, answer in answers]
    write_json(folder / "q.jsonl", lines, lines=True)
    with caplog.at_level(logging.WARNING):
        run(run_vqa, checkpoint, folder, "--output_dir", tmp_path / "out", *arguments)
    if "--streaming" not in arguments:
        assert re.search(r"answers of 1 of [23] rows are cut to \d+ tokens.*\n.*row 1: .*red red", caplog.text)


def test_answer_is_one_of_the_candidates(checkpoint, folder, tmp_path, monkeypatch):
    write_images(folder, "a.png")
    write_json(folder / "q.jsonl", [{"image": "a.png", "question": "what?"}], lines=True)
    candidates = write_json(tmp_path / "answer_list.json", ["red", "blue"])
    command = ["run_vqa", "--model", checkpoint, "--eval_data", folder, "--predict_only", "--candidates", candidates]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--output_dir", str(tmp_path)])
    run_vqa.main()
    (prediction,) = json.loads((tmp_path / "predictions.json").read_text())
    assert prediction["answer"] in ("red", "blue")


def test_too_long_answers_about_shared_images_are_cut(checkpoint):
    rows = {"image": [{"bytes": png(0)}], "question": ["what?"], "answers": [["red " * 600, "blue"]]}
    rows = load_rows(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()), "vqa")
    processor = PrismerProcessor.from_pretrained(checkpoint)
    processor.task = "vqa"
    rows = shorten_answers(leave_undecoded(rows), processor, PrismerConfig.from_pretrained(checkpoint).text_config)
    inputs = DataCollatorForPrismer(processor)([rows[0], rows[1]])
    assert rows[1]["suffix"] == "blue" and inputs["input_ids"].shape[1] < 62


def test_answers_that_fit_are_not_cut(checkpoint, folder):
    write_images(folder, "a.png")
    answers = ["red", "a " * 40]
    lines = [{"image": "a.png", "question": "what?", "answer": answer} for answer in answers]
    rows = load_rows(write_json(folder / "q.jsonl", lines, lines=True), "vqa")
    processor, config = PrismerProcessor.from_pretrained(checkpoint), PrismerConfig.from_pretrained(checkpoint)
    processor.task = "vqa"
    shortened = shorten_answers(rows, processor, config.text_config)
    assert shortened["suffix"][0] == "red" and answers[1].strip().startswith(shortened["suffix"][1].lower())
    tokens = processor(example_image(0), rows["text"][1], suffix=shortened["suffix"][1])["input_ids"].shape[1]
    assert tokens <= config.text_config.max_position_embeddings - config.text_config.pad_token_id - 1
    processor.task = "caption"  # the processor cuts captions
    assert shorten_answers(rows, processor, config.text_config)["suffix"][:] == rows["suffix"][:]


def test_streams_can_be_sent_to_other_processes(checkpoint, folder):
    processor = PrismerProcessor.from_pretrained(checkpoint)
    processor.task = "vqa"
    features = {"image": datasets.Image(), "question": Value("string"), "answer": Value("string")}
    rows = {"image": [example_image(0)], "question": ["q"], "answer": ["x"], "split": ["train"]}
    stream = datasets.Dataset.from_dict(rows, Features(features | {"split": Value("string")})).to_iterable_dataset()
    write_tar(folder / "x.tar", {"a.png": png(0), "a.json": b'{"question": "q", "answer": "x"}'})
    config = PrismerConfig.from_pretrained(checkpoint).text_config
    for source in (stream, str(folder)):
        sent = leave_undecoded(shorten_answers(load_rows(source, "vqa", streaming=True), processor, config))
        assert columns(pickle.loads(pickle.dumps(sent)), "suffix") == ["x"]
