"""Loading and unloading LoRA adapters while the server runs, under the paths that vLLM gave these requests.

The routes exist only where the server was started with a folder of adapters and with API keys; an adapter is named by
its path within that folder. It then answers as "model:adapter", and its requests are batched among themselves only.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field

from anytoken.serving.errors import FAILURES, BadRequest, NotFound
from anytoken.serving.schemas import Body
from anytoken.serving.service import service_of

router = APIRouter(prefix="/v1", tags=["adapters"])
NAME = r"^[A-Za-z0-9][\w.-]{0,63}$"


class LoadBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(pattern=NAME)
    lora_path: str = Field(
        min_length=1, description="folder of a PEFT adapter, within the server's adapter folder"
    )


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1)


@router.post("/load_lora_adapter", responses=FAILURES, response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadBody, request: Request) -> Response:
    """Read an adapter; it waits until what runs is answered."""
    service = service_of(request)
    allowed = service.settings.adapter_folder
    assert allowed is not None
    folder = _within(allowed, body.lora_path)
    try:
        await service.change(lambda: service.model.load_adapter(folder, body.lora_name))
    except BadRequest as error:  # clients know the folder by the name that they gave
        raise BadRequest(error.message.replace(str(folder), body.lora_path), "lora_path") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", responses=FAILURES, response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadBody, request: Request) -> Response:
    """Forget an adapter; requests for it that still wait fail."""
    service = service_of(request)
    if body.lora_name not in service.model.adapters.names:
        raise NotFound(f"There is no adapter {body.lora_name!r}.", "lora_name", "adapter_not_found")
    await service.change(lambda: service.model.unload_adapter(body.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _within(folder: Path, path: str) -> Path:
    """A folder below the one that is allowed, links resolved; BadRequest for any other."""
    try:
        found = (folder / path).resolve()
    except (OSError, ValueError):
        found = folder
    root = folder.resolve()
    if root not in found.parents or not found.is_dir():
        raise BadRequest("lora_path is not a folder within the server's adapter folder.", "lora_path")
    return found
