"""Quantisers: codes and vectors belong together, gradients pass straight through."""

import pytest
import torch

from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.quantizers import Quantizer

LEVELS = (5, 4, 3)


def build(kind: str, dim: int = 8) -> Quantizer:
    """A small quantiser in evaluation mode, its learned codebook set by k-means."""
    torch.manual_seed(0)
    quantizer = Quantizer(dim, kind, levels=LEVELS, codebook_size=24)
    quantizer.train()(torch.randn(4, 50, dim))
    return quantizer.eval()


@pytest.fixture(params=["fsq", "vq"])
def quantizer(request):
    return build(request.param)


def test_codes_are_in_range_and_many_are_used(quantizer):
    found = quantizer(torch.randn(3, 400, 8))
    assert found.vectors.shape == (3, 400, 8) and found.codes.shape == (3, 400)
    assert found.codes.dtype == torch.int64 and found.loss.ndim == 0
    assert found.codes.min() >= 0 and found.codes.max() < quantizer.codebook_size
    assert len(found.codes.unique()) > quantizer.codebook_size / 3


def test_looking_codes_up_gives_the_vectors_that_training_saw(quantizer):
    found = quantizer(torch.randn(3, 40, 8))
    torch.testing.assert_close(quantizer.lookup(found.codes), found.vectors)


def test_the_codebook_holds_every_code_once(quantizer):
    book = quantizer.codebook()
    assert book.shape == (quantizer.codebook_size, 8)
    assert len(book.unique(dim=0)) == quantizer.codebook_size
    codes = torch.tensor([[3, 0, quantizer.codebook_size - 1]])
    torch.testing.assert_close(quantizer.lookup(codes)[0], book[codes[0]])


def test_learned_vectors_get_their_own_codes_back():
    quantizer = build("vq")
    codes = torch.arange(24)[None]
    assert torch.equal(quantizer(quantizer.lookup(codes)).codes, codes)


def test_scalar_levels_get_their_own_codes_back():
    quantizer = build("fsq", dim=len(LEVELS))  # no projection: vectors are the levels themselves
    codes = torch.arange(5 * 4 * 3)[None]
    assert torch.equal(quantizer.inner.codes_to_indices(quantizer.lookup(codes)).long(), codes)
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


def test_only_the_learned_codebook_has_a_loss():
    x = torch.randn(2, 30, 8)
    assert build("fsq").train()(x).loss == 0
    assert build("vq").train()(x).loss > 0


def test_an_unknown_kind_is_an_error():
    with pytest.raises(TokenizerError, match="Unknown quantizer 'rvq'; allowed: fsq, vq"):
        Quantizer(8, "rvq")
