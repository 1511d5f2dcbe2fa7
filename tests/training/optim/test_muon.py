"""Muon: torch's own on 2-D matrices, each expert and each part of a fused projection by itself, resumable."""

import copy
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from anytoken.model.modeling import AnyTokenForCausalLM
from anytoken.training.config import (
    OptimizerSpec,
    TrainConfig,
)
from anytoken.training.initialize import build_model
from anytoken.training.metrics import read_metrics
from anytoken.training.optim import muon
from anytoken.training.optim.muon import Chunk, Muon, make_optimizer, orthogonalise, owners
from anytoken.training.optim.param_groups import parameter_groups
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError

STEPS = 3


def stepped(values: Tensor, gradients: list[Tensor], **group: Any) -> Tensor:
    """A parameter after Muon's steps with these gradients."""
    parameter = nn.Parameter(values.clone())
    settings = {"params": [parameter], "muon": True, "lr": 0.02, "weight_decay": 0.1, **group}
    optimizer = Muon([settings])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def random(*shape: int) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(shape), [torch.randn(shape) for _ in range(STEPS)]


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_one_matrix_is_stepped_as_by_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values, gradients = random(*shape)
    theirs = nn.Parameter(values.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(stepped(values, gradients), theirs, atol=1e-3)
    assert not torch.allclose(values, theirs, atol=1e-2)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    found = orthogonalise(left * torch.linspace(0.1, 1, 16 if 16 in shape else 24) @ right, torch.float32)
    singular = torch.linalg.svdvals(found)
    assert found.shape == (3, *shape) and singular.min() > 0.5 and singular.max() < 1.3


def test_experts_and_fused_parts_are_stepped_one_by_one() -> None:
    torch.manual_seed(0)
    values, gradients = random(3, 24, 8)
    whole = stepped(values, gradients, parts=(16, 4, 4))
    for expert in range(3):
        for start, stop in ((0, 16), (16, 20), (20, 24)):
            part = (expert, slice(start, stop))
            alone = stepped(values[part], [gradient[part] for gradient in gradients])
            assert torch.allclose(whole[part], alone, atol=1e-3)
    assert not torch.allclose(whole, stepped(values, gradients), atol=1e-2)
    turned = stepped(
        values[0].T, [gradient[0].T for gradient in gradients], transposed=True, parts=(16, 4, 4)
    )
    assert torch.allclose(turned.T, whole[0], atol=1e-3)


# ---- shared out over processes ----

SHAPES = {"attention": (6, 24, 24), "tall": (5, 40, 16), "wide": (16, 40), "fused": (3, 24, 8)}


def several_steps(processes: dist.ProcessGroup | None, dtype: torch.dtype) -> tuple[Muon, list[Tensor]]:
    """The optimizer and the weights after steps with gradients that are the same in every process."""
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    settings = {"muon": True, "lr": 0.02, "weight_decay": 0.1}
    fused = {"params": [weights.pop("fused")], "parts": (16, 4, 4), **settings}
    bias = {"params": [nn.Parameter(torch.randn(7))], "lr": 1e-3}
    groups = [{"params": list(weights.values()), **settings}, fused, bias]
    optimizer = Muon(groups, dtype, processes)
    for _ in range(STEPS):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer, [one.detach() for group in optimizer.param_groups for one in group["params"]]


def in_processes(count: int, work: Callable[[int], None], folder: Path) -> None:
    """Do the work in forks that are one gloo group; it is given its rank."""
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=count
                )
                work(rank)
                dist.destroy_process_group()
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
    assert [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children] == [0] * count


@pytest.mark.slow  # it forks, which beside other tests' threads may hang
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processes_that_share_the_work_step_as_one_to_the_last_bit(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(muon.CHUNK, "cpu", 2 * 24 * 24)
    inner = muon.orthogonalise

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        done = []

        def counting(matrices: Tensor, dtype: torch.dtype) -> Tensor:
            done.append(matrices.shape)
            return inner(matrices, dtype)

        monkeypatch.setattr(muon, "orthogonalise", counting)
        optimizer, weights = several_steps(dist.group.WORLD, dtype)
        state = optimizer.state_dict()["state"]
        torch.save({"weights": weights, "state": state, "chunks": len(done)}, tmp_path / f"{rank}.pt")

    torch.set_num_threads(1)  # as in the forks: sums depend on it
    in_processes(2, work, tmp_path)
    optimizer, weights = several_steps(None, dtype)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for found in (first, second):
        assert all(torch.equal(one, other) for one, other in zip(found["weights"], weights, strict=True))
        for place, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, found["state"][place][name]) for name, value in state.items())
    # Each chunk is the work of one process, and both have some.
    with torch.no_grad():
        alone = sum(len([*optimizer._chunks(group)]) for group in optimizer.param_groups if group["muon"])
    assert first["chunks"] + second["chunks"] == STEPS * alone
    assert min(first["chunks"], second["chunks"]) >= STEPS * alone // 3


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_costs_of_processes_are_balanced(processes: int) -> None:
    shapes = [(4, 64, 64)] * 3 + [(2, 256, 64)] * 5 + [(1, 64, 256)] * 2 + [(9, 32, 32)] * 7
    chunks = [
        Chunk([(torch.empty(rows, columns),) * 3] * number, 1.0, torch.float32)
        for number, rows, columns in shapes
    ]

    def cost(shape: tuple[int, int, int]) -> int:
        """Multiplications of the three products of an iteration."""
        short, long = min(shape[1:]), max(shape[1:])
        return shape[0] * (short * long * short + short**3 + short * short * long)

    load = [0] * processes
    for owner, shape in zip(owners(chunks, processes), shapes, strict=True):
        load[owner] += cost(shape)
    assert max(load) - min(load) <= max(map(cost, shapes))
    assert owners(chunks, processes) == owners(list(chunks), processes)


def by_optimizer(model: Any) -> tuple[dict[str, Any], set[str]]:
    """Names of Muon's parameters -> the sizes of their parts; names of AdamW's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spec = OptimizerSpec(kind="muon")
    optimizer = make_optimizer(spec, model, parameter_groups(model, spec.weight_decay))
    muon = {
        names[id(one)]: (group["parts"], group["transposed"])
        for group in optimizer.param_groups
        if group["muon"]
        for one in group["params"]
    }
    adamw = {
        names[id(one)] for group in optimizer.param_groups if not group["muon"] for one in group["params"]
    }
    assert set(muon) | adamw == set(names.values()) and not set(muon) & adamw
    assert not optimizer.param_groups[0]["muon"]  # whose rate is logged
    return muon, adamw


def test_embeddings_head_norms_and_routers_stay_with_adamw(recipe: dict[str, Any]) -> None:
    recipe["model"] |= {"tie_word_embeddings": False, "shared_expert_intermediate_size": 16}
    _, model = build_model(TrainConfig.from_dict(recipe))
    assert isinstance(model, AnyTokenForCausalLM)
    muon, adamw = by_optimizer(model)
    layers = [name.removeprefix("model.layers.0.") for name in muon if name.startswith("model.layers.0.")]
    attention = [f"self_attn.{key}_proj.weight" for key in "qkvo"]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    shared = [f"mlp.shared_expert.{key}_proj.weight" for key in ("gate", "up", "down")]
    assert sorted(layers) == sorted(attention + experts + shared)
    assert muon["model.layers.1.mlp.experts.gate_up_proj"] == ((32, 32), False)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"} <= adamw


def test_fused_projections_of_other_models() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    kinds = {"gpt2": {}, "phi3": {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}}
    found = {}
    for kind, settings in kinds.items():
        config = AutoConfig.for_model(kind, **sizes, **settings)
        muon, _ = by_optimizer(AutoModelForCausalLM.from_config(config))
        found |= {name.split(".", 3)[-1]: fused for name, fused in muon.items()}
    assert found["attn.c_attn.weight"] == ((32, 32, 32), True)
    assert found["mlp.c_fc.weight"] == (None, True)
    assert found["self_attn.qkv_proj.weight"] == ((32, 16, 16), False)
    assert found["mlp.gate_up_proj.weight"] == ((48, 48), False)


def test_a_small_world_is_learnt_sooner_than_by_adamw(recipe: dict[str, Any], tmp_path: Path) -> None:
    ends = {}
    for kind in ("adamw", "muon"):
        changed = {"output": str(tmp_path / kind), "optimizer": {"kind": kind, "lr": 1e-2}, "steps": 40}
        folder = train(TrainConfig.from_dict(copy.deepcopy(recipe) | changed))
        ends[kind] = [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry][
            -1
        ]
    assert ends["muon"] < ends["adamw"] < 1.5


@pytest.mark.parametrize(
    "changes",
    [{"distributed": {"mesh": "a.json"}}, {"distributed": {"deepspeed": "b.json"}}, {"lora": {}}],
)
def test_what_needs_parts_of_matrices_is_refused(recipe: dict[str, Any], changes: dict[str, Any]) -> None:
    start = {"init_from": "mini", "tokenizers": {}, "model": {}}
    with pytest.raises(ConfigError, match=r"optimizer.kind muon .*use kind: adamw"):
        TrainConfig.from_dict(recipe | {"optimizer": {"kind": "muon"}} | start | changes)
