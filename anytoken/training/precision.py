"""Choose the precision of matrix products by measurement: bfloat16 is several times faster on some processors and
several times slower on others of the same family.
"""

import logging
from functools import lru_cache

import torch
from torch import distributed

from anytoken.training.run_metadata import measure_peak_flops

MARGIN = 1.2  # how much quicker products in bfloat16 must be: casts and float32 parts take some of the gain
log = logging.getLogger(__name__)


@lru_cache
def bf16_speedup(device: torch.device) -> float:
    """The speed of a bfloat16 product relative to float32; measuring takes a fraction of a second.

    All processes of a run must call this; the measurement of the first is used.
    """
    side, tries = (2048, 5) if device.type == "cuda" else (512, 3)
    fp32, bf16 = (measure_peak_flops(device, dtype, side, tries) for dtype in (torch.float32, torch.bfloat16))
    found = torch.tensor([bf16 / fp32], dtype=torch.float64, device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(found, 0)
    return float(found)


def quicker_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if its products are clearly faster on this device, else float32."""
    return torch.bfloat16 if bf16_speedup(device) >= MARGIN else torch.float32


def choose_precision(device: torch.device) -> str:
    """Resolve ``precision: auto`` on this device to fp32 or bf16; logs the choice and the reason."""
    chosen = "bf16" if quicker_dtype(device) == torch.bfloat16 else "fp32"
    log.info("precision: %s; bf16 products are %.1f x as fast here", chosen, bf16_speedup(device))
    return chosen
