"""Weight interpolation: exact arithmetic, refusals, and what it does to two fine-tunes."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from anytoken import AnyToken
from anytoken.cli import app
from anytoken.model.merge import (
    check_mergeable,
    merge_weights,
)
from anytoken.utils.errors import CheckpointError

Make = Callable[..., AnyToken]


def pair(model: AnyToken) -> tuple:
    return model.lm, model.processor


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_the_weighted_means(make_whole_model: Make, tied: bool) -> None:
    one, other = (make_whole_model(seed, tie_word_embeddings=tied).lm for seed in (1, 2))
    states = [copy.deepcopy(lm.state_dict()) for lm in (one, other)]
    merged = merge_weights([one, other], [0.25, 0.75])
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * states[0][name] + 0.75 * states[1][name])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in other.state_dict().items())
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_all_the_weight_on_one_is_that_one(make_whole_model: Make) -> None:
    ids = torch.arange(20)[None]
    expected = make_whole_model(2).lm(ids).logits
    merged = merge_weights([make_whole_model(seed).lm for seed in (1, 2, 3)], [0, 1, 0])
    assert torch.equal(merged(ids).logits, expected)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.0], [1.5, -0.5], [float("nan"), 1]])
def test_shares_must_be_shares(make_whole_model: Make, weights: list[float]) -> None:
    with pytest.raises(CheckpointError, match="add up to 1"):
        merge_weights([make_whole_model(seed).lm for seed in (1, 2)], weights)


def test_models_that_do_not_match_are_refused(make_whole_model: Make) -> None:
    model = make_whole_model()
    check_mergeable([pair(model), pair(make_whole_model(1, router_z_loss_coef=0.5))])
    for settings, says in (
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
    ):
        with pytest.raises(CheckpointError, match=f"architectures differ: {says}"):
            check_mergeable([pair(model), pair(make_whole_model(**settings))])
    grown = make_whole_model()
    tokenizer = copy.deepcopy(grown.processor.tokenizers["image"])
    grown.processor.token_space.append_modality("mask", tokenizer.codebook_sizes, tokenizer.shape)
    with pytest.raises(CheckpointError, match="token spaces differ"):
        check_mergeable([pair(model), pair(grown)])


def test_tokenizers_that_differ_in_a_weight_are_refused(make_whole_model: Make) -> None:
    model, other = make_whole_model(), make_whole_model()
    with torch.no_grad():
        next(other.processor.tokenizers["image"].parameters()).view(-1)[0] += 1e-3
    with pytest.raises(CheckpointError, match="image tokenizers differ"):
        check_mergeable([pair(model), pair(other)])
    with pytest.raises(CheckpointError, match="text tokenizers differ"):
        check_mergeable([pair(model), pair(make_whole_model(texts=("a blue plum", "who is that?")))])


def test_the_command(make_whole_model: Make, tmp_path: Path) -> None:
    one, other = (
        make_whole_model(seed).save_pretrained(tmp_path / str(seed), torch.bfloat16) for seed in (1, 2)
    )
    out = tmp_path / "out"
    words = ["merge", str(one), str(other), "--weights", "0.25", "0.75", "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    merged, first, second = (
        AnyToken.from_pretrained(folder, "cpu").lm.state_dict() for folder in (out, one, other)
    )
    name = "model.layers.0.mlp.experts.down_proj"
    expected = (0.25 * first[name] + 0.75 * second[name]).bfloat16().float()  # stored as the first is
    assert torch.equal(merged[name], expected)
    wrong = CliRunner().invoke(
        app, ["merge", str(one), str(other), "--weights", ".5", ".6", "--out", str(tmp_path / "no")]
    )
    assert wrong.exit_code == 2 and "add up to 1" in wrong.stderr and not (tmp_path / "no").exists()


def repeats(count: int, seed: int, ids: tuple[int, int]) -> Tensor:
    """Rows [count, 24] of three random ids of one kind over and over."""
    start = torch.randint(*ids, (count, 3), generator=torch.Generator().manual_seed(seed))
    return start.repeat(1, 8)


def fine_tune(lm: PreTrainedModel, rows: Callable[[int], Tensor], steps: int, rate: float) -> PreTrainedModel:
    optimizer = torch.optim.AdamW(lm.parameters(), lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        batch = rows(step)
        lm(batch, labels=batch).loss.backward()
        optimizer.step()
    return lm


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_merge_of_two_skills_is_better_over_both_than_either(make_whole_model: Make) -> None:
    """Repeating text, and repeating codes: a fine-tune gains one and loses some of the other, the merge gains both."""
    model = make_whole_model(initializer_range=0.05)
    span = model.token_space.code_range("image")
    skills = {"text": (40, 52), "image": (span.start, span.stop)}
    base = fine_tune(
        model.lm, lambda step: repeats(8, step, skills["text" if step % 2 else "image"]), 600, 3e-3
    )
    text, image = (
        fine_tune(copy.deepcopy(base), lambda step, ids=ids: repeats(8, 1000 + step, ids), 60, 1e-3)
        for ids in skills.values()
    )
    merge = merge_weights([copy.deepcopy(text), image], [0.5, 0.5])  # the second stays as it is

    @torch.no_grad()
    def loss(lm: PreTrainedModel) -> dict[str, float]:
        rows = {kind: repeats(32, 9999, ids) for kind, ids in skills.items()}
        return {
            kind: lm.loss_function(lm(one).logits, one, lm.config.vocab_size).item()
            for kind, one in rows.items()
        }

    losses = [loss(lm) for lm in (base, text, image, merge)]
    start, one, other, both = (sum(one.values()) for one in losses)
    assert both < min(one, other) < start, losses
    assert all(losses[3][kind] < losses[0][kind] for kind in skills), losses
