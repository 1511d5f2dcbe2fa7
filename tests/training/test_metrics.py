"""Meters, the metrics file and the report."""

import json
import math
from pathlib import Path

import pytest
import torch

from anytoken.training.losses.balanced import LossParts
from anytoken.training.metrics import LossMeter, MetricsLog, read_metrics
from anytoken.training.report.markdown import write_report


def parts(nll: list[float], right: list[float], count: list[float], term: float) -> LossParts:
    return LossParts(
        torch.tensor(0.0),
        torch.tensor(nll),
        torch.tensor(right),
        torch.tensor(count),
        {"z_loss": torch.tensor(term)},
    )


def test_meter_averages_over_targets_not_batches() -> None:
    meter = LossMeter(["text", "image", "control"])
    meter.add(parts([2.0, 0.0, 4.0], [1, 0, 0], [1, 0, 2], 1.0), tokens=10)
    meter.add(parts([4.0, 0.0, 0.0], [0, 0, 0], [5, 0, 0], 3.0), tokens=10)
    report = meter.report()
    assert report["groups"]["text"]["loss"] == pytest.approx(1.0)
    assert report["groups"]["text"]["bits"] == pytest.approx(1 / math.log(2))
    assert report["groups"]["text"]["accuracy"] == pytest.approx(1 / 6)
    assert set(report["groups"]) == {"text", "control"}
    assert report["mean_over_modalities"] == pytest.approx(1.0)
    assert report["mean_over_tokens"] == pytest.approx(10 / 8)
    assert report["z_loss"] == pytest.approx(2.0)
    meter.reset()
    assert meter.report()["groups"] == {}


def test_meter_goes_on_from_its_state() -> None:
    whole, first, second = (LossMeter(["text", "control"]) for _ in range(3))
    load = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    for meter in (whole, first):
        meter.add(parts([2.0, 0.1], [1, 0], [3, 1], 1.0), tokens=10, load=load)
    second.restore(json.loads(json.dumps(first.state())))
    for meter in (whole, second):
        meter.add(parts([1.0, 0.3], [0, 0], [2, 1], 2.0), tokens=10, load=load)
    ours, theirs = second.report(), whole.report()
    assert ours.pop("tokens_per_second") > 0 and theirs.pop("tokens_per_second") > 0
    assert ours == theirs and ours["expert_load"] == {"text": [[0.75, 0.25]]}


def test_rewind_drops_what_was_written_later(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.rewind(0)
    log.write({"step": 1})
    log.write({"step": 2})
    kept = log.position()
    log.write({"step": 3})
    with log.path.open("a") as handle:
        handle.write('{"step": 4, "cut of')
    log.rewind(kept)
    log.write({"step": 3, "again": True})
    assert read_metrics(log.path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_report_shows_first_and_last_and_held_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 21):
        group = {"text": {"bits": 21.0 - step}}
        log.write({"step": step, "groups": group, "tokens_per_second": float(step)})
    log.write({"step": 20, "eval": {"groups": {"text": {"bits": 7.25}, "image": {"bits": 3.5}}}})
    lines = write_report(tmp_path).read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert rows[0] == "| 1 | 20.00 |" and rows[5] == "| 20 | 1.00 |" and rows[6] == "| 20 | 7.25 | 3.50 |"
    assert "Median speed: 11 tokens/s." in "\n".join(lines)
