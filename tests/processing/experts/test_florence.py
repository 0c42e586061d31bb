import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartTokenizer,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
)

from modeling_prismer.processing.experts import ExpertSuite, FlorenceText, HashedNgrams

from .models import photograph


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """A small random Florence-2 with a tokenizer that knows the letters and the places."""
    folder = tmp_path_factory.mktemp("florence")
    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    vocabulary |= {letter: 5 + number for number, letter in enumerate("Ġabcdefghijklmnopqrstuvwxyz")}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_tokens([f"<loc_{number}>" for number in range(1000)])
    image_processor = CLIPImageProcessor(
        size={"height": 64, "width": 64}, do_center_crop=False, crop_size={"height": 64, "width": 64}
    )
    image_processor.image_seq_length = 5
    Florence2Processor(
        image_processor, tokenizer, post_processor_config={"ocr": {"PATTERN": None, "AREA_THRESHOLD": 0.0}}
    ).save_pretrained(folder)
    config = Florence2Config(
        vision_config=Florence2VisionConfig(
            depths=[1, 1, 1, 1],
            embed_dim=[8, 8, 16, 16],
            num_heads=[1, 1, 2, 2],
            num_groups=[1, 1, 2, 2],
            window_size=2,
            mlp_ratio=1.0,
            projection_dim=16,
        ),
        text_config=BartConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=64,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    return FlorenceText(model_id=folder, max_new_tokens=12, num_beams=2)


def test_the_model_answers_about_the_image(expert):
    expert.load()
    assert isinstance(expert.answer(photograph()), str)
    (label,) = expert([photograph()])  # whatever it reads
    assert label["ids"].shape == (64, 96)
    assert len(label["words"]) == len(label["features"])


def test_each_line_is_painted_at_its_place(expert, monkeypatch):
    places = [(100, 100), (500, 100), (500, 300), (100, 300)], [(600, 500), (900, 500), (900, 900), (600, 900)]
    corners = ["".join(f"<loc_{x}><loc_{y}>" for x, y in line) for line in places]
    monkeypatch.setattr(FlorenceText, "answer", lambda self, image: f"</s><s>Stop Here{corners[0]}two{corners[1]}</s>")
    (label,) = expert([photograph((200, 100))])
    assert label["words"] == ["stop here", "two"]
    assert np.array_equal(label["features"], HashedNgrams()(["stop here", "two"]))
    assert (label["ids"][12:28, 24:98] == 0).all()
    assert (label["ids"][52:88, 122:178] == 1).all()
    assert (label["ids"][:8] == 255).all()
    assert (label["ids"][:, :16] == 255).all()


def test_nothing_to_read_gives_background(expert, monkeypatch):
    monkeypatch.setattr(FlorenceText, "answer", lambda self, image: "</s><s></s>")
    (label,) = expert([photograph()])
    assert label["words"] == []
    assert (label["ids"] == 255).all()
    assert expert([photograph((4, 30))])[0]["words"] == []


def test_it_is_saved_and_restored_with_a_suite(expert, tmp_path):
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["ocr"]
    assert (restored.max_new_tokens, restored.num_beams) == (12, 2)
    image = photograph()
    assert restored([image])[0]["words"] == expert([image])[0]["words"]
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        FlorenceText(max_new_tokens=0)
