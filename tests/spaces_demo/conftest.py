"""Makes the Space's modules importable by their plain names, as on the Hub, and starts one server for all tests."""

import shutil
import socket
import sys
from pathlib import Path

import pytest

from modeling_prismer import pretrained_path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "spaces_demo"))


@pytest.fixture(scope="session")
def reader():
    pytest.importorskip("gradio")
    from reader import Reader

    return Reader(pretrained_path("prismer-easy-vqa"), "cpu")


@pytest.fixture(scope="session")
def shape():
    from PIL import Image

    with Image.open(ROOT / "modeling_prismer/assets/shape.png") as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    """The app with a bundled checkpoint and a copy to compare it with, not launched, and its sessions."""
    pytest.importorskip("gradio")
    import app

    path = pretrained_path("prismer-easy-vqa")
    copy = shutil.copytree(path, tmp_path_factory.mktemp("checkpoints") / "a-copy")
    return app.make_app([path, str(copy)], "cpu")


@pytest.fixture(scope="session")
def server(space):
    """The address of the running app."""
    import app

    blocks, sessions = space
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app.launch(blocks, sessions, "127.0.0.1", port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}"
    blocks.close(verbose=False)
