"""The errors of this package. All are ValueErrors that say what was received, what is allowed and what to do."""

import re


class AnyTokenError(ValueError):
    """Base class of the errors that users can correct."""


class SegmentError(AnyTokenError):
    """A file or value that cannot become, or be saved as, a segment of the requested kind."""


class MediaLimitError(SegmentError):
    """A medium exceeds a limit: `limit` is its name, `found` the measured value, `allowed` the limit's value."""

    def __init__(self, name: object, limit: str, found: float, allowed: float, fact: str) -> None:
        self.limit, self.found, self.allowed, self.fact = limit, found, allowed, fact
        super().__init__(
            f"{name} {fact} ({limit}). For a larger one: with anytoken.media_limits({limit}=...), "
            f"or --limits {limit}=... of the command."
        )


class TokenizerError(AnyTokenError):
    """A segment that cannot be encoded, codes that cannot be decoded, or an unusable tokenizer folder."""


class TokenSpaceError(AnyTokenError):
    """Ids outside the token space or not allowed by its grammar, or a token space that does not fit."""


class DataError(AnyTokenError):
    """Training data that cannot be read, built or used."""


class RecordError(DataError):
    """A training record that cannot be used; ``reason`` names the kind of fault, for counting."""

    def __init__(self, message: str, reason: str = "wrong shape") -> None:
        super().__init__(message)
        self.reason = reason


class ConfigError(AnyTokenError):
    """A recipe or a setting that cannot be used here."""


class CheckpointError(AnyTokenError):
    """A checkpoint, adapter, backbone or training run that is missing, damaged or incompatible."""


class DivergenceError(AnyTokenError):
    """A loss or a gradient that is not finite; the message says where the batch lies and what to do."""


class RequestError(AnyTokenError):
    """A prompt, chat or generation option that this model does not support."""


class EvaluationError(AnyTokenError):
    """Scores or benchmarks that cannot be computed, read or compared."""


class WriteError(AnyTokenError):
    """A path that cannot be written to, a full disk, or a path that contains something else."""


def reason(error: BaseException) -> str:
    """What a library says went wrong, without error numbers and the addresses of its buffers."""
    said = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
    return re.sub(r"\[Errno -?\d+\] |:? '?<[^>]*>'?", "", str(said)).strip(" .")
