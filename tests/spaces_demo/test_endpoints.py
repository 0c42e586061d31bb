import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image


pytest.importorskip("gradio")
client_library = pytest.importorskip("gradio_client")

IMAGE = "modeling_prismer/assets/shape.png"
QUESTION = "What color is the shape?"


@pytest.fixture(scope="module")
def client(server):
    return client_library.Client(server, verbose=False)


@pytest.fixture(scope="module")
def image():
    from tests.spaces_demo.conftest import ROOT

    return client_library.handle_file(str(ROOT / IMAGE))


def test_endpoints_are_those_of_the_guide(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/experts", "/ask", "/classify"}


def test_experts(client, image):
    edge, ocr = client.predict(image, api_name="/experts")
    assert edge["name"] == "edge" and edge["saw"] is None and not edge["failed"]
    assert ocr["name"] == "ocr" and isinstance(ocr["saw"], list)


def test_ask_with_and_without_experts(client, image):
    said = client.predict(image, QUESTION, api_name="/ask")
    assert said["text"] == "teal" and said["probability"] > 0.5 and said["familiar"] is None
    assert set(said["attention"]) == {"image", "edge", "ocr"}
    alone = client.predict(image, QUESTION, [], api_name="/ask")
    assert alone["attention"]["edge"] == 0 and alone["probability"] != said["probability"]


def test_classify(client, image):
    ranking = client.predict(image, "circle, triangle", "What shape is in the image?", api_name="/classify")
    assert [row["label"] for row in ranking] == ["triangle", "circle"]


def test_answers_contain_no_path(client, image):
    for name, arguments in (("/experts", ()), ("/ask", (QUESTION,))):
        assert "/" not in json.dumps(client.predict(image, *arguments, api_name=name))


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (lambda folder: folder / "text.png", (QUESTION,), "not an image, or damaged"),
        (None, ("why " * 40,), "too long"),
        (None, ("",), "type a question"),
    ],
)
def test_unusable_input_gets_a_plain_message(client, image, tmp_path, make, arguments, message):
    if make is not None:
        file = make(tmp_path)
        file.write_bytes(b"this is not an image")
        image = client_library.handle_file(str(file))
    with pytest.raises(Exception, match=message) as caught:
        client.predict(image, *arguments, api_name="/ask")
    assert "Traceback" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_parallel_clients_get_the_answers_to_their_own_images(server, tmp_path):
    colors = {"red": (220, 30, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}

    def ask(color):
        file = tmp_path / f"{color}.png"
        image = Image.new("RGB", (64, 64), (240, 240, 240))
        image.paste(colors[color], (16, 16, 44, 44))
        image.save(file)
        mine = client_library.Client(server, verbose=False)
        said = mine.predict(client_library.handle_file(str(file)), QUESTION, api_name="/ask")
        return color, said["text"]

    with ThreadPoolExecutor(3) as pool:
        assert all(color == said for color, said in pool.map(ask, colors))
