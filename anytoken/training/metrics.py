"""Training metrics as JSON lines: loss, accuracy and bits per group, tokens per second, expert load."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anytoken.model.moe import expert_use
from anytoken.training.losses.balanced import LossParts, bits
from anytoken.utils.atomic import write_file
from anytoken.utils.json_lines import read_json_lines


class LossMeter:
    """Sums over the batches between two reports; saved with the state, so that no batch is lost.

    The sums stay on the device of the batches: the host waits only for a report or a state.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Start a new interval; the clock starts too."""
        self.sums: Tensor | None = None  # float64 [3, groups]
        self.counts = torch.zeros(2, dtype=torch.float64)  # batches, ids
        self.terms: dict[str, float | Tensor] = {}
        self.load: Tensor | None = None
        self.seconds = 0.0
        self.start_clock()

    def start_clock(self) -> None:
        """Resume the clock of the interval."""
        self.started = time.monotonic()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """A context whose time does not count."""
        start = time.monotonic()
        yield
        self.started += time.monotonic() - start

    def add(self, parts: LossParts, tokens: int, load: Tensor | None = None) -> None:
        """Add one global batch; ``tokens``: all its ids; ``load``: its expert counts [L, G, E + 1]."""
        sums = torch.stack([parts.nll, parts.right, parts.count]).detach().double()
        self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums
        self.note({"loss": parts.loss.detach(), **parts.terms})
        if load is not None:
            self.load = load.double() if self.load is None else self.load.to(load.device) + load
        self.counts[0] += 1
        self.counts[1] += tokens

    def note(self, terms: Mapping[str, float | Tensor]) -> None:
        """Add terms to the last batch."""
        for name, value in terms.items():
            wide = value.detach().double() if isinstance(value, Tensor) else value
            self.terms[name] = wide if name not in self.terms else self.terms[name] + wide

    def _sums(self) -> Tensor:
        return torch.zeros(3, len(self.names), dtype=torch.float64) if self.sums is None else self.sums.cpu()

    def state(self) -> dict[str, Any]:
        """The state of the interval, as JSON."""
        load = None if self.load is None else self.load.tolist()
        seconds = self.seconds + time.monotonic() - self.started
        terms = {name: float(value) for name, value in self.terms.items()}
        return {
            "sums": self._sums().tolist(), "counts": self.counts.tolist(), "terms": terms, "load": load,
            "seconds": seconds,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the interval from ``state``."""
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.counts = torch.tensor(state["counts"], dtype=torch.float64)
        self.terms, self.seconds = dict(state["terms"]), state["seconds"]
        self.load = None if state["load"] is None else torch.tensor(state["load"], dtype=torch.float64)
        self.start_clock()

    def report(self) -> dict[str, Any]:
        """Per group with targets: loss (nats), bits, accuracy, tokens; the means of the terms and overall."""
        batches, tokens = self.counts.tolist()
        sums = self._sums()
        found: dict[str, Any] = {}
        for name, nll, right, count in zip(self.names, *sums.tolist(), strict=True):
            if count:
                found[name] = {
                    "loss": nll / count,
                    "bits": bits(nll / count),
                    "accuracy": right / count,
                    "tokens": int(count),
                }
        means = [found[name]["loss"] for name in found if name != "control"]
        nll, _, count = sums.sum(1).tolist()
        seconds = max(self.seconds + time.monotonic() - self.started, 1e-9)
        return {
            "groups": found,
            **({} if self.load is None else _expert_report(self.load.cpu(), self.names)),
            "mean_over_modalities": sum(means) / max(len(means), 1),
            "mean_over_tokens": nll / max(count, 1),
            **{name: float(value) / max(batches, 1) for name, value in self.terms.items()},
            "tokens_per_second": tokens / seconds,
        }


def _expert_report(load: Tensor, names: list[str]) -> dict[str, Any]:
    """Counts [L, G, E + 1] as each group's share of every layer's experts, and `expert_use` over all layers."""
    use = expert_use(load.sum(0), names)
    shares = (load / load.sum(-1, keepdim=True).clamp(min=1))[..., :-1]
    by_layer = {
        name: [[round(x, 4) for x in layer] for layer in share.tolist()]
        for name, share in zip(names, shares.unbind(1), strict=True)
        if name in use
    }
    return {
        "expert_load": by_layer,
        "expert_entropy": {name: round(one.entropy, 4) for name, one in use.items()},
        "dropped_share": {name: round(one.dropped, 4) for name, one in use.items()},
    }


class MetricsLog:
    """``metrics.jsonl``: append-only; on resumption it is cut back to the position of the saved state.

    So no step has two lines, and an incomplete last line is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def position(self) -> int:
        """The size in bytes."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def rewind(self, position: int) -> None:
        """Remove everything after ``position``."""
        if self.position() > position:
            os.truncate(self.path, position)

    def rewind_to_step(self, step: int) -> None:
        """Remove entries of later steps, for a state that does not store the position."""
        if self.path.is_file():
            kept = [entry for entry in read_metrics(self.path) if entry["step"] <= step]
            write_file(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; it must hold ``step``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All entries of a ``metrics.jsonl``, except an incomplete last line."""
    return list(read_json_lines(path, torn_end=True))
