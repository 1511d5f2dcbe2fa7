"""What a refused run says to type begins another one: the words are taken from the message and run."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.training import checkpoint
from anytoken.training.checkpoint import saved_states
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.metrics import read_metrics
from anytoken.training.report.markdown import summary
from anytoken.training.trainer import train
from anytoken.utils.errors import ConfigError


def told(message: object) -> list[str]:
    """The overrides at the end of a message."""
    return re.findall(r"\S+=\S*", str(message).split("start another run")[1])


def again(recipe: dict[str, Any], folder: Path, *changes: str) -> tuple[TrainConfig, Path]:
    """Run the recipe with changes that it refuses, then as it says."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(ConfigError) as error:
        train(TrainConfig.load(path, changes))
    assert Path(re.search(r"\((\S+stage\.yaml)\)", str(error.value))[1]).is_file()  # type: ignore[index]
    stage = TrainConfig.load(path, [*changes, *told(error.value)])
    return stage, train(stage)


@pytest.fixture
def short(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"steps": 2, "save_every": 1}


def test_a_finished_run_from_scratch(short: dict[str, Any], tmp_path: Path) -> None:
    train(TrainConfig.from_dict(short))
    (tmp_path / "out_2").mkdir()  # taken already
    stage, folder = again(short, tmp_path, "optimizer.lr=0.005")
    assert stage.init_from == short["output"] and folder == tmp_path / "out_3"


def test_a_run_that_was_stopped(
    short: dict[str, Any], tmp_path: Path, killed_at: Callable[[int, dict[str, Any]], None]
) -> None:
    killed_at(1, short)
    [state] = saved_states(Path(short["output"]))
    stage, _ = again(short, tmp_path, "seed=1")
    assert stage.init_from == str(state)


def test_a_run_that_has_learnt_nothing_yet(
    short: dict[str, Any], tmp_path: Path, killed_at: Callable[[int, dict[str, Any]], None]
) -> None:
    killed_at(0, short)
    stage, _ = again(short, tmp_path, "seed=1")
    assert stage.init_from == "scratch" and stage.output == str(tmp_path / "out_2")


def test_an_adapter(short: dict[str, Any], tmp_path: Path) -> None:
    base = train(TrainConfig.from_dict(short | {"output": str(tmp_path / "base"), "steps": 1}))
    adapter = {key: value for key, value in short.items() if key not in ("tokenizers", "model")}
    adapter |= {"init_from": str(base), "lora": {"r": 2}}
    train(TrainConfig.from_dict(adapter))
    stage, _ = again(adapter, tmp_path, "seed=1")
    assert stage.lora is not None and stage.lora.start == adapter["output"]
    assert stage.init_from == str(base)


def test_a_finished_run_says_what_it_has_become(short: dict[str, Any], tmp_path: Path) -> None:
    held_out = [{"path": "things", "views": {"text->tile": 1}, "split": "test"}]
    short |= {"eval": {"batches": 1, "data": held_out}, "output": str(tmp_path / "my run")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(short, sort_keys=False))
    for _ in range(2):  # a finished run is left as it is, and says the same
        found = CliRunner().invoke(app, ["train", str(path)])
        assert found.exit_code == 0, found.output
        run, score, report, following = found.stdout.splitlines()
        last = read_metrics(tmp_path / "my run" / "metrics.jsonl")[-1]["eval"]["groups"]
        assert re.fullmatch(r".*/my run: 2 of 2 steps, loss \d+\.\d{3}", run)
        assert score == "held out, bits per target: " + ", ".join(
            f"{name} {group['bits']:.2f}" for name, group in last.items()
        )
        assert Path(report.removeprefix("report: ")).is_file()
        assert following == f"next: anytoken chat --model '{tmp_path / 'my run'}'"
    info = CliRunner().invoke(app, ["info", *shlex.split(following)[4:]])
    assert info.exit_code == 0, info.output


def test_an_adapter_is_opened_with_its_model(short: dict[str, Any]) -> None:
    stage = TrainConfig.from_dict({key: value for key, value in short.items() if key not in ("tokenizers", "model")} | {
        "init_from": "mini", "lora": {}, "output": "runs/lora",
    })  # fmt: skip
    assert summary(stage) == ["runs/lora", "next: anytoken chat --model mini --adapter runs/lora"]


def test_a_run_folder_holds_what_its_description_names(short: dict[str, Any]) -> None:
    folder = train(TrainConfig.from_dict(short))
    named = {"stage.yaml", "run.json", "metrics.jsonl", "report.html", "training.md"}
    assert named <= {path.name for path in folder.iterdir()} and not (folder / "state").exists()
    for name in named:
        assert checkpoint.__doc__ is not None and name in checkpoint.__doc__
