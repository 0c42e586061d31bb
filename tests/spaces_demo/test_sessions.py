import pytest


pytest.importorskip("gradio")

from links import from_link, to_link
from pictures import Refused
from sessions import Session, Sessions


def test_visitors_do_not_see_each_others_sessions():
    sessions = Sessions()
    sessions["a"].source = "mine"
    assert sessions["b"].source is None and sessions["a"].source == "mine"


def test_a_session_is_forgotten_when_its_visitor_leaves_or_rests():
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


def test_of_too_many_sessions_the_longest_unused_is_forgotten():
    sessions = Sessions(most=2)
    for key in "abac":
        sessions[key].source = key
    assert sessions["a"].source == "a" and sessions["b"].source is None


def make_session(shape, reader):
    session = Session(picture=shape.resize((500, 400)), seen={"edge": None, "ocr": None})
    session.modes = {"edge": "off", "ocr": "edited"}
    session.edits = {"ocr": {"boxes": [{"box": [0, 0, 0.5, 0.5], "text": "stop"}]}}
    session.turns = [("vqa", "Is it red?", "no"), ("vqa", "Is it green?", "yes")]
    return session


def test_a_link_restores_picture_questions_switches_and_edits(reader, shape):
    session = make_session(shape, reader)
    found = from_link(to_link(session), reader)
    assert found["picture"].size == (384, 307)
    assert found["questions"] == ["Is it red?", "Is it green?"]
    assert found["modes"] == {"edge": "off", "ocr": "edited"}
    assert found["edits"] == session.edits


def test_a_link_to_an_example_names_it(reader, shape):
    session = make_session(shape, reader)
    session.source = "shape.png"
    found = from_link(to_link(session), reader)
    assert found["picture"] is None and found["example"] == "shape.png"
    assert len(to_link(session)) < 400


@pytest.mark.parametrize("link", ["x", "eJw", "!!!!", "a" * 300_000, "eNqrVgIAAJcAtw"])
def test_a_damaged_link_is_refused(reader, link):
    with pytest.raises(Refused, match="link"):
        from_link(link, reader)
