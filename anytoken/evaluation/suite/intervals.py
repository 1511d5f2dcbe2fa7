"""Bootstrap intervals (Efron 1979) of one model's score or of a difference.

Two models are compared on the same samples: one resample serves both, so the difficulty of samples cancels out (paired
bootstrap; Koehn, EMNLP 2004). If every sample has the same score, the interval is a point, which understates the
uncertainty. R: resamples, N: samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

RESAMPLES = 1000
Total = Callable[[np.ndarray], float]


def indices(count: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sample indices of each resample; int64 [R, N]."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def resampled(total: Total, rows: np.ndarray, drawn: np.ndarray, is_mean: bool = False) -> np.ndarray:
    """The figure of each resample of rows [N] or [N, D]; float64 [R]."""
    if is_mean:
        known = ~np.isnan(rows)
        counts = known[drawn].sum(1)
        sums = np.where(known, rows, 0.0)[drawn].sum(1)
        return np.divide(sums, counts, out=np.full(len(drawn), np.nan), where=counts > 0)
    return np.array([total(rows[one]) for one in drawn])


def percentiles(found: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled figures; NaN if none is defined."""
    known = found[~np.isnan(found)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def figure(
    total: Total, rows: np.ndarray, is_mean: bool = False, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """value, low, high (95 % bootstrap) and total of rows, ready for JSON; None if undefined."""
    low, high = percentiles(resampled(total, rows, indices(len(rows), resamples), is_mean))
    value = total(rows)
    return {
        **{name: None if np.isnan(one) else round(one, 5) for name, one in
           (("value", value), ("low", low), ("high", high))},
        "total": len(rows),
    }  # fmt: skip


def difference(
    total: Total, ours: np.ndarray, theirs: np.ndarray, is_mean: bool = False, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Our score minus theirs on the same samples, with its 95 % interval and p-value.

    p: twice the smaller share of resamples on one side of 0, at most 1; not below 2 / R.
    """
    drawn = indices(len(ours), resamples)
    found = resampled(total, ours, drawn, is_mean) - resampled(total, theirs, drawn, is_mean)
    low, high = percentiles(found)
    known = found[~np.isnan(found)]
    tail = min((known <= 0).mean(), (known >= 0).mean()) if len(known) else 1.0
    value = total(ours) - total(theirs)
    return {
        **{name: None if np.isnan(one) else round(one, 5) for name, one in
           (("value", value), ("low", low), ("high", high))},
        "p": round(float(min(1.0, max(2 * tail, 2 / resamples))), 4),
        "total": len(ours),
    }  # fmt: skip
