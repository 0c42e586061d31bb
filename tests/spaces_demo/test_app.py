"""The program names an argument that it cannot use in one line."""

import sys

import pytest


pytest.importorskip("gradio")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "no/such/folder"), "--model no/such/folder cannot be used: .*no/such/folder"),
        (("--model", "prismer-scenes", "no-such-name"), "--model prismer-scenes no-such-name cannot be used"),
        (("--device", "gpu"), "--device gpu cannot be used: .*gpu"),
        (("--port", "99999"), "--port 99999 cannot be used"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch):
    import app

    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises(SystemExit, match=message):
        app.main()
