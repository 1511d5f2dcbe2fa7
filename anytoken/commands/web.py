"""`anytoken web`: a web page to chat with a model, inspect its tokens and watch a training run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from anytoken.commands.options import Adapter, AllowOpen, ApiKeys, Device, Host, ModelArgument, examples, load

app = typer.Typer()


@app.command(epilog=examples("anytoken web mini", "anytoken web mini --run runs"))
def web(
    model: ModelArgument = "mini",
    run: Annotated[
        Path | None, typer.Option(help="Output folder of a training run to watch, or a folder of several.")
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one from 7860 up.")
    ] = 0,
    api_keys: ApiKeys = None,
    allow_open: AllowOpen = False,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Open a chat page in the browser, with text, images, speech, video and DNA as input and output.

    With API keys, visitors log in with any user name and a key as the password.
    """
    if not find_spec("gradio"):
        raise typer.BadParameter("web needs gradio: pip install 'anytoken[web]'.")
    from anytoken.serving.settings import ServerSettings, check_exposure, read_keys

    keys = read_keys(api_keys)
    check_exposure(host, keys, allow_open)
    from anytoken.serving.web.page import build_page, launch

    opened = load(model, device, adapter)
    with TemporaryDirectory(prefix="anytoken-web-") as files:
        page = build_page(opened, Path(model).name, Path(files), run)
        print(launch(page, Path(files), host, port, ServerSettings(api_keys=keys)), flush=True)
        page.block_thread()
