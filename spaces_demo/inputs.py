"""
The one place through which every input of every endpoint passes, before gradio itself looks at it. Gradio opens each
file and fetches each URL that it finds in an input, so that would be too late.
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
MAX_LETTERS = 1000  # of a text whose component sets no limit
FAILED = "That did not work"


class friendly:
    """Turns what goes wrong into a message that a visitor can act on; the rest goes to the log."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Refused):  # gradio shows messages as HTML, and they may cite what was sent
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, print_exception=False, title=FAILED) from None
        if isinstance(error, Exception) and not isinstance(error, gr.Error):
            logger.error("a request failed", exc_info=error)
            raise gr.Error(
                "Something went wrong on our side. Please try again, or with another picture.",
                print_exception=False,
                title=FAILED,
            ) from None


def guarded(function: Callable) -> Callable:
    """The function, or generator, with [`friendly`] messages."""
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
    """`gr.Blocks` that refuse an input that its component does not take, and name it."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        with friendly():
            checked = check_inputs(block_fn.inputs, inputs)
        return await super().preprocess_data(block_fn, checked, *args, **kwargs)


def check_inputs(components: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """
    The values for these components. Of a file only its real path is left.

    Raises:
        Refused: if one is missing, or is not what its component takes.
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
    """What the page's own scripts send with an event, `None` if it is not there."""
    return event._data.get(name) if isinstance(event._data, dict) else None
