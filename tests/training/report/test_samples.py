"""Samples along the way: they leave the training as it is, are on the page, and never take most of the time."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.training.config import (
    SampleSpec,
    TrainConfig,
)
from anytoken.training.metrics import read_metrics
from anytoken.training.report.samples import Sampler, read_samples
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError, RequestError


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")]


def test_samples_leave_the_training_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {
        "steps": 3,
        "model": recipe["model"] | {"router_jitter_noise": 0.1},
    }  # a step that draws numbers
    plain = train(TrainConfig.from_dict(recipe))

    def answer(model: torch.nn.Module, processor: Any, prompt: Any, output: Any) -> str:
        assert not model.training
        return f"<b>{output} {torch.rand(1).item()}</b>"

    spec = {"every": 2, "share_of_time": 1, "prompts": [{"prompt": "ant", "output": "tile"}]}
    sampled = train(
        TrainConfig.from_dict(recipe | {"samples": spec, "output": str(tmp_path / "sampled")}), answer
    )
    assert losses(sampled) == losses(plain)
    taken = read_samples(sampled)
    assert [step for step, _ in taken] == [2, 3]  # and at the end
    assert taken[0][1][0]["html"] in (sampled / "report.html").read_text()


def test_the_command_answers_with_the_model(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"steps": 1, "samples": {"prompts": [{"prompt": "ant", "output": "text"}]}}
    (tmp_path / "stage.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "stage.yaml")])
    assert result.exit_code == 0, result.output
    [(step, [sample])] = read_samples(Path(recipe["output"]))
    assert step == 1 and sample["html"].startswith("<")


def test_what_cannot_be_sampled_is_said_before_training(recipe: dict[str, Any]) -> None:
    prompts = [{"prompt": "ant", "output": "smell"}]
    with pytest.raises(ConfigError, match="answer"):
        train(TrainConfig.from_dict(recipe | {"samples": {"prompts": prompts}}))
    with pytest.raises(ConfigError, match="'smell' is no kind"):
        train(TrainConfig.from_dict(recipe | {"samples": {"prompts": prompts}}), lambda *_: "")
    with pytest.raises(RequestError, match="empty"):
        train(TrainConfig.from_dict(recipe | {"samples": {"prompts": [{"prompt": ""}]}}), lambda *_: "")


def test_slow_samples_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("anytoken.training.report.samples.time", SimpleNamespace(monotonic=lambda: now))

    def slow(*_: Any) -> str:
        nonlocal now
        now += 10
        return ""

    spec = SampleSpec.model_validate({"every": 5, "share_of_time": 0.1, "prompts": [{"prompt": "a"}]})
    processor = SimpleNamespace(messages=lambda prompt: [], kinds={"text": None})
    sampler = Sampler(spec, tmp_path, processor, slow)  # type: ignore[arg-type]
    taken = []
    for step in range(1, 41):
        now += 5
        if sampler.due(step, last=step == 40):
            sampler.take(step, torch.nn.Identity())  # type: ignore[arg-type]
            taken.append(step)
    assert taken == [
        5,
        20,
        40,
    ]  # at 5 for 10 s: not again before 100 s; then not before 200 s, but at the end
