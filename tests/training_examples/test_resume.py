"""A killed training resumes with bit-identical results."""

import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from modeling_prismer import DataCollatorForPrismer, PrismerProcessor
from tests.modeling_prismer.tiny import tiny_model
from tests.training_examples import distributed_resume, distributed_training
from tests.training_examples.distributed_launch import launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer, image_folder):
    """
    `straight` has 8 steps. `killed` ends after 7 steps, and `resumed` starts from its checkpoint at step 6.
    `from_4` and `stream_from_1` start from checkpoints of `straight` and `stream`.
    """
    folder = tmp_path_factory.mktemp("runs")
    distributed_resume.save_checkpoint_with_dropout(folder / "checkpoint", tokenizer)
    launch(distributed_resume.straight, folder, image_folder)
    assert launch(distributed_resume.killed, folder, image_folder) == [-9]
    launch(distributed_resume.resumed, folder, image_folder)
    return folder


def assert_same_state(checkpoint, expected):
    weights, expected_weights = (load_file(path / "model.safetensors") for path in (checkpoint, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    for file in ("optimizer.pt", "scheduler.pt"):
        found, wanted = (torch.load(path / file, weights_only=True) for path in (checkpoint, expected))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_resumed_training_equals_an_uninterrupted_one(runs):
    """Step 6 is in the middle of the second epoch, which has a shuffled order."""
    assert_same_state(runs / "resumed" / "checkpoint-8", runs / "straight" / "checkpoint-8")


def test_training_resumes_at_the_end_of_an_epoch(runs):
    assert_same_state(runs / "from_4" / "checkpoint-8", runs / "straight" / "checkpoint-8")


def test_stream_resumes_within_an_epoch(runs):
    assert_same_state(runs / "stream_from_1" / "checkpoint-3", runs / "stream" / "checkpoint-3")


# ---- the checkpoint to resume from ----


@pytest.fixture
def output_dir(tmp_path, runs):
    shutil.copytree(runs / "killed", tmp_path / "output")
    return tmp_path / "output"


@pytest.mark.parametrize("content", [None, "", '{"global_step": 1'], ids=["no state", "empty state", "half a state"])
def test_incomplete_checkpoint_is_skipped(output_dir, content):
    from training import last_checkpoint

    broken = output_dir / "checkpoint-8"
    broken.mkdir()
    if content is not None:
        (broken / "trainer_state.json").write_text(content)
    assert last_checkpoint(output_dir) == str(output_dir / "checkpoint-6")


def test_last_checkpoint_has_the_largest_number(output_dir):
    from training import last_checkpoint

    shutil.copytree(output_dir / "checkpoint-6", output_dir / "checkpoint-10")
    assert last_checkpoint(output_dir) == str(output_dir / "checkpoint-10")


def test_folder_without_checkpoints_has_no_last_one(tmp_path):
    from training import last_checkpoint

    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "not there") is None


# ---- epochs ----


@pytest.mark.parametrize("streamed", [False, True])
def test_collator_gets_the_number_of_the_epoch(tmp_path, checkpoint, streamed):
    from training import PrismerTrainer

    class Collator(DataCollatorForPrismer):
        epochs = []

        def __call__(self, rows):
            self.epochs.append(self.epoch)
            return distributed_training.stacked(distributed_training.samples()[: len(rows)])

    collator = Collator(PrismerProcessor.from_pretrained(checkpoint))
    rows = Dataset.from_dict({"number": list(range(4))})
    PrismerTrainer(
        tiny_model(),
        distributed_training.arguments(tmp_path, per_device_train_batch_size=2, max_steps=6),
        train_dataset=rows.to_iterable_dataset() if streamed else rows,
        data_collator=collator,
    ).train()
    assert collator.epochs == [0, 0, 1, 1, 2, 2]
