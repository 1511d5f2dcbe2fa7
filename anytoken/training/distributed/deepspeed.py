"""DeepSpeed's settings, and loading its states with another number of processes.

ZeRO (arXiv 1910.02054) saves each process's part of the optimizer. For another number of processes, DeepSpeed's own
converter first rewrites it as a universal checkpoint (arXiv 2406.18820), with one file per parameter.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from anytoken import recipes
from anytoken.training.checkpoint import step_of

UNIVERSAL = "universal"


def load_deepspeed_config(path: str | None, converted: bool) -> dict[str, Any] | None:
    """The settings in a DeepSpeed JSON file; converted: load a universal checkpoint. None without a path."""
    if path is None:
        return None
    settings = json.loads(recipes.find(path).read_text(encoding="utf-8"))
    return settings | {"checkpoint": {"load_universal": True}} if converted else settings


@contextmanager
def no_zero3_init(arguments: TrainingArguments) -> Iterator[None]:
    """A context in which every process loads whole checkpoints; under ZeRO-3 transformers would shard them immediately.

    Rows, experts and optimizer groups are created from whole weights, and one process may load while others wait.
    """
    unset_hf_deepspeed_config()
    yield
    if arguments.deepspeed:
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def load_buffers(model: nn.Module, state: Path) -> None:
    """Load the buffers of a state, which universal checkpoints do not contain."""
    buffers = dict(model.named_buffers())
    for path in state.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in buffers.keys() & set(file.keys()):
                buffers[name].copy_(file.get_tensor(name))


def restore_adamw_groups(optimizer: torch.optim.Optimizer, weight_decays: list[float]) -> None:
    """Repair AdamW after loading a universal checkpoint, which gives all groups the first one's settings and all parts
    one shared step counter.
    """
    for group, decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def convert(state: Path) -> None:
    """Add the universal checkpoint to a state if it is missing; one process calls this while the others wait."""
    if (state / f"latest_{UNIVERSAL}").is_file():  # written last
        return
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        SimpleNamespace(
            input_folder=str(state / f"global_step{step_of(state)}"),
            output_folder=str(state / UNIVERSAL),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
