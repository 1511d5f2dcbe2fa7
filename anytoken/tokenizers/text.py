"""Text to ids and back: byte-level byte-pair encoding, exact for every UTF-8 string.

Every vocabulary begins with the 256 bytes, so no text is out of vocabulary (byte-level BPE as in GPT-2; byte-pair
encoding of words: arXiv 1508.07909). Hugging Face `tokenizers` does the merging; it trains in seconds and writes a
`tokenizer.json` that other programs read.

The tokenizer of another language model is read unchanged, including SentencePiece's (arXiv 1808.06226). Its special
ids are not text: no string is ever encoded to one.

A corpus of captions yields whole words, but not necessarily the short pieces that a task needs as single tokens, such
as one amino acid per token in "M K L V". `train(..., always=[" K", ...])` guarantees those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from anytoken.tokenizers.base import TokenizerError
from anytoken.utils.atomic import write_file

NUM_BYTES = 256
FILE = "tokenizer.json"
SPACE_PIECE, BYTE_PIECE = (
    "\u2581",
    re.compile(r"<0x[0-9A-F]{2}>"),
)  # how SentencePiece writes a space, and a byte
STEPS = ("normalizers", "pretokenizers")  # where a tokenizer.json lists the steps of a sequence
# What UTF-8 of people's texts is made of: without the bytes of control codes and of planes nobody writes in, which
# the vocabularies of some language models lack.
IN_TEXT = {ord("\t"), ord("\n"), *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE represents each byte by one visible letter: itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(NUM_BYTES + i): byte for i, byte in enumerate(hidden)
    }


def _id_pieces(bpe: Tokenizer) -> list[bytes | None]:
    """The bytes of every id; None for special ids and gaps. TokenizerError for another kind of vocabulary."""
    letters, added = _byte_of_letter(), bpe.get_added_tokens_decoder()
    vocabulary = {id_: token for token, id_ in bpe.get_vocab(with_added_tokens=True).items()}
    pieces: list[bytes | None] = [None] * (max(vocabulary, default=-1) + 1)
    plain = {id_: token for id_, token in vocabulary.items() if id_ not in added}
    byte_level = all(letter in letters for token in plain.values() for letter in token)
    if not byte_level and "<0x00>" not in plain.values():
        raise TokenizerError(
            "This is neither a byte-level vocabulary nor one that falls back to bytes; train one with `train`."
        )
    for id_, token in plain.items():
        if byte_level:
            pieces[id_] = bytes(letters[letter] for letter in token)
        elif BYTE_PIECE.fullmatch(token):
            pieces[id_] = bytes([int(token[3:5], 16)])
        else:
            pieces[id_] = token.replace(SPACE_PIECE, " ").encode()
    for id_, one in added.items():
        pieces[id_] = None if one.special else one.content.encode()
    return pieces


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as JSON, without the part that adds a space before a text; None if empty."""
    if not isinstance(part, dict) or part["type"] == "Prepend":
        return None
    exact = {"add_prefix_space": False, "prepend_scheme": "never"}
    inner = {key: [_without_prefix(one) for one in value] for key, value in part.items() if key in STEPS}
    kept = {key: [one for one in steps if one is not None] for key, steps in inner.items()}
    return {**part, **{key: value for key, value in exact.items() if key in part}, **kept}


class TextTokenizer:
    """Ids 0 to `vocab_size - 1`, each standing for a few bytes. Equal files give equal ids on every machine."""

    def __init__(self, bpe: Tokenizer) -> None:
        bpe.encode_special_tokens = True  # "<s>" in a text is four letters
        self._bpe = bpe
        self._bytes = _id_pieces(bpe)
        single = {piece[0] for piece in self._bytes if piece is not None and len(piece) == 1}
        self._lost = set(range(NUM_BYTES)) - single
        if self._lost & IN_TEXT:
            raise TokenizerError(
                "The vocabulary lacks single bytes, so some text would be lost; train it again with `train`, or take "
                "a backbone whose tokenizer is byte-level or falls back to bytes."
            )
        edges = [
            0,
            *(id_ for id_ in range(1, self.vocab_size) if self._is_text(id_) != self._is_text(id_ - 1)),
        ]
        spans = pairwise([*edges, self.vocab_size])
        self.ranges = tuple(span for span in spans if self._is_text(span[0]))

    def _is_text(self, id_: int) -> bool:
        return self._bytes[id_] is not None

    @property
    def vocab_size(self) -> int:
        """Number of ids, at least 256."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of a string. TokenizerError for text that UTF-8 (lone surrogates) or the vocabulary lacks."""
        if not isinstance(text, str):
            raise TokenizerError(f"The text tokenizer encodes str; received {type(text).__name__}.")
        try:
            lost = self._lost.intersection(text.encode())
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"The text is not valid Unicode ({error}); repair it before encoding."
            ) from error
        if lost:
            raise TokenizerError(
                f"The backbone's vocabulary has no id for the byte {min(lost):#04x}, a control code or rare character "
                "of the text; remove it."
            )
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The string of ids. Bytes that are not UTF-8, which only a model generates, become U+FFFD."""
        return b"".join(self.id_bytes(id_) for id_ in ids).decode("utf-8", errors="replace")

    def id_bytes(self, id_: int) -> bytes:
        """The bytes one id stands for; TokenizerError outside `ranges`."""
        piece = self._bytes[id_] if 0 <= id_ < self.vocab_size else None
        if piece is None:
            runs = ", ".join(f"{start} to {stop - 1}" for start, stop in self.ranges)
            raise TokenizerError(f"Text ids run from {runs}; received {id_}.")
        return piece

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, always: Sequence[str] = ()) -> TextTokenizer:
        """Learn merges from texts until there are `vocab_size` ids, or no pair occurs twice.

        always: strings that become exactly one id wherever they are a separate piece (" K" in "M K L"). Byte-pair
        encoding merges the most frequent pair first, so each of them is added once more often than the most frequent
        pair of bytes in `texts` occurs: a pair inside an unfinished one then precedes every other merge. Two runs on
        the same texts give the same file.
        TokenizerError if vocab_size is below 256 or too small for `always`, or if one of these is not a single piece
        (a word or sign with at most one space before it).
        """
        if vocab_size < NUM_BYTES:
            raise TokenizerError(
                f"A byte-level vocabulary has at least {NUM_BYTES} ids; received {vocab_size}."
            )
        corpus = list(texts)
        pairs: Counter[tuple[int, int]] = Counter()
        for text in [*corpus, *always]:
            pairs.update(pairwise(text.encode()))
        copies = max(pairs.values(), default=1) + 1
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator([*corpus, *(piece for piece in always for _ in range(copies))], trainer)
        tokenizer = cls(bpe)
        split = [piece for piece in always if len(tokenizer.encode(piece)) != 1]
        if split:
            raise TokenizerError(
                f"With {vocab_size} ids, {split} cannot be one id each; raise vocab_size, or give single pieces: "
                "a word or sign with at most one space before it."
            )
        return tokenizer

    @classmethod
    def adopt(cls, bpe: Tokenizer) -> TextTokenizer:
        """The tokenizer of another language model, made exact: no space is added before a text, nothing is truncated.

        TokenizerError if it is neither byte-level nor falls back to bytes.
        """
        spec = json.loads(bpe.to_str()) | {"truncation": None, "padding": None}
        for part in ("normalizer", "pre_tokenizer"):
            spec[part] = _without_prefix(spec[part])
        return cls(Tokenizer.from_str(json.dumps(spec)))

    def fingerprint(self) -> str:
        """sha256 of the saved form: tokenizers with equal fingerprints give equal ids."""
        return hashlib.sha256(self._bpe.to_str().encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write tokenizer.json, whole or not at all; returns the folder."""
        folder = Path(folder)
        write_file(folder / FILE, self._bpe.to_str(pretty=True))
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """Load tokenizer.json; TokenizerError if it is missing, truncated or not byte-level."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise TokenizerError(f"{path} is missing: expected a folder that a text tokenizer was saved to.")
        try:
            bpe = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises nothing more specific for a damaged file
            raise TokenizerError(f"{path} is not a tokenizer ({error}); copy the folder again.") from error
        return cls(bpe)
