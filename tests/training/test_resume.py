"""Nothing is lost: a run that is killed, stopped, or meets a full disk goes on as if nothing had happened."""

import copy
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import anytoken.training
from anytoken.cli import app
from anytoken.data.mixture import Mixture
from anytoken.data.packing import PackedStream, PackState
from anytoken.processor import Processor
from anytoken.training.checkpoint import saved_states
from anytoken.training.config import TrainConfig
from anytoken.training.interrupts import Interrupted
from anytoken.training.metrics import read_metrics
from anytoken.training.trainer import StageTrainer, train
from anytoken.utils.errors import DivergenceError, WriteError

CLOCK = {"tokens_per_second", "mfu"}
Step = torch.Tensor


def log_of(folder: str | Path) -> list[dict[str, Any]]:
    """The whole log but for what the clock says: losses, tokens of each group (the data's order), norms, rates."""
    entries = read_metrics(Path(folder) / "metrics.jsonl")
    for entry in entries:
        for place in (entry, entry.get("eval", {})):
            for key in CLOCK:
                place.pop(key, None)
    return entries


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_same_run(ours: str | Path, theirs: str | Path) -> None:
    assert log_of(ours) == log_of(theirs)
    first, second = weights(ours), weights(theirs)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert not (Path(ours) / "state").exists()


@contextmanager
def at_step(step: int, action: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, ``action(trainer)`` happens when the step after ``step`` finished ones begins."""
    inner = StageTrainer.compute_loss

    def acting(self: StageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            action(self)
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "compute_loss", acting)
        yield


class Killed(Exception):
    """Stands for a crash."""


def crash(trainer: StageTrainer) -> None:
    raise Killed


@pytest.fixture
def eventful(recipe: dict[str, Any]) -> dict[str, Any]:
    """States, log lines and held-out losses that fall on different steps."""
    held_out = [{"path": "things", "views": {"text->tile": 1}, "split": "test"}]
    return recipe | {
        "steps": 5,
        "save_every": 2,
        "log_every": 3,
        "eval": {"every": 3, "batches": 1, "data": held_out},
    }


@pytest.fixture
def whole(eventful: dict[str, Any], tmp_path: Path) -> Path:
    """The same run, uninterrupted."""
    return train(TrainConfig.from_dict(copy.deepcopy(eventful) | {"output": str(tmp_path / "whole")}))


def run_killed(runs: list[tuple[dict[str, Any], list[int | float]]], tmp_path: Path) -> list[list[int]]:
    """Exit statuses of each run's forks; see run_killed.py."""
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("run_killed.py")
    found = os.environ | {"PYTHONPATH": str(Path(anytoken.training.__file__).parents[2])}
    command = [sys.executable, str(script), str(tmp_path / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=found)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "statuses.json").read_text())


@pytest.mark.timeout(600)
def test_killed_again_and_again(eventful: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    kills: list[int | float] = [3, 25, 31, 60]
    [statuses] = run_killed([(eventful, kills)], tmp_path)
    assert statuses == [-signal.SIGKILL] * len(kills) + [0]
    assert_same_run(eventful["output"], whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_every_third_file_operation_and_at_random_moments(
    eventful: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    moments = random.Random(0)
    plans: list[list[int | float]] = [[touch] for touch in range(1, 150, 3)]
    plans += [[moments.uniform(0.2, 3.0) for _ in range(4)] for _ in range(10)]
    runs = [(eventful | {"output": str(tmp_path / f"run{n}")}, kills) for n, kills in enumerate(plans)]
    statuses = run_killed(runs, tmp_path)
    assert all(found[-1] == 0 for found in statuses)
    killed = sum(status == -signal.SIGKILL for found in statuses for status in found)
    assert killed > len(plans) / 2
    for recipe, _ in runs:
        assert_same_run(recipe["output"], whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"optimizer": {"kind": "muon", "lr": 1e-2}},
        {"ema_decay": 0.9},
        {"context_noise": {"tile": 0.3}},
    ],
)
def test_accumulated_batches_muon_and_averages_resume_too(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    recipe |= {"steps": 6, **changes}
    whole = train(TrainConfig.from_dict(copy.deepcopy(recipe) | {"output": str(tmp_path / "whole")}))
    with at_step(5, crash, monkeypatch), pytest.raises(Killed):
        train(TrainConfig.from_dict(recipe))
    train(TrainConfig.from_dict(recipe))
    assert_same_run(recipe["output"], whole)


def test_log_and_save_intervals_may_change_when_a_run_goes_on(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_step(5, crash, monkeypatch), pytest.raises(Killed):
        train(TrainConfig.from_dict(recipe))
    changed = recipe | {"log_every": 2, "save_every": 3}
    with at_step(7, crash, monkeypatch), pytest.raises(Killed):
        train(TrainConfig.from_dict(changed))
    assert [entry["step"] for entry in log_of(recipe["output"])] == [1, 2, 3, 4, 6]
    assert [state.name for state in saved_states(Path(recipe["output"]))] == ["checkpoint-4", "checkpoint-6"]


# ---- Ctrl-C ----


def interrupt(trainer: StageTrainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_says_how_to_go_on(
    eventful: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with (
        at_step(2, interrupt, monkeypatch),
        pytest.raises(
            Interrupted,
            match=r"stopped at step 3 of 5 and saved in .*/state/checkpoint-3; rerun the command to resume",
        ),
    ):
        train(TrainConfig.from_dict(eventful))
    assert signal.getsignal(signal.SIGINT) is before
    assert saved_states(Path(eventful["output"]))[-1].name == "checkpoint-3"
    train(TrainConfig.from_dict(eventful))
    assert_same_run(eventful["output"], whole)


def test_a_second_ctrl_c_acts_at_once(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(trainer: StageTrainer) -> None:
        interrupt(trainer)
        while not trainer.stop.asked:  # two signals at once would count as one
            time.sleep(0.001)
        interrupt(trainer)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born ignoring it
    try:
        with at_step(2, twice, monkeypatch), pytest.raises(KeyboardInterrupt) as stopped:
            train(TrainConfig.from_dict(recipe))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(stopped.value, Interrupted) and not saved_states(Path(recipe["output"]))


def test_the_command_ends_with_130_and_one_line(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stage.yaml").write_text(json.dumps(recipe))
    with at_step(2, interrupt, monkeypatch):
        result = CliRunner().invoke(app, ["train", str(tmp_path / "stage.yaml")])
    assert result.exit_code == 130 and "rerun the command to resume from there" in result.stderr


# ---- a full disk ----


@contextmanager
def small_files(trainer: StageTrainer) -> Iterator[None]:
    """No file may grow past 32 kB: writes fail in the operating system, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_space_for_the_optimizer(trainer: StageTrainer) -> Iterator[None]:
    def full(folder: str) -> None:
        (Path(folder) / "optimizer.pt").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer._save_optimizer_and_scheduler = full  # type: ignore[method-assign]
    yield


@pytest.mark.parametrize("full", [small_files, no_space_for_the_optimizer])
def test_a_full_disk_leaves_the_last_state(
    eventful: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch, full: Any
) -> None:
    inner = StageTrainer._save_checkpoint

    def saving(self: StageTrainer, *args: Any) -> None:
        if self.state.global_step < 4:
            return inner(self, *args)
        with full(self):
            return inner(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "_save_checkpoint", saving)
        with pytest.raises(
            WriteError, match=r"state of step 4 could not be saved.*checkpoint-2.*Free some space"
        ):
            train(TrainConfig.from_dict(eventful))
    state = Path(eventful["output"]) / "state"
    assert [path.name for path in state.iterdir()] == ["checkpoint-2"]
    train(TrainConfig.from_dict(eventful))
    assert_same_run(eventful["output"], whole)


def test_a_full_disk_at_the_end_costs_nothing(
    eventful: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = StageTrainer.save_model

    def saving(self: StageTrainer, folder: str | None = None, _internal_call: bool = False) -> None:
        with small_files(self):
            inner(self, folder, _internal_call)

    with monkeypatch.context() as patch:
        patch.setattr(
            StageTrainer,
            "run",
            lambda self: (inner_run(self), patch.setattr(StageTrainer, "save_model", saving)),
        )
        with pytest.raises(WriteError, match="final checkpoint"):
            train(TrainConfig.from_dict(eventful))
    with at_step(5, crash, monkeypatch):  # no step is made again
        train(TrainConfig.from_dict(eventful))
    assert_same_run(eventful["output"], whole)


inner_run = StageTrainer.run


# ---- numbers that are none ----


def test_a_loss_that_is_none_stops_the_run_and_keeps_the_batch(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_a_weight(trainer: StageTrainer) -> None:
        next(trainer.model.parameters()).data[:] = float("nan")

    said = r"loss is nan at step 6; the weights are no longer.*optimizer.lr.*init_from=\S*/checkpoint-4 "
    with at_step(5, break_a_weight, monkeypatch), pytest.raises(DivergenceError, match=said):
        train(TrainConfig.from_dict(recipe))
    folder = Path(recipe["output"])
    [path] = (folder / "diverged").glob("*.safetensors")
    about, batch = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    last = saved_states(folder)[-1]
    assert about["step"] == 6 and about["loss"] == "nan" and len(about["weights_not_finite"]) == 1
    stage, processor = TrainConfig.from_dict(recipe), Processor.from_pretrained(last)
    mixture = Mixture(stage.sources(stage.data), processor, stage.context, stage.seed, stage.cfg_dropout)
    stream = PackedStream(mixture.sample, stage.batch_size, stage.context, processor.token_space.pad)
    stream.restore(0, PackState(**about["stream_before"]))
    assert all(torch.equal(batch[f"0.{key}"], value) for key, value in next(iter(stream)).items())


def test_a_divergence_among_many_micro_batches_is_told(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer draws all batches of a step first: the state before them has to be known still."""
    seen = 0

    def break_the_loss(trainer: StageTrainer) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            trainer.model.loss.z_loss = float("inf")

    recipe |= {"gradient_accumulation_steps": 70, "context": 16, "tokens_per_batch": 70 * 16, "save_every": 1}
    recipe["data"] = [{"path": "things", "views": {"text->tile": 1}}]
    said = r"loss is \w+ at step 2, micro-batch 3 of 70; the weights are still finite.*checkpoint-1 "
    with at_step(1, break_the_loss, monkeypatch), pytest.raises(DivergenceError, match=said):
        train(TrainConfig.from_dict(recipe))
    [path] = (Path(recipe["output"]) / "diverged").glob("*.json")
    before = PackState(**json.loads(path.read_text())["stream_before"])
    assert before.next_index > 70
    assert len({name.split(".")[0] for name in load_file(path.with_suffix(".safetensors"))}) == 3


def test_a_gradient_that_is_none_never_reaches_the_weights(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(trainer: StageTrainer) -> None:
        first = next(trainer.model.parameters())
        first.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))

    recipe |= {"gradient_accumulation_steps": 2, "save_every": 1}
    with (
        at_step(3, poison, monkeypatch),
        pytest.raises(DivergenceError, match="gradient norm is nan at step 4; the weights are still finite"),
    ):
        train(TrainConfig.from_dict(recipe))
    folder = Path(recipe["output"])
    [path] = (folder / "diverged").glob("*.safetensors")
    assert {name.split(".")[0] for name in load_file(path)} == {"0", "1"}
    assert json.loads(path.with_suffix(".json").read_text())["weights_not_finite"] == []
    assert all(torch.isfinite(value).all() for value in weights(saved_states(folder)[-1]).values())
