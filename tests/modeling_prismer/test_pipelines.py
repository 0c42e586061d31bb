"""`pipeline("image-text-to-text")` over the bundled checkpoint, and `classify` in place of the zero-shot pipeline."""

import base64
import copy
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import pipeline

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path


SHAPE, COLOR, BLUE = "What shape is in the image?", "What color is the shape?", "Is there a blue shape?"
LABELS = ["circle", "rectangle", "triangle"]


def picture(shape, color):
    image = Image.new("RGB", (64, 64), (240, 244, 250))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((16, 18, 46, 48), fill=color)
    else:
        draw.rectangle((14, 20, 44, 40), fill=color)
    return image


RED_CIRCLE, BLUE_RECTANGLE = picture("circle", (255, 0, 0)), picture("rectangle", (0, 0, 255))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "circle.png"
    RED_CIRCLE.save(path)
    return path


@pytest.fixture(scope="module")
def model():
    return PrismerForConditionalGeneration.from_pretrained(pretrained_path("prismer-easy-vqa"))


@pytest.fixture(scope="module")
def processor():
    """Of its experts only the fast one runs: edges, by which shapes are told."""
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"))
    processor.experts = processor.experts.only("edge")
    return processor


@pytest.fixture(scope="module")
def ask(model, processor):
    return partial(pipeline("image-text-to-text", model=model, processor=processor), return_full_text=False)


def answers(outputs):
    return [output["generated_text"].strip().lower() for output in outputs]


def test_a_folder_is_enough(path):
    pipe = pipeline("image-text-to-text", model=pretrained_path("prismer-easy-vqa"))
    assert set(pipe.processor.experts) == {"edge", "ocr"}
    assert pipe(str(path), COLOR) == [{"input_text": COLOR, "generated_text": f"{COLOR} Red"}]
    assert answers(pipe(images=RED_CIRCLE, text=SHAPE, return_full_text=False)) == ["circle"]


def test_pictures_by_path_url_and_data_uri(ask, path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=path.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    data_uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for image in (str(path), RED_CIRCLE, f"http://127.0.0.1:{server.server_port}/{path.name}", data_uri):
        assert answers(ask(images=image, text=COLOR)) == ["red"]
    server.shutdown()
    server.server_close()


def test_lists_of_pictures_and_questions(ask):
    assert answers(ask(images=[RED_CIRCLE, BLUE_RECTANGLE], text=[COLOR, SHAPE])) == ["red", "rectangle"]
    assert answers(ask(images=[RED_CIRCLE, BLUE_RECTANGLE], text=BLUE)) == ["no", "yes"]
    assert answers(ask(images=RED_CIRCLE, text=[COLOR, SHAPE, BLUE])) == ["red", "circle", "no"]


ROWS = [
    {"images": RED_CIRCLE, "text": COLOR},
    {"images": BLUE_RECTANGLE, "text": "Is it blue?"},
    {"images": BLUE_RECTANGLE, "text": SHAPE},
]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [lambda: (row for row in ROWS), Rows], ids=["generator", "dataset"])
def test_many_pictures_in_batches(ask, rows, batch_size):
    expected = [ask(**row) for row in ROWS]
    assert list(ask(rows(), batch_size=batch_size)) == expected
    assert answers(output for (output,) in expected) == ["red", "yes", "rectangle"]


def test_full_text_begins_with_the_prompt(ask):
    (output,) = ask(RED_CIRCLE, COLOR, return_full_text=True)
    assert output["generated_text"] == f"{COLOR} Red"
    (output,) = ask.func(RED_CIRCLE, COLOR, return_tensors=True)
    assert ask.func.tokenizer.decode(output["generated_token_ids"], skip_special_tokens=True) == f"{COLOR} Red"


def test_arguments_reach_generate_and_the_processor(ask, processor, model):
    settings = {"num_beams": 3, "num_return_sequences": 2}
    outputs = ask(images=[RED_CIRCLE, BLUE_RECTANGLE], text=[COLOR, SHAPE], generate_kwargs=settings)
    assert answers(outputs)[::2] == ["red", "rectangle"] and len(set(answers(outputs))) == 4
    (output,) = ask(RED_CIRCLE, COLOR, max_new_tokens=1, return_full_text=None, return_tensors=True)
    assert len(output["generated_token_ids"]) == len(processor(RED_CIRCLE, COLOR)["input_ids"][0]) + 1
    inputs = processor(RED_CIRCLE, SHAPE, experts=[])
    blind = processor.post_process_generation(model.generate(**inputs), inputs["input_ids"].shape[1])
    assert answers(ask(RED_CIRCLE, SHAPE, experts=[])) == blind != ["circle"]


def chat(image, question, *turns):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, *turns]


def test_messages_give_the_answers_of_questions(ask):
    (expected,) = ask(RED_CIRCLE, COLOR, return_full_text=False)
    assert ask(text=chat(RED_CIRCLE, COLOR), return_full_text=False)[0]["generated_text"] == expected["generated_text"]
    (output,) = ask(chat(RED_CIRCLE, COLOR), return_full_text=True)
    assert output["generated_text"][-1] == {"role": "assistant", "content": expected["generated_text"]}


def test_several_turns_about_one_picture(ask):
    turns = [{"role": "assistant", "content": "red"}, {"role": "user", "content": SHAPE}]
    assert answers(ask(text=chat(RED_CIRCLE, COLOR, *turns), return_full_text=False)) == ["circle"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_messages_in_batches(ask, batch_size):
    chats = [chat(RED_CIRCLE, COLOR), chat(BLUE_RECTANGLE, SHAPE), chat(BLUE_RECTANGLE, "Is it blue?")]
    outputs = ask(text=chats, batch_size=batch_size, return_full_text=False)
    assert answers(output for (output,) in outputs) == ["red", "rectangle", "yes"]


def test_a_begun_answer_is_continued(ask):
    messages = chat(RED_CIRCLE, "Is it red or blue?", {"role": "assistant", "content": "blue"})
    (output,) = ask(text=messages, return_full_text=True)
    assert output["generated_text"][-1] == {"role": "assistant", "content": "blue"}  # </s> follows at once


def test_captions(model, processor):
    """The checkpoint was never trained for captions: what counts is that the pipeline gives what `generate` gives."""
    captioner = PrismerProcessor(processor.image_processor, processor.tokenizer, processor.experts, task="caption")
    pipe = pipeline("image-text-to-text", model=model, processor=captioner)
    inputs = captioner(RED_CIRCLE)
    expected = captioner.post_process_generation(model.generate(**inputs, max_new_tokens=4, num_beams=3))
    outputs = pipe(RED_CIRCLE, "A picture of", generate_kwargs={"max_new_tokens": 4, "num_beams": 3})
    assert [output["generated_text"] for output in outputs] == expected


@pytest.fixture(scope="module")
def scenes():
    """The checkpoint for captions and answers; of its experts only the fast one runs."""
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-scenes"))
    processor.experts = processor.experts.only("edge")
    return pipeline("image-text-to-text", model=pretrained_path("prismer-scenes"), processor=processor)


def test_the_beginning_of_a_caption_is_continued(scenes):
    """The checkpoint was made for captions and answers, and answers where nothing says otherwise."""
    inputs = scenes.processor(RED_CIRCLE, task="caption")
    (expected,) = scenes.processor.post_process_generation(scenes.model.generate(**inputs))
    assert expected.startswith("A picture of ") and len(expected.split()) > 4
    for text, settings in (("A picture of", {}), ("A picture of", {"task": "caption"})):
        assert scenes(RED_CIRCLE, text, **settings) == [{"input_text": text, "generated_text": expected}]
    (answer,) = scenes(RED_CIRCLE, "A picture of", task="vqa")
    assert answer["generated_text"] != expected


def test_captions_and_answers_share_a_call_and_a_batch(scenes):
    texts = ["A picture of", COLOR]
    expected = [scenes(RED_CIRCLE, text)[0] for text in texts]
    assert scenes(images=[RED_CIRCLE] * 2, text=texts) == expected
    assert scenes(images=RED_CIRCLE, text=texts) == expected
    rows = ({"images": RED_CIRCLE, "text": text} for text in texts)
    assert [output for (output,) in scenes(rows, batch_size=2)] == expected


def test_tokens_that_were_added_are_shown(model, processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<loc_1>"], special_tokens=True)
    model = copy.deepcopy(model)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    processor = PrismerProcessor(processor.image_processor, tokenizer, processor.experts, task="vqa")
    number = tokenizer.convert_tokens_to_ids("<loc_1>")
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    (output,) = pipe(
        RED_CIRCLE, "is <loc_1> red", generate_kwargs={"forced_eos_token_id": number, "max_new_tokens": 1}
    )
    assert output["generated_text"] == "is <loc_1> red<loc_1>"


def test_pipeline_needs_image_and_text(ask, path):
    with pytest.raises(ValueError, match="A pipeline takes both: images=… and text=…"):
        ask(str(path))
    with pytest.raises(ValueError, match="You must provide text"):
        ask(RED_CIRCLE)
    with pytest.raises(ValueError, match="images is missing"):
        ask(text=COLOR)


@pytest.mark.parametrize(
    "device, dtype",
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        pytest.param(
            "cuda", "auto", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
        ),
    ],
)
def test_devices_and_number_types(processor, device, dtype):
    path = pretrained_path("prismer-easy-vqa")
    pipe = pipeline("image-text-to-text", model=path, processor=processor, device=device, dtype=dtype)
    assert pipe.model.device.type == device
    assert pipe.model.dtype == (torch.float16 if dtype == "auto" else dtype)  # as it was saved
    assert answers(pipe(RED_CIRCLE, SHAPE, return_full_text=False)) == ["circle"]


# ---- zero-shot classification


def test_pictures_are_classified_among_labels_of_ones_own(model, processor):
    ranked = model.classify(processor, [RED_CIRCLE, BLUE_RECTANGLE], LABELS, text=SHAPE)
    assert [row[0]["label"] for row in ranked] == ["circle", "rectangle"]
    for row in ranked:
        assert sorted(entry["label"] for entry in row) == LABELS
        scores = [entry["score"] for entry in row]
        assert scores == sorted(scores, reverse=True) and scores[0] < 0


def test_classify_scores_equal_rank_candidates(model, processor):
    inputs = processor(RED_CIRCLE, [SHAPE, COLOR])
    candidates = processor.prepare_candidates(LABELS)
    expected = model.rank_candidates(**candidates, k=3, **inputs)
    ranked = model.classify(processor, RED_CIRCLE, LABELS, text=[SHAPE, COLOR])
    assert len(ranked) == 2  # one image, two questions
    for row, scores, indices in zip(ranked, expected.scores, expected.indices):
        assert [entry["label"] for entry in row] == [LABELS[index] for index in indices]
        assert [entry["score"] for entry in row] == scores.tolist()


def test_experts_labels_and_task_can_be_given(model, processor):
    blind = model.classify(processor, RED_CIRCLE, LABELS, text=SHAPE, experts=[])
    assert blind != model.classify(processor, RED_CIRCLE, LABELS, text=SHAPE)
    # a caption's candidates are lower case, an answer's are not
    assert model.classify(processor, RED_CIRCLE, LABELS, text=SHAPE, task="caption") != blind


def test_labels_have_the_form_of_the_text_before(scenes):
    captions = ["a Red ball", "a blue cube"]
    expected = scenes.model.classify(scenes.processor, RED_CIRCLE, captions, task="caption")
    assert scenes.model.classify(scenes.processor, RED_CIRCLE, captions) == expected
    assert scenes.model.classify(scenes.processor, RED_CIRCLE, captions, text="A picture of") == expected
    assert scenes.model.classify(scenes.processor, RED_CIRCLE, captions, text="What is it?") != expected
    with pytest.raises(ValueError, match="belong to several tasks"):
        scenes.model.classify(scenes.processor, RED_CIRCLE, captions, text=["A picture of", "What is it?"])


def test_classify_names_missing_inputs(model, processor):
    with pytest.raises(ValueError, match="text is missing: the task 'vqa' needs a question"):
        model.classify(processor, RED_CIRCLE, LABELS)
    with pytest.raises(ValueError, match="answers is empty"):
        model.classify(processor, RED_CIRCLE, [], text=SHAPE)
