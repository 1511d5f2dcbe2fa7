"""Lossless DNA codes with context: each code identifies a window of letters and a class of its surroundings.

A code is a window of k letters and one of a few context classes: 1,024 codes for 4 letters and 4 classes. The code
spells the window, so reconstruction is exact without training. The class is learned: a network also reads the letters
around a window, a vector quantizer (VQ-VAE, arXiv 1711.00937) turns them into a class, and the decoder predicts the
surrounding letters from window and class. A class therefore captures what nearby letters have in common, such as
the reading frame (compare VQDNA, 2405.10812, which is lossy). Windows begin where those of `dna_kmer` do; letters
outside any window have codes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from anytoken.segments import DNA, Segment
from anytoken.tokenizers.base import CodeSequence, TokenizerError, register_modality
from anytoken.tokenizers.dna.base import (
    LETTERS,
    MAX_TOKENS,
    DNATokenizerBase,
    N,
    pieces,
    to_symbols,
    training_genes,
)
from anytoken.tokenizers.dna.kmer_bpe import DNAKmerTokenizer
from anytoken.tokenizers.modules.convnext import mlp
from anytoken.tokenizers.modules.quantizer import Quantizer

OUTSIDE = len(LETTERS)  # the symbol before the first letter and after the last
BLOCK = 8_192  # windows that the network sees at once
NONE = np.empty(0, dtype=np.uint8)  # letters
WITHOUT_CLASS = (
    0.1  # share of training windows whose class is hidden: what the class adds can then be measured
)


@register_modality
class DNAContextTokenizer(DNATokenizerBase):
    """Codes window * classes + class for 4^k windows in `classes` contexts each, then one code for each of A C G T N.

    reach: the number of letters on either side that the class depends on, and that a stream waits for.
    """

    kind = "dna_context"

    def __init__(
        self, k: int = 4, classes: int = 4, reach: int = 24, width: int = 128, code_dim: int = 32
    ) -> None:
        if classes < 2 or reach < 1 or width < 1 or code_dim < 1:
            raise TokenizerError(
                f"classes is 2 or more, reach, width and code_dim 1 or more; received {classes}, {reach}, {width}, "
                f"{code_dim}."
            )
        windows = DNAKmerTokenizer(k)
        config = {"k": k, "classes": classes, "reach": reach, "width": width, "code_dim": code_dim}
        size = 4**k * classes + len(LETTERS)
        super().__init__(shape=CodeSequence(1, MAX_TOKENS), codebook_sizes=[size], config=config)
        self.k, self.classes, self.reach = k, classes, reach
        self.windows = windows
        self.encoder = mlp((k + 2 * reach) * (OUTSIDE + 1), width, code_dim)
        self.quantize = Quantizer(code_dim, "vq", codebook_size=classes)
        self.names = nn.Embedding(4**k + len(LETTERS), code_dim)  # of windows and single letters
        self.decoder = mlp(2 * code_dim, width, 2 * reach * len(LETTERS))

    # ---- the network ----

    def _latents(self, surroundings: Tensor) -> Tensor:
        """Latents [B, D] of windows with their surroundings, int64 [B, reach + k + reach]; float64 while not training.

        In float64 the nearest class does not depend on batch size or number of threads.
        """
        seen = F.one_hot(surroundings, OUTSIDE + 1).flatten(1)
        if self.training:
            return self.encoder(seen.float())
        weights = {name: value.double() for name, value in self.encoder.named_parameters()}
        return functional_call(self.encoder, weights, seen.double())

    def _window_codes(self, surroundings: Tensor) -> Tensor:
        places = 4 ** torch.arange(self.k - 1, -1, -1, device=surroundings.device)
        return (surroundings[:, self.reach : self.reach + self.k] * places).sum(1)

    def _around_logits(self, surroundings: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 2 * reach, 5] of the letters around windows, given class vectors [B, D]; and those letters."""
        named = torch.cat([self.names(self._window_codes(surroundings)), classes.float()], 1)
        around = torch.cat([surroundings[:, : self.reach], surroundings[:, self.reach + self.k :]], 1)
        return self.decoder(named).unflatten(1, (2 * self.reach, len(LETTERS))), around

    def training_loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """batch: windows of A C G T with their surroundings, int64 [B, reach + k + reach], 0 to 5 (outside)."""
        quantized = self.quantize(self._latents(batch)[None])
        given = torch.rand(len(batch), 1, device=batch.device) >= WITHOUT_CLASS
        logits, around = self._around_logits(batch, quantized.vectors[0] * given)
        bits = _bits(logits, around)
        inside = (around != OUTSIDE).sum(1).clamp_min(1)
        loss = bits.sum() / inside.sum() * math.log(2) + quantized.loss
        each, given = bits.detach().sum(1) / inside, given[:, 0]
        seen = {
            "bits_with_class": each[given].mean().item(),
            "classes_used": float(quantized.codes.unique().numel()),
        }
        return loss, seen | ({"bits_without": each[~given].mean().item()} if not given.all() else {})  # fmt: skip

    @torch.inference_mode()
    def context_bits(self, segments: Sequence[Segment]) -> dict[str, float]:
        """Bits per letter around a window, given the window and its class, and given the window only."""
        letters = [to_symbols(one.bases) for one in segments if isinstance(one, DNA)]
        found = np.concatenate([self._surroundings(NONE, one, NONE) for one in letters])
        around = torch.from_numpy(found.astype(np.int64)).to(self.device)
        totals, count = np.zeros(2), 0
        for block in around.split(BLOCK):
            vectors = self.quantize.codebook()[self._nearest(block)]
            for place, given in enumerate((vectors, torch.zeros_like(vectors))):
                totals[place] += _bits(*self._around_logits(block, given)).sum().item()
            count += int((block != OUTSIDE).sum()) - len(block) * self.k
        return dict(
            zip(("context_bits_with_class", "context_bits_without"), (totals / count).tolist(), strict=True)
        )

    # ---- letters ----

    def _nearest(self, surroundings: Tensor) -> Tensor:
        """Classes int64 [B] of windows with their surroundings, int64 [B, reach + k + reach]."""
        points = self.quantize.codebook().double()
        return (self._latents(surroundings)[:, None] - points).square().sum(-1).argmin(1)

    def _surroundings(self, before: np.ndarray, symbols: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Windows of symbols with `reach` letters on either side, uint8 [B, reach + k + reach]."""
        around = np.full(max(len(symbols), self.k) + 2 * self.reach, OUTSIDE, dtype=np.uint8)
        before, after = before[-self.reach :], after[: self.reach]
        around[self.reach - len(before) : self.reach] = before
        around[self.reach : self.reach + len(symbols)] = symbols
        around[self.reach + len(symbols) :][: len(after)] = after
        return sliding_window_view(around, self.k + 2 * self.reach)[self.windows._windows(symbols)]

    def _lookup_within(self, before: np.ndarray, symbols: np.ndarray, after: np.ndarray) -> np.ndarray:
        return self._classed(
            self.windows._lookup_all([symbols])[0], self._surroundings(before, symbols, after)
        )

    def _lookup_all(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        plain = self.windows._lookup_all(sequences)
        around = np.concatenate([self._surroundings(NONE, one, NONE) for one in sequences])
        codes = self._classed(np.concatenate(plain), around)
        return pieces(codes, [len(one) for one in plain])

    @torch.inference_mode()
    def _classed(self, codes: np.ndarray, surroundings: np.ndarray) -> np.ndarray:
        """Codes [n] of plain windows and letters, where windows get the class of their surroundings."""
        is_window = codes < 4**self.k
        blocks = [surroundings[i : i + BLOCK] for i in range(0, max(1, len(surroundings)), BLOCK)]
        placed = (torch.from_numpy(block.astype(np.int64)).to(self.device) for block in blocks)
        classes = np.concatenate([self._nearest(block).cpu().numpy() for block in placed])
        codes = np.where(is_window, codes * self.classes, codes + 4**self.k * (self.classes - 1))
        codes[is_window] += classes
        return codes

    def _spelled(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        letters = codes - 4**self.k * (self.classes - 1)
        return self.windows._spelled(np.where(letters < 4**self.k, codes // self.classes, letters))

    def _whole(self, symbols: np.ndarray) -> int:
        return self.windows._whole(symbols)

    def codebook_vectors(self, codebook: int = 0) -> Tensor:
        """Vectors [K, 2 * code_dim]: that of the window or letter, then that of the class (zeros for a letter)."""
        names, classes = self.names.weight.detach(), self.quantize.codebook()
        count = 4**self.k
        windows = torch.cat([names[:count].repeat_interleave(self.classes, 0), classes.repeat(count, 1)], 1)
        return torch.cat([windows, F.pad(names[count:], (0, classes.shape[1]))])

    # ---- training ----

    def training_batches(self, source: Path, batch_size: int, seed: int) -> Callable[[int], Tensor]:
        """Windows of the training genes with their surroundings, half of them from the other strand.

        source: JSON lines with `dna` and `split`.
        """
        genes = training_genes(source)
        gap = np.full(self.reach, OUTSIDE, dtype=np.uint8)
        letters = np.concatenate([gap, *(part for gene in genes for part in (gene, gap))])
        views = sliding_window_view(letters, self.k + 2 * self.reach)
        windows = views[:, self.reach : self.reach + self.k]
        starts = np.flatnonzero((windows < N).all(1))
        if not len(starts):
            raise TokenizerError(f"{source} has no training gene with {self.k} letters of A C G T in a row.")
        other_strand = np.array([3, 2, 1, 0, N, OUTSIDE])

        def batch(step: int) -> Tensor:
            rng = np.random.default_rng((seed, step))
            chosen = views[rng.choice(starts, batch_size)].astype(np.int64)
            turned = rng.random(batch_size) < 0.5
            chosen[turned] = other_strand[chosen[turned, ::-1]]
            return torch.from_numpy(chosen)

        return batch


def _bits(logits: Tensor, letters: Tensor) -> Tensor:
    """Bits [B, L] of letters [B, L] by logits [B, L, 5]; 0 for what is outside."""
    return F.cross_entropy(
        logits.transpose(1, 2), letters, ignore_index=OUTSIDE, reduction="none"
    ) / math.log(2)
