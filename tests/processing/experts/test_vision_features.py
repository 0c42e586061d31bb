"""Grids of vectors: the expert, its label, the store, the processor and the network."""

import numpy as np
import pytest
import torch
from transformers import (
    BitImageProcessor,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    RadioConfig,
    RadioModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    TimmWrapperModel,
)

from modeling_prismer import ExpertSpec
from modeling_prismer.processing.augmentation import JointAugmentation
from modeling_prismer.processing.expert_labels import read_experts, read_vectors
from modeling_prismer.processing.experts import ExpertSuite, VisionFeatures, quantized
from modeling_prismer.processing.experts.vision_features import as_grid
from modeling_prismer.processing.image_processing_prismer import PrismerImageProcessor
from modeling_prismer.processing.labels import LabelStore, label_images
from modeling_prismer.processing.visualization import draw_expert
from tests.modeling_prismer.tiny import tiny_config, tiny_model

from .models import photograph, save


SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SPEC = {"name": "features", "kind": "features", "channels": 32}


def dinov2():
    config = Dinov2Config(**SIZE, mlp_ratio=1, image_size=56, patch_size=14)
    return Dinov2Model(config), BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def siglip():
    vision = {**SIZE, "intermediate_size": 16, "image_size": 48, "patch_size": 16}
    text = {**SIZE, "intermediate_size": 16, "vocab_size": 20, "max_position_embeddings": 8}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    return model, SiglipImageProcessor(size={"height": 48, "width": 48})


def radio():
    config = RadioConfig(**SIZE, mlp_ratio=1.0, image_size=64, max_img_size=128, summary_idxs=[0])
    return RadioModel(config), SiglipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False)


def convnext():
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    return ConvNextModel(config), SiglipImageProcessor(size={"height": 96, "width": 96})


def timm_vit():
    pretrained = {"input_size": [3, 64, 64], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 64, "depth": 1, "embed_dim": 32, "num_heads": 2},
        num_features=32,
        pretrained_cfg=pretrained,
        num_labels=0,
    )
    return TimmWrapperModel(config), TimmWrapperImageProcessor(pretrained)


GRIDS = {dinov2: 4, siglip: 3, radio: 4, convnext: 3, timm_vit: 4}


@pytest.fixture(scope="module", params=list(GRIDS), ids=lambda make: make.__name__)
def expert(request, tmp_path_factory):
    expert = VisionFeatures(save(request.param, tmp_path_factory.mktemp("features")))
    expert.side = GRIDS[request.param]
    return expert


@pytest.fixture(scope="module")
def label():
    generator = np.random.default_rng(0)
    return quantized(generator.normal(size=(4, 6, 32)) * np.repeat([1, 100], 16), 16)


def test_a_label_is_the_grid_of_the_last_layer(expert):
    assert not expert.is_loaded or expert.channels == 32
    assert expert.description == SPEC
    image = photograph((96, 64))
    (label,) = expert([image])
    assert label["values"].shape == (expert.side, expert.side, 32)
    ((_, inputs),) = expert.prepared([image])
    hidden = expert.forward(inputs).last_hidden_state[0]
    expected = hidden.flatten(1).T[-(expert.side**2) :] if hidden.ndim == 3 else hidden[-(expert.side**2) :]
    vectors = read_vectors(label, read_experts([SPEC])[0]).reshape(32, -1).T
    step = np.repeat((label["high"] - label["low"]) / 255, 16)
    assert (np.abs(vectors - expected.detach().numpy()) <= 0.51 * step + 1e-5).all()
    assert label["values"].std() > 10


def test_the_whole_image_is_seen(expert):
    expert.load()
    images = [photograph((96, 64)), photograph((96, 64))]
    images[1].paste((255, 0, 0), (0, 0, 6, 64))  # a stripe at the left edge, which a centre crop would cut off
    given, striped = (next(expert.prepared([image]))[1]["pixel_values"] for image in images)
    changed = (given - striped).abs().amax((0, 1, 2)) > 0.1  # by column
    assert changed[0]
    assert 0 < changed.float().mean() < 0.2


def test_a_batch_equals_one_by_one(expert):
    images = [photograph((96, 64)), photograph((40, 60), 1)]
    for image, label in zip(images, expert(images)):
        (alone,) = expert([image])
        assert np.abs(label["values"].astype(int) - alone["values"]).max() <= 1


def test_each_group_has_its_own_range(label):
    assert label["low"].shape == label["high"].shape == (2,)
    assert label["high"][1] > 20 * label["high"][0]
    for group in (slice(0, 16), slice(16, 32)):
        assert (label["values"][..., group].min(), label["values"][..., group].max()) == (0, 255)
    assert quantized(np.zeros((2, 2, 6)), 4)["low"].shape == (2,)  # groups of three
    assert (quantized(np.ones((2, 2, 4)), 4)["values"] == 0).all()


def test_prefix_tokens_are_left_out():
    tokens = torch.arange(5 + 6.0).view(1, 11, 1)
    assert as_grid(tokens, (28, 42))[0, ..., 0].tolist() == [[5, 6, 7], [8, 9, 10]]
    with pytest.raises(ValueError, match="500 tokens for an image of 28×28 pixels lie on no grid"):
        as_grid(torch.zeros(1, 500, 1), (28, 28))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((2, 2, 31), np.uint8)}, r"\(h, w, 32\) is needed"),
        ({"low": np.zeros(3), "high": np.zeros(3)}, "groups share the 32 channels equally"),
        ({"high": np.array([np.nan, 1])}, "NaN or inf in low or high"),
        ({"low": None}, "features label is not"),
    ],
)
def test_wrong_labels_are_named(label, change, message):
    with pytest.raises(ValueError, match=message):
        PrismerImageProcessor(experts=[SPEC])(photograph(), {"features": {**label, **change}})


def test_the_processor_makes_a_grid_of_one_size(label):
    processor = PrismerImageProcessor(experts=[SPEC], expert_size=64)
    inputs = processor([photograph(), photograph()], [{"features": label}, None])
    assert inputs["features_values"].shape == (2, 32, 4, 4)
    assert inputs["expert_mask"].tolist() == [[True], [False]]
    assert (inputs["features_values"][1] == 0).all()
    vectors = read_vectors(label, read_experts([SPEC])[0])
    assert np.allclose(inputs["features_values"][0].mean((1, 2)), vectors.mean((1, 2)), atol=0.35 * vectors.std())


def test_a_store_returns_the_label(expert, tmp_path):
    photograph((96, 64)).save(tmp_path / "one.png")
    suite = ExpertSuite([expert])
    label_images(str(tmp_path / "one.png"), suite, tmp_path / "store", progress=False, map_size=32)
    (labels,) = (labels for _, labels in LabelStore(tmp_path / "store").items())
    (expected,) = suite([photograph((96, 64))])
    for part in ("values", "low", "high"):
        assert np.array_equal(labels["features"][part], expected["features"][part])


def test_augmentation_moves_the_grid_with_the_image(label):
    still = {"scale": (1, 1), "ratio": (1, 1), "num_ops": 0}
    augment = JointAugmentation([SPEC], size=64, expert_size=64, flip_probability=1, **still)
    square = {**label, "values": label["values"][:, :4]}
    _, labels = augment(photograph((64, 64)), {"features": square})
    assert np.array_equal(labels["features"]["values"], square["values"][:, ::-1])
    assert labels["features"]["low"] is label["low"]


def test_a_network_reads_the_grid():
    config = tiny_config(experts=[SPEC])
    model = tiny_model(config).eval()
    inputs = PrismerImageProcessor(experts=[SPEC], size={"height": 32, "width": 32}, expert_size=64)(
        [photograph()], [{"features": quantized(np.random.default_rng(0).normal(size=(4, 4, 32)), 16)}]
    )
    prompt = {"input_ids": torch.tensor([[0, 5, 6]])}
    with torch.no_grad():
        given = model(**inputs, **prompt).logits
        other = model(**{**inputs, "features_values": -inputs["features_values"]}, **prompt).logits
    assert (given - other).abs().max() > 1e-5
    with pytest.raises(ValueError, match=r"needs \(batch, 32, height, width\)"):
        model(**{**inputs, "features_values": torch.zeros(1, 3, 4, 4)}, **prompt)


def test_the_spec_names_one_tensor():
    spec = ExpertSpec(**SPEC)
    assert (spec.tensor_names, spec.label_parts, spec.is_features) == (("features_values",), ("low", "high"), True)
    assert spec.to_dict() == SPEC
    (fields,) = read_experts([SPEC])
    assert fields.tensor_suffixes == spec.tensor_suffixes
    with pytest.raises(ValueError, match="is of the kind 'features': 'num_classes'"):
        ExpertSpec("features", "features", 8, num_classes=3)


def test_a_drawing_shows_the_main_directions(label):
    drawing = draw_expert(photograph(), ExpertSpec(**SPEC), label)
    assert np.asarray(drawing.image).std() > 5


def test_settings_are_saved_with_the_suite(expert, tmp_path):
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["features"]
    assert (restored.channels, restored.group_size) == (32, 16)
    with pytest.raises(ValueError, match="group_size"):
        VisionFeatures(group_size=0)
