"""The chunked loss is the masked full softmax, in value and gradient, whatever the groups, chunks and dtypes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anytoken.training.losses.linear_cross_entropy import (
    ALIGNMENT,
    Group,
    Scores,
    _chunks,
    linear_cross_entropy,
)

WIDTH = 8
Spans = list[tuple[int, int]]


def reference(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, z_weight: float, groups: list[Group]
) -> Scores:
    """All logits at once, those outside a target's group at minus infinity; groups of one id cost nothing."""
    allowed = torch.zeros(len(targets), len(head), dtype=torch.bool)
    for where, ranges in groups:
        for start, stop in ranges:
            allowed[where, start:stop] = True
    logits = (hidden.float() @ head.float().T).masked_fill(~allowed, float("-inf"))
    single = allowed.sum(1) == 1
    nll = F.cross_entropy(logits, targets, reduction="none").masked_fill(single, 0)
    log_z = torch.logsumexp(logits, 1).masked_fill(single, 0)
    loss = (weights * nll).sum() + z_weight * log_z.square().sum()
    return Scores(loss, nll, log_z, logits.argmax(1) == targets)


def example(count: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, head and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, WIDTH, generator=generator).requires_grad_()
    return hidden, head, torch.rand(count, generator=generator) / max(count, 1)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, Tensor, list[Group]]:
    """A vocabulary cut into classes of one or more ranges, in any order, and targets grouped by them."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    owners = draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    classes: dict[int, Spans] = {}
    edge = 0
    for size, owner in zip(sizes, owners, strict=True):
        classes.setdefault(owner, []).append((edge, edge + size))
        edge += size
    targets = torch.tensor(draw(st.lists(st.integers(0, edge - 1), max_size=30)), dtype=torch.long)
    groups = []
    for spans in draw(st.permutations(list(classes.values()))):
        inside = torch.stack([(start <= targets) & (targets < stop) for start, stop in spans]).any(0)
        groups.append(Group(inside.nonzero().squeeze(1), spans))
    return edge, targets, [group for group in groups if len(group.where)]


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts(),
    buffer=st.integers(1, 400),
    z_weight=st.sampled_from([0.0, 1e-3]),
    seed=st.integers(0, 9),
)
def test_it_is_the_masked_full_softmax(
    layout: tuple[int, Tensor, list[Group]], buffer: int, z_weight: float, seed: int
) -> None:
    vocabulary, targets, groups = layout
    hidden, head, weights = example(len(targets), vocabulary, seed)
    ours = linear_cross_entropy(hidden, head, targets, weights, z_weight, groups, buffer)
    wanted = reference(hidden, head, targets, weights, z_weight, groups)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(3 * ours.loss, (hidden, head))
    for one, other in zip(gradients, torch.autograd.grad(3 * wanted.loss, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_by_default_every_target_competes_with_the_whole_vocabulary() -> None:
    hidden, head, weights = example(9, 50)
    targets = torch.arange(9) * 5
    ours = linear_cross_entropy(hidden, head, targets, weights)
    each = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(ours.nll, each.detach())
    torch.testing.assert_close(ours.loss, (each * weights).sum())


def test_far_logits_neither_overflow_nor_vanish() -> None:
    hidden, head, weights = example(6, 50)
    targets = torch.arange(6)
    with torch.no_grad():
        hidden *= 300
    ours = linear_cross_entropy(hidden, head, targets, weights)
    each = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(ours.nll, each.detach())
    for one, other in zip(
        torch.autograd.grad(ours.loss, (hidden, head)),
        torch.autograd.grad((each * weights).sum(), (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_no_more_logits_exist_than_the_buffer_holds() -> None:
    hidden, head, weights = example(500, 64)
    buffer = 7 * 64
    with Largest() as plain:
        F.cross_entropy(hidden @ head.T, torch.zeros(500, dtype=torch.long))
    with Largest() as ours:
        linear_cross_entropy(
            hidden, head, torch.zeros(500, dtype=torch.long), weights, buffer=buffer
        ).loss.backward()
    assert plain.elements == 500 * 64
    assert ours.elements == max(hidden.numel(), head.numel(), buffer)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_a_gradient_nobody_wants_is_not_made(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, weights = example(9, 50)
    targets = torch.arange(9)
    whole = linear_cross_entropy(hidden, head, targets, weights)
    wanted = dict(zip(("hidden", "head"), torch.autograd.grad(whole.loss, (hidden, head)), strict=True))
    products = []
    monkeypatch.setattr(
        "anytoken.training.losses.linear_cross_entropy._add_product", lambda *_: products.append(1)
    )
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    ours = linear_cross_entropy(hidden, head, targets, weights)
    torch.testing.assert_close(ours.loss, whole.loss)
    assert bool(products) == (frozen == "hidden")
    assert ours.loss.requires_grad == (frozen != "both")
    if frozen == "head":
        torch.testing.assert_close(torch.autograd.grad(ours.loss, hidden)[0], wanted["hidden"])


def test_without_gradients_only_scores_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, weights = example(9, 50)
    monkeypatch.setattr("anytoken.training.losses.linear_cross_entropy._add_product", None)
    with torch.no_grad():
        ours = linear_cross_entropy(hidden, head, torch.arange(9), weights)
    assert not ours.loss.requires_grad


@pytest.mark.parametrize(("hidden_dtype", "head_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_low_precision_errs_no_more_than_twice_the_plain_softmax(hidden_dtype: str, head_dtype: str) -> None:
    exact = [*example(64, 200)[:2]]
    targets, weights = torch.arange(64) * 3, torch.full((64,), 1 / 64)
    dtypes = getattr(torch, hidden_dtype), getattr(torch, head_dtype)
    low = [one.detach().to(dtype).requires_grad_() for one, dtype in zip(exact, dtypes, strict=True)]
    wanted = reference(*exact, targets, weights, 0.0, [Group(torch.arange(64), ((0, 200),))])
    plain = F.cross_entropy((low[0].to(dtypes[1]) @ low[1].T).float(), targets)
    ours = linear_cross_entropy(*low, targets, weights)
    assert ours.nll.dtype == torch.float32
    results = []
    for loss in (ours.loss, plain):
        gradients = torch.autograd.grad(loss, low)
        assert [one.dtype for one in gradients] == list(dtypes)
        results.append([loss, *gradients])
    truth = [wanted.loss, *torch.autograd.grad(wanted.loss, exact)]
    for one, other, right in zip(*results, truth, strict=True):
        assert (one - right).abs().max() <= 2 * (other - right).abs().max() + 1e-5


def test_under_autocast_products_run_in_its_dtype() -> None:
    hidden, head, weights = example(64, 200)
    targets = torch.arange(64)
    whole = linear_cross_entropy(hidden, head, targets, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear_cross_entropy(hidden, head, targets, weights)
    assert 0 < (low.nll - whole.nll).abs().max() < 0.1
    gradients = torch.autograd.grad(low.loss, (hidden, head))
    for one, other in zip(gradients, torch.autograd.grad(whole.loss, (hidden, head)), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0.05)


def test_a_tied_head_gets_both_gradients() -> None:
    _, head, weights = example(12, 40)
    table = nn.Parameter(head.detach())
    ids = torch.arange(12)
    results = []
    for tied in (linear_cross_entropy, None):
        hidden = F.embedding(ids, table).tanh()
        if tied:
            loss = tied(hidden, table, ids + 1, weights).loss
        else:
            loss = (F.cross_entropy(hidden @ table.T, ids + 1, reduction="none") * weights).sum()
        results.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*results)


def test_gradients_accumulate_over_batches_and_a_second_backward_is_refused() -> None:
    hidden, head, weights = example(9, 50)
    once = linear_cross_entropy(hidden, head, torch.arange(9), weights).loss
    once.backward()
    first = head.grad.clone()
    with pytest.raises(RuntimeError, match="once"):
        once.backward()
    linear_cross_entropy(hidden, head, torch.arange(9), weights).loss.backward()
    torch.testing.assert_close(head.grad, 2 * first)


def test_rows_of_logits_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    strides = []
    plain = torch.mm

    def spy(one: Tensor, other: Tensor, out: Tensor) -> Tensor:
        strides.append(out.stride(0))
        return plain(one, other, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    hidden, head, weights = example(9, 50)
    linear_cross_entropy(hidden, head, torch.arange(9), weights)
    assert strides and all(stride % ALIGNMENT == 0 for stride in strides)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 1000, 5000])
def test_chunks_on_a_cpu_have_few_sizes(count: int) -> None:
    """Each target is in one of them, in order, and all but the last few are powers of two."""
    where = torch.arange(count)
    chunks = _chunks(where, 3000)
    assert torch.equal(torch.cat(chunks), where)
    sizes = {len(chunk) for chunk in chunks}
    assert all(size < 16 or size in (16, 32, 64, 128, 256, 512, 1024) for size in sizes)
    assert len(_chunks(where, 3)[0]) == min(count, 3)
