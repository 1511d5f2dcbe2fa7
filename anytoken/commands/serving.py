"""`anytoken serve`: the model behind HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from anytoken.commands.options import Adapter, Device, ModelArgument, examples, load

app = typer.Typer()


@app.command(
    epilog=examples(
        "anytoken serve mini --port 8000",
        "anytoken serve runs/4_instruct --host 0.0.0.0 --api-keys keys.txt --set max_waiting=16",
    )
)
def serve(
    model: ModelArgument = "mini",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name that clients ask for; by default the model's.")
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File with one API key per line; by default the variable ANYTOKEN_API_KEYS."),
    ] = None,
    allow_open: Annotated[
        bool, typer.Option("--allow-open", help="Listen on other addresses without an API key.")
    ] = False,
    limits: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a limit: --set max_waiting=16."),
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Pixels of an image or frame.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds of speech or video.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origin of pages that may call the server.")] = None,
    device: Device = "auto",
    adapter: Adapter = None,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "info",
) -> None:
    """Serve a model through OpenAI's API; http://127.0.0.1:8000/docs lists it.

    SIGTERM stops it after the running requests are answered.
    """
    missing = [
        name for name in ("fastapi", "uvicorn", "prometheus_client", "multipart") if not find_spec(name)
    ]
    if missing:
        raise typer.BadParameter(f"serve needs {', '.join(missing)}: pip install 'anytoken[serve]'.")
    from anytoken.serving.server import Address, run, settings_from
    from anytoken.serving.settings import check_exposure, read_keys

    keys = read_keys(api_keys)
    check_exposure(host, keys, allow_open)
    media = {"max_pixels": max_pixels, "max_seconds": max_seconds, "max_frames": max_frames}
    changes = [*(limits or []), *(f"{key}={value}" for key, value in media.items() if value is not None)]
    settings = settings_from(changes, keys, tuple(cors or ()))
    opened = load(model, device, adapter)
    run(opened, name or Path(model).name, settings, Address(host, port), log_level)
