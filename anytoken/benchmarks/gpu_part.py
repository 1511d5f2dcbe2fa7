"""Common code of the parts of `bench gpu`: time budget, timing, and sizes."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from anytoken.benchmarks.harness import Figures
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, CodeSequence
from anytoken.training.cost_estimate import GPUS
from anytoken.training.run_metadata import measure_peak_flops

Shape = dict[str, Any]
MEBI = 2**20
DENSE: Shape = {  # 350 M weights besides its vocabulary
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 3712, "tie_word_embeddings": True,
}  # fmt: skip
MOE: Shape = {  # 1.07 B weights, of which a token passes 0.15 B and the tied vocabulary of 0.22 B
    "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
    "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "norm_topk_prob": True,
    "tie_word_embeddings": True,
}  # fmt: skip
LARGE: Shape = {  # Qwen3-8B's, with as many of its 36 layers as fit with their gradients and optimizer
    "hidden_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "tie_word_embeddings": False,
}  # fmt: skip
SMALL: Shape = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured, in full or in miniature.

    shapes: settings of the models by name, dense where they name no experts. text, codes: ids. samples: shortest and
    longest packed sample. seconds: how long a case is timed for. grid: rows and columns of a generated image.
    """

    shapes: dict[str, Shape] = field(
        default_factory=lambda: {"350M dense": DENSE, "1B-A0.3B MoE": MOE, "8B cut": LARGE}
    )
    text: int = 150_000
    codes: int = 64_000
    rows: int = 4
    context: int = 8192
    samples: tuple[int, int] = (256, 4096)
    seconds: float = 1.5
    batches: tuple[int, ...] = (1, 8, 64, 256)
    grid: int = 8
    is_tiny: bool = False

    @classmethod
    def tiny(cls) -> Sizes:
        """Miniature sizes: every case runs on a CPU in a fraction of a second."""
        moe = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
        }
        shapes = {
            "350M dense": SMALL | {"intermediate_size": 48, "tie_word_embeddings": True},
            "1B-A0.3B MoE": SMALL | moe | {"tie_word_embeddings": True},
        }
        return cls(shapes, 120, 40, 2, 64, (8, 32), 0.0, (1, 3), 2, True)

    def space(self) -> TokenSpace:
        """Text, and images and speech that share the codes."""
        space = TokenSpace(self.text)
        side = self.grid
        space.append_modality("image", [self.codes // 2], CodeGrid(("rows", "cols"), (1, 1), (side, side)))
        space.append_modality("speech", [self.codes // 2], CodeSequence(1, 512))
        return space


class Skip(Exception):
    """A case is skipped, with the reason."""


class Part:
    """One running part of the benchmark: cases within a budget, each written as soon as it is measured."""

    def __init__(
        self, name: str, device: torch.device, seconds: float, write: Callable[[Figures], None], peak: float
    ) -> None:
        self.name, self.device, self.write, self.peak = name, device, write, peak
        self.ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.ends - time.monotonic()

    def case(self, name: str, needs: float, measure: Callable[[], Figures], **facts: Any) -> Figures | None:
        """Measure a case that takes about `needs` seconds; its figures, or None if it was skipped or failed.

        facts: further fields of the row. Only a request to stop is raised: a failure costs one case.
        """
        row: Figures = {"case": name, **facts}
        found = None
        started = time.monotonic()
        try:
            if self.left < needs:
                raise Skip(
                    f"it takes about {needs:.0f} s, and {max(self.left, 0):.0f} s of the budget are left"
                )
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            found = measure()
            row |= {"status": "measured", **found}
            if self.device.type == "cuda":
                row["peak MiB"] = torch.cuda.max_memory_allocated(self.device) / MEBI
        except Skip as why:
            row |= {"status": "skipped", "reason": str(why)}
        except Exception as error:
            row |= {"status": "failed", "reason": reason(error)}
        row["took"] = time.monotonic() - started
        self.write(row)
        self.tidy()
        return found

    def tidy(self) -> None:
        """Free the memory of the last case."""
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            torch._dynamo.reset()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Synchronize with the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], object], seconds: float, warmups: int = 2, least: int = 3) -> float:
        """Median seconds of one call, over `seconds` of calls and at least `least` of them, after `warmups`."""
        for _ in range(warmups):
            work()
        self.wait()
        taken: list[float] = []
        began = time.monotonic()
        while len(taken) < least or time.monotonic() - began < seconds:
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)


def reason(error: Exception) -> str:
    """An error in one line, for the row of a failed case."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def gpu_key(device: torch.device) -> str | None:
    """The key of a device in the table of GPUs; None if unknown."""
    if device.type != "cuda":
        return None
    own = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((key for key in GPUS if key in own), None)


def peak_flops(device: torch.device) -> Figures:
    """The peak FLOP/s for MFU: the data sheet's bf16 peak if the GPU is known; and the measured peak."""
    cuda = device.type == "cuda"
    dtype, side = (torch.bfloat16, 8192) if cuda else (torch.float32, 256)
    measured = measure_peak_flops(device, dtype, side, 10 if cuda else 2)
    key = gpu_key(device)
    listed = GPUS[key].peak_tflops * 1e12 if key else None
    return {
        "gpu": key,
        "measured_peak_flops": measured,
        "listed_peak_flops": listed,
        "peak_flops": listed or measured,
    }
