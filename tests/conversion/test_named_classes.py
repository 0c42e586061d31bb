"""Class features of any label set, from the text encoders of CLIP and SigLIP."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextModelWithProjection, SiglipConfig, SiglipModel

from modeling_prismer.conversion import ClassTable, named_classes
from modeling_prismer.processing.experts.text_encoder import TextEncoder
from tests.modeling_prismer.tiny import tiny_model


NAMES = ["cat", "dog", "grass", "cat", "a long name of many words"]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def siglip_folder(clip_folder, tmp_path_factory):
    """A small random SigLIP with the tokenizer of the small CLIP."""
    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = {**size, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


def clip_embeddings(folder, texts):
    model = CLIPTextModelWithProjection.from_pretrained(folder, projection_dim=96)
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, return_tensors="pt", truncation=True, max_length=16
    )
    with torch.no_grad():
        return model.eval()(**tokens).text_embeds


def test_few_names_keep_their_distances(clip_folder, cache):
    table = ClassTable.from_names(NAMES, clip_folder, cache_dir=cache)
    assert table.features.shape == (5, 64)
    assert table.class_names == NAMES
    assert torch.equal(table.features[0], table.features[3])
    rows = torch.cat([table.features, table.background[None]])
    embeddings = clip_embeddings(clip_folder, [*NAMES, "background"])
    assert torch.allclose(torch.cdist(rows, rows), torch.cdist(embeddings, embeddings), atol=1e-4)
    assert rows.std() > 0.01


def test_a_given_analysis_makes_the_published_features(clip_folder, cache, tmp_path):
    analysis = {"mean": torch.randn(96), "components": torch.randn(64, 96)}
    save_file(analysis, tmp_path / "pca.safetensors")
    table = ClassTable.from_names(NAMES, clip_folder, tmp_path / "pca.safetensors", cache_dir=cache)
    expected = (clip_embeddings(clip_folder, NAMES) - analysis["mean"]) @ analysis["components"].T
    assert torch.allclose(table.features, expected, atol=1e-4)


def test_siglip_reads_names_with_their_padding(siglip_folder, cache):
    table = ClassTable.from_names(NAMES, siglip_folder, cache_dir=cache)
    model, tokenizer = SiglipModel.from_pretrained(siglip_folder).eval(), AutoTokenizer.from_pretrained(siglip_folder)
    tokens = tokenizer(NAMES, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        embeddings = model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
    assert torch.allclose(torch.cdist(table.features, table.features), torch.cdist(embeddings, embeddings), atol=1e-4)
    assert TextEncoder(siglip_folder).width == 32


def test_a_table_is_computed_once(clip_folder, cache, monkeypatch):
    table = ClassTable.from_names(NAMES, clip_folder, cache_dir=cache)
    monkeypatch.setattr(named_classes, "_compute", lambda *arguments: pytest.fail("computed again"))
    assert torch.equal(ClassTable.from_names(NAMES, clip_folder, cache_dir=cache).features, table.features)
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "change",
    [{"names": ["cat", "dog"]}, {"prompt": "a photo of a {}"}, {"background": "nothing"}, {"channels": 16}],
)
def test_another_table_is_computed_anew(clip_folder, cache, change):
    table = ClassTable.from_names(NAMES, clip_folder, cache_dir=cache)
    other = ClassTable.from_names(**{"names": NAMES, "encoder": clip_folder, "cache_dir": cache, **change})
    assert len(list(cache.iterdir())) == 2
    assert not torch.equal(table.background, other.background[: len(table.background)])


def test_another_encoder_in_the_same_folder_is_noticed(clip_folder, cache, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    ClassTable.from_names(NAMES, folder, cache_dir=cache)
    model = CLIPTextModelWithProjection.from_pretrained(folder, projection_dim=96)
    model.save_pretrained(folder)
    ClassTable.from_names(NAMES, folder, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_table_is_computed_anew(clip_folder, cache):
    table = ClassTable.from_names(NAMES, clip_folder, cache_dir=cache)
    (file,) = cache.iterdir()
    file.write_bytes(b"damaged")
    assert torch.equal(ClassTable.from_names(NAMES, clip_folder, cache_dir=cache).features, table.features)
    assert torch.equal(ClassTable.from_names(NAMES, clip_folder, cache_dir=cache).features, table.features)


def test_a_model_takes_the_table(clip_folder, cache):
    table = ClassTable.from_names(["cat", "dog"], clip_folder, cache_dir=cache)
    model = tiny_model()
    stem = model.add_expert("parts", "label", channels=64, num_classes=2)
    model.set_class_features("parts", table.features, table.background, table.class_names)
    assert torch.equal(stem.class_features, torch.cat([table.features, table.background[None]]))
    assert model.config.class_names["parts"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": "cat"}, "names is 'cat'"),
        ({"names": ["cat", ""]}, "none of them empty"),
        ({"prompt": "a photo"}, "in the place of the name"),
        ({"pca": "nowhere.safetensors"}, "there is no file nowhere.safetensors"),
    ],
)
def test_wrong_arguments_are_refused(clip_folder, cache, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ClassTable.from_names(**{"names": NAMES, "encoder": clip_folder, "cache_dir": cache, **arguments})


def test_other_analyses_and_encoders_are_refused(clip_folder, siglip_folder, cache, tmp_path):
    save_file({"mean": torch.zeros(8), "components": torch.zeros(64, 8)}, tmp_path / "pca.safetensors")
    with pytest.raises(ValueError, match="embeddings of 8 numbers; those of .* have 96"):
        ClassTable.from_names(NAMES, clip_folder, tmp_path / "pca.safetensors", cache_dir=cache)
    save_file({"mean": torch.zeros(8)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="has no tensor 'components'"):
        ClassTable.from_names(NAMES, clip_folder, tmp_path / "half.safetensors", cache_dir=cache)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is of the family bert; accepted text encoders are clip"):
        ClassTable.from_names(NAMES, tmp_path / "bert", cache_dir=cache)
