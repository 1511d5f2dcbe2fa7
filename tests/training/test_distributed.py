"""Two processes on CPUs train one model: each on its own samples, with averaged gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import anytoken.training
from anytoken.data.mixture import Mixture
from anytoken.data.packing import PackedStream
from anytoken.training.losses import BalancedLoss
from anytoken.training.metrics import read_metrics
from anytoken.training.stage import Stage
from anytoken.training.start import load_start
from anytoken.training.trainer import ModelWithLoss


@pytest.mark.slow
def test_first_loss_is_the_mean_over_both_shares(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"steps": 2, "save_every": 1, "distributed": {"world_size": 2, "ddp_backend": "gloo"}}
    (tmp_path / "stage.json").write_text(json.dumps(recipe))
    script = Path(__file__).with_name("run_stage.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(script), str(tmp_path / "stage.json")]
    found = os.environ | {"PYTHONPATH": str(Path(anytoken.training.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=found)
    assert done.returncode == 0, done.stderr[-2000:]

    stage = Stage.from_dict(recipe)
    processor, lm = load_start(stage)
    mixture = Mixture(stage.sources(stage.data), processor, stage.context, stage.seed, stage.prompt_drop)
    model = ModelWithLoss(lm, BalancedLoss(processor.grammar), stage.moe).train()
    losses = []
    for share in (0, 1):
        stream = PackedStream(mixture.sample, stage.rows, stage.context, processor.token_space.pad, 2, share)
        losses.append(model(**next(iter(stream)))["loss"].item())
    assert abs(losses[0] - losses[1]) > 1e-4
    logged = read_metrics(Path(recipe["output"]) / "metrics.jsonl")[0]["loss"]
    assert logged == pytest.approx(sum(losses) / 2, abs=1e-5)
