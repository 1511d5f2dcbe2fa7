"""Two processes on CPUs are one: whatever engine shares the work, the run is the one that a single process makes.

The recipe has all that a loss could get wrong with parts of a batch: modalities weighed by their counts, balance of
the experts within modalities, the bias, groups, accumulation, and held-out losses.
"""

import copy
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import anytoken.training
from anytoken.training.metrics import read_metrics
from anytoken.training.stage import Stage, StageError
from anytoken.training.states import saved_states
from anytoken.training.trainer import train

STEPS = 10


@pytest.fixture
def shared(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose every sum runs over several processes."""
    held_out = [{"path": "things", "views": {"text->tile": 1, "beep->tile": 1}, "split": "test"}]
    recipe["model"] |= {"num_experts": 4, "num_experts_per_tok": 2, "expert_groups": {"common": 2, "text": 2}}
    return recipe | {
        "output": str(tmp_path / "shared"),
        "steps": STEPS,
        "accumulate": 2,
        "moe": {"router_modality_aux_loss": 0.02, "expert_bias_rate": 0.01},
        "eval": {"every": 5, "batches": 1, "data": held_out},
    }


def launch(
    recipe: dict[str, Any], processes: int, stop: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a recipe under torchrun; stop: to be asked to after so many steps."""
    recipe = copy.deepcopy(recipe)
    recipe.setdefault("distributed", {}).setdefault("world_size", processes)
    path = Path(recipe["output"]).with_suffix(".json")
    path.write_text(json.dumps(recipe))
    script = Path(__file__).with_name("run_stage.py")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *start, str(script), str(path), *([] if stop is None else [str(stop)])]
    environment = os.environ | {"PYTHONPATH": str(Path(anytoken.training.__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def fork(recipe: dict[str, Any], processes: int) -> None:
    """Run a recipe in forks of this process, told what torchrun tells: nothing is imported anew, so it is quick."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(processes),
        }
    stage = Stage.from_dict(
        recipe | {"distributed": recipe.get("distributed", {}) | {"world_size": processes}}
    )
    children = []
    for rank in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                train(stage)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


def finished(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-4000:]


def alone(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The same run in this process."""
    return train(
        Stage.from_dict(copy.deepcopy(recipe) | {"output": str(tmp_path / "alone"), "distributed": {}})
    )


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """Every number of a log but for what the clock says, by its place."""
    if isinstance(value, dict):
        found = [numbers(each, f"{name}.{key}") for key, each in value.items()]
    elif isinstance(value, list):
        found = [numbers(each, f"{name}.{place}") for place, each in enumerate(value)]
    else:
        clock = name.endswith(("tokens_per_second", "share_of_peak"))
        return {} if clock else {name: float(value)}
    return {key: number for each in found for key, number in each.items()}


def assert_same_run(ours: str | Path, theirs: str | Path) -> None:
    """The logs agree to 1e-4 in every number, and in every step; so do the weights nearly."""
    logs = [read_metrics(Path(folder) / "metrics.jsonl") for folder in (ours, theirs)]
    assert [entry["step"] for entry in logs[0] if "loss" in entry] == list(range(1, STEPS + 1))
    first, second = map(numbers, logs)
    assert first.keys() == second.keys()
    worst = max(first, key=lambda name: abs(first[name] - second[name]) / max(1, abs(second[name])))
    print(f"largest difference: {abs(first[worst] - second[worst]):.2e} in {worst}")
    assert first[worst] == pytest.approx(second[worst], rel=1e-4, abs=1e-4), worst
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (ours, theirs)
    )
    assert all(torch.allclose(value, other[name], atol=1e-3) for name, value in one.items())


def test_two_processes_train_as_one(shared: dict[str, Any], tmp_path: Path) -> None:
    fork(shared, 2)
    assert_same_run(shared["output"], alone(shared, tmp_path))


# ---- the engines of other libraries ----

SCALE = Path(__file__).parents[2] / "stages" / "scale"
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": str(SCALE / "deepspeed" / "zero1.json")},
    "zero2": {"deepspeed": str(SCALE / "deepspeed" / "zero2.json")},
    "zero3": {"deepspeed": str(SCALE / "deepspeed" / "zero3.json")},
    "fsdp2": {"mesh": str(SCALE / "mesh" / "fsdp2.json")},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_as_one_process(shared: dict[str, Any], tmp_path: Path, engine: str) -> None:
    finished(launch(shared | {"distributed": ENGINES[engine] | {"world_size": 2}}, 2))
    assert_same_run(shared["output"], alone(shared, tmp_path))
