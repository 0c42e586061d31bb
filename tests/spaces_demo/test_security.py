"""Hostile requests over HTTP, as curl would send them."""

import base64
import http.server
import json
import os
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image


pytest.importorskip("gradio")

import httpx  # comes with gradio

from tests.spaces_demo.conftest import ROOT


SHAPE = ROOT / "modeling_prismer/assets/shape.png"
QUESTION = "What color is the shape?"
FILE = {"_type": "gradio.FileData"}
WAIT = 60


@pytest.fixture(scope="module")
def http_client(server):
    with httpx.Client(base_url=f"{server}/gradio_api", timeout=WAIT) as client:
        yield client


def post(client, route, body):
    """Sends `body`: bytes unchanged, other values as JSON, including lone surrogates."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    return client.post(route, content=content, headers={"Content-Type": "application/json"})


def upload(client, name="shape.png"):
    answer = client.post("/upload", files={"files": (name, SHAPE.read_bytes())})
    assert answer.status_code == 200
    return answer.json()[0]


def end_of(client, posted, name):
    """Returns how a call ended, `"complete"` or `"error"`, and its result."""
    assert posted.status_code == 200, posted.text
    events = client.get(f"/call/{name}/{posted.json()['event_id']}").text.strip().split("\n\n")
    kind, data = events[-1].split("\n")
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def call(client, name, *data):
    return end_of(client, post(client, f"/call/{name}", {"data": data}), name)


def page_call(client, blocks, function, data, session="visitor", event=None):
    """Calls a function as the page does. Returns how it ended, and the error or all outputs."""
    index = next(i for i, each in blocks.fns.items() if getattr(each.fn, "__name__", None) == function)
    body = {"data": data, "fn_index": index, "session_hash": session, "event_data": event}
    answer = post(client, "/queue/join", body)
    if answer.status_code != 200:
        return "error", answer.json()["detail"]
    shown = []
    with client.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
        for line in filter(None, stream.iter_lines()):
            message = json.loads(line.removeprefix("data: "))
            shown.append(json.dumps(message.get("output")))
            if message["msg"] == "process_completed":
                return ("complete", "".join(shown)) if message["success"] else ("error", message["output"]["error"])
    raise AssertionError("the stream ended without an answer")


# ---- files ----


def uploads_folder():
    import app

    return Path(app.UPLOADS)


def foreign_payloads(path):
    """Ways to name a file that was not uploaded."""
    return [
        {"path": path},
        {"path": path, "meta": {"_type": "gradio.Other"}},
        {"path": path, "meta": FILE},
        {"path": path, "meta": FILE, "url": "http://127.0.0.1/x.png"},
        {"path": os.path.relpath(path)},
        {"path": f"{uploads_folder()}/../..{path}"},
        {"path": f"file://{path}"},
        {"path": [path]},
        {"path": {"path": path, "meta": FILE}},
        [{"path": path, "meta": FILE}],
        path,
    ]


@pytest.mark.parametrize("number", range(11))
def test_file_that_was_not_uploaded_is_not_read(http_client, tmp_path, number):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), "red").save(secret)
    for name, others in (("experts", []), ("ask", [QUESTION, []]), ("classify", ["a, b", "", []])):
        payload = foreign_payloads(str(secret))[number]
        kind, there = call(http_client, name, payload, *others)
        assert kind == "error" and there["error"].startswith("image: ")
        assert str(tmp_path) not in there["error"]
    secret.unlink()  # the error does not reveal whether the file exists
    assert call(http_client, name, foreign_payloads(str(secret))[number], *others) == (kind, there)


def test_error_does_not_reveal_the_size_of_a_foreign_file(http_client, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(bytes(11 * 1024**2))
    _, said = call(http_client, "experts", {"path": str(large)})
    assert said == call(http_client, "experts", {"path": str(tmp_path / "none")})[1]
    assert "MB" not in said["error"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "descriptor", "parent"])
def test_only_regular_files_in_the_upload_folder_are_opened(http_client, kind, tmp_path):
    place = uploads_folder() / f"hostile-{kind}"
    secret = tmp_path / "secret.png"
    secret.write_bytes(SHAPE.read_bytes())
    if kind == "link":
        place.symlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "descriptor":
        place = Path("/proc/self/fd/1")
    else:
        place = uploads_folder()
    for meta in ({}, {"meta": FILE}):
        ended, said = call(http_client, "experts", {"path": str(place), **meta})
        assert ended == "error" and said["error"].startswith("image: ")
    assert call(http_client, "experts", {"path": upload(http_client)})[0] == "complete"  # other requests still work


@pytest.mark.parametrize("name", ["question", "labels", "experts"])
def test_file_in_place_of_a_text_is_refused(http_client, name, tmp_path):
    image = {"path": upload(http_client), "meta": FILE}
    inputs = {"image": image, "labels": "a, b", "question": QUESTION, "experts": []}
    inputs[name] = image
    kind, said = call(http_client, "classify", *inputs.values())
    assert kind == "error" and said["error"].startswith(f"{name}: ") and "object" in said["error"]


def test_page_refuses_foreign_files(http_client, space, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(SHAPE.read_bytes())
    for payload in foreign_payloads(str(secret)):
        kind, said = page_call(http_client, space[0], "_take_image", [payload])
        assert kind == "error" and said.startswith("Your image: ")


@contextmanager
def listening():
    """Serves an image. Yields its address and the list of requests."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SHAPE.read_bytes())

        do_HEAD = do_GET

        def log_message(self, *args): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/image.png", asked
    server.shutdown()
    server.server_close()


def test_no_url_is_fetched(http_client, monkeypatch):
    import safehttpx

    async def allow(host):  # treats the address as public
        return "127.0.0.1"

    monkeypatch.setattr(safehttpx, "async_validate_url", allow)
    with listening() as (url, asked):
        for payload in ({"path": url}, {"path": url, "meta": FILE}, {"url": url}, {"path": None, "url": url}, url):
            assert call(http_client, "experts", payload)[0] == "error"
        for payload in ({"path": url, "meta": FILE}, {"url": url, "path": url}):
            assert call(http_client, "ask", {"path": upload(http_client)}, payload, [])[0] == "error"
        kind, _ = call(http_client, "experts", {"path": upload(http_client), "url": url, "meta": FILE})
        assert kind == "complete"  # a browser also sends the address of the uploaded file
        for route in (f"/file={url}", f"/file={url.upper()}", f"/proxy={url}", f"/file/{url}"):
            assert http_client.get(route).status_code == 404
        assert asked == []


@pytest.mark.parametrize(
    "route",
    [
        "GET /deep_link?session_hash=a",
        "GET /run-history/buckets",
        "GET /vibe-code",
        "POST /component_server",
        "POST /process_recording",
        "POST /vibe-edit",
        "POST /run-history/connect",
        "POST /stream/a",
        "DELETE /upload",
    ],
)
def test_unused_routes_are_closed(http_client, route):
    method, path = route.split()
    assert http_client.request(method, path).status_code == 404


def test_calls_cannot_bypass_the_queue(http_client):
    image = {"path": upload(http_client), "meta": FILE}
    for route in ("/run/experts", "/api/experts"):
        assert post(http_client, route, {"data": [image]}).status_code == 404


# ---- lifetime of uploads ----


@contextmanager
def busy(monkeypatch):
    """Blocks all runs of experts until it ends."""
    from reader import Reader

    go, look = threading.Event(), Reader.look

    def wait(self, *args):
        assert go.wait(WAIT)
        return look(self, *args)

    monkeypatch.setattr(Reader, "look", wait)
    try:
        yield
    finally:
        go.set()


def tidy_late(space):
    """Tidies up as if all uploads were old."""
    import app
    from waiting import Unread

    for file in uploads_folder().rglob("*"):
        os.utime(file, (1, 1), follow_symlinks=False)
    app.tidy(*space, Unread(space[0]))


def wait_until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_upload_stays_while_a_request_waits(http_client, space, monkeypatch):
    files = [upload(http_client, name=f"{number}.png") for number in range(3)]
    unused = upload(http_client, name="unused.png")
    with busy(monkeypatch):
        posted = [post(http_client, "/call/experts", {"data": [{"path": file, "meta": FILE}]}) for file in files]
        tidy_late(space)
        assert [Path(file).exists() for file in files] == [True] * 3
    assert not Path(unused).exists()
    assert [end_of(http_client, each, "experts")[0] for each in posted] == ["complete"] * 3
    wait_until(lambda: not space[0]._queue.event_ids_to_events)  # the queue removes an event a moment after its answer
    tidy_late(space)
    assert not any(Path(file).exists() for file in files)


def test_upload_stays_as_long_as_its_session(http_client, space):
    file = upload(http_client, name="mine.png")
    assert page_call(http_client, space[0], "_take_image", [{"path": file, "meta": FILE}], "owner")[0] == "complete"
    tidy_late(space)
    assert http_client.get(f"/file={file}").status_code == 200
    space[1].forget("owner")
    tidy_late(space)
    assert not Path(file).exists()


def test_example_image_stays_as_long_as_its_session(http_client, space):
    ended, _ = page_call(http_client, space[0], "_take_example", [], "guest", {"name": "shape.png"})
    assert ended == "complete"
    (shown,) = (session.upload for key, session in space[1]._sessions.items() if key == "guest")
    tidy_late(space)
    assert http_client.get(f"/file={shown}").status_code == 200
    space[1].forget("guest")
    tidy_late(space)
    assert not Path(shown).exists()


def test_full_upload_folder_refuses_uploads(http_client, monkeypatch):
    import uploads

    monkeypatch.setattr(uploads, "MAX_KEPT", 100_000)
    files = [upload(http_client, name=f"full-{number}.png") for number in range(2)]  # each counts as 64 KB
    answer = http_client.post("/upload", files={"files": ("more.png", b"x")})
    assert answer.status_code == 503 and "try again" in answer.json()["detail"]
    for file in files:
        Path(file).unlink()


def test_answers_that_nobody_fetches_are_dropped(http_client, space):
    from waiting import Unread

    queue = space[0]._queue
    posted = post(http_client, "/call/experts", {"data": [{"path": upload(http_client), "meta": FILE}]})
    event = posted.json()["event_id"]
    call(http_client, "experts", {"path": upload(http_client)})  # the first call has ended now
    assert not queue.pending_messages_per_session[event].empty()
    Unread(space[0], seconds=WAIT).sweep()
    assert event in queue.pending_messages_per_session
    Unread(space[0], seconds=0).sweep()
    assert event not in queue.pending_messages_per_session and event not in queue.pending_event_ids_session
    assert call(http_client, "experts", {"path": upload(http_client)})[0] == "complete"


# ---- bodies ----


def in_parts(*parts):
    yield from parts


def test_too_large_body_is_refused(http_client):
    body = json.dumps({"data": ["x" * 1_000_000]}).encode()
    for content in (body, in_parts(body[:400_000], body[400_000:])):  # with and without `Content-Length`
        for route in ("/call/ask", "/queue/join", "/run/ask", "/api/ask", "/call/v2/ask", "/cancel"):
            answer = http_client.post(route, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413 and "512 KB" in answer.json()["detail"]
            content = body if content is body else in_parts(body[:400_000], body[400_000:])


@pytest.mark.parametrize("files", [1, 12])
@pytest.mark.parametrize("with_length", [True, False])
def test_too_large_upload_leaves_no_file(http_client, space, files, with_length):
    tidy_late(space)
    head = '--b\r\nContent-Disposition: form-data; name="files"; filename="{}.png"\r\n\r\n'
    size = 12_000_000 // files
    parts = [part for n in range(files) for part in (head.format(n).encode(), bytes(size), b"\r\n")] + [b"--b--\r\n"]
    content = b"".join(parts) if with_length else in_parts(*parts)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = http_client.post("/upload", content=content, headers=headers)
    assert answer.status_code == 413 and "maximum allowed size" in answer.text
    assert not [file for file in uploads_folder().rglob("*") if file.is_file() and file.stat().st_size > 100_000]


@pytest.mark.parametrize(
    "body, named",
    [
        (b'{"data": [null, ' + b"[" * 30 + b"]" * 30 + b", []]}", "question"),
        (b'{"data": [{"path": ' + b'{"path": ' * 30 + b"1" + b"}" * 31 + b', "why", []]}', "image"),
        (b'{"data": [], "event_data": ' + b"[" * 30 + b"]" * 30 + b"}", "event_data"),
        (b'{"data": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "nested"),
        (b'{"data": [' + b"[]," * 50_000 + b"[]]}", "lists and objects"),
        (b'{"data": ', "JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "JSON"),
        (b'{"data": [], "session_hash": "' + b"x" * 101 + b'"}', "session_hash"),
        (b'{"data": [], "session_hash": "\\ud800"}', "session_hash"),
    ],
)
def test_unreadable_body_gets_a_reason(http_client, body, named):
    answer = post(http_client, "/call/ask", body)
    assert answer.status_code == 400 and named in answer.json()["detail"]


def test_unknown_function_is_named(http_client):
    answer = post(http_client, "/call/nothing", {"data": []})
    assert answer.status_code == 404 and "/experts, /ask, /classify" in answer.json()["detail"]
    answer = post(http_client, "/queue/join", {"data": [], "fn_index": 10**6, "session_hash": "a"})
    assert answer.status_code == 404 and "fn_index" in answer.json()["detail"]


# ---- texts ----

NO_TEXTS = [5, 0.5, True, {"a": 1}, ["a"], [[[["a"]]]], "\ud800", "a\udfff", "x" * 10_000]


@pytest.mark.parametrize("value", NO_TEXTS, ids=lambda value: ascii(value)[:12])
@pytest.mark.parametrize("name", ["question", "labels", "experts"])
def test_input_of_a_wrong_kind_is_named(http_client, name, value):
    if name == "experts":
        value = value if not isinstance(value, str | list) else [value]
    inputs = {"image": {"path": upload(http_client)}, "labels": "a, b", "question": QUESTION, "experts": []}
    inputs[name] = value
    kind, said = call(http_client, "classify", *inputs.values())
    assert kind == "error" and said["error"].startswith(f"{name}: ")
    if name != "labels":
        del inputs["labels"]
        kind, said = call(http_client, "ask", *inputs.values())
        assert kind == "error" and said["error"].startswith(f"{name}: ")
        answer = post(http_client, "/call/v2/ask", inputs)
        assert end_of(http_client, answer, "ask") == (kind, said)


@pytest.mark.parametrize("value", NO_TEXTS, ids=lambda value: ascii(value)[:12])
def test_page_names_inputs_of_a_wrong_kind(http_client, space, value):
    blocks = space[0]
    assert page_call(http_client, blocks, "_take_example", [], event={"name": "shape.png"})[0] == "complete"
    for function, data, event, named in (
        ("_ask", [value], None, "Your question"),
        ("_ask_suggested", [], {"question": value}, "question"),
        ("_rank", [value, QUESTION], None, "Your labels"),
        ("_rank", ["a, b", value], None, "The question"),
        ("_take_example", [], {"name": value}, "example"),
        ("_edit", [], {"name": value, "edit": {}}, "name of the expert"),
        ("_edit", [], {"name": "ocr", "edit": value}, "edit"),
        ("_edit", [], {"name": "ocr", "edit": {"boxes": [{"box": [0, 0, 1, 1], "text": value}]}}, ("word", "edit")),
        ("_reset", [], {"name": value}, "name of the expert"),
        ("switch", [value], None, "Edges: input of the model"),
        ("_choose_other", [value], None, "Compare with"),
        ("_open_link", [value if len(str(value)) < 1000 else "x" * 300_000], None, "link"),
    ):
        kind, said = page_call(http_client, blocks, function, data, event=event)
        assert kind == "error" and said.startswith(named) or "x" * 99 in str(event), (function, said)


def test_missing_inputs_are_named(http_client):
    kind, said = call(http_client, "ask", {"path": upload(http_client)})
    assert kind == "error" and said["error"].startswith("question, experts: missing")


def test_missing_event_data_are_named(http_client, space):
    blocks = space[0]
    page_call(http_client, blocks, "_take_example", [], event={"name": "shape.png"})
    for event in (None, 5, [], "name"):
        for function, named in (("_take_example", "example"), ("_edit", "name of the expert"), ("_reset", "name")):
            kind, said = page_call(http_client, blocks, function, [], event=event)
            assert kind == "error" and said.startswith(named)


@pytest.mark.parametrize("value", [None, 5, "12", [1], ["a", "b"], [1, float("inf")], {"x": 1, "y": 2}, [[1], [2]]])
def test_place_of_a_click_is_checked(http_client, space, value):
    blocks = space[0]
    page_call(http_client, blocks, "_take_example", [], event={"name": "shape.png"})
    index = next(i for i, each in blocks.fns.items() if getattr(each.fn, "__name__", None) == "_point")
    body = {"data": [], "fn_index": index, "session_hash": "visitor", "event_data": {"index": value}}
    answer = post(http_client, "/run/predict", body)
    assert answer.json()["error"] == "place: two numbers are needed, x and y in pixels."


def test_unknown_checkpoint_to_compare_with_is_refused(http_client, space):
    kind, said = page_call(http_client, space[0], "_choose_other", ["../secret"])
    assert kind == "error" and said == "checkpoint: this must be one of a-copy."


def test_visitors_without_a_session_do_not_share_one(http_client, space):
    kind, said = page_call(http_client, space[0], "_take_example", [], session="", event={"name": "shape.png"})
    assert kind == "error" and said.startswith("session_hash: ")


# ---- links ----


def link_of(content):
    packed = zlib.compress(content if isinstance(content, bytes) else json.dumps(content).encode())
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def content_with(**changes):
    return {"v": 1, "example": "shape.png", "questions": [], "modes": {}, "edits": {}} | changes


WORD = {"box": [0, 0, 1, 1], "text": "a"}
STROKE = {"value": True, "width": 1, "points": []}


@pytest.mark.parametrize(
    "content, named",
    [
        (b"[" * 100_000, "link is damaged"),
        (b'{"questions": ' + b"[" * 700 + b"]" * 700 + b', "modes": {}, "edits": {}}', "link is damaged"),
        ([], "link is damaged"),
        (content_with(questions="why"), "questions"),
        (content_with(questions=[5]), "question in this link: a text is needed, not a number"),
        (content_with(questions=[{"a": 1}]), "question in this link: a text is needed, not an object"),
        (content_with(questions=["\ud800"]), "question in this link: U+D800"),
        (content_with(questions=["x" * 400]), "question in this link: this is too long"),
        (content_with(example=5), "example in this link"),
        (content_with(example="../shape.png"), "example: "),
        (content_with(example=None, image=5), "its image"),
        (content_with(modes=5), "modes"),
        (content_with(edits=[]), "edits"),
        (content_with(edits={"ocr": {"boxes": [WORD | {"text": 5}]}}), "word: a text is needed, not a number"),
        (content_with(edits={"ocr": {"boxes": [WORD | {"text": "\udc00"}]}}), "word: U+DC00"),
        (content_with(edits={"ocr": {"boxes": [WORD | {"box": ["0", 0, 1, 1]}]}}), "edit: this change to ocr"),
        (
            content_with(edits={"edge": {"strokes": [{"value": True, "width": 1, "points": []}]}}),
            "edit: this change to",
        ),
    ],
    ids=range(17),
)
def test_damaged_part_of_a_link_is_named(http_client, space, content, named):
    kind, said = page_call(http_client, space[0], "_open_link", [link_of(content)])
    assert kind == "error" and named in said


# ---- markup ----

MARKUP = "<img src=x> <b>b</b>"


def test_messages_show_markup_as_text(http_client, space):
    _, said = call(http_client, "ask", {"path": upload(http_client)}, QUESTION, [MARKUP])
    assert "<" not in said["error"] and "&lt;img src=x&gt;" in said["error"]
    page_call(http_client, space[0], "_take_example", [], event={"name": "shape.png"})
    _, said = page_call(http_client, space[0], "_rank", [f"{MARKUP * 4}, b", QUESTION])
    assert "<" not in said and "&lt;img src=x&gt;" in said


def test_chat_shows_markup_as_text(http_client, space):
    content = content_with(questions=["<img src=x>?"], modes={"ocr": "edited"}, edits={"ocr": {"boxes": [WORD]}})
    content["edits"]["ocr"]["boxes"][0]["text"] = "<img src=x>"
    kind, shown = page_call(http_client, space[0], "_open_link", [link_of(content)])
    assert kind == "complete"
    assert "<img src=x>" not in shown and "&lt;img src=x&gt;?" in shown
