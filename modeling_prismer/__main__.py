"""`python -m modeling_prismer` is the command `prismer`."""

from .cli import app


if __name__ == "__main__":
    app(prog_name="prismer")
