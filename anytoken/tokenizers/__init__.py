"""Raw input to discrete codes and back: one vector-quantised tokenizer per modality."""

from anytoken.tokenizers.base import (
    MODALITIES,
    Codes,
    CodeShape,
    Grid,
    ModalityTokenizer,
    Run,
    TokenizerError,
    load_tokenizer,
    register_modality,
)
from anytoken.tokenizers.registry import load_modality

__all__ = [
    "MODALITIES",
    "CodeShape",
    "Codes",
    "Grid",
    "ModalityTokenizer",
    "Run",
    "TokenizerError",
    "load_modality",
    "load_tokenizer",
    "register_modality",
]
