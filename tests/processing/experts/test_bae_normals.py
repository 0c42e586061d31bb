import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_prismer.processing.experts import BaeNormals, ExpertError, ExpertSuite, expert_from_dict
from modeling_prismer.processing.experts.bae_normals import NormalNetwork
from modeling_prismer.processing.experts.base import read_weights

from .bae_weights import RECORDING, pixel_values, seeded
from .models import photograph


def published_names(network):
    """The shapes of the published file by name."""
    shapes = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("encoder."):
            shapes[name.replace("encoder.", "encoder.original_model.")] = tensor.shape
        elif name.startswith("up"):
            block, rest = name.split(".", 1)
            shapes[f"decoder.{block}._net.{rest}"] = tensor.shape
        else:
            is_mlp = name.startswith("out_conv_res") and "res8" not in name and tensor.ndim == 4
            shapes[f"decoder.{name}"] = tensor.shape[:3] if is_mlp else tensor.shape
    for name in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"encoder.original_model.bn2.{name}"] = torch.Size([2048])
    shapes["encoder.original_model.bn2.num_batches_tracked"] = torch.Size([])
    return shapes


@pytest.fixture(scope="module")
def weights():
    with torch.device("meta"):
        network = NormalNetwork()
    return seeded(published_names(network))


@pytest.fixture(scope="module")
def expert(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("normals") / "scannet.pt"
    torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    expert = BaeNormals(path)
    expert.load()
    path.unlink()
    return expert


def test_the_network_equals_the_recorded_one(expert):
    with torch.no_grad():
        outputs = expert.model(pixel_values())
    recorded = load_file(RECORDING)["outputs"]
    assert recorded.std(dim=(0, 2, 3)).min() > 0.02
    torch.testing.assert_close(outputs, recorded, atol=1e-5, rtol=0)
    assert outputs[:, :3].norm(dim=1).sub(1).abs().max() < 1e-5


class Listener(torch.nn.Linear):
    """Stands for the network: keeps its input, and returns two of its channels as x and y."""

    def __init__(self, factor=1):
        super().__init__(1, 1)
        self.factor = factor

    def forward(self, pixel_values):
        self.heard = pixel_values
        x, y = (pixel_values[:, channel].clamp(-1, 1) / 2 for channel in (0, 1))
        return torch.stack([x, y, (1 - x**2 - y**2).sqrt(), x], dim=1) * self.factor


def test_the_map_follows_the_published_settings(expert, monkeypatch):
    monkeypatch.setattr(expert, "model", Listener())
    image = photograph((120, 90))
    (normals,) = expert([image])
    pixels = np.asarray(image.resize((480, 480), Image.Resampling.BILINEAR)) / 255
    pixels = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    pixels = torch.from_numpy(pixels.transpose(2, 0, 1))[None].float()
    torch.testing.assert_close(expert.model.heard, pixels)
    outputs = expert.model(pixels)[:, :3]
    expected = torch.nn.functional.interpolate(outputs, size=(90, 120), mode="bilinear", antialias=True)[0]
    expected = ((expected.permute(1, 2, 0).numpy() + 1) / 2 * 255).round()
    assert normals.shape == (90, 120, 3)
    assert np.abs(normals.astype(int) - expected).max() <= 1
    assert normals.std(axis=(0, 1)).min() > 1


def test_the_expert_is_frozen_and_states_its_size(expert):
    assert not expert.model.training
    assert not any(parameter.requires_grad for parameter in expert.model.parameters())
    assert expert.size_in_bytes == sum(tensor.nbytes for tensor in expert.model.state_dict().values())
    assert expert.spec.channels == 3


def test_half_precision_changes_little(expert, monkeypatch):
    monkeypatch.setattr(BaeNormals, "input_size", (96, 96))
    image = photograph((64, 64))
    half = BaeNormals(pretrained=False).to("cuda")
    assert half.running_dtype == torch.float16
    half.to("cpu", "bfloat16")
    half.model, half.is_loaded = copy.deepcopy(expert.model), True
    half.place_model()
    assert half.model.conv2.weight.dtype == torch.bfloat16
    difference = np.abs(half([image])[0].astype(int) - expert([image])[0])
    assert 0 < difference.mean() < 3


def test_without_weights_the_error_names_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"scannet.pt of shikunl/prismer is not in the Hub's cache and HF_HUB_OFFLINE"):
        BaeNormals().load()


def test_other_files_are_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors does not hold the weights of NLL-AngMF"):
        BaeNormals(tmp_path / "other.safetensors").load()


def test_normals_that_are_not_numbers_raise(expert, monkeypatch):
    monkeypatch.setattr(expert, "model", Listener(torch.nan))
    with pytest.raises(ExpertError, match=r"normals are not numbers in torch.float32; use to\(dtype='float32'\)"):
        expert([photograph()])


@pytest.mark.parametrize(
    ("saved", "message"),
    [([1], "holds a list"), ({"model": {1: torch.ones(1)}}, "holds a dict"), ({"a": 5}, "'a' is a int")],
)
def test_weights_are_tensors_with_names(saved, message, tmp_path):
    torch.save(saved, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("entry", ["model", "state_dict"])
def test_a_suite_saves_the_weights_as_safetensors(entry, tmp_path):
    torch.save({entry: {"module.a": torch.ones(2)}}, tmp_path / "scannet.pt")
    ExpertSuite([BaeNormals(tmp_path / "scannet.pt")]).save_pretrained(tmp_path / "saved")
    restored = ExpertSuite.from_pretrained(tmp_path / "saved")["normal"]
    assert read_weights(restored.checkpoint).keys() == {"module.a"}
    assert expert_from_dict(restored.to_dict()).checkpoint == restored.checkpoint
