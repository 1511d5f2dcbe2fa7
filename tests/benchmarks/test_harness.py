"""Benchmarks: turns are taken fairly, the peer's ids must agree, and what is printed is what is written."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import anytoken
from anytoken.benchmarks import experts, harness
from anytoken.benchmarks import generate as bench_generate_module
from anytoken.benchmarks.experts import decoders, step_operations
from anytoken.benchmarks.generate import Sizes, bench_generate, large_lm
from anytoken.inference.fast_decode import FlatDecoder
from anytoken.utils.errors import EvaluationError


def test_sides_take_turns_and_warmups_do_not_count(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    cost = {"ours": iter([100, 1, 2, 9]), "peer": iter([100, 4, 5, 6])}

    def run(name):
        calls.append(name)
        now[0] += next(cost[name])

    taken = harness.interleaved_timing({"ours": lambda: run("ours"), "peer": lambda: run("peer")}, repeats=3)
    assert taken == {"ours": 2, "peer": 5}
    assert calls == ["ours", "peer"] * 4


def test_a_ratio_of_turns_compares_within_a_round(monkeypatch):
    """The second and third rounds are three times as slow on both sides."""
    now, seconds = [0.0], iter([100, 100, 2, 1, 6, 3, 6, 3, 3, 2, 5, 2])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(seconds)

    assert harness.ratio_of_turns(run, run, repeats=5) == 2


def test_report_writes_the_figures_with_their_environment(tmp_path, capsys):
    harness.report({"rows": [{"batch": 1, "ratio": 1.5}]}, tmp_path / "deep" / "bench.json")
    written = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert written["rows"] == [{"batch": 1, "ratio": 1.5}]
    assert {"commit", "torch", "threads", "machine"} <= set(written)
    assert "ratio" in capsys.readouterr().out


def test_a_table_that_is_too_wide_is_shown_line_by_line(tmp_path, capsys, monkeypatch):
    row = {"measure": "loading, of a step", "ours": 1234.5, "the other side's": 0.25, "met": True}
    shown = {}
    for columns in (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        harness.report({"rows": [row]}, tmp_path / "bench.json")
        shown[columns] = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert all(len(line) <= columns for line in shown[columns][:-1])
    assert " loading, of a step   1,234   0.25               yes" in shown[80]
    assert " the other side's   0.25" in shown[40]


def test_generation_is_compared_on_equal_ids(monkeypatch):
    """Every comparison is made, at tiny sizes and without a compiler; and ids that differ are no comparison."""
    monkeypatch.setattr(FlatDecoder, "compile", lambda self: None)
    monkeypatch.setattr(bench_generate_module, "LIMIT", 12)
    monkeypatch.setattr(bench_generate_module, "ROWS", 2)
    model = anytoken.load("mini")
    sizes = Sizes(vocabulary=9000, width=192, layers=1, contexts=(8, 70))
    figures = bench_generate(model, "image", "a red circle", 1, sizes)
    large = f"{large_lm(model, sizes).num_parameters() / 1e6:.0f} M"
    assert [(row["model"], row.get("rows")) for row in figures["rows"]] == [
        ("the model", 1), ("the model", 2), ("the model", None), ("9000 ids", 1), (large, 1), (large, 2), (large, None),
        ("the model", None), ("the model", None), (large, None), ("the model", 1), (large, 1), (large, None),
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in figures["rows"])
    assert [point["context"] for point in figures["context curve"]] == [8, 70]
    peer = type(model.lm).generate

    def other(*args, **extra):
        ids = peer(*args, **extra)
        ids[:, -3] = 0
        return ids

    monkeypatch.setattr(type(model.lm), "generate", other)
    with pytest.raises(EvaluationError, match="different ids"):
        bench_generate(model, "image", "a red circle", 1, sizes)


def test_the_fast_step_is_compared_with_the_models_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_generate_module, "LIMIT", 12)
    monkeypatch.setattr(bench_generate_module, "ROWS", 2)
    steps, step = [], FlatDecoder.step
    monkeypatch.setattr(FlatDecoder, "step", lambda self, *given: steps.append(1) or step(self, *given))
    sizes = Sizes(width=192, layers=1, contexts=(8,))
    figures = bench_generate_module.bench_decode(anytoken.load("mini"), "image", "a red circle", 1, sizes)
    assert [row["rows"] for row in figures["rows"]] == [1, 2, 1, 2] and steps
    assert all(row["ratio"] > 0 for row in figures["rows"])


def test_both_decoders_are_as_large_as_each_other_in_use() -> None:
    models = decoders(hidden=64, experts=4, top_k=2)
    active = {name: lm.num_active_parameters() for name, lm in models.items()}
    assert active["moe"] == pytest.approx(active["dense"], rel=0.01)  # the router is the difference
    assert sum(p.numel() for p in models["moe"].parameters()) > 1.2 * active["moe"]


def test_counted_operations_are_those_that_run() -> None:
    """Eager attention computes the masked half too, so torch's count is an upper bound, near with short rows."""
    lm, ids = decoders(hidden=64, experts=4, top_k=2)["dense"], torch.randint(4096, (2, 16))
    lm.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        lm(ids, labels=ids, use_cache=False).loss.backward()
    assert 0.95 * counter.get_total_flops() < step_operations(lm, 2, 16) <= counter.get_total_flops()


def test_bench_experts_measures_all_three_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CONTEXT", 16)
    monkeypatch.setattr(experts, "PEAK_SIZE", 64)
    figures = experts.bench_experts(hidden=64, experts=2, top_k=1, repeats=1)
    assert [row["decoder"] for row in figures["rows"]] == ["moe", "dense"]
    assert all(row["tokens/s"] > 0 and row["share of the fp32 peak"] > 0 for row in figures["rows"])
    assert figures["rows"][0]["MoE / dense tokens/s"] > 0


def test_bench_score_compares_equal_scores(tmp_path):
    from anytoken import load
    from anytoken.benchmarks.score import bench_score

    figures = bench_score(load("mini"), ["a fox"], ["fox", "a cat", "red panda"], repeats=1)
    once, plain = figures["rows"]
    assert figures["largest_difference"] < 1e-3 and plain["speed"] == 1 and once["answers/s"] > 0


def test_bench_naming_compares_ways_on_the_same_images(tmp_path):
    from anytoken import load, recipes
    from anytoken.benchmarks.score import BASE, READ, bench_naming
    from anytoken.segments import Image

    Image.open(recipes.assets() / "images" / "sample.png").save(tmp_path / "0.png")
    lines = [
        {"text": f"{name}, 3d, red background", "image": "0.png", "split": split, "style": "3d"}
        for name, split in (("a fox", "test"), ("a cat", "test"), ("an owl", "train"))
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    rows = {row["side"]: row for row in bench_naming(load("mini"), tmp_path / "set.jsonl", 2)}
    assert len(rows) == 8 and rows[BASE]["speed"] == 1 and rows[BASE]["difference"]["value"] == 0
    for row in rows.values():
        assert (row["images"], row["names"]) == (2, 3) and row["seconds per image"] > 0
    assert (
        rows["best name"]["accuracy"] == rows["score all names"]["accuracy"] and "accuracy" not in rows[READ]
    )
    assert (
        rows["score all names"]["accuracy"]["value"] <= 0.5
    )  # one image has both names, and one answer is given
    with pytest.raises(EvaluationError, match="no records of split test"):
        (tmp_path / "set.jsonl").write_text(json.dumps(lines[2]) + "\n")
        bench_naming(load("mini"), tmp_path / "set.jsonl", 2)
