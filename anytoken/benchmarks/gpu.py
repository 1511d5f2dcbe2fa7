"""`anytoken bench gpu`: training, decoding and tokenizers on one large GPU, in under nine minutes.

Each part has a budget and runs in its own process, so that one that hangs or breaks the CUDA context is stopped and the
next one starts. Within a part every case is written to the JSON file as soon as it is measured; a case that would not
fit into what is left is skipped with the reason, and one that fails (out of memory, a package that is missing) is
recorded and the rest continues. A killed run leaves all that it had measured.

MFU, the share of the peak (PaLM, arXiv 2204.02311), is FLOPs per token x tokens per second / peak. FLOPs per token
are those of products, each counted once (recomputation is no work):
- 6 per weight of a matrix that a token passes, of experts the chosen ones;
- 6 x layers x heads x head size x context for causal attention, where context is the length of the sample that a
  token lies in, averaged over tokens;
- 6 x width x ids that a target competes with for the head: all ids, or those that the grammar allows.

The peak is the vendor's dense bf16 figure where the GPU is in `GPUS` of `training/cost_estimate.py`, else the fastest
of a few large products. `plan_share` is the same speed as a share of the peak by the FLOPs of `anytoken plan`, which
counts the whole head at every position; `plan --measured` reads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anytoken.benchmarks.gpu_codecs import bench_codecs
from anytoken.benchmarks.gpu_decode import bench_decode
from anytoken.benchmarks.gpu_equality import bench_equality
from anytoken.benchmarks.gpu_part import Part, Sizes, peak_flops
from anytoken.benchmarks.gpu_train import bench_train
from anytoken.benchmarks.harness import Figures, environment
from anytoken.utils.atomic import write_file
from anytoken.utils.device import device_name, usable_device
from anytoken.utils.errors import EvaluationError

PARTS: dict[str, tuple[Callable[[Part, Sizes], None], float]] = {  # what runs, and its share of the time
    "equality": (bench_equality, 0.12),
    "train": (bench_train, 0.53),
    "decode": (bench_decode, 0.20),
    "codecs": (bench_codecs, 0.15),
}
MINUTES = 8.5  # of all parts, with starting their processes
STARTUP, GRACE = 12.0, 4.0  # seconds that a process takes to start, and that it may take over its budget


@dataclass
class Report:
    """The JSON file: metadata of the machine and the rows of every part; rewritten after each change."""

    path: Path
    figures: Figures = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, fresh: bool) -> Report:
        """Read a file; empty if it is missing or invalid."""
        kept = {} if fresh or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
        return cls(path, {"parts": {}} | kept)

    def update(self, part: str, **facts: Any) -> None:
        """Update a part and write the file."""
        self.figures["parts"].setdefault(part, {"rows": []}).update(facts)
        self.write()

    def write(self) -> None:
        """Rewrite the file."""
        write_file(self.path, json.dumps(self.figures, indent=1) + "\n")


def bench_gpu(out: Path, minutes: float = MINUTES, tiny: bool = False) -> Figures:
    """Run all parts, each in its own process and within its share of `minutes`; tiny: all in this one.

    EvaluationError without a CUDA device, unless tiny.
    """
    if not tiny and not torch.cuda.is_available():
        raise EvaluationError("there is no CUDA device here; --tiny runs everything in miniature on a CPU.")
    report = Report.open(out, fresh=True)
    report.figures |= {"minutes": minutes, "tiny": tiny} | environment()
    report.write()
    ends = time.monotonic() + 60 * minutes
    shares = 1.0
    for name, (_, share) in PARTS.items():  # what a part leaves over is shared by those after it
        budget = (ends - time.monotonic()) * share / shares
        shares -= share
        if tiny:
            run_part(name, out, budget, tiny)
        else:
            _in_own_process(name, out, budget)
    return json.loads(out.read_text(encoding="utf-8"))


def _in_own_process(name: str, out: Path, budget: float) -> None:
    """Run a part as a separate command, stopped after its budget and GRACE."""
    seconds = max(budget - STARTUP, 1)
    words = [
        "-m",
        "anytoken",
        "bench",
        "gpu",
        "--part",
        name,
        "--out",
        str(out),
        "--seconds",
        f"{seconds:.0f}",
    ]
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *words])
    try:
        code = process.wait(budget + GRACE)
        status = "done" if code == 0 else f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = f"ended after {time.monotonic() - started:.0f} s, its budget; what it had measured is kept"
    Report.open(out, fresh=False).update(name, status=status, seconds=time.monotonic() - started)


def run_part(name: str, out: Path, seconds: float, tiny: bool = False) -> Figures:
    """Run one part here and write its rows to the file, keeping the other parts. EvaluationError: unknown part."""
    if name not in PARTS:
        raise EvaluationError(f"part is {name!r}; there are {', '.join(PARTS)}.")
    started = time.monotonic()  # what this process has taken to start is the parent's to count
    device = usable_device("cpu" if tiny else "auto")
    report = Report.open(out, fresh=False)
    sizes = Sizes.tiny() if tiny else Sizes()
    report.figures |= environment() | {"device": device_name(device)} | peak_flops(device)
    rows: list[Figures] = []
    report.update(name, status="running", budget_seconds=seconds, rows=rows)

    def write(row: Figures) -> None:
        rows.append(row)
        report.write()

    part = Part(name, device, seconds, write, report.figures["peak_flops"])
    PARTS[name][0](part, sizes)
    report.update(name, status="done", seconds=time.monotonic() - started)
    return report.figures


def rows_of(figures: Figures) -> list[Figures]:
    """All cases of a file for the screen, failures and reasons too."""
    return [
        {"part": name, **{key: value for key, value in row.items() if not isinstance(value, dict | list)}}
        for name, part in figures["parts"].items()
        for row in part["rows"]
    ]
