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
from anytoken.training.report.samples import Sampler, _as_prompt, read_samples
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


@pytest.mark.parametrize(("words", "output"), [("ant " * 200, "text"), ("ant " * 59, ["tile"] * 4)])
def test_a_prompt_that_leaves_no_room_is_refused_before_training(
    recipe: dict[str, Any], words: str, output: Any
) -> None:
    prompts = [{"prompt": "ant", "output": "text"}, {"prompt": words, "output": output}]
    said = r"samples.prompts.1 has \d+ ids and its shortest reply \d+, but the model's context is 128"
    with pytest.raises(ConfigError, match=said):
        train(TrainConfig.from_dict(recipe | {"samples": {"prompts": prompts}}), lambda *_: "")
    assert not Path(recipe["output"]).exists()


def test_a_sample_that_fails_ends_no_training(
    recipe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(model: torch.nn.Module, processor: Any, prompt: Any, output: Any) -> str:
        if prompt == "bee":
            raise RuntimeError("no <codec>")
        return "fine"

    prompts = [{"prompt": "bee", "output": "tile"}, {"prompt": "ant", "output": "tile"}]
    folder = train(TrainConfig.from_dict(recipe | {"steps": 1, "samples": {"prompts": prompts}}), answer)
    [(_, [failed, fine])] = read_samples(folder)
    assert "no &lt;codec&gt;" in failed["html"] and fine["html"] == "fine"
    assert "step 1 has no sample of 'bee': no <codec>" in caplog.text


def test_slow_samples_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("anytoken.training.report.samples.time", SimpleNamespace(monotonic=lambda: now))

    def slow(*_: Any) -> str:
        nonlocal now
        now += 10
        return ""

    spec = SampleSpec.model_validate({"every": 5, "share_of_time": 0.1, "prompts": [{"prompt": "a"}]})
    grammar = SimpleNamespace(reply=lambda plan: None, min_remaining=lambda state: 1)
    processor = SimpleNamespace(encode_chat=lambda prompt: [0], kinds={"text": None}, grammar=grammar)
    sampler = Sampler(spec, tmp_path, processor, slow, 64)  # type: ignore[arg-type]
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


def test_paths_in_prompts_of_a_recipe_are_its_owners_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    prompt = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "a.png"},
        {"type": "dna", "dna": "ACGT"},
    ]
    (message,) = _as_prompt(prompt)
    assert message["content"] == [
        {"type": "image", "image": Path("a.png")}, {"type": "text", "text": "a.png"}, {"type": "dna", "dna": "ACGT"},
    ]  # fmt: skip
