from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from kornia.models.dexined import DexiNed
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_prismer import sample_image
from modeling_prismer.processing.experts import (
    CannyEdges,
    DexiNedEdges,
    ExpertError,
    ExpertSuite,
    expert_from_dict,
)


def test_canny_draws_the_outline_of_a_square_dark_on_white(square):
    (edges,) = CannyEdges()([square])
    assert edges.shape == (48, 64)
    assert edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges == 0)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((20, 43, 10, 39), abs=1)
    # no edge inside, none outside; every side closed but for the corners
    assert (edges[13:37, 23:41] == 255).all()
    assert (edges[:8] == 255).all()
    assert (edges[13:37, 18:23] == 0).any(axis=1).all()
    assert (edges[8:13, 23:41] == 0).any(axis=0).all()


def test_canny_finds_nothing_in_a_uniform_image():
    (edges,) = CannyEdges()([Image.new("RGB", (40, 30), (90, 10, 200))])
    assert (edges == 255).all()


def test_canny_on_a_batch_of_mixed_sizes_equals_one_by_one(square):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    images = [square, Image.fromarray(noise), square.resize((30, 50)), square.rotate(90), Image.fromarray(noise[:20])]
    together, alone = CannyEdges()(images), [CannyEdges()([image])[0] for image in images]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone))
    assert not np.array_equal(together[0], together[1])


def test_canny_returns_a_large_image_at_its_own_size(square):
    (edges,) = CannyEdges()([square.resize((1600, 1200), Image.Resampling.NEAREST)])
    assert edges.shape == (1200, 1600)
    rows, columns = np.nonzero(edges < 128)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((500, 1100, 250, 1000), abs=12)
    # a line that survives being reduced to what the network reads
    reduced = np.asarray(Image.fromarray(edges).resize((224, 224), Image.Resampling.NEAREST))
    assert (reduced[60:170, 65:75] < 255).any(axis=1).all()


def test_canny_without_a_limit_uses_the_full_size(square):
    large = square.resize((640, 480), Image.Resampling.NEAREST)
    (edges,) = CannyEdges(max_pixels=None)([large])
    assert set(np.unique(edges)) == {0, 255}
    assert (edges[200, 190:210] == 0).sum() == 1


def test_canny_finds_the_same_edges_as_kornia():
    from kornia.filters import Canny

    image = sample_image("scene")
    (edges,) = CannyEdges(max_pixels=None)([image])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    _, expected = Canny(kernel_size=(5, 5), sigma=(1.0, 1.0))(pixels)
    np.testing.assert_array_equal(edges == 0, expected[0, 0].numpy() == 1)
    _, unlinked = Canny(kernel_size=(5, 5), sigma=(1.0, 1.0), hysteresis=False)(pixels)
    assert 0 < (edges == 0).sum() < (unlinked > 0).sum()  # some weak edges stay, some are dropped


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 1), (1, 300), (20000, 20)])
def test_canny_takes_images_of_any_size(size):
    (edges,) = CannyEdges()([Image.new("RGB", size)])
    assert edges.shape == (size[1], size[0])
    assert (edges == 255).all()


def test_thresholds_of_canny_select_the_edges(square):
    faint = square.point(lambda value: value // 8)
    assert (CannyEdges()([faint])[0] == 0).any()
    assert (CannyEdges(0.3, 0.6)([faint])[0] == 255).all()


@pytest.mark.parametrize(
    "settings",
    [{"low_threshold": 0.3}, {"low_threshold": 0}, {"kernel_size": 4}, {"max_pixels": 0}],
)
def test_invalid_settings_of_canny_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CannyEdges(**settings)


def test_canny_is_restored_from_its_description():
    expert = CannyEdges(0.05, 0.3, sigma=2.0, kernel_size=7, max_pixels=None)
    assert expert_from_dict(expert.to_dict()).to_dict() == expert.to_dict()
    assert expert.model_id is None
    assert expert.size_in_bytes == 0


@pytest.fixture(scope="module")
def dexined_weights():
    torch.manual_seed(0)
    model = DexiNed(pretrained=False)
    for module in model.modules():  # so that statistics other than 0 and 1 have to be read, too
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return model.state_dict()


@pytest.fixture(scope="module")
def dexined(dexined_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("dexined") / "dexined.pth"
    torch.save(dexined_weights, path)
    return DexiNedEdges(checkpoint=path)


@pytest.fixture
def small_input(monkeypatch):
    monkeypatch.setattr(DexiNedEdges, "input_size", (96, 96))


def test_dexined_reads_images_of_the_published_size():
    assert DexiNedEdges.input_size == DexiNedEdges().input_size == (480, 480)


def test_dexined_follows_the_published_settings(dexined, dexined_weights, square, small_input):
    square.paste((200, 40, 10), (0, 0, 30, 48))
    (edges,) = dexined([square])
    with torch.device("meta"):
        model = DexiNed(pretrained=False).eval()
    model.load_state_dict(dexined_weights, assign=True)
    pixels = np.asarray(square.resize((96, 96), Image.Resampling.BILINEAR)).astype(np.float32)
    bgr = pixels[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32)
    with torch.no_grad():
        fused = model(torch.from_numpy(bgr.transpose(2, 0, 1).copy())[None])[0, 0].sigmoid().numpy()
    expected = 255 - (255 * (fused - fused.min()) / (fused.max() - fused.min())).astype(np.uint8)
    expected = np.asarray(Image.fromarray(expected).resize(square.size, Image.Resampling.BILINEAR))
    assert edges.shape == (48, 64)
    assert np.abs(edges.astype(int) - expected).max() <= 1
    assert edges.std() > 1


def test_dexined_in_half_precision_changes_little(dexined, square, small_input):
    half = DexiNedEdges(checkpoint=dexined.checkpoint).to("cuda")
    assert half.running_dtype == torch.float16
    half.to("cpu", "float16")
    difference = np.abs(half([square])[0].astype(int) - dexined([square])[0])
    assert 0 < difference.max() <= 4
    assert half.model.block_1.conv1.weight.dtype == torch.float16


def test_dexined_raises_if_numbers_overflow(dexined, square, small_input, monkeypatch):
    monkeypatch.setattr(dexined, "mean", (1e39, 0, 0))
    with pytest.raises(ExpertError, match=r"edges are not numbers in torch.float32; use to\(dtype='float32'\)"):
        dexined([square])


def test_dexined_is_frozen_and_states_its_size(dexined, dexined_weights):
    dexined.load()
    assert not dexined.model.training
    assert not any(parameter.requires_grad for parameter in dexined.model.parameters())
    assert dexined.size_in_bytes == sum(tensor.nbytes for tensor in dexined_weights.values())


def test_dexined_saves_its_weights_as_safetensors(dexined, dexined_weights, tmp_path):
    ExpertSuite([dexined]).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "experts" / "edge" / "dexined.safetensors")
    assert saved.keys() == dexined_weights.keys()
    assert all(torch.equal(saved[name], dexined_weights[name]) for name in saved)
    moved = tmp_path.rename(tmp_path.parent / "moved")
    restored = ExpertSuite.from_pretrained(moved)["edge"]
    assert restored.checkpoint == str(moved / "experts" / "edge" / "dexined.safetensors")
    assert torch.equal(
        restored.load() or restored.model.block_cat.conv.weight, dexined_weights["block_cat.conv.weight"]
    )


def test_dexined_with_random_weights_needs_no_file():
    expert = expert_from_dict(DexiNedEdges(pretrained=False).to_dict())
    expert.load()
    assert sum(parameter.numel() for parameter in expert.model.parameters()) == 35_215_245


def test_dexined_without_weights_is_a_clear_error_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"not in the Hub's cache and HF_HUB_OFFLINE is set.*checkpoint=.*CannyEdges"):
        DexiNedEdges().load()


def test_dexined_refuses_other_files(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors does not hold the weights of DexiNed"):
        DexiNedEdges(checkpoint=tmp_path / "other.safetensors").load()
    with pytest.raises(OSError, match="there is no file of weights .*nowhere.pth"):
        DexiNedEdges(checkpoint=tmp_path / "nowhere.pth").load()


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('unpickled')",))


def test_dexined_never_unpickles_objects(tmp_path):
    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UnpicklingError, match="weights_only"):
        DexiNedEdges(checkpoint=tmp_path / "trap.pth").load()
