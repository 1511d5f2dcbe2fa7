"""Endpoints for one kind of output: images, speech, transcriptions."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from anytoken.segments import Speech, Text
from anytoken.serving.chat_api import usage
from anytoken.serving.content import AUDIO_TYPES, audio_bytes, png
from anytoken.serving.errors import FAILURES, BadRequest, media_error
from anytoken.serving.schemas import ImageBody, Message, SamplingBody, SpeechBody
from anytoken.serving.service import Service, service_of
from anytoken.tokenizers.base import CodeGrid
from anytoken.tokenizers.image import PATCH_PX
from anytoken.utils.limits import media_limits

router = APIRouter(prefix="/v1", tags=["media"])


@router.post("/images/generations", responses=FAILURES)
async def images(body: ImageBody, request: Request) -> dict[str, Any]:
    """Images for a prompt, as base64 PNG (or, with response_format "url", as data URLs)."""
    service = service_of(request)
    service.check_model(body.model)
    _check_kind(service, "image")
    prompt = await service.encode([Message(role="user", content=body.prompt)])
    sizes = _grid(service, body.size)
    pending = await service.submit(body, prompt, ["image"], body.n, sizes=sizes)
    replies = await service.replies(pending, request)
    encoded = await asyncio.to_thread(lambda: [png(reply.images[0]) for reply in replies])
    if body.response_format == "url":
        data = [{"url": f"data:image/png;base64,{one}"} for one in encoded]
    else:
        data = [{"b64_json": one} for one in encoded]
    counts = usage(len(prompt), replies)
    tokens = {
        "input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"],
        "total_tokens": counts["total_tokens"],
        "input_tokens_details": {"text_tokens": counts["prompt_tokens"], "image_tokens": 0},
    }  # fmt: skip
    return {"created": int(time.time()), "data": data, "usage": tokens}


def _grid(service: Service, size: str | None) -> dict[str, tuple[int, ...]] | None:
    """The grid of codes for a size in pixels; BadRequest for one that the tokenizer does not make."""
    if size in (None, "auto"):
        return None
    assert size is not None
    tokenizer = service.model.processor.tokenizers["image"]
    assert isinstance(tokenizer.shape, CodeGrid)
    patch = getattr(tokenizer, "patch", PATCH_PX)  # pretrained codecs have their own
    width, height = map(int, size.split("x"))
    grid = (height // patch, width // patch)
    limits = zip(grid, tokenizer.shape.min_size, tokenizer.shape.max_size, strict=True)
    if width % patch or height % patch or not all(low <= n <= high for n, low, high in limits):
        most = " x ".join(str(n * patch) for n in tokenizer.shape.max_size)
        raise BadRequest(
            f"size is a multiple of {patch} pixels per side, at most {most}; received {size!r}.", "size"
        )
    return {"image": grid}


@router.post("/audio/speech", responses=FAILURES)
async def speech(body: SpeechBody, request: Request) -> Response:
    """Speak a text: the audio file itself. `voice` is one that the model knows, or anything for the model's choice."""
    service = service_of(request)
    service.check_model(body.model)
    _check_kind(service, "speech")
    known = body.voice in service.settings.voices
    text = f"{body.input}, voice {body.voice}" if known else body.input
    prompt = await service.encode([Message(role="user", content=text)])
    pending = await service.submit(body, prompt, ["speech"])
    (reply,) = await service.replies(pending, request)
    data = await asyncio.to_thread(audio_bytes, reply.speech[0], body.response_format)
    return Response(data, media_type=AUDIO_TYPES[body.response_format])


@router.post("/audio/transcriptions", responses=FAILURES)
async def transcriptions(
    request: Request,
    file: Annotated[UploadFile, File()],
    model: Annotated[str, Form()],
    response_format: Annotated[Literal["json", "text", "verbose_json"], Form()] = "json",
    prompt: Annotated[str | None, Form()] = None,
    language: Annotated[str | None, Form()] = None,
    temperature: Annotated[float | None, Form(ge=0, le=2)] = None,
) -> Response:
    """What a recording says, as text. `language` is a hint that the model does not need."""
    service = service_of(request)
    service.check_model(model)
    data = await file.read()

    def read() -> tuple[list[int], float]:
        with media_limits(service.settings.media_limits):
            clip = Speech.open(data)
        parts = [clip] if not prompt else [Text(prompt), clip]
        return service.model.encode_prompt([{"role": "user", "content": parts}]), clip.seconds

    try:
        ids, seconds = await asyncio.to_thread(read)
    except ValueError as error:
        raise media_error("file", error) from error
    body = SamplingBody(model=model, temperature=temperature)
    (reply,) = await service.replies(await service.submit(body, ids, ["text"]), request)
    if response_format == "text":
        return PlainTextResponse(reply.text + "\n")
    counts = usage(len(ids), [reply])
    found: dict[str, Any] = {"text": reply.text}
    if response_format == "json":
        found["usage"] = {
            "type": "tokens", "input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"],
            "total_tokens": counts["total_tokens"],
        }  # fmt: skip
    else:
        found |= {
            "task": "transcribe",
            "language": language or "unknown",
            "duration": seconds,
            "segments": [],
        }
    return JSONResponse(found)


def _check_kind(service: Service, kind: str) -> None:
    if kind not in service.model.kinds:
        raise BadRequest(f"This model makes no {kind}; it has {', '.join(service.model.kinds)}.")
