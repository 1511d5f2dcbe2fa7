"""Losses: the restricted softmax is the masked full one; modalities count the same; routers stay even."""

import pytest
import torch
import torch.nn.functional as F

from anytoken.grammar import Grammar
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, CodeSequence
from anytoken.training.losses.balanced import (
    CONTROL,
    BalancedLoss,
    grammar_groups,
)
from anytoken.utils.errors import ConfigError

WIDTH = 6


@pytest.fixture
def grammar() -> Grammar:
    space = TokenSpace(text_size=11)
    space.append_modality("image", [13], CodeGrid(("rows", "cols"), (1, 1), (4, 4)))
    space.append_modality("speech", [7, 5], CodeSequence(1, 20, num_codebooks=2))
    return Grammar(space)


def every_target(grammar: Grammar) -> torch.Tensor:
    """Each id of the vocabulary that the grammar's loss classes contain."""
    ids = torch.arange(grammar.token_space.vocab_size)
    classes = grammar.loss_rows(ids).tolist()
    inside = [any(a <= i < b for a, b in grammar.class_ranges[c]) for i, c in enumerate(classes)]
    return ids[torch.tensor(inside)]


def example(count: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, WIDTH, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, WIDTH, generator=generator).requires_grad_()
    return hidden, head


def test_targets_are_grouped_by_what_the_grammar_allows(grammar: Grammar) -> None:
    targets = every_target(grammar)
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))]
    groups = grammar_groups(targets, grammar)
    places = torch.cat([where for where, _ in groups])
    assert torch.equal(places.sort().values, torch.arange(len(targets)))
    for where, ranges in groups:
        assert {grammar.class_ranges[index] for index in grammar.loss_rows(targets[where]).tolist()} == {
            ranges
        }


def test_the_restricted_loss_forgets_what_the_grammar_forbids(grammar: Grammar) -> None:
    """Equal to the full loss once all forbidden logits are minus infinity."""
    targets, previous = batch(grammar, 4, 28)
    hidden, head = example(len(targets), grammar.token_space.vocab_size)
    restricted = BalancedLoss(grammar, z_loss=1e-3)(hidden, head, targets, previous)
    allowed = torch.zeros(len(targets), len(head), dtype=torch.bool)
    for row, index in enumerate(grammar.loss_rows(targets).tolist()):
        for start, stop in grammar.class_ranges[index]:
            allowed[row, start:stop] = True
    logits = F.linear(hidden, head).masked_fill(~allowed, float("-inf"))
    each = F.cross_entropy(logits, targets, reduction="none")
    wanted = (each[:4].mean() + each[4:].mean()) / 2 + 1e-3 * torch.logsumexp(logits, 1).square().mean()
    torch.testing.assert_close(restricted.loss, wanted)
    gradients = torch.autograd.grad(restricted.loss, (hidden, head))
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, (hidden, head)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    sums = (logits.argmax(1) == targets).float()
    assert restricted.right.tolist()[:2] == [sums[:4].sum(), sums[4:].sum()]


def batch(grammar: Grammar, texts: int, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and the ids before them: some text ids, then some picture codes."""
    start = grammar.token_space.code_range("image").start
    targets = torch.tensor(
        [index % 11 for index in range(texts)] + [start + index % 13 for index in range(codes)]
    )
    return targets, torch.zeros_like(targets)


@pytest.mark.parametrize("weights", ["equal", "tokens", {"image": 3.0}])
def test_weighting(grammar: Grammar, weights: object) -> None:
    targets, previous = batch(grammar, 4, 28)
    hidden, head = example(len(targets), grammar.token_space.vocab_size)
    loss = BalancedLoss(grammar, weights, grammar_restricted=False, z_loss=0.0)  # type: ignore[arg-type]
    each = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    text, image = each[:4].mean(), each[4:].mean()
    wanted = {"equal": (text + image) / 2, "tokens": each.mean()}
    expected = wanted[weights] if isinstance(weights, str) else (text + 3 * image) / 4
    parts = loss(hidden, head, targets, previous)
    torch.testing.assert_close(parts.loss, expected)
    assert parts.count.tolist() == [4, 28, 0, 0]
    torch.testing.assert_close(parts.nll[:2], torch.stack([each[:4].sum(), each[4:].sum()]).detach())


def test_groups(grammar: Grammar) -> None:
    space = grammar.token_space
    loss = BalancedLoss(grammar)
    controls = [space.open_token("image"), space.close_token("speech"), space.size_token(2)]
    targets = torch.tensor([3, space.end, space.end, *controls, space.code_range("speech", 1).start])
    code = space.code_range("image").start
    previous = torch.tensor([1, 3, code, 1, code, code, code])
    names = [loss.names[index] for index in loss.groups(targets, previous).tolist()]
    assert names == ["text", "text", CONTROL, CONTROL, "speech", CONTROL, "speech"]


def test_z_loss_is_the_mean_square_of_the_normaliser(grammar: Grammar) -> None:
    targets, previous = batch(grammar, 3, 5)
    hidden, head = example(8, grammar.token_space.vocab_size)
    with_z = BalancedLoss(grammar, grammar_restricted=False, z_loss=0.5)(hidden, head, targets, previous)
    without = BalancedLoss(grammar, grammar_restricted=False, z_loss=0.0)(hidden, head, targets, previous)
    expected = 0.5 * torch.logsumexp(hidden @ head.T, 1).square().mean()
    torch.testing.assert_close(with_z.loss - without.loss, expected)
    torch.testing.assert_close(with_z.terms["z_loss"], expected.detach())


@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("weights", ["equal", "tokens", {"image": 3.0}])
def test_the_shares_of_the_groups_add_up(grammar: Grammar, weights: object, restricted: bool) -> None:
    targets, previous = batch(grammar, 4, 28)
    hidden, head = example(len(targets), grammar.token_space.vocab_size)
    loss = BalancedLoss(grammar, weights, grammar_restricted=restricted)  # type: ignore[arg-type]
    shares = loss.shares(hidden, head, targets, previous)
    assert len(shares) == 2
    whole = loss(hidden, head, targets, previous).terms["cross_entropy"]
    torch.testing.assert_close(torch.stack(shares).sum(), whole)


def test_unknown_modality_weight_is_named(grammar: Grammar) -> None:
    with pytest.raises(ConfigError, match="smell"):
        BalancedLoss(grammar, {"smell": 1.0})
