"""Endpoints for one kind of output: images, speech, transcriptions."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from PIL import ImageOps
from PIL.Image import Resampling

from anytoken.segments import Image, Speech, Text
from anytoken.serving.chat_api import usage
from anytoken.serving.content import AUDIO_TYPES, audio_bytes, checked_limits, png
from anytoken.serving.errors import FAILURES, BadRequest, media_error
from anytoken.serving.schemas import ImageBody, Message, RequestMediaLimits, SamplingBody, SpeechBody
from anytoken.serving.service import Service, service_of
from anytoken.tokenizers.base import CodeGrid
from anytoken.tokenizers.image import PATCH_PX
from anytoken.utils.limits import media_limits

router = APIRouter(prefix="/v1", tags=["media"])
MAX_SIDE = 2048  # pixels of an image that is scaled for a client
TRANSCRIPTION_FIELDS = {
    "file", "model", "response_format", "prompt", "language", "temperature", "media_limits[max_seconds]", "stream",
    "timestamp_granularities[]", "timestamp_granularities", "chunking_strategy", "user",
}  # fmt: skip


@router.post("/images/generations", responses=FAILURES)
async def images(body: ImageBody, request: Request) -> dict[str, Any]:
    """Images for a prompt, as base64 PNG (or, with response_format "url", as data URLs).

    A `size` that the tokenizer does not make is scaled from the size that the model chooses.
    """
    service = service_of(request)
    service.check_model(body.model)
    _check_kind(service, "image")
    prompt = await service.encode([Message(role="user", content=body.prompt)])
    pixels = _pixels(body.size)
    sizes = _grid(service, pixels)
    pending = await service.submit(body, prompt, ["image"], body.n, sizes=sizes)
    replies = await service.replies(pending, request)
    scaled = pixels if sizes is None else None
    encoded = await asyncio.to_thread(lambda: [png(_scaled(reply.images[0], scaled)) for reply in replies])
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


def _pixels(size: str | None) -> tuple[int, int] | None:
    """Width and height of a size such as "512x512", None if the model decides; BadRequest for one out of range."""
    if size in (None, "auto"):
        return None
    assert size is not None
    width, height = map(int, size.split("x"))
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise BadRequest(f"size is from 1 to {MAX_SIDE} pixels per side; received {size!r}.", "size")
    return width, height


def _grid(service: Service, pixels: tuple[int, int] | None) -> dict[str, tuple[int, ...]] | None:
    """The grid of codes that makes an image of just this width and height, None if there is none."""
    tokenizer = service.model.processor.tokenizers["image"]
    if pixels is None:
        return None
    assert isinstance(tokenizer.shape, CodeGrid)
    # Pretrained codecs have their own; (rows, columns) of layered ones.
    patch = getattr(tokenizer, "patch", PATCH_PX)
    patch = patch if isinstance(patch, int) else patch[-1]
    width, height = pixels
    grid = (height // patch, width // patch)
    limits = zip(grid, tokenizer.shape.min_size, tokenizer.shape.max_size, strict=True)
    whole = not (width % patch or height % patch)
    return {"image": grid} if whole and all(low <= n <= high for n, low, high in limits) else None


def _scaled(image: Image, pixels: tuple[int, int] | None) -> Image:
    """The image at another width and height: scaled, with its corner's color around it where the shape differs."""
    if pixels is None:
        return image
    corner = tuple(image.pixels[0, 0].tolist())
    return Image.open(ImageOps.pad(image.to_pil(), pixels, Resampling.BICUBIC, corner))


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
    max_seconds: Annotated[float | None, Form(alias="media_limits[max_seconds]", gt=0)] = None,
    stream: Annotated[bool, Form()] = False,
) -> Response:
    """What a recording says, as text. `language` is a hint that the model does not need; there are no time stamps."""
    service = service_of(request)
    service.check_model(model)
    if unknown := sorted(set(await request.form()) - TRANSCRIPTION_FIELDS):
        raise BadRequest(f"Unknown parameter {unknown[0]!r:.80}.", unknown[0][:80], "unknown_parameter")
    if stream:
        raise BadRequest("stream is not supported: leave it out.", "stream")
    data, allowed = await file.read(), service.settings.media_limits
    own = checked_limits(RequestMediaLimits(max_seconds=max_seconds), service.settings)

    def read() -> tuple[list[int], float]:
        with media_limits(allowed, **own):
            clip = Speech.open(data)
        parts = [clip] if not prompt else [Text(prompt), clip]
        return service.model.encode_prompt([{"role": "user", "content": parts}]), clip.seconds

    try:
        ids, seconds = await asyncio.to_thread(read)
    except ValueError as error:
        raise media_error("file", error, allowed) from error
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
