"""`prismer serve`: a server with the chat completions of OpenAI's API."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import DeviceOption, DtypeOption, ExpertsOption, LanguageOption, ModelOption, find_device, start
from .console import Command, err


commands = typer.Typer()


@commands.command(cls=Command)
def serve(
    model: ModelOption = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests.", show_default="the last part of --model")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Most requests that are answered at once.")] = 16,
    experts: ExpertsOption = None,
    language: LanguageOption = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch images from public http(s) URLs, not only data: URIs.")
    ] = False,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MB.")] = 20,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """
    Answers requests in the format of OpenAI's chat completions over HTTP.

    Requests of one moment run as one batch. The server has no passwords: put a proxy in front of it on a network.
    """
    start(model, device)
    try:
        import uvicorn

        from modeling_prismer.serving import Batcher, build_app
    except ImportError as error:
        raise ImportError(
            f"prismer serve needs fastapi and uvicorn ({error}): pip install 'modeling-prismer[serve]'"
        ) from error
    from .checkpoints import Checkpoint

    reader = Checkpoint(model, find_device(device), dtype, experts, language).load()
    batcher = Batcher(reader.network, reader.processor, batch_size, experts=reader.experts_of_calls)
    batcher.warm_up()
    name = name or Path(reader.checkpoint.name).name
    app = build_app(batcher, name, allow_urls, max_body_mb * 1_000_000)
    err.print(f"{name} on http://{host}:{port}/v1", soft_wrap=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=256)
