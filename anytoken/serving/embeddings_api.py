"""Embeddings in OpenAI's form, for any modality.

    client.embeddings.create(model="mini", input=["a fox", "an owl"], dimensions=64)

An input may also be a list of content parts, such as [{"type": "image_url", "image_url": {"url": "data:..."}}].
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from anytoken.serving.content import read_part
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
    inputs = _inputs(body.input)

    def run() -> tuple[np.ndarray, int]:
        ids = [_ids(one, number, service) for number, one in enumerate(inputs)]
        found = service.model.embed_ids(ids, width=body.dimensions, untrained=body.untrained)
        return found, sum(map(len, ids))

    try:
        vectors, tokens = await service.worker.call(run)
    except ValueError as error:
        raise BadRequest(str(error), "input") from error
    service.metrics.tokens.labels("in", "all").inc(tokens)
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": n, "embedding": _base64(one) if packed else one.tolist()}
        for n, one in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": body.model, "data": data, "usage": usage}


def _inputs(given: Any) -> list[Any]:
    """The inputs of a request, at least one; BadRequest for none or too many."""
    single = isinstance(given, str) or (bool(given) and all(type(one) is int for one in given))
    inputs = [given] if single else list(given)
    if not inputs:
        raise BadRequest("input is empty: send a string, or a list of inputs.", "input")
    if len(inputs) > MAX_INPUTS:
        raise BadRequest(f"input has {len(inputs)} entries; at most {MAX_INPUTS} are taken.", "input")
    return inputs


def _ids(one: Any, number: int, service: Service) -> list[int]:
    """One input as a prompt's ids; BadRequest says what is wrong with it."""
    where, model = f"input[{number}]", service.model
    if isinstance(one, str):
        return model.encode_prompt(one)
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
        return model.encode_prompt([read_part(part, where, service.settings) for part in one])
    raise BadRequest(f"{where} is no string, list of token ids or list of content parts.", "input")


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
