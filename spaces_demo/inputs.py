"""
Checks every input of every endpoint before gradio reads it. gradio opens each file and fetches each URL that it finds
in an input, so a later check would come too late.
"""

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
from checks import Refused, as_text, kind_of
from uploads import find_upload


logger = logging.getLogger(__name__)
MAX_LETTERS = 1000  # limit for a text whose component sets none
FAILED = "That did not work"


class friendly:
    """Turns errors into messages that help a visitor. Unexpected errors go to the log."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Refused):  # gradio shows messages as HTML, and they may quote the input
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, print_exception=False, title=FAILED) from None
        if isinstance(error, Exception) and not isinstance(error, gr.Error):
            logger.error("a request failed", exc_info=error)
            raise gr.Error(
                "Something went wrong on the server. Please try again, or use another image.",
                print_exception=False,
                title=FAILED,
            ) from None


def guarded(function: Callable) -> Callable:
    """Wraps a function or generator with [`friendly`]."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def guarded_steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with friendly():
                yield from function(*args, **kwargs)

        return guarded_steps

    @functools.wraps(function)
    def guarded_call(*args: Any, **kwargs: Any) -> Any:
        with friendly():
            return function(*args, **kwargs)

    return guarded_call


class CheckedBlocks(gr.Blocks):
    """`gr.Blocks` that check every input and name a wrong one."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        with friendly():
            checked = check_inputs(block_fn.inputs, inputs)
        return await super().preprocess_data(block_fn, checked, *args, **kwargs)


def check_inputs(components: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """
    Returns the checked values of these components. A file is reduced to its real path.

    Raises:
        Refused: if a value is missing, or if its component does not accept it.
    """
    names = [component.label for component in components]
    if len(values) < len(names):
        raise Refused(
            f"{', '.join(names[len(values) :])}: missing. All inputs are needed, in order: {', '.join(names)}."
        )
    return [None if value is None else check_input(each, value) for each, value in zip(components, values)]


def check_input(component: Any, value: Any) -> Any:
    name = component.label
    if isinstance(component, gr.Image):
        if not isinstance(value, dict):
            raise Refused(f"{name}: an uploaded file is needed, not {kind_of(value)}.")
        return {"path": find_upload(value.get("path"), name), "meta": {"_type": "gradio.FileData"}}
    if isinstance(component, gr.CheckboxGroup):
        if not isinstance(value, list):
            raise Refused(f"{name}: a list of texts is needed, not {kind_of(value)}.")
        return [as_text(each, name, MAX_LETTERS) for each in value]
    return as_text(value, name, getattr(component, "max_length", None) or MAX_LETTERS)


def event_value(event: gr.EventData, name: str) -> Any:
    """Returns a value that the page's scripts send with an event, or `None` if it is missing."""
    return event._data.get(name) if isinstance(event._data, dict) else None
