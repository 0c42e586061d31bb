"""`prismer serve` answers the client of OpenAI: streamed or not, in batches, with clear errors."""

import asyncio
import base64
import io
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import httpx
from PIL import Image
from typer.testing import CliRunner

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path, sample_image
from modeling_prismer.cli import app as cli

from ..processing.tiny_lm_processors import make_model, make_processor


openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
serving = pytest.importorskip("modeling_prismer.serving")
TestClient = pytest.importorskip("fastapi.testclient").TestClient

NAME = "prismer-easy-vqa"
COLOR, SHAPE, RED = "What color is the shape?", "What shape is in the image?", "Is it red?"
MAX_BODY = 1_000_000


def data_uri(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


TRIANGLE = data_uri(sample_image("shape"))


def user(text, image=TRIANGLE):
    items = [] if image is None else [{"type": "image_url", "image_url": {"url": image}}]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


@contextmanager
def running(batcher, name=NAME, **kwargs):
    """The address of a server in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = serving.build_app(batcher, name, max_body_bytes=MAX_BODY, **kwargs)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    assert not batcher.is_alive


@pytest.fixture(scope="module")
def batcher():
    path = pretrained_path(NAME)
    processor = PrismerProcessor.from_pretrained(path)
    network = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    batcher = serving.Batcher(network, processor, wait=0.05, experts=["edge"])
    batcher.warm_up()
    return batcher


@pytest.fixture(scope="module")
def address(batcher):
    with running(batcher) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def batches(batcher, monkeypatch):
    """The sizes of the batches."""
    sizes, generate = [], batcher._generate

    def counted(jobs):
        sizes.append(len(jobs))
        return generate(jobs)

    monkeypatch.setattr(batcher, "_generate", counted)
    return sizes


def ask(client, *messages, model=NAME, **kwargs):
    return client.chat.completions.create(model=model, messages=list(messages), **kwargs)


def answer(client, *messages, **kwargs):
    return ask(client, *messages, **kwargs).choices[0].message.content


def pieces(client, *messages, **kwargs):
    chunks = list(ask(client, *messages, stream=True, **kwargs))
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]


# ---- answers ----


def test_the_model_is_listed(client, address):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_question_is_answered(client):
    completion = ask(client, user(COLOR))
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "teal", "stop")
    assert completion.model == NAME and completion.usage.completion_tokens == 2
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 2


def test_streamed_text_is_the_same(client):
    chunks = list(ask(client, user(SHAPE), stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer(client, user(SHAPE)) == "triangle"
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 0


def test_two_turns_about_one_image(client):
    turns = [user(COLOR), {"role": "assistant", "content": "teal"}, user(SHAPE, image=None)]
    assert answer(client, *turns) == "triangle"
    assert "".join(pieces(client, *turns)) == "triangle"


def test_settings_of_a_request_hold(client):
    cut = ask(client, user(SHAPE), max_tokens=1).choices[0]
    assert cut.finish_reason == "length" and "triangle".startswith(cut.message.content) != ""
    assert answer(client, user(COLOR), temperature=0, extra_body={"num_beams": 2}) == "teal"
    stopped = ask(client, user(SHAPE), stop=["gle", "ang"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("tri", "stop")
    assert "".join(pieces(client, user(SHAPE), stop="ang")) == "tri"
    assert answer(client, user(COLOR), max_tokens=10**9) == "teal"  # no more than there are positions


def test_20_clients_at_once_share_batches(address, batches):
    colors = ["red", "blue", "teal", "gray"] * 5

    def drawing(color):
        shape = {"red": (255, 0, 0), "blue": (0, 0, 255), "gray": (128, 128, 128), "teal": (0, 128, 128)}[color]
        image = Image.new("RGB", (64, 64), (240, 244, 250))
        image.paste(shape, (14, 20, 44, 40))
        return data_uri(image)

    async def one(color, number):
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            request = {"model": NAME, "messages": [user(COLOR, drawing(color))]}
            if number % 2:
                return (await client.chat.completions.create(**request)).choices[0].message.content
            stream = await client.chat.completions.create(**request, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone():
        return await asyncio.gather(*(one(color, number) for number, color in enumerate(colors)))

    assert asyncio.run(everyone()) == colors
    assert sum(batches) == 20 and len(batches) < 10


def test_a_client_that_leaves_ends_its_row(client, batcher, monkeypatch):
    jobs = []

    def begin(job):
        jobs.append(job)
        job.deliver("te")  # and nothing more

    monkeypatch.setattr(batcher, "submit", begin)
    with ask(client, user(COLOR), stream=True) as stream:
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "te"]
        assert not jobs[0].is_cancelled
    for _ in range(100):
        time.sleep(0.01 * (not jobs[0].is_cancelled))
    criteria = serving._Cancelled([serving.Job([], {}, print), jobs[0]])
    assert criteria(torch.zeros(4, 1), None).tolist() == [False, False, True, True]


def test_the_program_of_the_guide_runs(address, capsys):
    guide = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    program = guide.split("```python\n")[1].split("```")[0].replace("http://127.0.0.1:8000", address)
    program = program.replace("prismer-scenes", NAME).replace("scene.png", "shape.png")
    exec(program.replace("What does the sign say?", COLOR), {})
    assert capsys.readouterr().out == "teal\nteal"


# ---- errors ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "messages, message",
    [
        ([user(COLOR, image=None)], "the conversation has no image: Prismer needs one"),
        ([{"role": "user", "content": COLOR}], "the conversation has no image"),
        ([user(COLOR, "data:image/png;base64,AAAA")], "image 0"),
        ([user(COLOR, "/etc/hostname")], "not a URL that starts with data:"),
        ([user(COLOR, "http://127.0.0.1/a.png")], "not a URL that starts with data:"),
        ([{"role": "user", "content": [{"type": "image", "path": "/etc/hostname"}]}], "not a URL that starts with"),
        ([user(COLOR, data_uri(Image.new("1", (6000, 6000))))], "pixels"),
        ([user(COLOR), {"role": "assistant", "content": "teal"}], "the last message is one of the assistant"),
        ([{"role": "user", "content": [{"type": "input_audio", "data": "A" * 10_000}]}], "a message has the item"),
        ([{"role": "system", "content": "hello"}], "no turn of the role 'user'"),
        ([user("a" * 200_000)], "letters"),
        ([], "messages: List should have at least 1 item"),
    ],
)
def test_wrong_requests_are_named(client, messages, message, stream):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, *messages, stream=stream)
    assert message in error.value.body["message"] and len(error.value.body["message"]) < 600


def test_unsupported_fields_are_refused(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for kwargs in ({"tools": [tool]}, {"n": 2}, {"temperature": 9}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError, match=next(iter(kwargs))):
            ask(client, user(COLOR), **kwargs)
    assert answer(client, user(COLOR), user="me", seed=1, response_format={"type": "text"}) == "teal"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'prismer-easy-vqa'"):
        ask(client, user(COLOR), model="gpt-5")


def test_large_bodies_are_refused(client, address):
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, user("a" * MAX_BODY))
    assert error.value.status_code == 413 and "1,000,000 bytes" in error.value.body["message"]
    chunks = (b" " * 100_000 for _ in range(20))  # without a length in the header
    response = httpx.post(f"{address}/v1/chat/completions", content=chunks)
    assert response.status_code == 413


def test_a_body_that_is_no_request_is_refused(address):
    for body in (b"{", b"[1]", b'"' + b"[" * 100_000, b"[" * 100_000):
        response = httpx.post(
            f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_one_mistake_fails_no_other_request(client, address, batches):
    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            calls = [
                client.chat.completions.create(model=NAME, messages=[user(COLOR, image)])
                for image in (TRIANGLE, None, TRIANGLE)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

    first, second, third = asyncio.run(everyone())
    assert first.choices[0].message.content == third.choices[0].message.content == "teal"
    assert isinstance(second, openai.BadRequestError)


def test_a_failure_of_the_network_is_a_500(client, batcher, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("a secret")

    monkeypatch.setattr(batcher.network, "generate", fail)
    with pytest.raises(openai.InternalServerError) as error:
        ask(client, user(COLOR))
    assert "secret" not in json.dumps(error.value.body)
    monkeypatch.undo()
    assert answer(client, user(COLOR)) == "teal"


# ---- PrismerLM ----


@pytest.fixture(scope="module")
def lm_client():
    processor = make_processor()
    processor.tokenizer.model_max_length = 512
    network = make_model(len(processor.tokenizer), image_token_id=processor.image_token_id)
    with running(serving.Batcher(network, processor), "tiny") as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            client.processor, client.network = processor, network
            yield client


def test_a_prismer_lm_answers_as_generate_does(lm_client):
    messages = [user("What shape is it?"), {"role": "assistant", "content": "a"}, user("Is it red?", image=None)]
    inputs = lm_client.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, experts=[]
    )
    generated = lm_client.network.generate(**inputs, max_new_tokens=8)
    (expected,) = lm_client.processor.post_process_generation(generated, inputs["input_ids"].shape[1])
    assert answer(lm_client, *messages, model="tiny", max_tokens=8) == expected
    assert "".join(pieces(lm_client, *messages, model="tiny", max_tokens=8)) == expected


def test_a_prismer_lm_answers_without_an_image(lm_client):
    assert ask(lm_client, user("a circle", image=None), model="tiny", max_tokens=4).usage.completion_tokens <= 4
    with pytest.raises(openai.BadRequestError, match="tokens"):
        ask(lm_client, user("circle " * 10_000), model="tiny", max_tokens=4)


def test_a_checkpoint_without_a_template_is_refused():
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        serving.Batcher(None, processor)


# ---- command line ----


def test_the_command_serves_a_checkpoint(monkeypatch):
    served = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **kwargs: served.update(kwargs, app=app))
    result = CliRunner().invoke(cli, ["serve", "--model", NAME, "--experts", "none", "--port", "8001"])
    assert result.exit_code == 0, result.output
    assert "prismer-easy-vqa on http://127.0.0.1:8001/v1" in result.stderr
    assert (served["host"], served["port"]) == ("127.0.0.1", 8001)
    with TestClient(served["app"]) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == NAME


def test_the_command_names_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(cli, ["serve", "--model", NAME])
    assert result.exit_code == 1 and "pip install 'modeling-prismer[serve]'" in result.stderr
