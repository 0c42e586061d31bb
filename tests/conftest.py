"""What holds for every test: no network, one thread, fixed seeds."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import set_seed


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds():
    set_seed(0)
