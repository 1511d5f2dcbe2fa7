"""Initialize vocabulary rows of codes: similar codebook vectors get similar rows.

A new row is half noise, half a random projection of its codebook vector, which keeps distances up to scale (the
Johnson-Lindenstrauss lemma): codes of similar content start similar. In a trained model rows start around the
mean of the old ones, so that no new id stands out before it is trained (Hewitt, "Initializing New Word Embeddings
for Pretrained Language Models", 2021).

Shapes: K codes, D codebook width, H hidden, N new rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anytoken.processor import Processor
from anytoken.token_space import Range, TokenSpace
from anytoken.tokenizers.base import ModalityTokenizer

HEAD_SCALE = 0.25  # how far new rows of a head spread, as a share of the old ones' spread


def projected_rows(vectors: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Project codebook vectors [K, D] to [K, width] with unit variance."""
    vectors = vectors.detach().float().cpu()
    rows = (vectors - vectors.mean(0)) @ torch.randn(vectors.shape[1], width, generator=generator)
    return rows / rows.std().clamp(min=1e-6)


def _codebooks(space: TokenSpace, name: str, tokenizer: ModalityTokenizer) -> Iterator[tuple[Range, Tensor]]:
    """Range and vectors [K, D] of every codebook of a modality, and last of its global codes, if it has any."""
    for codebook in range(len(tokenizer.codebook_sizes)):
        yield space.code_range(name, codebook), tokenizer.codebook_vectors(codebook)
    if tokenizer.global_codebook_size:
        yield space.global_range(name), tokenizer.global_vectors()


def new_rows(
    old: Tensor,
    space: TokenSpace,
    tokenizers: Mapping[str, ModalityTokenizer],
    first: int,
    scale: float = 1.0,
) -> Tensor:
    """Rows [N, H], float32 on the CPU, for the ids from `first` on, around the mean of the `old` rows.

    Their deviation is `scale` times that of the old ones. tokenizers: those of the modalities among the new ids.
    """
    old = old.detach().float().cpu()
    width = old.shape[1]
    rows = torch.randn(space.vocab_size - first, width, generator=torch.Generator().manual_seed(first))
    for name, tokenizer in tokenizers.items():
        for span, vectors in _codebooks(space, name, tokenizer):
            generator = torch.Generator().manual_seed(vectors.shape[1])
            place = slice(span.start - first, span.stop - first)
            rows[place] = (rows[place] + projected_rows(vectors, width, generator)) / math.sqrt(2)
    return old.mean(0) + rows * (scale * old.std(0).mean())


def appended_rows(
    lm: PreTrainedModel, space: TokenSpace, tokenizers: Mapping[str, ModalityTokenizer], first: int
) -> tuple[Tensor, Tensor]:
    """`new_rows` for the embedding and for the head of a trained model, each by the deviation of its own table.

    Rows of a head (or a tied table) deviate less than the old ones: untrained ids then get about as much of the softmax
    as the same number of average ids, for any norm of the hidden states.
    """
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    rows = new_rows(head[:first], space, tokenizers, first, HEAD_SCALE)
    if embedding is head:
        return rows, rows
    return new_rows(embedding[:first], space, tokenizers, first), rows


def replaced_rows(
    table: Tensor, old: TokenSpace, space: TokenSpace, name: str, tokenizer: ModalityTokenizer
) -> Tensor:
    """The rows of `table`, whose ids `old` gives, for the ids of `space`: [space.vocab_size, H], float32 on the CPU.

    The codes of `name` get `new_rows` around the rows of the codes that they replace; all others are unchanged.
    """
    table = table.detach().float().cpu()
    codes = [span for span in old.ranges if (span.modality, span.kind) == (name, "code")]
    before = torch.cat([table[span.start : span.stop] for span in codes])
    fresh = new_rows(before, space, {name: tokenizer}, space.code_range(name).start)
    kept = [span for span in old.ranges if span not in codes]
    spans = [span for span in space.ranges if (span.modality, span.kind) != (name, "code")]
    rows = torch.empty(space.vocab_size, table.shape[1])
    start = space.code_range(name).start
    rows[start:] = fresh
    for source, target in zip(kept, spans, strict=True):
        rows[target.start : target.stop] = table[source.start : source.stop]
    return rows


@torch.no_grad()
def initialise_code_rows(model: PreTrainedModel, processor: Processor) -> None:
    """Initialize code rows of a model from scratch; rows keep the scale of the model's initialization."""
    table: Tensor = model.get_input_embeddings().weight
    scale: float = model.config.initializer_range
    generator = torch.Generator().manual_seed(0)
    for kind, tokenizer in processor.tokenizers.items():
        for span, vectors in _codebooks(processor.token_space, kind, tokenizer):
            rows = projected_rows(vectors, table.shape[1], generator)
            table[span.start : span.stop] += scale * rows
            table[span.start : span.stop] /= 2**0.5
