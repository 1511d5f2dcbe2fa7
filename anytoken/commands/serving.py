"""`anytoken serve`: the model behind HTTP."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from anytoken.commands.options import AllowOpen, ApiKeys, Device, Host, ModelArgument, examples, load

app = typer.Typer()


@app.command(
    epilog=examples(
        "anytoken serve mini --port 8000",
        "anytoken serve runs/4_instruct --host 0.0.0.0 --api-keys keys.txt --set max_waiting=16",
    )
)
def serve(
    model: ModelArgument = "mini",
    host: Host = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Model name for clients; by default that of the folder.")
    ] = None,
    api_keys: ApiKeys = None,
    allow_open: AllowOpen = False,
    limits: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a server setting: --set max_waiting=16."),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Maximum pixels of an image or frame.")
    ] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Maximum seconds of speech or video.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Maximum frames of a video.")] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Allowed CORS origin; repeatable.")] = None,
    device: Device = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="A PEFT adapter: served as MODEL:NAME, or merged into the model if no name is given.",
        ),
    ] = None,
    adapter_folder: Annotated[
        Path | None, typer.Option(help="Folder from which clients with an API key may load adapters.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Generate tokens with an external engine such as vLLM: http://host:8001/v1."
        ),
    ] = None,
    engine_model: Annotated[
        str | None, typer.Option(help="Model name at the engine; by default MODEL.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "info",
) -> None:
    """Serve a model through an OpenAI-compatible API, documented at http://127.0.0.1:8000/docs.

    With --engine, this process loads no language model. It encodes media to ids for the engine and decodes the ids it
    returns. The environment variable ANYTOKEN_ENGINE_KEY holds the engine's API key.

    SIGTERM stops the server after the running requests are answered.
    """
    missing = [
        name
        for name in ("fastapi", "uvicorn", "prometheus_client", "multipart", "websockets")
        if not find_spec(name)
    ]
    if missing:
        raise typer.BadParameter(f"serve needs {', '.join(missing)}: pip install 'anytoken[serve]'.")
    from anytoken.serving.server import Address, run, settings_from
    from anytoken.serving.settings import check_adapter_folder, check_exposure, read_keys

    keys = read_keys(api_keys)
    check_exposure(host, keys, allow_open)
    check_adapter_folder(adapter_folder, keys)
    media = {"max_pixels": max_pixels, "max_seconds": max_seconds, "max_frames": max_frames}
    changes = [*(limits or []), *(f"{key}={value}" for key, value in media.items() if value is not None)]
    settings = settings_from(changes, keys, tuple(cors or ()), adapter_folder)
    named = [tuple(one.split("=", 1)) for one in adapter or [] if "=" in one]
    merged = [one for one in adapter or [] if "=" not in one]
    if len(merged) > 1:
        raise typer.BadParameter(
            "only one adapter is merged in; give the others names: --adapter NAME=FOLDER."
        )
    if engine is not None:
        if adapter or adapter_folder:
            raise typer.BadParameter("with --engine, adapters are the engine's: leave out --adapter.")
        if "max_prefill_tokens" in settings.model_fields_set:
            raise typer.BadParameter(
                "with --engine, the engine reads the prompts: leave out max_prefill_tokens."
            )
        from anytoken.serving.remote import RemoteWorker, open_remote

        remote = open_remote(model)
        key = os.environ.get("ANYTOKEN_ENGINE_KEY")
        rows = settings.max_rows, settings.max_waiting
        worker = RemoteWorker(remote, engine, engine_model or model, *rows, key)
        run(remote, name or Path(model).name, settings, Address(host, port), log_level, worker)
        return
    opened = load(model, device, Path(merged[0]) if merged else None)
    for adapter_name, folder in named:
        opened.load_adapter(folder, adapter_name)
    run(opened, name or Path(model).name, settings, Address(host, port), log_level)
