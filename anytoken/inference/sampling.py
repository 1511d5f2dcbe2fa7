"""Sample the next id among the allowed ones: temperature, top-k, top-p, min-p, repetition penalty, guidance.

Sampling inverts the cumulative distribution with one uniform number per token. A sample then depends only on its
row's own numbers, and a rounding difference between batch sizes changes an outcome with a probability of about its
own size; with sorting or Gumbel noise it would depend on the number of candidates. Sources: nucleus
sampling (arXiv 1904.09751), min-p (2407.01082), repetition penalty (1909.05858), classifier-free guidance in
language models (2306.17806). Shapes: N rows, K allowed ids.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anytoken.utils.errors import RequestError
from anytoken.utils.hints import choices


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one modality.

    temperature >= 0 (0 is greedy); top_k >= 0 (0 is off); 0 < top_p <= 1 (1 is off); 0 <= min_p <= 1 (0 is off)
    keeps ids at least min_p times as probable as the top one; repetition_penalty > 0 (1 is off) on ids of the
    same kind already in the reply; cfg_scale >= 0 (1 is off, larger values follow the prompt more closely, at the
    cost of a second row in the batch). RequestError otherwise.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    cfg_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are welcome
                raise RequestError(f"{name} must be a number; received {value!r}.")
        limits = {
            "temperature": (0 <= self.temperature < float("inf"), "a number from 0 (greedy) up"),
            "top_k": (
                0 <= self.top_k < float("inf") and self.top_k % 1 == 0,
                "a whole number from 0 (off) up",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
            "cfg_scale": (0 <= self.cfg_scale < float("inf"), "a number from 0 up (1 is off)"),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise RequestError(f"{name} must be {allowed}; received {getattr(self, name)!r}.")
        object.__setattr__(self, "top_k", int(self.top_k))
        for name, value in asdict(self).items():
            if not isinstance(value, int | float):
                object.__setattr__(self, name, float(value))

    @property
    def greedy(self) -> bool:
        """Whether the most likely id is always chosen."""
        return self.temperature == 0 or self.top_k == 1


NAMES = tuple(field.name for field in fields(Sampling))


def merge_sampling(
    kinds: Sequence[str],
    defaults: Mapping[str, Sampling],
    overrides: Mapping[str, float | None],
    per_kind: Mapping[str, Sampling | Mapping[str, Any]] | None = None,
) -> dict[str, Sampling]:
    """One Sampling per kind: defaults, then `overrides` (None keeps), then `per_kind`, which wins.

    RequestError for a kind that is not in `kinds`, or settings that are not a mapping.
    """
    if not isinstance(per_kind or {}, Mapping):
        raise RequestError(f'sampling is {{kind: settings}}, as {{"image": ...}}; received {per_kind!r}.')
    unknown = sorted(set(per_kind or {}) - set(kinds), key=str)
    if unknown:
        raise RequestError(f"sampling names {unknown[0]!r}; this model has {', '.join(kinds)}.")
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    merged = {kind: replace(defaults.get(kind, Sampling()), **given) for kind in kinds}
    for kind, value in (per_kind or {}).items():
        if not isinstance(value, Sampling | Mapping):
            raise RequestError(f"sampling of {kind} is a Sampling or a mapping; received {value!r}.")
        merged[kind] = (
            value if isinstance(value, Sampling) else sampling_from_dict({**asdict(merged[kind]), **value})
        )
    return merged


def sampling_from_dict(values: Mapping[str, Any]) -> Sampling:
    """Sampling from JSON-ready data; RequestError names an unknown setting."""
    unknown = sorted(set(values) - set(NAMES))
    if unknown:
        raise RequestError(f"Unknown sampling setting {unknown[0]!r}{choices(unknown[0], NAMES)}.")
    return Sampling(**values)


def save_sampling(sampling: Mapping[str, Sampling], path: Path) -> None:
    """Write the defaults of each modality as JSON."""
    path.write_text(json.dumps({kind: asdict(value) for kind, value in sampling.items()}, indent=2) + "\n")


def load_sampling(path: Path) -> dict[str, Sampling]:
    """Read a file written by `save_sampling`; {} if there is none. RequestError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        return {kind: sampling_from_dict(values) for kind, values in json.loads(path.read_text()).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise RequestError(
            f"{path} does not hold sampling defaults ({error}); copy the checkpoint again."
        ) from error


def apply_cfg(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: move logits [N, K] away from those without the prompt."""
    return unconditional + scale * (conditional - unconditional)


def add_exits(logits: Tensor, exits: Tensor) -> Tensor:
    """Logits [N, K] whose last column, the planned open id, is at least the highest of the `exits` [N, E]."""
    planned = torch.cat([logits[:, -1:], exits], 1).amax(1, keepdim=True)
    return torch.cat([logits[:, :-1], planned], 1)


def apply_repetition_penalty(logits: Tensor, seen: Sequence[Tensor], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits [N, K] of each row's `seen` columns by the penalty."""
    logits = logits.clone()
    for row, columns in enumerate(seen):
        values = logits[row, columns]
        logits[row, columns] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Choose one column per row of logits [N, K] with uniforms [N] in [0, 1); returns int64 [N]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # shifted first: no overflow
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
