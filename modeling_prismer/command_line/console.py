"""Prints results, warnings and errors in the terminal."""

import re
from collections.abc import Sequence
from typing import Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from typer.core import TyperCommand


# what users and files contain is never read as markup
out = Console(markup=False, highlight=False, emoji=False)
err = Console(stderr=True, markup=False, highlight=False, emoji=False)


class Command(TyperCommand):
    """A command that prints errors caused by bad input as one line, and exits with code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of the output has gone
            raise
        except (ValueError, OSError, ImportError, StrictDataclassError) as error:
            raise failed(in_options(str(error), self.params)) from error
        except RuntimeError as error:
            from modeling_prismer.processing.experts import ExpertError

            if type(error).__name__ == "OutOfMemoryError":
                raise failed(f"{first_line(error)}. A smaller --batch-size or --dtype bfloat16 needs less") from error
            if not isinstance(error, ExpertError):
                raise
            raise failed(in_options(str(error), self.params)) from error


def failed(message: str) -> typer.Exit:
    err.print(f"error: {printable(message)}", style="bold red", soft_wrap=True)
    return typer.Exit(1)


def warn(message: str) -> None:
    err.print(f"warning: {printable(message)}", style="yellow", soft_wrap=True)


def in_options(message: str, params: Sequence[Any]) -> str:
    """A message of the library in the words of a command line: `overwrite=True` becomes `--overwrite`."""
    for param in params:
        option = next((name for name in param.opts if name.startswith("--")), None)
        if option is None or param.name is None:
            continue
        # a name with an underscore is no ordinary word; one that is part of a path or quoted is the user's
        value = "(=True)?" if "_" in param.name else "=True"
        message = re.sub(rf"(?<![\w./'\"-]){param.name}{value}(?![\w./'\"=-])", option, message)
    return message


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: str) -> str:
    """The text without control characters, which could change what a terminal shows."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
