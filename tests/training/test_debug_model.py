"""Recipes for many GPUs run in miniature, from the command line, with nothing but what is made on the spot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import anytoken
from anytoken import recipes
from anytoken.cli import app
from anytoken.training.config import (
    TrainConfig,
)
from anytoken.training.debug_model import STEPS, tiny
from anytoken.training.metrics import read_metrics
from anytoken.utils.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCALE = [f"stages/scale/{path.name}" for path in sorted((ROOT / "stages" / "scale").glob("*.yaml"))]


def assert_trained(recipe: str, folder: Path) -> None:
    """What the recipe names was trained, and generates every kind of segment that its codecs make."""
    stage = TrainConfig.load(recipes.find(recipe))
    output = folder / f"{stage.output}-tiny"
    entries = read_metrics(output / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, STEPS + 1))
    assert stage.backbone is not None
    kinds = {kind for entry in entries if "loss" in entry for kind in entry["groups"]}
    assert kinds >= {"text", *stage.backbone.codecs}
    assert entries[-1]["eval"]["groups"]
    model = anytoken.load(output)
    assert model.kinds == ["text", *stage.backbone.codecs]
    for kind in stage.backbone.codecs:
        assert [one.kind for one in model.generate("ant", output=kind, seed=0).segments] == [kind]


@pytest.mark.parametrize(
    "recipe", [one if "30b" in one else pytest.param(one, marks=pytest.mark.slow) for one in SCALE]
)
def test_a_recipe_runs_in_miniature(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", recipe, "--tiny"])
    assert result.exit_code == 0, result.output
    assert_trained(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", SCALE)
def test_and_with_its_engine_on_two_processes(recipe: str, tmp_path: Path) -> None:
    if TrainConfig.load(ROOT / recipe).distributed.deepspeed:
        pytest.importorskip("deepspeed", reason="the extra [deepspeed] is not installed")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*start, "-m", "anytoken", "train", recipe, "--tiny"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert_trained(recipe, tmp_path)


def test_a_recipe_without_a_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="shrinks a recipe with a backbone"):
        tiny(TrainConfig.load(ROOT / "stages" / "4_instruct.yaml"))
