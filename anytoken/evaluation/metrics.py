"""Metrics for scores with baselines: proportions with an interval, text and sequence agreement.

A proportion of correct answers has a 95 % Wilson interval (Wilson 1927): with 200 cases, a difference of a few percent
is not significant, and the interval shows it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np

Z95 = 1.959964


@dataclass(frozen=True)
class Proportion:
    """`right` of `total` cases; `value` is their quotient, `low` and `high` its 95 % Wilson interval."""

    right: float
    total: int

    @property
    def value(self) -> float:
        """The share, 0 where there is no case."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval; (0, 1) where there is no case."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.value
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready: value, low, high, total."""
        low, high = self.interval
        return {
            "value": round(self.value, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "total": self.total,
        }


def share(scores: Sequence[float]) -> Proportion:
    """The mean of scores in [0, 1] as a Share."""
    return Proportion(float(sum(scores)), len(scores))


def same_text(answer: str, target: str) -> bool:
    """Exact match up to letter case and runs of white space."""
    return answer.casefold().split() == target.casefold().split()


def same_words(answer: str, target: str) -> bool:
    """`same_text` without punctuation, as a transcript has it and a name does not: "Red Apple." is "red apple"."""
    plain = (re.sub(r"[^\w\s']", " ", text) for text in (answer, target))
    return same_text(*plain)


def sequence_identity(answer: Sequence[Any], target: Sequence[Any]) -> float:
    """The share of positions that agree, over the longer of the two: missing and surplus elements count as wrong."""
    longest = max(len(answer), len(target))
    agree = sum(one == other for one, other in zip(answer, target, strict=False))
    return agree / longest if longest else 1.0


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer; the first in order among equals."""
    if not answers:
        raise ValueError("majority() needs at least one answer.")
    counts = Counter(answers)
    return max(counts, key=lambda answer: counts[answer])


def nearest(queries: np.ndarray, items: np.ndarray, block: int = 256) -> np.ndarray:
    """For each query [N, D] the index of the nearest item [M, D] by Euclidean distance; int64 [N]."""
    items = items.astype(np.float32)
    norms = (items**2).sum(1)
    found = []
    for start in range(0, len(queries), block):
        part = queries[start : start + block].astype(np.float32)
        found.append((norms - 2 * part @ items.T).argmin(1))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """How likely a random inside score is higher than a random outside one; ties count half (0.5: by chance)."""
    inner, outer = np.sort(np.asarray(inside, float)), np.asarray(outside, float)
    below = np.searchsorted(inner, outer, "left")  # inside scores lower than each outside one
    ties = np.searchsorted(inner, outer, "right") - below
    return float(np.mean(len(inner) - below - ties / 2) / len(inner))


def false_positive_rate(inside: Sequence[float], outside: Sequence[float], recall: float = 0.95) -> float:
    """Share of outside scores at or above the threshold that keeps `recall` of the inside ones (FPR95)."""
    inner = np.sort(np.asarray(inside, float))[::-1]
    threshold = inner[max(0, ceil(recall * len(inner)) - 1)]
    return float(np.mean(np.asarray(outside, float) >= threshold))
