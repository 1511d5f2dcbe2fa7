"""Errors that more than one room raises or catches."""


class TokenizerError(ValueError):
    """Raised when a segment cannot be encoded, codes cannot be decoded, or a tokenizer folder is unusable."""
