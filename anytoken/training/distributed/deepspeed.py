"""DeepSpeed's settings, and its states for another number of processes.

ZeRO (arXiv 1910.02054) saves what each process holds of the optimizer. Another number of processes cannot read that:
it is first rewritten, by DeepSpeed's own converter, as a universal checkpoint (arXiv 2406.18820), a file a parameter.
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
    """The settings of a DeepSpeed JSON; converted: they are to read a universal checkpoint. None for no path."""
    if path is None:
        return None
    settings = json.loads(recipes.find(path).read_text(encoding="utf-8"))
    return settings | {"checkpoint": {"load_universal": True}} if converted else settings


@contextmanager
def no_zero3_init(arguments: TrainingArguments) -> Iterator[None]:
    """Within it every process reads a checkpoint whole; under ZeRO-3 transformers would give it parts at once.

    Rows, experts and optimizer groups are made of whole weights, and one process may read while others wait.
    """
    unset_hf_deepspeed_config()
    yield
    if arguments.deepspeed:
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def load_buffers(model: nn.Module, state: Path) -> None:
    """Give a model the buffers of a state, which the universal form leaves out."""
    buffers = dict(model.named_buffers())
    for path in state.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in buffers.keys() & set(file.keys()):
                buffers[name].copy_(file.get_tensor(name))


def restore_adamw_groups(optimizer: torch.optim.Optimizer, weight_decays: list[float]) -> None:
    """Undo what reading a universal checkpoint does to AdamW: all groups get the settings of the first one, and all
    parts one and the same count of steps, which each then moves.
    """
    for group, decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def convert(state: Path) -> None:
    """Add the universal form of a state to it, unless it is there; one process calls this, and the others wait."""
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
