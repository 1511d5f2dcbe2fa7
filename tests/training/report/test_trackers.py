"""Metrics reach experiment trackers through transformers' callbacks, as flat numbers."""

import sys
from pathlib import Path
from typing import Any

import pytest

from anytoken.training.config import TrainConfig
from anytoken.training.metrics import read_metrics
from anytoken.training.report.trackers import scalars
from anytoken.training.trainer import StageTrainer, train
from anytoken.utils.errors import ConfigError

FAKES = {  # as much of each package as transformers' callback uses; SEEN: what it is given
    "wandb": """
class Run:
    summary, id, name = {}, "1", "1"
    def _label(self, code): pass
run, config, SEEN = None, {}, []
def init(project, **more):
    global run
    run = Run()
    SEEN.append(more)
def log(values): SEEN.append(values)
""",
    "trackio": """
from types import SimpleNamespace
SEEN, __version__ = [], "1.0"
class config(dict):
    def update(self, values, allow_val_change): super().update(values)
config = config()
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
def init(project, name, space_id, **more): SEEN.append({"name": name, "space_id": space_id})
def log(values): SEEN.append(values)
def finish(): SEEN.append("finished")
""",
    "mlflow": """
from types import SimpleNamespace
SEEN, __version__ = [], "3.0"
limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
utils = SimpleNamespace(validation=limits)
def is_tracking_uri_set(): return True
def get_tracking_uri(): return "here"
def active_run(): return SimpleNamespace(info=SimpleNamespace(run_id="1")) if SEEN else None
def start_run(run_name, nested): SEEN.append({"name": run_name})
def end_run(): pass
def log_params(params, synchronous): pass
def log_metrics(metrics, step, synchronous): SEEN.append({f"train/{name}": one for name, one in metrics.items()})
""",
}


@pytest.fixture
def tracked(recipe: dict[str, Any]) -> dict[str, Any]:
    held_out = [{"path": "things", "views": {"text->tile": 1}, "split": "test"}]
    return recipe | {"steps": 5, "save_every": 2, "eval": {"every": 2, "batches": 1, "data": held_out}}


def test_nested_metrics_become_flat_names() -> None:
    line = {
        "loss": 2.0,
        "groups": {"image": {"bits": 3.0, "tokens": 4}},
        "expert_load": {"image": [[0.5, 0.5]]},
        "expert_entropy": {"image": 0.9},
        "retrieval": {"text->image": {"R@1": 0.25}},
        "mean_over_modalities": 0.0,
    }
    assert scalars(line, "eval_") == {
        "eval_loss": 2.0,
        "eval_bits/image": 3.0,
        "eval_tokens/image": 4,
        "eval_expert_entropy/image": 0.9,
        "eval_retrieval/text->image/R@1": 0.25,
        "eval_mean_over_modalities": 0.0,
        "eval_bits": 0.0,
    }


def test_tensorboard_has_each_step_once_though_the_run_was_killed(
    tracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    inner = StageTrainer.compute_loss

    def crash(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyError("killed")
        return inner(self, *args, **kwargs)

    tracked["report_to"] = "tensorboard"
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(StageTrainer, "compute_loss", crash)
        train(TrainConfig.from_dict(tracked))
    folder = train(TrainConfig.from_dict(tracked))
    assert [path.name for path in folder.iterdir() if path.name == "runs"] == []
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    lines = read_metrics(folder / "metrics.jsonl")
    for tag, found in {
        "train/bits/tile": {one["step"]: one["groups"]["tile"]["bits"] for one in lines if "groups" in one},
        "train/loss": {one["step"]: one["loss"] for one in lines if "groups" in one},
        "eval/bits/tile": {
            one["step"]: one["eval"]["groups"]["tile"]["bits"] for one in lines if "eval" in one
        },
    }.items():
        shown = [(one.step, one.value) for one in events.Scalars(tag)]
        assert [step for step, _ in shown] == list(found) and len(found) >= 3
        assert [value for _, value in shown] == pytest.approx(list(found.values()), rel=1e-6)
    assert "train/bits" in events.Tags()["scalars"] and "eval/bits" in events.Tags()["scalars"]


@pytest.mark.parametrize("name", FAKES)
def test_other_trackers_get_the_same(
    tracked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package = tmp_path / "fakes" / name
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKES[name])
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    try:
        train(TrainConfig.from_dict(tracked | {"report_to": [name]}))
        seen = sys.modules[name].SEEN
    finally:
        for module in [one for one in sys.modules if one.split(".")[0] == name]:
            del sys.modules[module]
    assert seen[0]["name"] == "out" and seen[0].get("space_id") is None
    lines = [one for one in seen[1:] if isinstance(one, dict)]
    assert len(lines) == 5 + 3  # steps and evaluations
    assert {"train/loss", "train/bits/tile", "train/bits"} <= set(lines[0])
    assert all(isinstance(value, int | float) for one in lines for value in one.values())
    assert any("bits/tile" in key and "eval" in key for key in lines[2])


def test_what_cannot_be_reported_to_is_said_before_training(tracked: dict[str, Any]) -> None:
    assert TrainConfig.from_dict(tracked | {"report_to": "none"}).report_to == []
    assert TrainConfig.from_dict(tracked | {"report_to": None}).report_to == []
    with pytest.raises(
        ConfigError, match=r"must be 'tensorboard'.* got 'wandbb' \(did you mean 'wandb'\?\)$"
    ):
        TrainConfig.from_dict(tracked | {"report_to": ["wandbb"]})
    with pytest.raises(ConfigError, match=r"^report_to: mlflow is not installed; run pip install mlflow"):
        train(TrainConfig.from_dict(tracked | {"report_to": ["tensorboard", "mlflow"]}))
    assert not Path(tracked["output"]).exists()
