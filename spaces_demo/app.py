"""
The Gradio Space: arguments, theme and start.

    python spaces_demo/app.py
    python spaces_demo/app.py --model prismer-easy-vqa --port 7861
    python spaces_demo/app.py --model prismer-scenes my_prismer_lm --language SmolLM2-135M-Instruct
"""

import argparse
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path


# Set before gradio starts: no analytics are sent, and gradio keeps statistics of one call instead of 10,000.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")

import gradio as gr  # noqa: E402
import hardware  # noqa: E402, F401  before torch
from endpoints import Endpoints  # noqa: E402
from guard import Guard  # noqa: E402
from images import MAX_BYTES  # noqa: E402
from inputs import CheckedBlocks  # noqa: E402
from page import Page  # noqa: E402
from readers import Readers  # noqa: E402
from sessions import MAX_SESSIONS, Sessions  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from suggestions import Examples  # noqa: E402
from uploads import UPLOADS, sweep  # noqa: E402
from waiting import Unread, queued_files  # noqa: E402


logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
QUEUE = 64
TIDY_SECONDS = 30.0


def make_app(
    models: Sequence[str] = (), device: str | None = None, language: str | None = None
) -> tuple[gr.Blocks, Sessions]:
    """Returns the app, not yet launched, and its sessions. The arguments are those of [`Readers`]."""
    readers = Readers(models, device, language)
    readers.main.warm_up()
    sessions = Sessions()
    study = next(
        (place for place in (HERE / "study", HERE.parent / "docs" / "study") if place.is_dir()), HERE / "study"
    )
    with CheckedBlocks(title="Prismer: see through the experts", analytics_enabled=False) as blocks:
        Page(readers, sessions, Examples.load(HERE / "examples", readers.main.name), study).build()
        Endpoints(readers.main).build()
    # One run at a time, because two would share the cores and each take twice as long. `api_open` would let calls
    # bypass the queue.
    blocks.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)
    return blocks, sessions


def make_theme() -> gr.themes.Base:
    """A theme with the fonts of the visitor's system and a blue with enough contrast."""
    shades = ("#e6f4f7", "#c5e6ec", "#99d3de", "#5fb8c9", "#2c98ad", "#0b7285", "#0a6678", "#095868", "#084857")
    blue = gr.themes.Color(*shades, "#063641", "#04262e", name="prismer")
    theme = gr.themes.Default(
        primary_hue=blue,
        neutral_hue="gray",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        text_size="md",
    )
    return theme.set(
        button_primary_background_fill="*primary_500",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        body_text_color_subdued="#555c66",
        body_text_color_subdued_dark="#b0b7c1",
        block_info_text_color="#555c66",
        block_info_text_color_dark="#b0b7c1",
        block_label_text_color="#424851",
        block_label_text_color_dark="#d3d8de",
        block_title_text_color="#30353c",
        block_title_text_color_dark="#e2e5e9",
        input_placeholder_color="#636a74",
        input_placeholder_color_dark="#a3abb6",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_300",
    )


def tidy(blocks: gr.Blocks, sessions: Sessions, unread: Unread) -> None:
    """Deletes unused sessions, uploads that nobody needs, and answers that nobody fetches."""
    sessions.sweep()
    sweep(UPLOADS, spare=sessions.uploads() | queued_files(blocks))
    unread.sweep()
    for names in blocks.temp_file_sets:  # they name all files since the start; only gradio's `delete_cache` reads them
        names.clear()


def launch(blocks: gr.Blocks, sessions: Sessions, host: str, port: int | None, **kwargs: object) -> None:
    unread = Unread(blocks)

    def tidy_forever() -> None:
        while True:
            time.sleep(TIDY_SECONDS)
            try:
                tidy(blocks, sessions, unread)
            except Exception:  # go on: without this thread the disk fills
                logger.exception("tidying failed")

    threading.Thread(target=tidy_forever, daemon=True).start()
    blocks.launch(
        app_kwargs={"middleware": [Middleware(Guard, blocks=blocks)]},
        run_history=False,  # the run history sends inputs and answers to a bucket that the caller names
        state_session_capacity=MAX_SESSIONS,
        # a script in the head runs before gradio builds the page; the argument `js` runs after it
        head=f"<script>{(HERE / 'names.js').read_text(encoding='utf-8')}</script>",
        server_name=host,
        server_port=port,
        max_file_size=MAX_BYTES,
        show_error=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        theme=make_theme(),
        css_paths=HERE / "style.css",
        **kwargs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The Gradio Space of Prismer.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        help="the checkpoint: a shipped name such as prismer-easy-vqa, a folder or a Hub id, of a Prismer or a "
        "PrismerLM. Further ones can be compared with it. By default the shipped ones, prismer-scenes first",
    )
    parser.add_argument("--language", help="the frozen language model of a PrismerLM: a folder or a Hub id")
    parser.add_argument("--device", help="cpu, cuda, …; by default a GPU, if there is one")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    args = parser.parse_args()
    try:
        blocks, sessions = make_app(args.model, args.device, args.language)
    except (OSError, ValueError, RuntimeError) as error:
        given = {"model": " ".join(args.model), "device": args.device, "language": args.language}
        named = " ".join(f"--{name} {value}" for name, value in given.items() if value)
        raise SystemExit(f"{named or 'the checkpoint'} cannot be used: {error}") from error
    try:
        launch(blocks, sessions, args.host, args.port)
    except (OSError, OverflowError) as error:
        raise SystemExit(f"--host {args.host} --port {args.port} cannot be used: {error}") from error


if __name__ == "__main__":
    main()
