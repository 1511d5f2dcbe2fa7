"""Losses that make speech codes depend on the words instead of the voice: spelling, and agreement of two voices.

Codes trained only to reconstruct audio keep every detail of a voice, so a language model has to learn each word once
per speaker. Two terms prevent this, on batches with every text by two voices. `spelling`: a small head predicts the
text from the codes (CTC, Graves et al. 2006, as in supervised semantic tokens, arXiv 2407.05407). `agreement`: both
clips are aligned by dynamic time warping, and features of the same moment of a text have to be alike across voices and
unlike those of other moments (InfoNCE).

Shapes: B clips, N codes of a clip, D features, S samples, C symbols.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anytoken.tokenizers.modules.convnext import ConvNeXtStack
from anytoken.utils.autocast import in_float32

TERMS = ("spelling", "agreement")
SYMBOLS = 257  # a blank, and the bytes of a text
TEMPERATURE, NEIGHBORS = 0.1, 1
READINGS_PER_CODE = 2  # fast speech has more letters than codes


@dataclass
class SpokenPairs:
    """Clips of one length, the first half of them and the second saying the same texts in other voices.

    samples: float [2B, S]; others: something else by the same voices, at the same level and speed, [2B, R];
    texts: of the first half [B].
    """

    samples: Tensor
    others: Tensor
    texts: Sequence[str]

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        return self.samples.device

    def to(self, device: str | torch.device) -> SpokenPairs:
        """The same pairs on a device."""
        return SpokenPairs(self.samples.to(device), self.others.to(device), self.texts)


def spelled(text: str) -> bytes:
    """A text as symbols: lower case, without accents, its letters, digits and single spaces."""
    plain = unicodedata.normalize("NFKD", text.lower())
    kept = "".join(c if c.isalnum() else " " for c in plain if not unicodedata.combining(c))
    return " ".join(kept.split()).encode()


class SpellingHead(nn.Module):
    """Reads the text from quantized vectors; trained along and not part of a tokenizer."""

    def __init__(self, width: int, depth: int = 2, kernel: int = 5) -> None:
        super().__init__()
        self.read = ConvNeXtStack(width, depth, (kernel,))
        self.name = nn.Linear(width, READINGS_PER_CODE * SYMBOLS)

    def forward(self, vectors: Tensor) -> Tensor:
        """Quantized vectors [B, N, D] to log-probabilities [B, 2 N, C]; symbol 0 is the blank."""
        found = self.name(self.read(vectors.transpose(1, 2)).transpose(1, 2))
        return found.unflatten(-1, (READINGS_PER_CODE, SYMBOLS)).flatten(1, 2).float().log_softmax(-1)

    @in_float32
    def loss(self, vectors: Tensor, texts: Sequence[str]) -> Tensor:
        """Nats per symbol of the texts [B]; those that do not fit into the clip do not count."""
        read = self(vectors).transpose(0, 1)
        symbols = [torch.frombuffer(bytearray(spelled(text) or b" "), dtype=torch.uint8) for text in texts]
        lengths = torch.tensor([len(one) for one in symbols])
        targets = torch.cat(symbols).long() + 1
        steps = torch.full((len(texts),), len(read))
        return F.ctc_loss(read, targets.to(read.device), steps, lengths, zero_infinity=True)


@in_float32
def agreement_loss(features: Tensor, texts: Sequence[str]) -> Tensor:
    """How unlikely a moment of one clip is to find the same moment of the other among those of all clips, in nats.

    features: [2B, N, D]; pairs and texts [B] as in `SpokenPairs`. InfoNCE (arXiv 1807.03748) over cosines. Moments next
    to the right one, and those of other clips of the same text, do not count as wrong.
    """
    ours, theirs = F.normalize(features, dim=-1).chunk(2)
    count, length = ours.shape[:2]
    with torch.no_grad():
        paths = align((1 - ours @ theirs.transpose(1, 2)).cpu().numpy())
        forth, back = (torch.from_numpy(one).to(features.device) for one in paths)
        number = {text: row for row, text in enumerate(texts)}
        named = torch.tensor([number[text] for text in texts], device=features.device)
        moments = torch.arange(count * length, device=features.device)
        row, time = moments // length, moments % length
        same_text = named[row][:, None] == named[row]

    def search(anchors: Tensor, others: Tensor, right: Tensor) -> Tensor:
        wanted = (right + torch.arange(count, device=right.device)[:, None] * length).flatten()
        near = (time[None] - time[wanted][:, None]).abs() <= NEIGHBORS
        own = row[None] == row[:, None]
        left_out = torch.where(own, near, same_text)
        left_out[moments, wanted] = False
        likeness = anchors.flatten(0, 1) @ others.flatten(0, 1).T / TEMPERATURE
        return F.cross_entropy(likeness.masked_fill(left_out, -torch.inf), wanted)

    return (search(ours, theirs, forth) + search(theirs, ours, back)) / 2


def align(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dynamic time warping of pairs (Sakoe and Chiba 1978) by the cost [B, N, M] of placing two moments together.

    Returns for each moment of the first the cheapest partner on the path [B, N], and for each of the second [B, M].
    """
    count, rows, columns = cost.shape
    total = np.full((count, rows + 1, columns + 1), np.inf)
    total[:, 0, 0] = 0
    for i in range(rows):
        for j in range(columns):
            before = np.minimum(np.minimum(total[:, i, j + 1], total[:, i + 1, j]), total[:, i, j])
            total[:, i + 1, j + 1] = cost[:, i, j] + before
    each = np.arange(count)
    row, column = np.full(count, rows - 1), np.full(count, columns - 1)
    forth, back = np.zeros((count, rows), np.int64), np.zeros((count, columns), np.int64)
    forth_cost, back_cost = np.full((count, rows), np.inf), np.full((count, columns), np.inf)
    for _ in range(rows + columns):
        here = cost[each, row, column]
        better = here < forth_cost[each, row]
        forth[each[better], row[better]], forth_cost[each[better], row[better]] = column[better], here[better]
        better = here < back_cost[each, column]
        back[each[better], column[better]], back_cost[each[better], column[better]] = (
            row[better],
            here[better],
        )
        steps = np.stack(
            [total[each, row, column], total[each, row, column + 1], total[each, row + 1, column]]
        )
        which = steps.argmin(0)  # both, the first only, the second only
        begun = (row == 0) & (column == 0)
        row = np.where(begun | (which == 2), row, np.maximum(row - 1, 0))
        column = np.where(begun | (which == 1), column, np.maximum(column - 1, 0))
    return forth, back
