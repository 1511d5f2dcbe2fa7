"""The errors of this package. All are ValueErrors: what was received, what is allowed, what to do."""


class AnyTokenError(ValueError):
    """Whatever this package finds wrong with what it was given."""


class SegmentError(AnyTokenError):
    """A file or value that cannot become, or be saved as, a segment of the asked kind."""


class TokenizerError(AnyTokenError):
    """A segment that cannot be encoded, codes that cannot be decoded, or a tokenizer folder that is unusable."""


class TokenSpaceError(AnyTokenError):
    """Ids that are outside the token space or that its grammar does not allow, or a space that does not fit."""


class DataError(AnyTokenError):
    """Training data that cannot be read, made or used."""


class ConfigError(AnyTokenError):
    """A recipe or a setting that cannot be used here."""


class CheckpointError(AnyTokenError):
    """A checkpoint, adapter or backbone that is missing or damaged, or does not fit what is asked of it."""


class RequestError(AnyTokenError):
    """A prompt, a chat or an option of generation that this model cannot serve."""


class EvaluationError(AnyTokenError):
    """Scores or benchmarks that cannot be made, read or compared."""


class WriteError(AnyTokenError):
    """A place that cannot be written to, or that holds something else."""
