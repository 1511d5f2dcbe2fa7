"""Weights sharded over a mesh of processes: FSDP2 and expert parallelism, through transformers.

Each process computes its own rows of a batch. The weights of a layer, their gradients and optimizer states are sharded,
and gathered while the layer is computed (FSDP, arXiv 2304.11277). With ``ep_size`` the experts are not gathered: each
of ``ep_size`` processes holds whole experts, and tokens are sent to them and back (GShard, arXiv 2006.16668).
accelerate's FSDP has no expert parallelism and is silently disabled on CPUs.
"""

import json
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import (
    DistributedConfig,
    initialize_distributed_mesh,
    load_optimizer_distributed,
    save_optimizer_distributed,
)
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism

from anytoken import recipes
from anytoken.training.config import TrainConfig
from anytoken.training.lora import base_model
from anytoken.training.step import ModelWithLoss
from anytoken.utils.errors import ConfigError

OPTIMIZER, SCHEDULER = "optimizer", "scheduler.pt"  # in a state: a folder of every process's part, and a file


def read_mesh(stage: TrainConfig) -> DistributedConfig | None:
    """The mesh of a recipe: settings of transformers' ``DistributedConfig``; None without one.

    By default all weights are sharded over all processes: ``fsdp_size`` is the world size divided by the other sizes.
    ConfigError for unknown settings, or settings that this loss does not support.
    """
    if stage.distributed.mesh is None:
        return None
    settings = mesh_settings(stage.distributed.mesh)
    known = DistributedConfig.__dataclass_fields__
    odd = [name for name in settings if name not in known]
    odd += [name for name in ("tp_size", "pp_size") if settings.get(name, 1) > 1]  # they share one batch
    if odd:
        raise ConfigError(f"distributed.mesh has {', '.join(odd)}, which AnyToken does not train with")
    world_size = stage.distributed.world_size
    settings.setdefault("fsdp_size", max(1, world_size // settings.get("dp_replicate_size", 1)))
    config = DistributedConfig(**settings)
    if config.dp_size != world_size:
        raise ConfigError(
            f"distributed.mesh is for {config.dp_size} processes, but distributed.world_size is {world_size}"
        )
    return config


def mesh_settings(mesh: str | dict[str, Any]) -> dict[str, Any]:
    """The settings, inline or from a JSON file."""
    if isinstance(mesh, dict):
        return dict(mesh)
    settings: dict[str, Any] = json.loads(recipes.find(mesh).read_text(encoding="utf-8"))
    return settings


def parallelize(model: ModelWithLoss, config: DistributedConfig) -> None:
    """Shard the weights of a model over all processes, in place; every process must hold the whole model before.

    The root is the model with its loss: the vocabulary, which the loss reads past the head's own forward, stays
    gathered for the whole step. ConfigError for null experts, which cannot be sharded.
    """
    _, meshes = initialize_distributed_mesh(config)
    if meshes is None:
        return
    lm = base_model(model.lm)
    _, ep_plan, fsdp_plan = lm._resolve_parallel_plans(config)
    if config.ep_size > 1:
        if getattr(lm.config, "num_null_experts", 0):
            raise ConfigError(
                "distributed.mesh: null experts cannot be spread over processes; leave ep_size out"
            )
        parts = meshes.get_mesh("ep"), meshes.get_mesh("tp")
        apply_expert_parallelism(lm, *parts, ep_plan, ep_implementation=config.ep_implementation)
    lm.config.distributed_config = config  # saving gathers
    # The engine and the Trainer ask for it.
    vars(model)["config"] = SimpleNamespace(distributed_config=config)
    model.is_distributed_loading_by_transformers = True
    layers = {f"lm.{name}": style for name, style in fsdp_plan.items() if name.split(".")[-1].isdigit()}
    experts = {f"lm.{name}": style for name, style in ep_plan.items()}
    apply_fully_sharded_data_parallelism(model, meshes, layers, experts)


def is_sharded(model: Any) -> bool:
    """Whether a model's weights are sharded."""
    return isinstance(model, ModelWithLoss) and model.is_distributed_loading_by_transformers


def full_tensor(value: Any) -> Any:
    """The gathered tensor of a sharded one; anything else unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def param_groups_by_mesh(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split optimizer groups so that each holds parameters of one mesh: a fused step cannot span two."""
    cut = []
    for group in groups:
        by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for one in group["params"]:
            by_mesh[one.device_mesh if isinstance(one, DTensor) else None].append(one)
        cut += [{**group, "params": some} for some in by_mesh.values()]
    return cut


def load_full_state_dict(model: nn.Module, saved: PreTrainedModel) -> None:
    """Load unsharded weights into a model, sharded or not."""
    set_model_state_dict(model, saved.state_dict(), options=StateDictOptions(full_state_dict=True))


def save_optimizer(model: nn.Module, optimizer: Any, scheduler: Any, state: str, first: bool) -> None:
    """Write each process's part of the optimizer to a state, and the schedule in the first process; all must call
    this."""
    save_optimizer_distributed(model, optimizer, f"{state}/{OPTIMIZER}")
    if first:
        torch.save(scheduler.state_dict(), f"{state}/{SCHEDULER}")


def load_optimizer(model: nn.Module, optimizer: Any, scheduler: Any, state: str) -> None:
    """Load what ``save_optimizer`` wrote with any number of processes."""
    load_optimizer_distributed(model, optimizer, f"{state}/{OPTIMIZER}")
    saved = torch.load(f"{state}/{SCHEDULER}", weights_only=True)
    for name, own in scheduler.state_dict().items():
        if isinstance(own, list):  # an entry a group: all the same, but another mesh cuts other groups
            saved[name] = saved[name][:1] * len(own)
    scheduler.load_state_dict(saved)
