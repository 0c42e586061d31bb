import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    Qwen2Tokenizer,
)

from modeling_prismer.processing.experts import ExpertSuite, GotOcrText, HashedNgrams, expert_from_dict

from .conftest import draw_page
from .models import photograph, save


LINES = ["hello brave world", "stop at 25"]


def got_ocr():
    """A small random GOT-OCR2 with a tokenizer of bytes."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"], special_tokens=True)
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 128,
        "patch_size": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 16,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    config = GotOcr2Config(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>")
    )
    processor = GotOcr2Processor(GotOcr2ImageProcessor(size={"height": 128, "width": 128}), tokenizer)
    return GotOcr2ForConditionalGeneration(config), processor


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    expert = GotOcrText(model_id=save(got_ocr, tmp_path_factory.mktemp("got")), max_new_tokens=12, num_threads=1)
    expert.load()
    return expert


@pytest.fixture
def reading(expert, ocr, monkeypatch):
    """The expert, whose crops RapidOCR reads in place of the random model."""
    sizes = []

    def answers(self, images):
        sizes.append(len(images))
        crops = [np.ascontiguousarray(np.asarray(image)[:, :, ::-1]) for image in images]
        return [text.lower() for text in ocr.model.recognize_txt(crops).txts]

    monkeypatch.setattr(GotOcrText, "answers", answers)
    monkeypatch.setattr(GotOcrText, "lines_at_once", 3)
    expert.sizes = sizes
    return expert


def test_the_model_answers_about_each_image(expert):
    images = [photograph((90, 20), seed) for seed in range(6)]
    answers = expert.answers(images)
    assert len(set(answers)) > 1
    for image, answer in zip(images, answers):
        assert expert.answers([image]) == [answer]
        assert answer == " ".join(answer.lower().split())


def test_the_answer_is_that_of_the_model_alone(expert):
    model = GotOcr2ForConditionalGeneration.from_pretrained(expert.model_id).eval()
    processor = GotOcr2Processor.from_pretrained(expert.model_id)
    image = photograph((90, 20))
    inputs = processor(image, num_image_tokens=4, return_tensors="pt")
    assert inputs["input_ids"].eq(model.config.image_token_id).sum() == 4  # 8×8 patches, halved twice
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(generated, skip_special_tokens=True)
    assert text
    assert expert.answers([image]) == [" ".join(text.lower().split())]


def test_an_answer_ends_at_its_end(expert, monkeypatch):
    tokenizer = expert._processor.tokenizer
    answer = tokenizer("Stop\n here<|im_end|><|im_end|>", return_tensors="pt")["input_ids"]

    def generate(input_ids, eos_token_id, pad_token_id, **inputs):
        assert eos_token_id == pad_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(expert.model, "generate", generate)
    assert expert.answers([photograph()]) == ["stop here"]
    decode = type(tokenizer).batch_decode
    monkeypatch.setattr(
        type(tokenizer), "batch_decode", lambda self, ids, **_: decode(self, ids, skip_special_tokens=False)
    )  # as if the end was an ordinary token
    assert expert.answers([photograph()]) == ["stop here"]


@pytest.mark.parametrize("angle", [0, 20, 90, -90, 180])
def test_lines_are_cut_out_upright(reading, angle):
    (label,) = reading([draw_page(angle)])
    assert sorted(label["words"]) == LINES
    assert np.array_equal(label["features"], HashedNgrams()(label["words"]))
    dark = np.asarray(draw_page(angle).convert("L")) < 128
    assert (label["ids"][dark] != 255).mean() > 0.97
    assert (label["ids"] != 255).mean() < 0.3


def test_each_line_is_painted_at_its_place(reading, page):
    (label,) = reading([page])
    assert label["words"] == LINES  # from the top
    rows = [np.nonzero(label["ids"] == number)[0].mean() for number in range(2)]
    assert rows == pytest.approx([120, 180], abs=4)
    assert reading.sizes == [2]


def test_lines_are_read_in_batches(reading):
    image = Image.new("RGB", (420, 600), "white")
    for number in range(4):
        image.paste(draw_page(size=(420, 150)), (0, 150 * number))
    (label,) = reading([image])
    assert label["words"] == LINES * 4
    assert reading.sizes == [3, 3, 2]


def test_lines_without_an_answer_are_left_out(expert, page, monkeypatch):
    monkeypatch.setattr(GotOcrText, "answers", lambda self, images: ["", "two"])
    (label,) = expert([page])
    assert label["words"] == ["two"]
    assert set(np.unique(label["ids"])) == {0, 255}
    assert np.nonzero(label["ids"] == 0)[0].mean() == pytest.approx(180, abs=4)


def test_nothing_to_read_gives_background(expert):
    for image in (Image.new("RGB", (96, 64), "white"), photograph((4, 30))):
        (label,) = expert([image])
        assert label["words"] == []
        assert label["features"].shape == (0, 64)
        assert (label["ids"] == 255).all()


def test_the_detector_reads_nothing(expert, page):
    expert([page])
    assert expert._detector.model.text_rec is None
    expert.unload()
    assert not expert._detector.is_loaded
    expert.load()


def test_lines_can_be_found_by_an_expert_that_reads(ocr, page):
    quads = ocr.find_lines(page)
    assert len(quads) == 2
    assert [word for line in LINES for word in line.split()] == ocr([page])[0]["words"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_runs_in_half_precision(expert, dtype):
    half = GotOcrText(model_id=expert.model_id, max_new_tokens=3, num_threads=1).to(dtype=dtype)
    half.load()
    assert len(half.answers([photograph((90, 20))])) == 1


def test_it_is_saved_and_restored_with_a_suite(expert, page, tmp_path):
    assert expert_from_dict(expert.to_dict()).to_dict() == expert.to_dict()
    ExpertSuite([expert]).save_pretrained(tmp_path)
    restored = ExpertSuite.from_pretrained(tmp_path)["ocr"]
    assert (restored.max_new_tokens, restored.num_threads) == (12, 1)
    assert restored.model_id != expert.model_id
    assert restored([page])[0]["words"] == expert([page])[0]["words"] != []
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        GotOcrText(max_new_tokens=0)
