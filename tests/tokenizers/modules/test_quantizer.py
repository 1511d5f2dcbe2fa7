"""Quantisers: codes and vectors belong together, gradients pass straight through."""

import pytest
import torch

from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.modules.quantizer import KINDS, Quantizer

LEVELS = (5, 4, 3)
FORMS = [(residual, groups) for residual in (1, 3) for groups in (1, 2)]


def build(kind: str, residual: int = 1, groups: int = 1, dim: int = 8) -> Quantizer:
    """A small quantiser in evaluation mode, its learned codebooks set by k-means."""
    torch.manual_seed(0)
    choice = {"kind": kind, "residual": residual, "groups": groups}
    quantizer = Quantizer(dim, choice, levels=LEVELS, codebook_size=32)
    quantizer.train()(torch.randn(4, 50, dim))
    return quantizer.eval()


@pytest.fixture(params=[(kind, *form) for kind in KINDS for form in FORMS], ids=str)
def quantizer(request):
    return build(*request.param)


def test_codes_are_in_range_and_many_are_used(quantizer):
    found = quantizer(torch.randn(3, 400, 8))
    assert found.vectors.shape == (3, 400, 8) and found.codes.shape == (3, 400, quantizer.num_codebooks)
    assert found.codes.dtype == torch.int64 and found.loss.ndim == 0
    assert quantizer.codebook_sizes == [quantizer.codebook_size] * quantizer.residual * quantizer.groups
    assert found.codes.min() >= 0 and found.codes.max() < quantizer.codebook_size
    assert len(found.codes.unique()) > quantizer.codebook_size / 3


def test_looking_codes_up_gives_the_vectors_that_training_saw(quantizer):
    found = quantizer(torch.randn(3, 40, 8))
    torch.testing.assert_close(quantizer.lookup(found.codes), found.vectors)


def test_every_codebook_holds_every_code_once(quantizer):
    for number in range(quantizer.num_codebooks):
        book = quantizer.codebook(number)
        assert book.ndim == 2 and len(book.unique(dim=0)) == len(book) == quantizer.codebook_size
    if quantizer.num_codebooks == 1:
        codes = torch.tensor([[[3], [0], [quantizer.codebook_size - 1]]])
        torch.testing.assert_close(quantizer.lookup(codes)[0], book[codes[0, :, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_residual_codebooks_bring_the_vectors_nearer(kind):
    x = torch.randn(3, 400, 8)
    errors = [(build(kind, depth)(x).vectors - x).square().mean() for depth in (1, 4)]
    if kind in (
        "vq",
        "simvq",
    ):  # the others have projections, or unit vectors: nearness is learnt with the decoder
        assert errors[1] < errors[0]
    residual = build(kind, 4)
    summed = sum(residual.codebook(n)[residual(x).codes[..., n]] for n in range(4))
    inner = residual.inner
    torch.testing.assert_close(
        getattr(inner, "project_out", torch.nn.Identity())(summed), residual.lookup(residual(x).codes)
    )


def test_groups_quantise_their_own_channels():
    quantizer, x = build("vq", groups=2), torch.randn(1, 50, 8)
    changed = x.clone()
    changed[..., 4:] = torch.randn(1, 50, 4)
    before, after = quantizer(x), quantizer(changed)
    assert torch.equal(before.codes[..., 0], after.codes[..., 0])
    assert not torch.equal(before.codes[..., 1], after.codes[..., 1])
    assert torch.equal(before.vectors[..., :4], after.vectors[..., :4])


def test_learned_vectors_get_their_own_codes_back():
    quantizer = build("vq")
    codes = torch.arange(32)[None, :, None]
    assert torch.equal(quantizer(quantizer.lookup(codes)).codes, codes)


def test_scalar_levels_get_their_own_codes_back():
    quantizer = build("fsq", dim=len(LEVELS))  # no projection: vectors are the levels themselves
    codes = torch.arange(5 * 4 * 3)[None, :, None]
    assert torch.equal(quantizer.inner.codes_to_indices(quantizer.lookup(codes)).long(), codes[..., 0])
    assert quantizer.codebook_size == 60


def test_gradients_pass_straight_through(quantizer):
    x = torch.randn(2, 30, 8, requires_grad=True)
    weights = torch.randn(2, 30, 8)
    (quantizer.train()(x).vectors * weights).sum().backward()
    assert x.grad.isfinite().all() and (x.grad.abs().sum(-1) > 0).all()


def test_quantising_is_a_step_function_of_its_input(quantizer):
    x = torch.randn(1, 200, 8)
    assert torch.equal(quantizer(x).codes, quantizer(x).codes)
    nearby = quantizer(x + 1e-4).codes == quantizer(x).codes
    assert nearby.float().mean() > 0.95


def test_only_scalar_levels_have_no_loss():
    x = torch.randn(2, 30, 8)
    for kind in KINDS:
        assert (build(kind).train()(x).loss != 0) == (kind != "fsq")


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("rvq", r"Unknown quantizer 'rvq' .did you mean 'vq'..; allowed: fsq, vq, cosine, simvq, lfq"),
        ({"residual": 2}, "Unknown quantizer ''"),
        (
            {"kind": "vq", "depth": 2},
            "is a kind, or {kind, residual, groups, codebook_pattern, dropout, num_active_codebooks}.*'depth': 2",
        ),
        ({"kind": "vq", "residual": 0}, "at least 1 each"),
        ({"kind": "vq", "groups": 3}, "groups that divide the width 8"),
        ({"kind": "fsq", "code_dim": 4}, "for vq and cosine also code_dim"),
        ({"kind": "vq", "residual": 2, "num_active_codebooks": 1}, "less only with dropout"),
        ({"kind": "vq", "residual": 2, "num_active_codebooks": 3, "dropout": True}, "1 to residual .2."),
        ("lfq", "for lfq a power of two; received 24"),
        (None, "Unknown quantizer ''"),
        ({"kind": "vq", "residual": "two"}, "at least 1 each"),
        ({"kind": "vq", "groups": 1.5}, "at least 1 each"),
        ({"kind": "vq", "code_dim": 0}, "at least 1 each"),
    ],
)
def test_a_choice_that_cannot_be_is_an_error(choice, says):
    with pytest.raises(TokenizerError, match=says):
        Quantizer(8, choice, codebook_size=24)


@pytest.mark.parametrize("levels", [(), (8, 1), ("a",), (4.5,)])
def test_levels_that_are_none_are_an_error(levels):
    with pytest.raises(TokenizerError, match=r"levels of at least 2 each, such as \[8, 5, 5, 5\]; received"):
        Quantizer(8, "fsq", levels)


@pytest.mark.parametrize("size", [0, 1, "many", 10.5])
def test_a_codebook_without_a_size_is_an_error(size):
    with pytest.raises(TokenizerError, match="codebook_size is at least 2"):
        Quantizer(8, "vq", codebook_size=size)


RANKS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from anytoken.tokenizers.modules.quantizer import Quantizer
dist.init_process_group("gloo")
rank = dist.get_rank()
for form in sys.argv[1:]:
    kind, residual, groups = form.split("-")
    torch.manual_seed(0)  # as every training begins
    choice = {"kind": kind, "residual": int(residual), "groups": int(groups)}
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Quantizer(8, choice, (5, 4, 3), 32))
    # Without broadcasts in the forward pass, equal codebooks are the quantiser's own doing.
    ranks = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(6):
        torch.manual_seed(100 * step + rank)
        found = ranks(torch.randn(2, 100 + 20 * rank, 8) * (1 + rank))
        (found.vectors.square().mean() + found.loss).backward()
        optimizer.step()
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.detach().contiguous())
        assert torch.allclose(both[0].float(), both[1].float(), atol=1e-6), (form, name)
    if rank == 0:
        print(form, "equal", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_codebooks_are_equal_on_all_ranks(tmp_path):
    import subprocess
    import sys

    (tmp_path / "ranks.py").write_text(RANKS)
    forms = [f"{kind}-{residual}-{groups}" for kind in KINDS for residual, groups in ((1, 1), (2, 1), (2, 2))]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "ranks.py")]
    done = subprocess.run([sys.executable, *launch, *forms], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [word for form in forms for word in (form, "equal")]


def test_with_dropout_the_first_codebooks_will_do():
    choice = {"kind": "vq", "residual": 3, "dropout": True, "code_dim": 4}
    torch.manual_seed(0)
    whole = Quantizer(8, choice, codebook_size=32)
    depths = {int((whole.train()(torch.randn(2, 50, 8)).codes[0, 0] >= 0).sum()) for _ in range(12)}
    assert depths == {1, 2, 3}
    first = Quantizer(8, {**choice, "num_active_codebooks": 1}, codebook_size=32)
    first.load_state_dict(whole.state_dict())
    x = torch.randn(2, 50, 8)
    found = first.eval()(x)
    assert found.codes.shape == (2, 50, 1) and first.codebook_sizes == [32]
    assert torch.equal(found.codes, whole.eval()(x).codes[..., :1])
    torch.testing.assert_close(first.lookup(found.codes), found.vectors)
    assert first.codebook().shape == (32, 4)


def test_the_nearest_sums_of_residual_codebooks_are_found():
    choice = {"kind": "vq", "residual": 2, "dropout": True, "code_dim": 6}
    torch.manual_seed(0)
    whole, x = Quantizer(8, choice, codebook_size=8), torch.randn(2, 50, 8)
    for _ in range(9):  # of which some train both
        whole.train()(x)
    projected = whole.eval().inner.project_in(x)
    first, second = whole.inner.codebooks
    sums = (first[:, None] + second).flatten(0, 1)  # a beam of 8 follows up all first codes
    nearest = torch.cdist(projected, sums.expand(2, -1, -1)).topk(5, largest=False).indices
    found = whole.nearest(x, 5)
    assert found.shape == (2, 50, 5, 2) and torch.equal(found[..., 0] * 8 + found[..., 1], nearest)
    greedy = whole(x).codes
    assert not torch.equal(found[:, :, 0], greedy), "one code after the other is not always nearest"
    alone = Quantizer(8, {**choice, "num_active_codebooks": 1}, codebook_size=8)
    alone.load_state_dict(whole.state_dict())
    assert torch.equal(alone.eval().nearest(x, 3)[:, :, 0], greedy[..., :1])


def test_settings_of_moving_averages_reach_the_codebook():
    book = Quantizer(
        8, {"kind": "vq", "decay": 0.5, "threshold_ema_dead_code": 0.25}, codebook_size=16
    ).inner._codebook
    assert (book.decay, book.threshold_ema_dead_code) == (0.5, 0.25)
    assert Quantizer(8, "vq", codebook_size=16).inner._codebook.decay == 0.95


def test_distances_are_not_taken_in_half_precision():
    quantizer, x = build("vq"), torch.randn(3, 400, 8)
    expected = quantizer(x).codes
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(x)
    assert torch.equal(found.codes, expected) and found.vectors.dtype == torch.float32
