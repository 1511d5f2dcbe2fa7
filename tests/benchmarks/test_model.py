"""The model's benchmark: both sides have one shape and one batch, and every row carries its bar."""

from functools import partial
from pathlib import Path

import pytest
import torch

from anytoken.benchmarks import model
from anytoken.benchmarks.model import Sizes, our_step, peak_mebibytes, stock_model, stock_step
from anytoken.model import AnyTokenConfig, AnyTokenForCausalLM
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, CodeSequence


@pytest.fixture
def own(tmp_path: Path) -> Sizes:
    space = TokenSpace(text_size=40)
    space.append_modality("image", [24], CodeGrid(("rows", "cols"), (1, 1), (4, 4)))
    space.append_modality("speech", [16], CodeSequence(1, 20))
    space.save(tmp_path / "token_space.json")
    AnyTokenConfig(
        vocab_size=space.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        moe_intermediate_size=24, num_experts=2, shared_expert_intermediate_size=16,
        modality_boundaries=space.bucket_boundaries(), modality_index=space.bucket_modalities(),
    ).save_pretrained(tmp_path)  # fmt: skip
    return Sizes(tmp_path, rows=2, context=18)


@pytest.fixture
def large(own: Sizes) -> Sizes:
    return Sizes(own.folder, rows=1, context=16, text_size=500)


def test_half_of_the_ids_are_text_and_all_modalities_are_there(own: Sizes, large: Sizes) -> None:
    for sizes in (own, large):
        space, ids = sizes.space, sizes.ids()
        assert ids.shape == (sizes.rows, sizes.context) and torch.equal(ids, sizes.ids())
        assert (ids < space.text_size).float().mean() == pytest.approx(0.5, abs=0.1)
        assert set(space.modality_of(ids).unique().tolist()) == {0, 1, 2}
    assert large.space.vocab_size == own.space.vocab_size + 460


def test_both_sides_have_the_same_parameters(own: Sizes, large: Sizes) -> None:
    for sizes in (own, large):
        ours, stock = AnyTokenForCausalLM(sizes.config()), stock_model(sizes, "eager")
        stock.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(sizes.ids()).logits, stock(sizes.ids()).logits)


def test_every_row_has_a_ratio_and_a_bar(own: Sizes, large: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100.0, 300.0, 900.0])
    monkeypatch.setattr(model, "peak_mebibytes", lambda step: next(peaks))
    monkeypatch.setattr(model, "HEAD_REPEATS", 2)
    figures = model.bench_model(own, large, repeats=1)
    assert [row["bar"] for row in figures["rows"]] == [1.0, 1.3, 2.0, 2.0, 10.0]
    assert all(row["ratio"] == row["peer"] / row["ours"] > 0 for row in figures["rows"])
    assert figures["rows"][3]["ratio"] == 4  # less what importing takes
    assert figures["stock experts"] in model.STOCK_EXPERTS


def test_steps_learn(own: Sizes) -> None:
    for make in (lambda: our_step(own, True), lambda: our_step(own, False), lambda: stock_step(own, "eager")):
        step = make()
        losses = [step() for _ in range(30)]
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_peak_memory_is_that_of_the_new_process_alone(own: Sizes) -> None:
    ballast = torch.ones(2**27)  # half a GiB that the child must not be charged for
    imports = peak_mebibytes(None)
    assert 0 < imports < ballast.numel() * 4 / 2**20 + 400
    a_step_of_256_mebibytes = partial(partial, torch.ones, 2**26)
    assert peak_mebibytes(a_step_of_256_mebibytes) - imports == pytest.approx(256, abs=64)
