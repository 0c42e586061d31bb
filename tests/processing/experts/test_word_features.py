import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from modeling_prismer.processing.experts import ClipTextFeatures, ExpertSuite, HashedNgrams, RapidOcrText, WordFeatures


WORDS = ["stop", "stops", "exit", "25"]


def test_hashed_ngrams_are_64_numbers_with_norm_one():
    features = HashedNgrams()(WORDS)
    assert features.shape == (4, 64)
    assert features.dtype == np.float32
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-6)


def test_hashed_ngrams_are_the_same_everywhere():
    # values that networks have been trained with
    features = HashedNgrams()(["it"])[0]
    expected = {35: 0.3536, 42: -0.7071, 49: -0.3536, 56: -0.3536, 62: 0.3536}
    assert {int(index): round(float(features[index]), 4) for index in np.nonzero(features)[0]} == expected
    assert np.array_equal(HashedNgrams()(WORDS), HashedNgrams()(WORDS))


def test_hashed_ngrams_of_similar_words_are_similar():
    stop, stops, exit, _ = HashedNgrams()(WORDS)
    assert stop @ stops > 0.5
    assert abs(stop @ exit) < 0.4


def test_no_words_give_an_empty_table():
    assert HashedNgrams()([]).shape == (0, 64)


def test_settings_of_hashed_ngrams_are_restored():
    encoder = HashedNgrams(channels=32, ngram_range=(1, 3))
    restored = WordFeatures.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert restored.to_dict() == encoder.to_dict() == {"type": "hashed_ngrams", "channels": 32, "ngram_range": (1, 3)}
    assert np.array_equal(restored(WORDS), encoder(WORDS))


@pytest.fixture(scope="module")
def pca_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pca") / "pca.safetensors"
    generator = torch.Generator().manual_seed(0)
    components = torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q[:64].contiguous()
    save_file({"mean": torch.randn(96, generator=generator), "components": components}, path)
    return path


def test_clip_features_are_projected_text_embeddings(clip_folder, pca_file):
    features = ClipTextFeatures(pca_file, clip_folder)(WORDS)
    assert features.shape == (4, 64)
    assert features.dtype == np.float32
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    analysis = load_file(pca_file)
    for word, feature in zip(WORDS, features):
        with torch.no_grad():
            embedding = model.get_text_features(**tokenizer(word, return_tensors="pt")).pooler_output[0]
        expected = analysis["components"] @ (embedding - analysis["mean"])
        assert np.allclose(feature, expected.numpy(), atol=1e-4)


def test_clip_features_do_not_depend_on_the_other_words(clip_folder, pca_file):
    encoder = ClipTextFeatures(pca_file, clip_folder)
    words = ["word" + str(number) for number in range(70)]
    assert np.allclose(encoder(words)[-1:], encoder(words[-1:]), atol=1e-5)
    assert encoder(["x" * 100]).shape == (1, 64)


def test_clip_is_frozen(clip_folder, pca_file):
    encoder = ClipTextFeatures(pca_file, clip_folder)
    encoder(WORDS)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_a_principal_component_analysis_can_be_fitted(clip_folder, tmp_path):
    texts = [f"{first}{second}" for first in "abcdefgh" for second in "0123456789"]
    encoder = ClipTextFeatures.fit_pca(texts, tmp_path / "own" / "pca.safetensors", clip_folder)
    features = encoder(texts)
    assert np.allclose(features.mean(0), 0, atol=1e-5)
    covariance = features.T @ features
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3 * covariance.max())
    assert (np.diff(np.diag(covariance)) <= 1e-6).all()
    with pytest.raises(ValueError, match="1 different texts; an analysis needs at least 64"):
        ClipTextFeatures.fit_pca(["a"], tmp_path / "pca.safetensors", clip_folder)


def test_the_suite_saves_a_local_clip_and_its_analysis(clip_folder, pca_file, tmp_path):
    encoder = ClipTextFeatures(pca_file, clip_folder)
    ExpertSuite([RapidOcrText(encoder)]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["ocr"].word_features
    assert isinstance(restored, ClipTextFeatures)
    assert restored.pca == str(tmp_path / "experts" / "ocr" / "pca.safetensors")
    assert restored.model_name.startswith(str(tmp_path))
    assert np.array_equal(restored(WORDS), encoder(WORDS))


def test_a_hub_id_stays_a_hub_id(tmp_path, pca_file):
    ExpertSuite([RapidOcrText(ClipTextFeatures(pca_file))]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["ocr"].word_features
    assert restored.model_id == restored.model_name == "openai/clip-vit-large-patch14"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mean": torch.zeros(96)}, "no tensor 'components'; it has mean"),
        ({"mean": torch.zeros(96), "components": torch.zeros(64, 768)}, r"\(64, 768\); needed is \(64, 96\)"),
    ],
)
def test_a_wrong_analysis_is_refused(clip_folder, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "pca.safetensors")
    with pytest.raises(ValueError, match=message):
        ClipTextFeatures(tmp_path / "pca.safetensors", clip_folder)(WORDS)


def test_a_custom_encoder_works_in_the_text_expert():
    class Lengths(WordFeatures):
        type = "test_lengths"
        channels = 1

        def encode(self, words):
            return [[len(word)] for word in words]

    expert = RapidOcrText(Lengths())
    assert expert.description["channels"] == 1
    assert expert.word_features(["four", "six"]).tolist() == [[4], [3]]
    assert isinstance(RapidOcrText.from_dict(expert.to_dict()).word_features, Lengths)


def test_features_of_a_wrong_shape_are_refused():
    class Wrong(WordFeatures):
        def encode(self, words):
            return [[0.0]]

    with pytest.raises(ValueError, match=r"shape \(1, 1\) for 4 words; needed is \(4, 64\)"):
        Wrong()(WORDS)
