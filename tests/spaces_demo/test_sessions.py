import numpy as np
import pytest
from PIL import Image


pytest.importorskip("gradio")

from checks import Refused
from links import from_link, to_link
from sessions import Session, Sessions


def test_visitors_do_not_share_sessions():
    sessions = Sessions()
    sessions["a"].source = "mine"
    assert sessions["b"].source is None and sessions["a"].source == "mine"


def test_session_ends_when_its_visitor_leaves_or_is_idle():
    now = [0.0]
    sessions = Sessions(idle=100, clock=lambda: now[0])
    sessions["a"].source, sessions["b"].source = "a", "b"
    sessions.forget("a")
    assert sessions["a"].source is None
    now[0] = 99
    assert sessions["b"].source == "b"
    now[0] = 300
    sessions.sweep()
    assert len(sessions) == 0


def test_too_many_sessions_drop_the_least_recently_used():
    sessions = Sessions(most=2)
    for key in "abac":
        sessions[key].source = key
    assert sessions["a"].source == "a" and sessions["b"].source is None


def test_memory_of_sessions_is_limited():
    sessions = Sessions(most_bytes=10_000_000)
    for key in "abc":
        sessions[key].take(Image.new("RGB", (1000, 1000)))  # 3 MB
        sessions.weigh(key)
    assert sessions["a"].image is not None
    sessions["c"].seen["depth"] = np.zeros((1500, 1500), np.uint8)
    sessions.weigh("c")
    assert sessions["b"].image is None and sessions["a"].image is not None  # b is the least recently used


def test_memory_of_a_session_counts_all_its_data(reader, shape):
    session = make_session(shape, reader)
    small = session.nbytes
    assert small >= 500 * 400 * 3
    session.seen["edge"] = np.zeros((400, 500), np.uint8)
    session.modes["edge"] = "seen"
    session.encoding("seen", reader)
    encoding = next(iter(session.encodings.values()))
    held = encoding.states.nbytes + sum(each.nbytes for each in encoding.sources.values())
    assert session.nbytes >= small + 400 * 500 + held
    session.edits["edge"] = {"strokes": [{"value": 1, "width": 0.1, "points": [[0.1, 0.2]] * 10_000}]}
    assert session.nbytes >= small + 400 * 500 + held + 10_000 * 64


def make_session(shape, reader):
    session = Session(image=shape.resize((500, 400)), seen={"edge": None, "ocr": None})
    session.modes = {"edge": "off", "ocr": "edited"}
    session.edits = {"ocr": {"boxes": [{"box": [0, 0, 0.5, 0.5], "text": "stop"}]}}
    session.turns = [(None, "a square"), ("Is it red?", "no"), ("Is it green?", "yes")]
    return session


def test_link_restores_image_questions_switches_and_edits(reader, shape):
    session = make_session(shape, reader)
    found = from_link(to_link(session), reader)
    assert found["image"].size == (384, 307)
    assert found["questions"] == ["Is it red?", "Is it green?"]
    assert found["modes"] == {"edge": "off", "ocr": "edited"}
    assert found["edits"] == session.edits


def test_link_to_an_example_names_it(reader, shape):
    session = make_session(shape, reader)
    session.source = "shape.png"
    found = from_link(to_link(session), reader)
    assert found["image"] is None and found["example"] == "shape.png"
    assert len(to_link(session)) < 400


@pytest.mark.parametrize("link", ["x", "eJw", "!!!!", "a" * 300_000, "eNqrVgIAAJcAtw"])
def test_damaged_link_is_refused(reader, link):
    with pytest.raises(Refused, match="link"):
        from_link(link, reader)
