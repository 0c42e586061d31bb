"""Checkpoints are found here or on the Hub, and read without running anything that is in them."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_prismer.conversion import convert_original_checkpoint, tensor_files
from modeling_prismer.conversion.tensor_files import find_checkpoint, load_state_dict


def test_a_folder_is_searched_for_its_checkpoint(prismerz):
    assert find_checkpoint(prismerz.folder) == prismerz.checkpoint
    assert find_checkpoint(str(prismerz.folder)) == prismerz.checkpoint


@pytest.mark.parametrize("place", ["missing.bin", "folder/missing.bin", "./folder/a/b", "/folder/a/b", Path("a/b/c")])
def test_a_missing_path_never_asks_the_hub(place, monkeypatch):
    monkeypatch.setattr(tensor_files, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*; a file, a folder with a pytorch_model.bin"):
        find_checkpoint(place)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*pytorch_model.bin"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("place", "repository", "filename"),
    [
        ("owner/prismer", "owner/prismer", "pytorch_model.bin"),
        ("owner/prismer/vqa_base", "owner/prismer", "vqa_base/pytorch_model.bin"),
        ("owner/prismer/vqa_base/", "owner/prismer", "vqa_base/pytorch_model.bin"),
        ("owner/prismer/vqa/base.safetensors", "owner/prismer", "vqa/base.safetensors"),
    ],
)
def test_a_path_on_the_hub_is_downloaded(place, repository, filename, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append((*args, kwargs))
        return "/cache/file"

    monkeypatch.setattr(tensor_files, "hf_hub_download", download)
    assert find_checkpoint(place, revision="v1") == Path("/cache/file")
    assert asked == [(repository, filename, {"revision": "v1"})]


def test_a_path_on_the_hub_is_a_clear_error_offline():
    with pytest.raises(FileNotFoundError) as error:
        convert_original_checkpoint("owner/prismer/vqa_base", "prismer_base")
    assert "owner/prismer/vqa_base is not a local file or folder" in str(error.value)
    assert "vqa_base/pytorch_model.bin of owner/prismer" in str(error.value)
    assert "the Hub cannot be reached (or HF_HUB_OFFLINE is set)" in str(error.value)


def test_an_invalid_path_on_the_hub_is_a_clear_error():
    with pytest.raises(FileNotFoundError, match="of own er/pris:mer is not available from the Hub: Repo id"):
        find_checkpoint("own er/pris:mer")


class TouchFile:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_code_is_refused_without_running_it(is_zip, prismerz, save_checkpoint, tmp_path):
    state = prismerz.state | {"extra": TouchFile(tmp_path / "ran")}
    path = save_checkpoint(state, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="was refused") as error:
        convert_original_checkpoint(path, prismerz.config)
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(error.value)  # torch's advice to switch the protection off


def test_a_bare_pickle_is_refused_without_running_it(tmp_path):
    (tmp_path / "model.bin").write_bytes(pickle.dumps(TouchFile(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match="was refused"):
        load_state_dict(tmp_path / "model.bin")
    assert not (tmp_path / "ran").exists()


def test_a_git_lfs_pointer_is_refused(tmp_path):
    (tmp_path / "model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="model.bin was refused: it is damaged, not a file of torch.save"):
        load_state_dict(tmp_path / "model.bin")


@pytest.mark.parametrize("size", [0, 100, 8000])
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
@pytest.mark.parametrize("mmap", [True, False])
def test_an_incomplete_file_is_refused(name, mmap, size, tmp_path):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)({"a": torch.zeros(5000)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{name} (could not be read|was refused)"):
        load_state_dict(path, mmap=mmap)


def test_a_file_without_permission_is_a_clear_error(save_checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError):
        load_state_dict(save_checkpoint({}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, "not a plain state dict.*: 'model', 'epoch' are not tensors"),
        ([torch.zeros(1)], "holds list; a state dict"),
        ({}, "holds dict; a state dict"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content, message, save_checkpoint):
    with pytest.raises(ValueError, match=message):
        load_state_dict(save_checkpoint(content))


@pytest.mark.parametrize("form", ["legacy", "safetensors", "parameters"])
def test_other_forms_of_a_checkpoint_are_read(form, prismerz, save_checkpoint, tmp_path):
    state = {name: tensor.clone() for name, tensor in prismerz.state.items()}
    if form == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(state, path)
    elif form == "parameters":
        path = save_checkpoint(
            {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}
        )
    else:
        path = save_checkpoint(state, _use_new_zipfile_serialization=False)
    model = convert_original_checkpoint(path, prismerz.config)
    plain = convert_original_checkpoint(prismerz.checkpoint, prismerz.config)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_model_does_not_depend_on_the_file(prismerz, save_checkpoint):
    path = save_checkpoint(prismerz.state)
    model = convert_original_checkpoint(path, prismerz.config, dtype="float16")
    path.write_bytes(bytes(path.stat().st_size))
    plain = convert_original_checkpoint(prismerz.checkpoint, prismerz.config, dtype="float16")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
