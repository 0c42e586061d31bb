"""Pictures unlike those of a checkpoint's training are told, by distance and on the command line."""

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from transformers.utils import hub
from typer.testing import CliRunner

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path
from modeling_prismer.cli import app
from modeling_prismer.familiarity import Familiarity, image_features


@pytest.fixture(scope="module")
def known():
    """Features around a mean, much more spread in one direction than in the others."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([10.0, 1.0, 1.0, 0.1])
    features = 5 + torch.randn(400, 4, generator=generator) * spread
    return features, Familiarity.fit(features[:300], features[300:], share=0.95)


def test_distance_is_in_standard_deviations(known):
    _, familiarity = known
    mean = familiarity.mean
    steps = mean + torch.diag(torch.tensor([10.0, 1.0, 1.0, 0.1])) * 3
    assert familiarity.distance(mean[None]).item() == pytest.approx(0, abs=1e-4)
    assert familiarity.distance(steps).tolist() == pytest.approx([3, 3, 3, 3], rel=0.15)


def test_limit_passes_the_given_share_of_new_images(known):
    features, familiarity = known
    assert (familiarity.distance(features[300:]) <= familiarity.limit).float().mean().item() == pytest.approx(0.95)


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="4 images are too few for the covariance of 4 features"):
        Familiarity.fit(torch.zeros(4, 4), torch.zeros(4, 4))


def test_saved_it_is_the_same(known, tmp_path):
    features, familiarity = known
    assert Familiarity.from_pretrained(tmp_path) is None
    familiarity.save_pretrained(tmp_path)
    loaded = Familiarity.from_pretrained(tmp_path)
    assert loaded.limit == familiarity.limit
    assert torch.equal(loaded.distance(features), familiarity.distance(features))
    assert [path.name for path in tmp_path.iterdir()] == [Familiarity.FILE]


def test_hub_checkpoint_is_found_in_the_cache(known, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path), raising=False)
    snapshot = tmp_path / "models--somebody--prismer" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    known[1].save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1234")
    assert Familiarity.from_pretrained("somebody/prismer").limit == known[1].limit
    assert Familiarity.from_pretrained("somebody/other") is None


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", None])
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / Familiarity.FILE
    if content is None:
        save_file({"mean": torch.zeros(4)}, path)  # something else
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{Familiarity.FILE} is damaged, or not a file of"):
        Familiarity.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit, warns", [(1e9, False), (0.0, True)])
def test_the_command_line_warns_of_an_unlike_picture(limit, warns, tmp_path):
    path = pretrained_path("prismer-easy-vqa")
    model = PrismerForConditionalGeneration.from_pretrained(path)
    PrismerProcessor.from_pretrained(path).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    width = model.config.vision_config.hidden_size
    Familiarity(torch.zeros(width), torch.eye(width), limit).save_pretrained(tmp_path)
    Image.new("RGB", (64, 64), (0, 128, 128)).save(tmp_path / "plain.png")
    answered = CliRunner().invoke(
        app, ["ask", str(tmp_path / "plain.png"), "What color is the shape?", "--model", str(tmp_path)]
    )
    assert answered.exit_code == 0
    assert ("unlike those that the checkpoint was trained on" in answered.stderr) == warns
    assert answered.stdout.count("\n") == 1


def test_features_leave_out_the_experts_latents():
    path = pretrained_path("prismer-easy-vqa")
    model = PrismerForConditionalGeneration.from_pretrained(path)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = torch.cat([torch.ones(2, patches, vision.hidden_size), torch.full((2, 3, vision.hidden_size), 9.0)], 1)
    assert torch.equal(image_features(model, (tokens,)), torch.ones(2, vision.hidden_size))
