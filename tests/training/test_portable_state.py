"""A state that is carried to another machine in a few small files, and goes on there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anytoken.training import portable_state, trainer
from anytoken.training.checkpoint import saved_states
from anytoken.training.config import TrainConfig
from anytoken.training.interrupts import Interrupted
from anytoken.training.metrics import read_metrics
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError


def stopped(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Train until a step, then stop as by Ctrl-C."""
    real = trainer.TrainingCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            self.trainer.stop.asked = True
        real(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer.TrainingCallback, "on_step_end", on_step_end)
        train(TrainConfig.from_dict(recipe))


def test_a_run_goes_on_in_another_folder(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    recipe |= {"weights_folder": str(weights), "save_every": 2, "optimizer": {"lr": 1e-3}}
    stopped(recipe, monkeypatch, 5)
    (path,) = weights.iterdir()
    assert path.name == "step-5-1-of-1.safetensors", "files of older steps are dropped"
    carried = load_file(path)
    assert {one.dtype for name, one in carried.items() if name.startswith("weights/") and one.ndim > 1} == {
        torch.bfloat16
    }
    assert not [name for name in carried if "optimizer" in name]

    moved = recipe | {"output": str(tmp_path / "elsewhere")}
    folder = train(TrainConfig.from_dict(moved))
    steps = [entry["step"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]
    assert steps == list(range(1, 9)), "the log goes on, too"
    assert [one.name for one in weights.iterdir()] == ["step-8-1-of-1.safetensors"]

    unmoved = train(TrainConfig.from_dict(recipe))  # with its optimizer
    losses = [
        [entry["loss"] for entry in read_metrics(one / "metrics.jsonl") if "loss" in entry]
        for one in (folder, unmoved)
    ]
    assert losses[0][:5] == losses[1][:5]
    assert losses[0][5] == pytest.approx(losses[1][5], rel=2e-2), "the same batch, the weights rounded"
    rates = [
        [entry["learning_rate"] for entry in read_metrics(one / "metrics.jsonl") if "loss" in entry]
        for one in (folder, unmoved)
    ]
    assert rates[0] == rates[1]

    # what is finished is finished elsewhere at once, for the next stage to begin from
    third = train(TrainConfig.from_dict(recipe | {"output": str(tmp_path / "third")}))
    before, after = load_file(unmoved / "model.safetensors"), load_file(third / "model.safetensors")
    assert before.keys() == after.keys()
    for name, one in before.items():
        torch.testing.assert_close(after[name], one, rtol=2**-8, atol=0)


def test_files_are_small_whole_and_of_one_recipe(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, header = tmp_path / "weights", 10_000
    monkeypatch.setattr(portable_state, "FILE_BYTES", 30_000)
    monkeypatch.setattr(portable_state, "HEADER_BYTES", header)
    recipe |= {"weights_folder": str(weights)}
    stopped(recipe, monkeypatch, 5)
    files = sorted(weights.iterdir(), key=lambda path: int(path.name.split("-")[2]))
    assert len(files) > 2 and max(path.stat().st_size for path in files) <= 30_000
    state = load_file(saved_states(Path(recipe["output"]))[-1] / "model.safetensors")
    assert max(one.nbytes for one in state.values()) / 2 > 30_000 - header, "no matrix had to be cut"

    other = TrainConfig.from_dict(recipe | {"output": str(tmp_path / "other"), "seed": 1})
    with pytest.raises(ConfigError, match="seed"):
        train(other)
    folder = tmp_path / "elsewhere"
    assert portable_state.read_portable(weights, folder)
    found = load_file(saved_states(folder)[-1] / "model.safetensors")
    for name, one in state.items():
        torch.testing.assert_close(
            found[name], one.bfloat16().float() if one.ndim > 1 else one, rtol=0, atol=0
        )
    assert not portable_state.read_portable(weights, folder), "it holds a run already"

    files[-1].rename(files[-1].with_suffix(".lost"))
    assert not portable_state.read_portable(weights, tmp_path / "new"), "a file is missing"
    files[-1].with_suffix(".lost").rename(files[-1])
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    with pytest.raises(ConfigError, match="is damaged"):
        portable_state.read_portable(weights, tmp_path / "new")


def test_the_limit_is_fifteen_mebibytes(tmp_path: Path) -> None:
    """Of a state with a matrix that is larger than that, and thousands of small ones."""
    state = tmp_path / "run" / "state" / "checkpoint-7"
    state.mkdir(parents=True)
    tensors = {"embed": torch.randn(30_000, 256), "scalar": torch.tensor(3.0)}
    tensors |= {f"layers.{n}.mlp.experts.{n}.gate_proj.weight": torch.randn(8, 8) for n in range(3000)}
    save_file(tensors, state / "model.safetensors")
    (state / "progress.json").write_text(json.dumps({"finished": False}))
    portable_state.write_portable(tmp_path / "run", tmp_path / "weights")
    sizes = [path.stat().st_size for path in (tmp_path / "weights").iterdir()]
    assert max(sizes) <= 15 * 2**20 and len(sizes) == math.ceil(sum(sizes) / (15 * 2**20 - 2**19))
    portable_state.read_portable(tmp_path / "weights", tmp_path / "new")
    found = load_file(tmp_path / "new" / "state" / "checkpoint-7" / "model.safetensors")
    assert torch.equal(found["embed"], tensors["embed"].bfloat16().float()) and found["scalar"] == 3
    assert found.keys() == tensors.keys()


def test_it_is_for_one_process(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="weights_folder is for runs of one process"):
        TrainConfig.from_dict(recipe | {"weights_folder": "out", "distributed": {"world_size": 2}})
