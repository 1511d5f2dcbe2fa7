"""The shared trunk: what its layers compute, whatever lies how in memory, and which items share a forward pass."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anytoken.tokenizers.base import load_tokenizer
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.modules import convnext
from anytoken.tokenizers.modules.convnext import (
    Conv1dAsConv2d,
    ConvNeXtBlock,
    group_by_shape,
    patchify,
    unpatchify,
)

SHAPES = [((7,), (9,)), ((7, 7), (5, 6)), ((3, 5, 5), (3, 4, 5))]


def plain(block: ConvNeXtBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's definition, one line a step."""
    past = F.pad(x, [0, 0] * (x.ndim - 3) + [block.before, 0])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    y = convolve(past, block.mix.weight, block.mix.bias, padding=block.mix.padding, groups=x.shape[1])
    y = block.down(F.gelu(block.up(block.norm(y.movedim(1, -1))))) * block.scale
    return x + y.movedim(-1, 1)


@pytest.mark.parametrize(("kernel", "space"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_block_is_what_it_is_defined_as(kernel, space, causal, channels_last):
    torch.manual_seed(0)
    block = ConvNeXtBlock(8, kernel, causal=causal)
    x = torch.randn(2, 8, *space)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    before, wanted = x.clone(), plain(block, x)
    found = block(x)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(block(x), found)
    assert torch.equal(x, before) and found.movedim(1, -1).is_contiguous()
    grads = [torch.autograd.grad(one.square().sum(), list(block.parameters())) for one in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_of_rows_is_one_along_a_line(groups):
    torch.manual_seed(0)
    ours, line = (
        Conv1dAsConv2d(8, 12, 3, padding=1, groups=groups),
        nn.Conv1d(8, 12, 3, padding=1, groups=groups),
    )
    line.load_state_dict(ours.state_dict())
    x = torch.randn(3, 8, 11)
    torch.testing.assert_close(ours(x), line(x))


@pytest.mark.parametrize("patch", [(2,), (2, 3), (1, 2, 3)])
def test_patches_hold_their_pixels_in_order_and_unfold_again(patch):
    space = [3 * p for p in patch]
    x = torch.arange(2 * 2 * np.prod(space)).reshape(2, 2, *space)
    folded = patchify(x, patch)
    first = x[(slice(None), slice(None), *(slice(p) for p in patch))]
    assert torch.equal(folded[(slice(None), slice(None), *(0 for _ in patch))], first.flatten(1))
    assert torch.equal(unpatchify(folded, patch), x)
    assert folded.movedim(1, -1).is_contiguous() and unpatchify(folded, patch).movedim(1, -1).is_contiguous()


def test_items_of_one_key_share_a_pass_up_to_what_pays(monkeypatch):
    monkeypatch.setattr(convnext, "AT_ONCE", 20)
    keys, positions = ["a", "b", "a", "a", "b", "c"], [8, 10, 8, 8, 10, 50]
    assert group_by_shape(keys, positions, torch.device("cpu")) == [[0, 2], [3], [1, 4], [5]]
    assert group_by_shape(keys, positions, torch.device("cuda")) == [[0, 2, 3], [1, 4], [5]]
    assert group_by_shape([], [], torch.device("cpu")) == []


def test_several_passes_give_what_one_gives(monkeypatch, tmp_path):
    torch.manual_seed(0)
    fresh = ImageTokenizer(16, 1, 1, refine_width=8, refine_depth=1, side_px=16)
    tokenizer = load_tokenizer(fresh.save_pretrained(tmp_path / "image"))
    rng = np.random.default_rng(0)
    pictures = [
        tokenizer.segment_type(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in [(16, 16), (16, 8), (16, 16), (8, 16), (16, 16), (16, 8), (16, 16)]
    ]
    codes = tokenizer.encode_batch(pictures)
    decoded = tokenizer.decode_batch(codes)
    for most in (1, 4, 9):
        monkeypatch.setattr(convnext, "AT_ONCE", most)
        assert tokenizer.encode_batch(pictures) == codes
        for one, other in zip(tokenizer.decode_batch(codes), decoded, strict=True):
            assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1
