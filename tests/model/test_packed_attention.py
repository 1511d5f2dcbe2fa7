"""Packed samples are separate samples under every attention, and whatever would mix them is an error."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache, modeling_flash_attention_utils

from anytoken.data.packing import flash_lengths
from anytoken.model import (
    AnyTokenConfig,
    AnyTokenForCausalLM,
)
from anytoken.model.packed_attention import _leaks, keep_samples_apart
from anytoken.utils.errors import DataError

VOCABULARY, LENGTH = 96, 24
ROWS = ((9, 15), (1, 3, 20))  # the samples of each row


@pytest.fixture(scope="module")
def lm() -> AnyTokenForCausalLM:
    torch.manual_seed(0)
    config = AnyTokenConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return AnyTokenForCausalLM(config).eval()


def ids(rows: int = len(ROWS)) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def positions(*rows: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def separate(lm: AnyTokenForCausalLM, row: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Logits [T, V] of a row's samples, each on its own, by the plainest attention."""
    lm.set_attn_implementation("eager")
    return torch.cat([lm(part[None], use_cache=False).logits[0] for part in row.split(lengths)])


def reference_flash(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the flash kernels, by their signatures; returns the names of those that were called."""
    called = []

    def dense(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, **rest: Any) -> Tensor:
        called.append("dense")
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
        )
        return output.transpose(1, 2)

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool, dropout_p: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        lengths = cu_seqlens_q.diff().tolist()
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q)
        parts = zip(*(one[None].split(lengths, 1) for one in (q, k, v)), strict=True)
        whole = torch.cat([dense(*part, softmax_scale, causal) for part in parts], 1)[0]
        called.append("varlen")
        return whole

    process = modeling_flash_attention_utils._lazy_define_process_function(varlen)
    loaded = ((dense, varlen, None, None, None), (process, None))
    monkeypatch.setattr(
        modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: loaded
    )
    return called


IMPLEMENTATIONS = [
    "eager",
    "sdpa",
    pytest.param("flex_attention", marks=pytest.mark.slow),
    "flash_attention_2",
]


@pytest.fixture(params=IMPLEMENTATIONS)
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param.startswith("flash"):
        reference_flash(monkeypatch)
    return request.param


def switch(lm: AnyTokenForCausalLM, attention: str) -> None:
    if attention.startswith("flash"):
        lm.config._attn_implementation_internal = attention  # the setter asks for the package
    else:
        lm.set_attn_implementation(attention)


@torch.no_grad()  # flex_attention has no backward pass on a CPU
def test_packed_rows_equal_separate_samples(lm: AnyTokenForCausalLM, attention: str) -> None:
    wanted = torch.stack([separate(lm, row, lengths) for row, lengths in zip(ids(), ROWS, strict=True)])
    switch(lm, attention)
    packed = positions(*ROWS)
    for extra in ({}, {"use_cache": False}, flash_lengths(packed)):
        torch.testing.assert_close(lm(ids(), position_ids=packed, **extra).logits, wanted, rtol=0, atol=1e-5)
    embedded = lm.get_input_embeddings()(ids())
    output = lm(inputs_embeds=embedded, position_ids=packed)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_row_of_positions_serves_all_rows(lm: AnyTokenForCausalLM, attention: str) -> None:
    wanted = torch.stack([separate(lm, row, ROWS[0]) for row in ids()])
    switch(lm, attention)
    torch.testing.assert_close(lm(ids(), position_ids=positions(ROWS[0])).logits, wanted, rtol=0, atol=1e-5)


def test_flash_attention_gets_all_rows_as_samples(
    lm: AnyTokenForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = reference_flash(monkeypatch)
    switch(lm, "flash_attention_2")
    lm(ids(), position_ids=positions(*ROWS))
    assert called.count("varlen") == lm.config.num_hidden_layers
    called.clear()
    lm(ids(), position_ids=positions((LENGTH,), (LENGTH,)))
    assert "varlen" not in called  # nothing is packed


def filled_cache(lm: AnyTokenForCausalLM, kind: type = DynamicCache) -> Any:
    cache = (
        DynamicCache(config=lm.config) if kind is DynamicCache else StaticCache(lm.config, max_cache_len=64)
    )
    lm(ids()[:, :5], past_key_values=cache, use_cache=True)
    return cache


PACKED = positions(*ROWS)
HOLE = torch.ones(2, LENGTH).index_fill(1, torch.tensor([9]), 0)  # padding where row 0's second sample begins
FORBIDDEN = {
    "a mask of ones": lambda lm: {"attention_mask": torch.ones(2, LENGTH)},
    "a mask of ones for all rows": lambda lm: {"attention_mask": torch.ones(1, LENGTH)},
    "padding between the samples": lambda lm: {
        "attention_mask": HOLE, "position_ids": positions((9, 1, 14), (9, 1, 14))
    },
    "a causal 4D mask": lambda lm: {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH).tril().bool()},
    "an additive 4D mask": lambda lm: {
        "attention_mask": torch.full((1, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    },
    "a mask that cannot be read": lambda lm: {"attention_mask": object()},
    "a cache asked for": lambda lm: {"use_cache": True},
    "an empty cache": lambda lm: {"past_key_values": DynamicCache(config=lm.config)},
    "a filled cache": lambda lm: {"past_key_values": filled_cache(lm)},
    "a static cache": lambda lm: {"past_key_values": StaticCache(lm.config, max_cache_len=64)},
    "another sample's cache": lambda lm: {
        "past_key_values": filled_cache(lm), "position_ids": positions((LENGTH,), (LENGTH,))
    },
    "other lengths": lambda lm: flash_lengths(positions(ROWS[1], ROWS[0])),
    "lengths of one row": lambda lm: flash_lengths(PACKED[:1]),
    "lengths without positions": lambda lm: flash_lengths(PACKED) | {"position_ids": None},
}  # fmt: skip


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("what", FORBIDDEN)
def test_whatever_would_mix_samples_is_an_error(lm: AnyTokenForCausalLM, what: str, embedded: bool) -> None:
    lm.set_attn_implementation("sdpa")
    given = {"input_ids": ids(), "position_ids": PACKED} | FORBIDDEN[what](lm)
    if embedded:
        given["inputs_embeds"] = lm.get_input_embeddings()(given.pop("input_ids"))
    with pytest.raises(DataError, match=r"position_ids"):
        lm(**given)


@pytest.mark.parametrize("what", [what for what in FORBIDDEN if "read" not in what and "without" not in what])
def test_compiled_code_refuses_too(lm: AnyTokenForCausalLM, what: str) -> None:
    @partial(torch.compile, backend="eager", fullgraph=True)
    def check(
        ids: Tensor, position_ids: Tensor, attention_mask: Any = None, use_cache: Any = None, **rest: Any
    ):  # type: ignore[no-untyped-def]
        keep_samples_apart(lm.config, len(ids), position_ids, attention_mask, use_cache, rest)
        return ids + 1

    with pytest.raises(RuntimeError, match="position_ids"):
        check(ids(), **({"position_ids": PACKED} | FORBIDDEN[what](lm)))
    torch.compiler.reset()


def test_compiled_packed_rows_equal_separate_samples(lm: AnyTokenForCausalLM) -> None:
    wanted = torch.stack([separate(lm, row, lengths) for row, lengths in zip(ids(), ROWS, strict=True)])
    lm.set_attn_implementation("sdpa")
    torch.compiler.reset()
    compiled = torch.compile(lm.model, backend="eager", fullgraph=True)
    output = compiled(ids(), position_ids=PACKED)
    assert output.past_key_values is None
    torch.testing.assert_close(lm.lm_head(output.last_hidden_state), wanted, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="position_ids"):
        compiled(ids(), position_ids=PACKED, attention_mask=torch.ones(2, LENGTH))


def block_mask() -> Tensor:
    sample = (PACKED == 0).cumsum(1)
    return (sample[:, None, :, None] == sample[:, None, None, :]) & torch.ones(LENGTH, LENGTH).tril().bool()


def test_a_4d_mask_that_separates_the_samples_is_let_through(lm: AnyTokenForCausalLM) -> None:
    wanted = torch.stack([separate(lm, row, lengths) for row, lengths in zip(ids(), ROWS, strict=True)])
    lm.set_attn_implementation("sdpa")
    output = lm(ids(), position_ids=PACKED, attention_mask=block_mask(), use_cache=False)
    torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_what_mixes_nothing_is_let_through(lm: AnyTokenForCausalLM, cache: type) -> None:
    """Padding on either side, positions that count columns over padding, and a prompt read in two parts."""
    lm.set_attn_implementation("sdpa")
    whole = lm(ids()).logits
    mask = torch.ones(2, LENGTH).long()
    mask[0, :4] = 0
    for counted in (
        (mask.cumsum(1) - 1).clamp(min=0),
        torch.arange(LENGTH)[None],
        (mask.cumsum(1) - 1) + 1 - mask,
    ):
        logits = lm(ids(), position_ids=counted, attention_mask=mask).logits
        torch.testing.assert_close(logits[1], whole[1], rtol=0, atol=1e-5)
    lm(ids(), position_ids=torch.arange(LENGTH)[None], attention_mask=mask.flip(1) * HOLE)
    rest = lm(
        ids()[:, 5:], past_key_values=filled_cache(lm, cache), position_ids=torch.arange(5, LENGTH)[None]
    ).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-5)


@st.composite
def padded_rows(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Positions, mask and sample of each token of one row: samples with padding anywhere between them."""
    found: list[tuple[int, int, int]] = []
    for sample in range(draw(st.integers(1, 3))):
        found += [(draw(st.integers(0, 1)), 0, -1)] * draw(st.integers(0, 3))
        found += [(position, 1, sample) for position in range(draw(st.integers(1, 4)))]
    found += [(0, 0, -1), (0, 0, -1)]
    return tuple(list(column) for column in zip(*found, strict=True))


@settings(max_examples=200, deadline=None)
@given(row=padded_rows())
def test_a_mask_leaks_exactly_if_it_shows_two_samples(row: tuple[list[int], list[int], list[int]]) -> None:
    counted, mask, samples = (torch.tensor(column)[None] for column in row)
    shown = len(set(samples[mask.bool()].tolist()))
    assert bool(_leaks(counted, mask, None)) == (shown > 1)
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool() & mask.bool()[:, None, None, :]
    assert bool(_leaks(counted, causal, None)) == (shown > 1)
    apart = causal & (samples[:, None, :, None] == samples[:, None, None, :])
    assert not _leaks(counted, apart, None)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_attention_keeps_packed_rows_apart_on_a_gpu(attention: str) -> None:
    """Within the rounding of bfloat16: no further from float32 than twice what eager attention is."""
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if attention in packages:
        pytest.importorskip(packages[attention])
    torch.manual_seed(0)
    make = partial(
        AnyTokenConfig, vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, num_experts=2,
    )  # fmt: skip
    exact = AnyTokenForCausalLM(make()).eval()
    wanted = torch.stack([separate(exact, row, lengths) for row, lengths in zip(ids(), ROWS, strict=True)])
    low = exact.to("cuda", torch.bfloat16)
    errors = {}
    for name in ("eager", attention):
        low.set_attn_implementation(name)
        logits = low(ids().cuda(), position_ids=PACKED.cuda()).logits
        errors[name] = (logits.float().cpu() - wanted).abs().max()
    assert errors[attention] <= 2 * errors["eager"] + 1e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_eager_attention_keeps_packed_samples_apart_as_sdpa_does(
    lm: AnyTokenForCausalLM, autocast: bool
) -> None:
    found = []
    for implementation in ("sdpa", "eager"):
        lm.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(
                lm.model(ids(), position_ids=positions(*ROWS), packed=True).last_hidden_state.float()
            )
    lm.set_attn_implementation("sdpa")
    tolerance = 0.05 if autocast else 1e-5
    assert (found[0] - found[1]).norm() / found[0].norm() < tolerance
    other = ids().clone()
    other[:, 0] += 1  # of the first sample: the rest must not change
    with torch.no_grad():
        lm.set_attn_implementation("eager")
        one, two = (
            lm.model(x, position_ids=positions(*ROWS), packed=True).last_hidden_state for x in (ids(), other)
        )
        lm.set_attn_implementation("sdpa")
    start = ROWS[0][0]
    assert not torch.equal(one[0, :start], two[0, :start])
    torch.testing.assert_close(one[0, start:], two[0, start:], rtol=0, atol=0)
