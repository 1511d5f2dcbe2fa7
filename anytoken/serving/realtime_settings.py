"""Session settings of OpenAI's Realtime API, in its present form and the one it had in beta, as settings of ours.

    now    {"output_modalities": ["audio"], "audio": {"input": {"turn_detection": null}}, "max_output_tokens": 500}
    beta   {"modalities": ["text", "audio"], "turn_detection": null, "max_response_output_tokens": 500}

What the model cannot do is refused unless it is off, as in the other endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from anytoken.serving.content import PCM_RATE_HZ
from anytoken.serving.errors import BadRequest
from anytoken.serving.schemas import MAX_KINDS
from anytoken.serving.voice_activity import VoiceSettings

_KINDS = {"audio": "speech"}  # OpenAI's word for it
_PCM = ("pcm16", {"type": "audio/pcm", "rate": PCM_RATE_HZ}, {"type": "audio/pcm"})
_OFF: dict[str, tuple[Any, ...]] = {  # what the model cannot do, and the values that do not ask for it
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "prompt": (None,), "input": (None,),
    "conversation": (None, "auto"), "include": (None, []), "transcription": (None,), "noise_reduction": (None,),
    "input_audio_transcription": (None,), "input_audio_noise_reduction": (None,), "speed": (None, 1, 1.0),
    "output_audio_format": (None, *_PCM), "input_audio_format": (None, *_PCM), "format": (None, *_PCM),
    "truncation": (None, "auto", "disabled"), "parallel_tool_calls": (None, True, False),
}  # fmt: skip
_LABELS = ("type", "object", "id", "expires_at", "model", "voice", "metadata", "tracing", "reasoning")


@dataclass(frozen=True)
class RealtimeSettings:
    """How a session answers.

    kinds: of a reply in order, None for the model's choice; voice: None for no turn detection.
    """

    kinds: tuple[str, ...] | None = ("speech",)
    instructions: str = ""
    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    voice: VoiceSettings | None = None
    respond: bool = True  # when somebody has stopped speaking
    interrupt: bool = True  # when somebody starts to speak

    def changed(self, given: Mapping[str, Any]) -> RealtimeSettings:
        """With what a session.update or response.create says; BadRequest for what cannot be."""
        given = _flat(given)
        changes: dict[str, Any] = {}
        for key, value in given.items():
            if key in ("output_modalities", "modalities"):
                changes["kinds"] = _kinds(value)
            elif key == "instructions":
                changes["instructions"] = _checked(key, value or "", str)
            elif key == "temperature":
                changes["temperature"] = None if value is None else float(_checked(key, value, (int, float)))
            elif key == "seed":
                changes["seed"] = value if value is None else _checked(key, value, int)
            elif key in ("max_output_tokens", "max_response_output_tokens"):
                changes["max_tokens"] = None if value in (None, "inf") else _checked(key, value, int)
                if value not in (None, "inf") and value < 1:
                    raise BadRequest(f'{key} is at least 1, or "inf"; received {value}.', f"session.{key}")
            elif key == "turn_detection":
                changes |= _turns(value)
            elif key not in _LABELS and key not in _OFF:
                raise BadRequest(f"Unknown parameter {key!r}.", f"session.{key}", "unknown_parameter")
            elif key in _OFF and value not in _OFF[key]:
                raise BadRequest(f"{key} is not supported: leave it out.", f"session.{key}")
        return replace(self, **changes)

    def shown(self) -> dict[str, Any]:
        """As a session object."""
        audio = {"type": "audio/pcm", "rate": PCM_RATE_HZ}
        turns = self.voice and {
            "type": "server_vad", "threshold": self.voice.threshold, "create_response": self.respond,
            "prefix_padding_ms": round(1000 * self.voice.prefix_padding), "interrupt_response": self.interrupt,
            "silence_duration_ms": round(1000 * self.voice.silence),
        }  # fmt: skip
        kinds = None if self.kinds is None else ["audio" if kind == "speech" else kind for kind in self.kinds]
        return {
            "type": "realtime", "object": "realtime.session", "output_modalities": kinds,
            "instructions": self.instructions, "max_output_tokens": self.max_tokens or "inf",
            "audio": {"input": {"format": audio, "turn_detection": turns}, "output": {"format": audio}},
            "tools": [], "tool_choice": "none",
        }  # fmt: skip


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `audio.input` and `audio.output` next to the others."""
    found = {key: value for key, value in given.items() if key != "audio"}
    audio = given.get("audio")
    if audio is not None and not isinstance(audio, Mapping):
        raise BadRequest("audio is an object.", "session.audio")
    for side in ("input", "output"):
        inner = (audio or {}).get(side)
        if inner is not None and not isinstance(inner, Mapping):
            raise BadRequest(f"audio.{side} is an object.", f"session.audio.{side}")
        for key, value in (inner or {}).items():
            if key == "format" and value not in _OFF["format"]:
                raise BadRequest(
                    f"Audio is 16-bit PCM at {PCM_RATE_HZ} Hz; received {value!r:.80}.", "session.audio"
                )
            found[key] = value
    return found


def _kinds(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadRequest('output_modalities is a list such as ["audio"].', "session.output_modalities")
    if len(value) > MAX_KINDS:
        raise BadRequest(f"output_modalities has more than {MAX_KINDS} entries.", "session.output_modalities")
    names: list[str] = value
    return tuple(_KINDS.get(one, one) for one in names)


def _turns(value: Any) -> dict[str, Any]:
    if value is None:
        return {"voice": None}
    if not isinstance(value, Mapping) or value.get("type") != "server_vad":
        raise BadRequest('turn_detection is null or of type "server_vad".', "session.turn_detection")
    default = VoiceSettings()

    def number(key: str, otherwise: float, most: int = 60_000) -> float:
        found = _checked(f"turn_detection.{key}", value.get(key, otherwise), (int, float))
        if not 0 <= found <= most:
            raise BadRequest(
                f"turn_detection.{key} is from 0 to {most}; received {found}.", "session.turn_detection"
            )
        return float(found)

    voice = VoiceSettings(
        number("threshold", default.threshold, 1),
        number("prefix_padding_ms", 1000 * default.prefix_padding) / 1000,
        number("silence_duration_ms", 1000 * default.silence) / 1000,
    )
    return {
        "voice": voice,
        "respond": value.get("create_response", True) is True,
        "interrupt": value.get("interrupt_response", True) is True,
    }


def _checked(name: str, value: Any, kinds: type | tuple[type, ...]) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise BadRequest(f"{name} has the wrong type; received {value!r:.80}.", f"session.{name}")
    return value
