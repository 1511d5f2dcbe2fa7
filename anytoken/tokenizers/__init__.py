"""Raw input to discrete codes and back: tokenizers for each modality, most of them vector-quantized."""

from typing import TYPE_CHECKING

from anytoken import moved
from anytoken.tokenizers.base import (
    MODALITIES,
    CodeGrid,
    Codes,
    CodeSequence,
    CodeShape,
    ModalityTokenizer,
    TokenizerError,
    load_tokenizer,
    register_modality,
)
from anytoken.tokenizers.registry import load_modality

__all__ = [
    "MODALITIES",
    "CodeGrid",
    "CodeSequence",
    "CodeShape",
    "Codes",
    "ModalityTokenizer",
    "TokenizerError",
    "load_modality",
    "load_tokenizer",
    "register_modality",
]

if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
