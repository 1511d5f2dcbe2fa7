"""Select the attention implementation: FlashAttention if package, device and dtype allow it, else PyTorch's own.

The names are transformers' (`ALL_ATTENTION_FUNCTIONS`). FlashAttention (arXiv 2205.14135, 2307.08691, 2407.08608)
takes no mask: samples and padding are given as cumulative lengths, which `model/packed_attention.py` gives it in
training and `inference/kv_cache.py` in generation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils.generic import is_flash_attention_requested

from anytoken.utils.errors import ConfigError
from anytoken.utils.hints import choices

FLASH = {  # name: the test for its package, the package
    "flash_attention_3": (is_flash_attn_3_available, "flash_attn_interface (FlashAttention 3)"),
    "flash_attention_2": (is_flash_attn_2_available, "flash_attn 2.3.3 or later"),
}
CHOICES = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
HALF = (torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)


def use_attention(lm: PreTrainedModel, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Switch a model to an attention implementation, and log it; returns its name.

    wanted: one of CHOICES; "auto" uses FlashAttention if it can run, otherwise the model's default, sdpa. device,
    dtype: those of the computation (the dtype of autocast, if it is on). ConfigError for an unknown name, or
    one that cannot run.
    """
    if wanted not in CHOICES:
        raise ConfigError(f"Unknown attention implementation {wanted!r}{choices(wanted, CHOICES)}.")
    reason = ""
    if wanted == "auto":
        wanted, reason = _best(lm, device, dtype)
    elif wanted in FLASH:
        obstacle = flash_obstacle(wanted, lm, device, dtype)
        if obstacle:
            raise ConfigError(f"{wanted} cannot run here: {obstacle}. Choose auto or sdpa.")
    if wanted != lm.config._attn_implementation:
        try:
            lm.set_attn_implementation(wanted)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{type(lm).__name__} cannot use {wanted}: {error}") from error
    log.info("attention: %s on %s in %s%s", wanted, device, str(dtype).removeprefix("torch."), reason)
    return wanted


def _best(lm: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The fastest implementation that can run, and the reason against a faster one."""
    obstacles = {name: flash_obstacle(name, lm, device, dtype) for name in FLASH}
    for name, obstacle in obstacles.items():
        if not obstacle and (name == "flash_attention_2" or torch.cuda.get_device_capability(device)[0] == 9):
            return name, ""
    return lm.config._attn_implementation, f" (no FlashAttention: {obstacles['flash_attention_2']})"


def flash_obstacle(name: str, lm: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """The reason why FlashAttention cannot run for a model; "" if it can."""
    available, package = FLASH[name]
    heads = lm.config.get_text_config()
    head_dim = getattr(heads, "head_dim", None) or heads.hidden_size // heads.num_attention_heads
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device}"
    if dtype not in HALF:
        return f"it computes in bfloat16 or float16, and this is {str(dtype).removeprefix('torch.')}"
    if not available():
        return f"the package {package} is not installed"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return f"it needs an Ampere GPU or a later one, and this is {torch.cuda.get_device_name(device)}"
    if head_dim > 256 or head_dim % 8:
        return f"its heads are at most 256 wide and a multiple of 8, and these are {head_dim}"
    if not lm._supports_flash_attn:
        return f"{type(lm).__name__} does not support it"
    return ""


def runs_flash(lm: PreTrainedModel) -> bool:
    """Whether a model's own forward pass runs FlashAttention with its current weights."""
    return is_flash_attention_requested(lm.config) and lm.get_input_embeddings().weight.dtype in HALF


@contextmanager
def usable_attention(lm: PreTrainedModel, cached: bool = False, masked: bool = False) -> Iterator[None]:
    """A context in which sdpa replaces an implementation that does not support the computation.

    These are FlashAttention with float32 weights and no autocast, as between training steps, or with an explicit mask
    (masked); and flex_attention with a key-value cache (cached), since its block masks are for whole sequences.
    """
    before = lm.config._attn_implementation
    flash = is_flash_attention_requested(lm.config) and (masked or not runs_flash(lm))
    swap = flash or (cached and before == "flex_attention")
    if swap:
        lm.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if swap:
            lm.config._attn_implementation = before
