"""A run ends when its held-out loss stops improving, and exports its best weights; a resumed one does the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from anytoken.training.checkpoint import saved_states
from anytoken.training.config import TrainConfig
from anytoken.training.metrics import read_metrics
from anytoken.training.trainer import StageTrainer, train
from anytoken.utils.errors import ConfigError

BITS = {2: 3.0, 4: 1.0, 6: 2.5, 8: 2.0, 10: 1.5, 12: 0.5}  # by step


@pytest.fixture
def evaluated(recipe: dict[str, Any]) -> dict[str, Any]:
    held_out = [{"path": "things", "views": {"text->tile": 1}, "split": "test"}]
    return recipe | {
        "steps": 12,
        "save_every": 3,
        "log_every": 3,
        "eval": {"every": 2, "batches": 1, "data": held_out},
    }


@pytest.fixture
def known_bits(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Evaluations give BITS; returns the weights that each was made of."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def log_held_out(self: StageTrainer, step: int, report: dict[str, Any]) -> dict[str, float]:
        seen[step] = {name: one.detach().clone() for name, one in self.lm.state_dict().items()}
        self.metrics_log.write({"step": step, "eval": report})
        return {"eval_bits": 9.0, "eval_bits/tile": BITS[step]}

    monkeypatch.setattr(StageTrainer, "log_held_out", log_held_out)
    return seen


def same(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return all(torch.equal(found[name], one) for name, one in weights.items())


@pytest.mark.parametrize("killed", [None, 7, 9])
def test_the_run_ends_early_with_its_best_weights(
    evaluated: dict[str, Any],
    known_bits: dict[int, Any],
    killed_at: Callable[[int, dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
    killed: int | None,
) -> None:
    evaluated |= {"early_stopping": {"metric": "bits/tile", "patience": 3}, "keep_best": True}
    if killed is not None:
        killed_at(killed, evaluated)
        assert saved_states(Path(evaluated["output"]))[0].name == "checkpoint-4"
    folder = train(TrainConfig.from_dict(evaluated))
    lines = read_metrics(folder / "metrics.jsonl")
    assert [one["step"] for one in lines if "eval" in one] == [2, 4, 6, 8, 10]
    assert lines[-2]["step"] == lines[-1]["step"] == 10  # the last interval is logged too
    assert same(folder, known_bits[4]) and not same(folder, known_bits[10])
    said = capsys.readouterr().err
    assert (
        "held-out bits/tile did not improve on 1 in 3 evaluations: the run ends here, at step 10 of 12"
        in said
    )
    assert "exporting the weights of step 4" in said
    assert train(TrainConfig.from_dict(evaluated)) == folder  # finished


def test_the_last_weights_are_exported_unless_asked(
    evaluated: dict[str, Any], known_bits: dict[int, Any]
) -> None:
    folder = train(
        TrainConfig.from_dict(evaluated | {"early_stopping": {"metric": "bits/tile", "patience": 2}})
    )
    assert same(folder, known_bits[8]) and 10 not in known_bits


def test_real_held_out_bits_and_the_smallest_improvement_that_counts(evaluated: dict[str, Any]) -> None:
    still = {"optimizer": {"lr": 1e-9}, "early_stopping": {"patience": 2, "min_delta": 0.01}}
    folder = train(TrainConfig.from_dict(evaluated | still))
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 6


def test_what_cannot_be_compared_is_an_error(evaluated: dict[str, Any], tmp_path: Path) -> None:
    for changes in ({"early_stopping": {}}, {"keep_best": True}):
        with pytest.raises(
            ConfigError, match=r"it needs eval.data, got 0 sources, and eval.every, got 0; set both"
        ):
            TrainConfig.from_dict(evaluated | changes | {"eval": {}})
    with pytest.raises(ConfigError, match=r"early_stopping.metric.* got 'loss'"):
        TrainConfig.from_dict(evaluated | {"early_stopping": {"metric": "loss"}})
    unknown = evaluated | {"early_stopping": {"metric": "bits/smell"}}
    with pytest.raises(
        ConfigError, match="there is no 'smell'; take bits, or bits/ and one of text, tile, beep"
    ):
        train(TrainConfig.from_dict(unknown))
    absent = evaluated | {"early_stopping": {"metric": "bits/beep"}, "output": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=r"'bits/beep': eval.data has no targets of it; it gives bits/tile"):
        train(TrainConfig.from_dict(absent))
