"""For every test: no network, no writing into the user's caches, one thread, fixed seeds."""

import atexit
import gc
import os
import shutil
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="prismer-tests-")
os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(os.environ["HF_HOME"], "torch_extensions")  # peft's BOFT builds one
os.environ["TOKENIZERS_PARALLELISM"] = "false"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, set_seed


torch.set_num_threads(1)


def pytest_collection_finish():
    """Hides the imported modules from the garbage collector: Trainer and torch.export call it often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds():
    set_seed(0)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small random CLIP and a tokenizer that knows the letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    text = {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """An empty folder for a user's data."""
    folder = tmp_path / "photos [2024]"
    folder.mkdir()
    return folder
