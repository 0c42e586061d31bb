"""The command line: `prismer ask`, `caption`, `classify`, `experts`, `label`, `convert`, `check` and others."""

import sys
from typing import Annotated

import typer

from .command_line import answers, checks, conversion, experts, serve, worth


app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from modeling_prismer import __version__

        print(f"prismer {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prismer: captions images, answers questions about them and classifies them, with frozen experts."""


for module in (answers, experts, worth, serve, conversion, checks):
    app.add_typer(module.commands)


if __name__ == "__main__":
    sys.exit(app())
