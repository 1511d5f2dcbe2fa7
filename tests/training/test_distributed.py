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
from anytoken.training import precision, trainer
from anytoken.training.checkpoint import saved_states
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.distributed.fsdp import mesh_settings
from anytoken.training.interrupts import Interrupted
from anytoken.training.metrics import read_metrics
from anytoken.training.optim import muon
from anytoken.training.trainer import StageTrainer, train
from anytoken.utils.errors import ConfigError

STEPS = 10


@pytest.fixture
def shared(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose every sum runs over several processes."""
    held_out = [{"path": "things", "views": {"text->tile": 1, "beep->tile": 1}, "split": "test"}]
    recipe["model"] |= {"num_experts": 4, "num_experts_per_tok": 2, "expert_groups": {"common": 2, "text": 2}}
    return recipe | {
        "output": str(tmp_path / "shared"),
        "steps": STEPS,
        "gradient_accumulation_steps": 2,
        "moe": {"router_modality_aux_loss": 0.02, "expert_bias_rate": 0.01},
        "eval": {"every": 5, "batches": 1, "data": held_out},
    }


def launch(recipe: dict[str, Any]) -> None:
    """Run a recipe under torchrun."""
    path = Path(recipe["output"]).with_suffix(".json")
    path.write_text(json.dumps(recipe))
    script = Path(__file__).with_name("run_stage.py")
    processes = str(recipe["distributed"]["world_size"])
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [sys.executable, *start, str(script), str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(anytoken.training.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def fork(recipe: dict[str, Any], processes: int, stop: int | None = None) -> list[int]:
    """Run a recipe in forks of this process, told what torchrun tells, and give their statuses.

    Nothing is imported anew, so it is quick. stop: ask one of them to stop after so many steps, as Ctrl-C does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(processes),
        }
    stage = TrainConfig.from_dict(recipe)
    children = []
    for rank in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= told | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(child(stage, stop if rank == 0 else None))
    return [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in children]


def child(stage: TrainConfig, stop: int | None) -> int:
    """Train in a fork, and give its exit status."""
    inner = StageTrainer.compute_loss

    def stopping(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.stop.asked = self.stop.asked or self.state.global_step == stop
        return inner(self, *args, **kwargs)

    StageTrainer.compute_loss = stopping  # type: ignore[method-assign]
    try:
        train(stage)
    except Interrupted:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def alone(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The same run in this process."""
    return train(
        TrainConfig.from_dict(copy.deepcopy(recipe) | {"output": str(tmp_path / "alone"), "distributed": {}})
    )


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """Every number of a log but for what the clock says, by its place."""
    if isinstance(value, dict):
        found = [numbers(each, f"{name}.{key}") for key, each in value.items()]
    elif isinstance(value, list):
        found = [numbers(each, f"{name}.{place}") for place, each in enumerate(value)]
    else:
        clock = name.endswith(("tokens_per_second", "mfu"))
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


@pytest.mark.slow  # it forks, which beside other tests' threads may hang
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_two_processes_train_as_one(
    shared: dict[str, Any], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "quicker_dtype", lambda device: torch.float32)  # or rounding drowns the rest
    shared["optimizer"] = {"kind": kind, "lr": 1e-2}
    assert fork(shared | {"distributed": {"world_size": 2}}, 2) == [0, 0]
    assert_same_run(shared["output"], alone(shared, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_muon_goes_on_with_another_number_of_processes(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    monkeypatch.setattr(muon, "quicker_dtype", lambda device: torch.float32)
    shared["optimizer"] = {"kind": "muon", "lr": 1e-2}
    assert fork(shared | {"distributed": {"world_size": before}}, before, 5)[0] == 130
    assert fork(shared | {"distributed": {"world_size": after}}, after) == [0] * after
    assert_same_run(shared["output"], alone(shared, tmp_path))


@pytest.mark.slow
def test_the_first_process_chooses_the_precision_of_all(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(device: torch.device, dtype: torch.dtype, *sizes: int) -> float:
        return 3.0 if (dtype == torch.bfloat16) == (os.environ["RANK"] == "0") else 1.0

    def noting(start: Any, stage: TrainConfig, device: torch.device) -> None:
        (tmp_path / os.environ["RANK"]).write_text(stage.precision)

    monkeypatch.setattr(precision, "measure_peak_flops", measured)
    monkeypatch.setattr(trainer, "choose_attention", noting)
    shared |= {"precision": "auto", "steps": 1, "distributed": {"world_size": 2}}
    precision.bf16_speedup.cache_clear()
    assert fork(shared, 2) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["bf16", "bf16"]


def test_another_number_of_processes_than_asked_for_is_an_error(
    shared: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert fork(shared, 2) == [1, 1]
    assert "distributed.world_size is 1 but 2 processes run" in capfd.readouterr().err
    said = {
        "rows evenly": {"world_size": 3},
        "2 but 1 processes run; launch with torchrun": {"world_size": 2},
        "is for 4 processes, but distributed.world_size is 1": {"mesh": {"fsdp_size": 4}},
        "mesh has rows, tp_size, which": {"mesh": {"rows": 1, "tp_size": 2}},
        "neither a file nor a recipe": {"deepspeed": "stages/scale/none.json"},
    }
    for message, distributed in said.items():
        with pytest.raises(ValueError, match=message):
            train(TrainConfig.from_dict(shared | {"distributed": distributed}))


# ---- the engines of other libraries ----

SCALE = Path(__file__).parents[2] / "stages" / "scale"
ENGINES = {
    "ddp": {},
    "zero1": {"deepspeed": str(SCALE / "deepspeed" / "zero1.json")},
    "zero2": {"deepspeed": str(SCALE / "deepspeed" / "zero2.json")},
    "zero3": {"deepspeed": str(SCALE / "deepspeed" / "zero3.json")},
    "fsdp2": {"mesh": str(SCALE / "mesh" / "fsdp2.json")},
    "experts": {"mesh": str(SCALE / "mesh" / "fsdp2_ep8.json")},
}


def engine_of(name: str, processes: int) -> dict[str, Any]:
    """The ``distributed`` section; a lone process has nobody to share experts with."""
    if name == "experts":
        return {
            "world_size": processes,
            "mesh": mesh_settings(ENGINES[name]["mesh"]) | {"ep_size": processes},
        }
    if "deepspeed" in ENGINES[name]:
        pytest.importorskip("deepspeed")
    return {"world_size": processes, **ENGINES[name]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_as_one_process(shared: dict[str, Any], tmp_path: Path, engine: str) -> None:
    launch(shared | {"distributed": engine_of(engine, 2)})
    assert_same_run(shared["output"], alone(shared, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("engine", ENGINES)
def test_another_number_of_processes_goes_on(
    shared: dict[str, Any], tmp_path: Path, engine: str, before: int, after: int
) -> None:
    assert fork(shared | {"distributed": engine_of(engine, before)}, before, 5)[0] == 130
    states = [state.name for state in saved_states(Path(shared["output"]))]
    assert states == ["checkpoint-4", "checkpoint-6"]
    assert fork(shared | {"distributed": engine_of(engine, after)}, after) == [0] * after
    assert_same_run(shared["output"], alone(shared, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_states_of_one_engine_are_not_for_another(shared: dict[str, Any], tmp_path: Path) -> None:
    fork(shared | {"distributed": {"world_size": 2}}, 2, 5)
    changed = shared | {"distributed": engine_of("fsdp2", 1)}
    with pytest.raises(
        ConfigError, match=r"saved by distributed.ddp, and mesh cannot.*init_from=\S*checkpoint-6"
    ):
        train(TrainConfig.from_dict(changed))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_best_state_is_exported_by_all_processes(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    bits = {2: 2.0, 4: 1.0, 6: 3.0, 8: 3.0}
    monkeypatch.setattr(StageTrainer, "log_held_out", lambda self, step, report: {"eval_bits": bits[step]})
    shared |= {"eval": shared["eval"] | {"every": 2}, "early_stopping": {"patience": 2}, "keep_best": True}
    shared["schedule"] = {"kind": "constant", "warmup_steps": 2}
    assert fork(shared | {"distributed": engine_of(engine, 2)}, 2) == [0, 0]
    lines = read_metrics(Path(shared["output"]) / "metrics.jsonl")
    assert lines[-1]["step"] == 8
    short = alone(shared | {"steps": 4, "early_stopping": None, "keep_best": False}, tmp_path)
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (shared["output"], short)
    )
    assert all(torch.allclose(value, second[name], atol=1e-3) for name, value in first.items())
