"""Metadata of a run for its report: the code, the machine, the model's size, and the data with checksums."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from anytoken.data.mixture import SourceSpec
from anytoken.training.cost_estimate import count, flops_per_token
from anytoken.utils.errors import ConfigError
from anytoken.utils.git import commit

PACKAGES = ("anytoken", "torch", "transformers", "accelerate", "peft")


def run_facts(
    model: PreTrainedModel, sources: list[SourceSpec], processes: int, context: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The facts as JSON, with ``data`` as from ``data_facts``; dtype: of the matrix products."""
    counted = count(model, [name for name, one in model.named_parameters() if one.requires_grad])
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        "parameters": counted.total,
        "active_parameters": counted.active,
        "trained_parameters": counted.trained,
        "flops_per_token": flops_per_token(model.config, counted, context),
        "measured_peak_flops": processes * measure_peak_flops(model.device, dtype),
        "precision": str(dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "versions": {name: version(name) for name in PACKAGES},
        "data": data_facts(sources),
    }


def measure_peak_flops(device: torch.device, dtype: torch.dtype, side: int = 1024, tries: int = 5) -> float:
    """FLOP/s of the fastest of a few matrix products, the peak that MFU refers to."""
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(tries):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for a device that runs on its own
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def check_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """ConfigError if a data set was rebuilt since the run started: its samples would come in another order."""
    known = {row["set"]: row for row in before["data"]}
    changed = [row["set"] for row in now["data"] if known.get(row["set"], row) != row]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} changed since this run started; restore the old data, or start a new run "
            "with another output"
        )


def data_facts(sources: list[SourceSpec]) -> list[dict[str, Any]]:
    """Provenance of each tokenized set: the checksum of its records and the fingerprints of its tokenizers."""
    folders = [
        folder for one in sources for folder in (one.path, *([one.pair_with.path] if one.pair_with else []))
    ]
    rows = []
    for folder in dict.fromkeys(folders):
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        tokenizers = {kind: written[:12] for kind, written in manifest["tokenizers"].items()}
        rows.append(
            {
                "set": folder,
                "records": manifest["records"],
                "sha256": manifest["source_sha256"][:12],
                "tokenizers": tokenizers,
            }
        )
    return rows
