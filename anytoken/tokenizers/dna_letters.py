"""What all DNA tokenizers share: which letters there are, sequences of any length as streams, and FASTA files.

Lower case (soft-masked) is read as upper case, U (RNA) as T, every other IUPAC letter (R, Y, S, W, K, M, B, D, H, V)
as N. A tokenizer only says how symbols become codes, codes letters, and where a stream may be cut; segments, batches,
streams and whole genomes in constant memory follow from that.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np

from anytoken.segments import DNA, Segment
from anytoken.tokenizers.base import Codes, ModalityTokenizer, TokenizerError

LETTERS = "ACGTN"
N = LETTERS.index("N")
MAX_TOKENS = 400
BLOCK = 1 << 16  # letters of a file that are in memory at once


def _symbol_of_byte() -> bytes:
    table = np.full(256, 255, dtype=np.uint8)
    for letter in "ACGTUNRYSWKMBDHV":
        symbol = LETTERS.find("T" if letter == "U" else letter)
        table[[ord(letter), ord(letter.lower())]] = symbol if symbol >= 0 else N
    return table.tobytes()


_SYMBOLS = _symbol_of_byte()
_BASES = np.frombuffer(LETTERS.encode(), dtype=np.uint8)


def to_symbols(bases: str) -> np.ndarray:
    """IUPAC letters as uint8 [T] indices into A C G T N; TokenizerError names the first other letter."""
    symbols = np.frombuffer(bases.encode("latin-1", errors="replace").translate(_SYMBOLS), dtype=np.uint8)
    if symbols.size and symbols.max() > N:
        position = int(symbols.argmax())
        raise TokenizerError(
            f"DNA has IUPAC letters (ACGT, U, N, RYSWKMBDHV, either case); received {bases[position]!r} "
            f"at position {position + 1}."
        )
    return symbols


def to_bases(symbols: np.ndarray) -> str:
    """The letters A C G T N of indices [T]."""
    return _BASES[symbols].tobytes().decode("ascii")


def read_fasta(path: str | Path) -> Iterator[tuple[int, str, str]]:
    """Number, name and a piece of every sequence of a FASTA or plain file (.gz too), in order and in constant memory.

    Lines may be of any length. TokenizerError for a file that cannot be read.
    """
    path = Path(path)
    number, name, part, at_start = 0, "", "bases", True
    pieces: list[str] = []
    try:
        with gzip.open(path, "rt") if path.suffix.lower() == ".gz" else open(path) as handle:
            while text := handle.read(BLOCK):
                for line in text.splitlines(keepends=True):
                    if at_start and line.startswith(">"):
                        if any(pieces):
                            yield number, name.strip(), "".join(pieces)
                        number, name, pieces, line = number + 1, "", [], line[1:]
                        part = "name"
                    elif at_start:
                        part = "comment" if line.startswith(";") else "bases"
                    if part == "name":
                        name += line
                    elif part == "bases":
                        pieces.append("".join(line.split()))
                    at_start = line.endswith("\n")
                if any(pieces):
                    yield number, name.strip(), "".join(pieces)
                    pieces = []
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TokenizerError(f"{path} cannot be read as FASTA: {error}.") from error


class DNALetters(ModalityTokenizer):
    """A tokenizer of DNA segments; a subclass implements `_lookup_all`, `_spell`, `_num_letters` and `_whole`."""

    segment_type = DNA

    def _lookup_all(self, symbols: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes int64 [n] of sequences one after the other, and how many each has.

        symbols: uint8 [sum(lengths)]; each sequence ends as a sequence does, or stops where `_whole` said.
        """
        raise NotImplementedError

    def _spell(self, codes: np.ndarray) -> str:
        """The letters of codes [n], all in range."""
        raise NotImplementedError

    def _num_letters(self, codes: np.ndarray) -> np.ndarray:
        """How many letters each of codes [n] stands for, at least one."""
        raise NotImplementedError

    def _whole(self, symbols: np.ndarray) -> int:
        """How many of these first symbols of a stream have the codes they would have if all of it were there."""
        raise NotImplementedError

    def _lookup(self, symbols: np.ndarray) -> np.ndarray:
        return self._lookup_all(symbols, np.array([len(symbols)]))[0]

    def encode(self, segment: Segment) -> Codes:
        """DNA to codes int64 [n, 1]; TokenizerError for another kind, or more than 400 codes."""
        self.check_segment(segment)
        assert isinstance(segment, DNA)
        codes = self._lookup(to_symbols(segment.bases))
        if len(codes) > MAX_TOKENS:
            raise TokenizerError(
                f"A DNA segment has at most {MAX_TOKENS} codes; {len(segment.bases)} bases are {len(codes)}. "
                "Cut it into pieces, or use encode_stream or encode_fasta, which take any length."
            )
        return Codes(codes[:, None])

    def decode(self, codes: Codes) -> Segment:
        """Codes to upper-case A C G T N; every code in range decodes."""
        self.check_codes(codes)
        return DNA(self._spell(codes.values[:, 0]))

    def encode_batch(self, segments: Sequence[Segment]) -> list[Codes]:
        """`encode` for many, looked up at once; what one of them does not take is its error, as `encode` words it."""
        bases = [segment.bases for segment in segments if isinstance(segment, DNA)]
        try:
            symbols = to_symbols("".join(bases))
        except TokenizerError:
            return super().encode_batch(segments)
        codes, counts = self._lookup_all(symbols, np.array([len(one) for one in bases], dtype=np.int64))
        if len(bases) < len(segments) or counts.max(initial=0) > MAX_TOKENS:
            return super().encode_batch(segments)  # one by one: the first that is wrong says so
        column, ends = codes[:, None], counts.cumsum().tolist()
        return [Codes(column[start:end]) for start, end in pairwise([0, *ends])]

    def decode_batch(self, codes: Sequence[Codes]) -> list[Segment]:
        """`decode` for many, spelled at once; codes that are none are an error, as `decode` words it."""
        shapes = [one.values.shape for one in codes]
        if not shapes or any(books != 1 or not 0 < count <= MAX_TOKENS for count, books in shapes):
            return super().decode_batch(codes)
        values = np.concatenate([one.values for one in codes])[:, 0]
        if values.min() < 0 or values.max() >= self.codebook_sizes[0]:
            return super().decode_batch(codes)
        last = np.cumsum([count for count, _ in shapes]) - 1
        bases, ends = self._spell(values), self._num_letters(values).cumsum()[last].tolist()
        return [DNA(bases[start:end]) for start, end in pairwise([0, *ends])]

    @property
    def lookahead(self) -> int:
        """A code is its letters, whatever stands beside it."""
        return 0

    def decode_span(self, codes: Codes, start: int, stop: int) -> DNA:
        """The letters of codes `start` to `stop`."""
        return DNA(self._spell(codes.values[start:stop, 0]))

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Codes int64 [n] for chunks of a sequence of any length, in memory of one chunk's size.

        Chunks may be cut anywhere, and white space in them is skipped, so the lines of a file will do.
        """
        rest = np.empty(0, dtype=np.uint8)
        for chunk in chunks:
            symbols = np.concatenate([rest, to_symbols("".join(chunk.split()))])
            whole = self._whole(symbols)
            rest = symbols[whole:]
            if whole:
                yield self._lookup(symbols[:whole])
        if rest.size:
            yield self._lookup(rest)

    def decode_stream(self, chunks: Iterable[np.ndarray]) -> Iterator[str]:
        """Bases for chunks of codes int [n]: the inverse of `encode_stream`."""
        for chunk in chunks:
            if chunk.size and not 0 <= chunk.min() <= chunk.max() < self.codebook_sizes[0]:
                raise TokenizerError(
                    f"dna codes run from 0 to {self.codebook_sizes[0] - 1}; "
                    f"received values from {chunk.min()} to {chunk.max()}."
                )
            yield self._spell(chunk)

    def encode_fasta(self, path: str | Path) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """Name and codes, as `encode_stream` gives them, of each sequence of a file, in constant memory.

        As with itertools.groupby, the codes of a sequence are to be taken before the next sequence is.
        """
        for (_, name), pieces in groupby(read_fasta(path), itemgetter(0, 1)):
            yield name, self.encode_stream(map(itemgetter(2), pieces))
