"""run_lm.py in two processes learns what it learns in one."""

import json
import sys

import torch
from safetensors.torch import load_file

import run_lm
from tests.training_examples.distributed_launch import launch


def train(folder, language, vision, images, batch_size):
    data = images / "questions.jsonl"
    sys.argv = ["run_lm.py", "--stage", "questions", "--language", str(language), "--vision", str(vision)]
    sys.argv += ["--experts", "none", "--cache_features", "--dtype", "float32", "--do_train", "--do_eval"]
    sys.argv += ["--train_data", str(data), "--eval_data", str(data), "--max_train_rows", "16", "--max_steps", "2"]
    sys.argv += ["--per_device_train_batch_size", str(batch_size), "--train_sampling_strategy", "sequential"]
    sys.argv += ["--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
    sys.argv += ["--ddp_find_unused_parameters", "false", "--use_cpu", "--disable_tqdm", "true"]
    sys.argv += ["--output_dir", str(folder)]
    run_lm.main()


def test_two_processes_learn_what_one_learns(tmp_path, language, vision, image_folder):
    arguments = (language, vision, image_folder)
    assert launch(train, tmp_path / "one", *arguments, 4) == [0]
    assert launch(train, tmp_path / "two", *arguments, 2, number=2) == [0, 0]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    scores = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert scores[0]["eval_exact"] == scores[1]["eval_exact"]
    caches = [list((tmp_path / name / "image_features").glob("*/*.safetensors")) for name in ("one", "two")]
    assert [len(files) for files in caches] == [1, 2]  # each process encodes its share
