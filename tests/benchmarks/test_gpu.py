"""The GPU benchmark: everything runs in miniature, every case is written at once, and a failure costs one case."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from anytoken.benchmarks import gpu
from anytoken.benchmarks.gpu_equality import held
from anytoken.benchmarks.gpu_part import Part, Sizes
from anytoken.benchmarks.gpu_train import logits_per_token, measured, our_step, packed_batch, useful_flops
from anytoken.cli import app
from anytoken.grammar import Grammar
from anytoken.utils.errors import EvaluationError

CPU = torch.device("cpu")


def part(rows: list, seconds: float = 1000) -> Part:
    return Part("train", CPU, seconds, rows.append, 1e9)


def test_everything_runs_in_miniature(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = CliRunner().invoke(app, ["bench", "gpu", "--tiny", "--out", str(out)])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    assert list(figures["parts"]) == list(gpu.PARTS)
    assert all(one["status"] == "done" for one in figures["parts"].values())
    rows = gpu.rows_of(figures)
    reasons = [row["reason"] for row in rows if row["status"] == "failed"]
    assert all(reason.startswith("ImportError: ") for reason in reasons), reasons  # kernels that are not here
    assert {row["status"] for row in rows} == {"measured", "skipped", "failed"}
    measured = [row for row in rows if row["status"] == "measured"]
    assert all(row["within"] for row in measured if row["part"] == "equality")
    train = [row for row in measured if row["part"] == "train"]
    assert {(row["shape"], row["side"]) for row in train} == {
        (shape, side) for shape in ("350M dense", "1B-A0.3B MoE") for side in ("ours", "stock")
    } | {("350M dense", "plain torch")}
    sizes = {(row["shape"], row["M parameters"]) for row in train}
    assert len(sizes) == 2, "every side has as many weights"
    assert {row["compiled"] for row in train} == {True, False}
    assert all(row["last loss"] < row["first loss"] and row["mfu"] > 0 for row in train)
    decode = {(row["side"], row["batch"]): row for row in measured if row["part"] == "decode"}
    assert all(decode[side, batch]["tokens/s"] > 0 for side in ("ours", "transformers") for batch in (1, 3))
    codecs = {row["case"].split(",")[0] for row in measured if row["part"] == "codecs"}
    assert codecs == {"ours", "Mimi", "DAC", "Emu3 VQ"}
    assert not [row for row in measured if any(key.endswith("failed") for key in row)]


def test_a_part_alone_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"parts": {"codecs": {"rows": [{"case": "old", "status": "measured"}]}}}))
    monkeypatch.setitem(gpu.PARTS, "train", (lambda one, sizes: one.case("a", 0, lambda: {"x": 1.0}), 1.0))
    gpu.run_part("train", out, 10, tiny=True)
    kept = json.loads(out.read_text())["parts"]
    assert kept["codecs"]["rows"][0]["case"] == "old" and kept["train"]["rows"][0]["x"] == 1
    with pytest.raises(EvaluationError, match="part is 'trian'; there are equality, train, decode, codecs"):
        gpu.run_part("trian", out, 10, tiny=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_there_is_a_word_of_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no CUDA device here; --tiny"):
        gpu.bench_gpu(tmp_path / "gpu.json")


def test_a_case_that_fails_or_does_not_fit_is_recorded_and_the_rest_goes_on() -> None:
    rows: list = []
    one = part(rows, seconds=500)

    def fails() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    one.case("fails", 0, fails)
    one.case("long", 1000, lambda: {"x": 1.0})
    one.case("fits", 5, lambda: {"x": 1.0}, side="ours")
    assert [row["status"] for row in rows] == ["failed", "skipped", "measured"]
    assert rows[0]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert re.match(r"it takes about 1000 s, and [1-9]\d* s of the budget are left", rows[1]["reason"])
    assert rows[2]["x"] == 1 and rows[2]["side"] == "ours"


def test_a_part_that_hangs_is_ended_and_what_it_measured_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    hang = (
        "import json, sys, time\n"
        f"open({str(out)!r}, 'w').write(json.dumps({{'parts': {{'train': {{'rows': [{{'case': 'a'}}]}}}}}}))\n"
        "time.sleep(60)"
    )
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words: real([sys.executable, "-c", hang]))
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    gpu._in_own_process("train", out, 2.0)
    train = json.loads(out.read_text())["parts"]["train"]
    assert train["rows"] == [{"case": "a"}] and "its budget" in train["status"] and train["seconds"] < 30


def test_rows_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, one = Sizes.tiny(), part([])
    monkeypatch.setattr("anytoken.benchmarks.gpu_train._measured", partial(_fits_one_row))
    found = measured(one, sizes, lambda: None, lambda batch: 0.0)
    assert found == {"rows": 1}


def _fits_one_row(part: Part, sizes: Sizes, make: object, head: object, rows: int) -> dict:
    if rows > 1:
        raise torch.OutOfMemoryError("no")
    return {"rows": rows}


def test_flops_are_those_pytorch_counts() -> None:
    """Of the head, only the ids that a target competes with; attention of eager is full, twice the causal half."""
    sizes = Sizes.tiny()
    space = sizes.space()
    batch = packed_batch(sizes, space, 2, CPU)
    batch["position_ids"] = torch.arange(sizes.context).expand(2, -1)  # one sample a row: what eager computes
    batch["layout"]["packed"] = False
    lm, loss = our_step(part([]), sizes, sizes.shapes["350M dense"], "sdpa", False, True)
    lm.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loss(batch).backward()
    head = logits_per_token(batch, Grammar(space), space.vocab_size)
    assert head < space.vocab_size / 2
    tokens, shape = batch["input_ids"].numel(), sizes.shapes["350M dense"]
    norms = sum(one.numel() for name, one in lm.named_parameters() if "norm" in name)
    causal = 6 * shape["num_attention_heads"] * shape["head_dim"] * sizes.context
    ours = useful_flops(lm, batch, head) - 6 * norms + causal
    unseen = (
        2 * shape["hidden_size"] * head
    )  # products into a buffer that is there, which the counter does not know
    assert tokens * (ours - unseen) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_packed_rows_are_learnt_within_their_samples() -> None:
    sizes = Sizes.tiny()
    batch = packed_batch(sizes, sizes.space(), 2, CPU)
    following = batch["position_ids"].flatten()[batch["loss_index"] + 1]
    assert (following > 0).all() and len(following) == (batch["position_ids"] > 0).sum()
    Grammar(sizes.space()).loss_rows(batch["targets"])


def test_the_rule_of_tolerance() -> None:
    exact = {"output": torch.ones(3, dtype=torch.float64)}
    plain = {"output": exact["output"] + 0.01}
    assert held(exact, plain, {"output": exact["output"] - 0.0205})["within"]
    assert not held(exact, plain, {"output": exact["output"] + 0.022})["within"]
