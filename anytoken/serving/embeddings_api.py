"""Embeddings in OpenAI's form, for any modality.

    client.embeddings.create(model="mini", input=["a fox", "an owl"], dimensions=64)

An input may also be a list of content parts, such as [{"type": "image_url", "image_url": {"url": "data:..."}}].
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from anytoken.inference.api import AnyToken
from anytoken.inference.score import PART, Steps
from anytoken.serving.content import Limits, checked_limits, read_part
from anytoken.serving.errors import FAILURES, BadRequest
from anytoken.serving.schemas import EmbeddingsBody
from anytoken.serving.service import Service, service_of

router = APIRouter(prefix="/v1", tags=["embeddings"])
MAX_INPUTS = 2048  # OpenAI's limit


@router.post("/embeddings", responses=FAILURES)
async def embeddings(body: EmbeddingsBody, request: Request) -> dict[str, Any]:
    """A unit vector for each input: floats, or base64 of little-endian float32 numbers."""
    service = service_of(request)
    service.check_model(body.model)
    inputs, own = _inputs(body.input), checked_limits(body.media_limits, service.settings)

    def read() -> list[list[int]]:
        return [_ids(one, number, service, own) for number, one in enumerate(inputs)]

    try:
        ids = await asyncio.to_thread(read)
    except ValueError as error:
        raise BadRequest(str(error), "input") from error
    vectors = await service.run(_steps(service.model, ids, body), body.model, request)
    tokens = sum(map(len, ids))
    service.metrics.tokens.labels("in", "all").inc(tokens)
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": n, "embedding": _base64(one) if packed else one.tolist()}
        for n, one in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": body.model, "data": data, "usage": usage}


def _steps(model: AnyToken, ids: Sequence[list[int]], body: EmbeddingsBody) -> Steps[list[np.ndarray]]:
    """The vectors, a part of about PART ids at a time, so that decoding steps of others run between."""
    vectors: list[np.ndarray] = []
    while len(vectors) < len(ids):
        start = stop = len(vectors)
        length = 0
        while stop < len(ids) and (stop == start or length + len(ids[stop]) <= PART):
            length += len(ids[stop])
            stop += 1
        vectors += list(model.embed_ids(ids[start:stop], width=body.dimensions, untrained=body.untrained))
        yield
    return vectors


def _inputs(given: Any) -> list[Any]:
    """The inputs of a request, at least one; BadRequest for none or too many."""
    single = isinstance(given, str) or (bool(given) and all(type(one) is int for one in given))
    inputs = [given] if single else list(given)
    if not inputs:
        raise BadRequest("input is empty: send a string, or a list of inputs.", "input")
    if len(inputs) > MAX_INPUTS:
        raise BadRequest(f"input has {len(inputs)} entries; at most {MAX_INPUTS} are taken.", "input")
    return inputs


def _ids(one: Any, number: int, service: Service, own: Limits) -> list[int]:
    """One input as a prompt's ids; BadRequest says what is wrong with it."""
    where, model = f"input[{number}]", service.model
    if isinstance(one, str):
        return model.encode_prompt([read_part(one, where, service.settings, own)])
    if isinstance(one, list) and one and all(type(token) is int for token in one):
        if not all(0 <= token < model.token_space.text_size for token in one):
            raise BadRequest(
                f"{where}: token ids are of text, from 0 to {model.token_space.text_size - 1}.", "input"
            )
        space = model.token_space
        return [space.bos, space.user, *one, space.end, space.assistant]
    if isinstance(one, list) and one:
        if len(one) > service.settings.max_parts:
            raise BadRequest(f"{where} has more than {service.settings.max_parts} content parts.", "input")
        return model.encode_prompt([read_part(part, where, service.settings, own) for part in one])
    raise BadRequest(f"{where} is not a string, list of token ids or list of content parts.", "input")


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
