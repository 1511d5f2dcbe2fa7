"""Proteins to codes and back: two residues per code, up to 1,024 residues.

Pairs of the 20 amino acids go through a small network and a learned codebook of vectors (VQ-VAE, arXiv 1711.00937).
There are 420 pairs, including those with an odd last residue, and as many codes, so no letter is lost. The codebook
initializes a language model's embedding rows: pairs that share letters start near each other. The folder is a whole
modality: this file, a recipe, a card.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from anytoken.segments import Segment, SegmentError
from anytoken.tokenizers.base import Codes, CodeSequence, ModalityTokenizer, TokenizerError, register_modality
from anytoken.tokenizers.modules.quantizer import Quantizer
from anytoken.utils.json_lines import read_json_lines

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
KEPT_AS = str.maketrans(
    {"B": "D", "J": "L", "O": "K", "U": "C", "X": "A", "Z": "E"}
)  # the residue each is nearest to
PAD = len(RESIDUES)
WINDOW, MAX_CODES = 2, 512


@dataclass(frozen=True)
class Protein(Segment):
    """A chain of amino acids in one-letter code; B, J, O, U, X and Z are kept as D, L, K, C, A and E."""

    residues: str
    kind: ClassVar[str] = "protein"

    def __post_init__(self):
        known = str(self.residues).upper().translate(KEPT_AS)
        if not known or set(known) - set(RESIDUES):
            raise SegmentError(
                f"Protein takes the letters {RESIDUES} and BJOUXZ; received {self.residues!r:.60}."
            )
        object.__setattr__(self, "residues", known)

    @classmethod
    def open(cls, path):
        """The one sequence of a FASTA or plain file."""
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return cls("".join(line.strip() for line in lines if not line.startswith(">")))

    def save(self, path):
        """Write FASTA."""
        Path(path).write_text(f">protein\n{self.residues}\n", encoding="utf-8")
        return Path(path)

    def __str__(self):
        return self.residues


@register_modality
class ProteinTokenizer(ModalityTokenizer):
    """Pairs of residues; an odd last residue is padded, and padding elsewhere, which only a model writes, left out."""

    kind = "protein"
    segment_type = Protein

    def __init__(self, width: int = 128, code_dim: int = 32, codebook_size: int = len(RESIDUES) * (PAD + 1)):
        config = {"width": width, "code_dim": code_dim, "codebook_size": codebook_size}
        super().__init__(shape=CodeSequence(1, MAX_CODES), codebook_sizes=[codebook_size], config=config)
        pairs = WINDOW * (PAD + 1)
        self.encoder = nn.Sequential(nn.Linear(pairs, width), nn.GELU(), nn.Linear(width, code_dim))
        follow = {
            "kind": "vq",
            "decay": 0.5,
        }  # vectors keep up with the network, so that no two pairs come to share one
        self.quantize = Quantizer(code_dim, follow, codebook_size=codebook_size)
        self.decoder = nn.Sequential(nn.Linear(code_dim, width), nn.GELU(), nn.Linear(width, pairs))

    def _latents(self, pairs):
        """Pairs int64 [B, N, 2] of letters to latents [B, N, D]."""
        return self.encoder(F.one_hot(pairs, PAD + 1).flatten(2).float())

    def _logits(self, vectors):
        return self.decoder(vectors).unflatten(-1, (WINDOW, PAD + 1))

    def training_loss(self, batch):
        """batch: pairs int64 [B, N, 2], indices into RESIDUES and padding."""
        quantized = self.quantize(self._latents(batch))
        logits = self._logits(quantized.vectors)
        loss = F.cross_entropy(logits.flatten(0, 2), batch.flatten()) + quantized.loss
        return loss, {"letters_exact": (logits.argmax(-1) == batch).float().mean().item()}

    @torch.inference_mode()
    def encode(self, segment):
        """Codes [ceil(T / 2), 1]; TokenizerError for more than 1,024 residues."""
        self.check_segment(segment)
        if len(segment.residues) > WINDOW * MAX_CODES:
            raise TokenizerError(
                f"A protein has at most {WINDOW * MAX_CODES} residues; received {len(segment.residues)}."
            )
        return Codes(self.quantize(self._latents(_pairs(segment.residues)[None])).codes[0].numpy())

    @torch.inference_mode()
    def decode(self, codes):
        """The likeliest letters; the first of a pair is no padding."""
        self.check_codes(codes)
        logits = self._logits(self.quantize.lookup(torch.from_numpy(codes.values)[None]))
        logits[..., 0, PAD] = -torch.inf
        return Protein("".join(RESIDUES[n] for n in logits.argmax(-1).flatten().tolist() if n != PAD))

    def fit(self, source, seed):
        """One vector a code to begin with: k-means of all pairs."""
        torch.manual_seed(seed)
        self.train().quantize(self._latents(_all_pairs()[None]))

    def training_batches(self, source, batch_size, seed):
        """128 pairs a row from the training split of a JSON lines file with a `protein` key, and every pair once."""
        chain = _pairs("".join(residues for _, residues in _proteins(source, "train")))
        all_pairs = _all_pairs().expand(batch_size, -1, -1)

        def batch(step):
            rng = np.random.default_rng((seed, step))
            return torch.cat([chain[rng.integers(0, len(chain), (batch_size, 128))], all_pairs], 1)

        return batch

    def held_out(self, source):
        """Proteins of the test split that are short enough."""
        return [("", Protein(one)) for _, one in _proteins(source, "test") if len(one) <= WINDOW * MAX_CODES]

    def distortion(self, original, decoded):
        """Share of letters that come back, and whether all do."""
        same = sum(a == b for a, b in zip(original.residues, decoded.residues, strict=False))
        return {"letters kept": same / len(original.residues), "exact": float(original == decoded)}

    def codebook_vectors(self, codebook=0):
        """Learned vectors [K, code_dim]."""
        return self.quantize.codebook()


def _all_pairs():
    """Each pair once [420, 2], with those of an odd last residue."""
    return torch.cartesian_prod(torch.arange(PAD), torch.arange(PAD + 1))


def _pairs(residues):
    symbols = [RESIDUES.index(letter) for letter in residues] + [PAD] * (len(residues) % WINDOW)
    return torch.tensor(symbols).unflatten(0, (-1, WINDOW))


def _proteins(source, split):
    if not Path(source).is_file():
        raise TokenizerError(f"{source} is missing: build the set with `anytoken data dna` first.")
    lines = read_json_lines(source)
    return [(one["product"], Protein(one["protein"]).residues) for one in lines if one["split"] == split]
