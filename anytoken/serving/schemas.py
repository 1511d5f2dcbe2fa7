"""Bodies of requests, as OpenAI's API names them; settings of ours keep the names of `generate`.

What the model cannot do is refused unless it is off, and unknown keys are refused: nothing is ignored silently. Keys
that only label a request (`user`, `metadata`, ...) are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

_LABELS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
_OFF: dict[str, tuple[Any, ...]] = {  # what the model cannot do, and the values that do not ask for it
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}), "logprobs": (None, False),
    "top_logprobs": (None, 0), "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "response_format": (None, {"type": "text"}), "reasoning_effort": (None, "none"), "prediction": (None,),
    "web_search_options": (None,), "verbosity": (None,),
}  # fmt: skip
_MODALITIES = {"audio": "speech"}  # OpenAI's word for it
SEED_LIMIT = 2**63
MAX_KINDS = 64  # parts of a reply
MAX_STOPS, MAX_STOP = 16, 256  # each string and its beginnings are looked for whenever text comes
MIN_TOKENS = 2  # one of text and the end of the turn; clients that only check a model ask for 1
_DATA_URL = {"type": "string", "pattern": "^data:[a-z]+/[a-z0-9]+;base64,[A-Za-z0-9+/]*={0,2}$"}


def _part_schema(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    found = {"type": {"const": kind}, kind: value}
    return {"type": "object", "title": kind, "properties": found, "required": list(found)}


def _object_schema(**fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields)}


AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")
_PART = {
    "anyOf": [
        _part_schema("text", {"type": "string"}),
        _part_schema("image_url", _object_schema(url=_DATA_URL)),
        _part_schema(
            "input_audio",
            _object_schema(data={"type": "string", "format": "byte"}, format={"enum": list(AUDIO_FORMATS)}),
        ),
        _part_schema("video_url", _object_schema(url=_DATA_URL)),
        _part_schema("dna", {"type": "string", "pattern": "^[ACGTN]+$"}),
    ]
}
_INPUT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": _PART},
    ]
}
# `content.read_part` reads them, and its errors name the part; the schemas are for the document.
Part = Annotated[Any, WithJsonSchema(_PART)]
Input = Annotated[Any, WithJsonSchema({"anyOf": [*_INPUT["anyOf"], {"type": "integer"}]})]


class Body(BaseModel):
    """A request body."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_labels(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, off in _OFF.items():
            if key in values and key not in cls.model_fields and values[key] not in off:
                raise ValueError(f"{key} is not supported: leave it out")
        known = {*_LABELS, *_OFF} - set(cls.model_fields)
        return {key: value for key, value in values.items() if key not in known}


class SamplingBody(Body):
    """Settings of `generate` that a request may give."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    cfg_scale: float | None = Field(default=None, ge=0, le=20)
    seed: int | None = Field(default=None, ge=-SEED_LIMIT, lt=SEED_LIMIT)

    def sampling(self) -> dict[str, Any]:
        """As options of `generate`."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cfg_scale")
        seed = None if self.seed is None else self.seed % SEED_LIMIT
        return {**{name: getattr(self, name) for name in names}, "seed": seed}


class StreamOptions(Body):
    """What a stream brings besides its chunks."""

    include_usage: bool = False
    include_obfuscation: bool = False


class AudioFormat(Body):
    """How spoken parts of a reply are encoded."""

    format: Literal["wav", "mp3", "flac", "ogg", "pcm16"] = "wav"
    voice: str | dict[str, Any] | None = None


class Message(BaseModel):
    """One message: a text, or a list of content parts."""

    model_config = ConfigDict(extra="ignore")  # clients return an assistant's message with all of its fields

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    images: list[Part] | None = Field(default=None, description="of a reply that is sent back as history")


class RequestMediaLimits(Body):
    """Limits for each medium of one request, up to those of the server; a larger medium returns status 400."""

    max_bytes: int | None = Field(default=None, ge=1, description="encoded file")
    max_pixels: int | None = Field(default=None, ge=1, description="image or frame of a video")
    max_frames: int | None = Field(default=None, ge=1, description="frames of a video")
    max_seconds: float | None = Field(default=None, gt=0, description="length of speech or video")
    max_letters: int | None = Field(default=None, ge=1, description="characters of a text or DNA sequence")


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    modalities: list[str] | None = Field(
        default=None, max_length=MAX_KINDS, description="kinds of the reply in order; null: the model decides"
    )
    audio: AudioFormat | None = None
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = Field(
        default=None, description=f"up to {MAX_STOPS} strings of up to {MAX_STOP} characters"
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    sizes: dict[str, list[int]] | None = Field(
        default=None, description='grid of a kind in codes, {"image": [8, 8]}'
    )
    media_limits: RequestMediaLimits | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        given = [stop] if isinstance(stop, str) else stop or []
        if len(given) > MAX_STOPS or any(len(one) > MAX_STOP for one in given):
            raise ValueError(f"at most {MAX_STOPS} strings of at most {MAX_STOP} characters")
        return stop

    @property
    def output(self) -> list[str] | None:
        """Kinds of the reply, in our words."""
        if self.modalities is None:
            return None
        return [_MODALITIES.get(kind, kind) for kind in self.modalities]

    @property
    def limit(self) -> int | None:
        """The longest reply, in tokens."""
        limit = self.max_completion_tokens or self.max_tokens
        return None if limit is None else max(limit, MIN_TOKENS)

    @property
    def stops(self) -> list[str]:
        """Strings that end the reply."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [one for one in given if one]


class ImageBody(SamplingBody):
    """POST /v1/images/generations."""

    prompt: str = Field(min_length=1)
    n: int = Field(default=1, ge=1)
    size: str | None = Field(default=None, pattern=r"^(auto|\d{1,4}x\d{1,4})$")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    quality: str | None = None
    background: Literal["auto", "opaque"] | None = None
    style: str | None = None


class SpeechBody(SamplingBody):
    """POST /v1/audio/speech."""

    input: str = Field(min_length=1)
    voice: str | None = None
    response_format: Literal["mp3", "wav", "flac", "ogg", "pcm"] = "mp3"
    speed: float | None = Field(default=None, ge=1, le=1, description="other speeds are not supported")
    stream_format: Literal["audio"] | None = None


class ScoreBody(Body):
    """POST /v1/score: log-likelihoods of answers; messages as for chat completions."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    answers: list[str | list[Part]] = Field(min_length=1, max_length=1000)
    normalize: Literal["none", "tokens", "pmi"] = "none"
    media_limits: RequestMediaLimits | None = None


class EmbeddingsBody(Body):
    """POST /v1/embeddings: strings, token ids, or, beyond OpenAI's, lists of content parts as in messages."""

    model: str
    input: str | list[Input] = Field(
        description="a string, token ids, or a list of inputs: strings, lists of token ids, lists of content parts"
    )
    dimensions: int | None = Field(default=None, ge=1, description="one of the head's widths")
    encoding_format: Literal["float", "base64"] = "float"
    untrained: bool = Field(
        default=False, description="means of hidden states where there is no trained head"
    )
    media_limits: RequestMediaLimits | None = None
