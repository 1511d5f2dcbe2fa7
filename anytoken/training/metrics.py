"""What training reports: loss, accuracy and bits per group, tokens a second, expert load, as JSON lines."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anytoken.model.moe import ExpertUse, expert_use
from anytoken.training.losses import LossParts, bits


class GroupMeter:
    """Sums of LossParts between two reports."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Start a new interval; the clock starts too."""
        self.sums = torch.zeros(3, len(self.names), dtype=torch.float64)
        self.terms: dict[str, float] = {}
        self.load: Tensor | None = None
        self.batches = self.tokens = 0
        self.started = time.monotonic()

    def add(self, parts: LossParts, tokens: int, load: Tensor | None = None) -> None:
        """Count one batch; ``tokens``: all its ids; ``load``: its expert counts [G, E + 1]."""
        self.sums += torch.stack([parts.nll, parts.right, parts.count]).double().cpu()
        for name, value in parts.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + float(value)
        if load is not None:
            self.load = load.cpu() if self.load is None else self.load + load.cpu()
        self.batches += 1
        self.tokens += tokens

    def report(self) -> dict[str, Any]:
        """Per group with targets: loss (nats), bits, accuracy, tokens; the means of the terms and overall."""
        found: dict[str, Any] = {}
        for name, nll, right, count in zip(self.names, *self.sums.tolist(), strict=True):
            if count:
                found[name] = {
                    "loss": nll / count,
                    "bits": bits(nll / count),
                    "accuracy": right / count,
                    "tokens": int(count),
                }
        means = [found[name]["loss"] for name in found if name != "control"]
        nll, _, count = self.sums.sum(1).tolist()
        seconds = max(time.monotonic() - self.started, 1e-9)
        use = {} if self.load is None else expert_use(self.load, self.names)
        return {
            "groups": found,
            **(_expert_report(use) if use else {}),
            "mean_over_modalities": sum(means) / max(len(means), 1),
            "mean_over_tokens": nll / max(count, 1),
            **{name: value / max(self.batches, 1) for name, value in self.terms.items()},
            "tokens_per_second": self.tokens / seconds,
        }


def _expert_report(use: dict[str, ExpertUse]) -> dict[str, Any]:
    return {
        "expert_load": {name: [round(x, 4) for x in one.load.tolist()] for name, one in use.items()},
        "expert_entropy": {name: round(one.entropy, 4) for name, one in use.items()},
        "dropped_share": {name: round(one.dropped, 4) for name, one in use.items()},
    }


class MetricsLog:
    """``metrics.jsonl``: append-only, and cut back to the resumed step so that a line per step remains."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop lines of steps after ``step``."""
        if self.path.is_file():
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
            self.path.write_text("".join(line + "\n" for line in kept))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; it must hold ``step``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All entries of a ``metrics.jsonl``."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
