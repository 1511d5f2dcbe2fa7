"""Drawing from logits: frequencies, filters, penalties, guidance, and settings that are refused."""

from typing import Any

import numpy as np
import pytest
import torch

from anytoken.inference.sampling import (
    Sampling,
    apply_cfg,
    apply_repetition_penalty,
    merge_sampling,
    sample,
)
from anytoken.utils.errors import RequestError

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def frequencies(sampling: Sampling, count: int = 20_000) -> torch.Tensor:
    uniforms = (torch.arange(count) + 0.5) / count  # an even grid: exact up to 1 / count
    chosen = sample(LOGITS.expand(count, -1), sampling, uniforms)
    return torch.bincount(chosen, minlength=4) / count


def test_draw_follows_the_distribution() -> None:
    torch.testing.assert_close(frequencies(Sampling()), LOGITS.exp(), atol=2e-4, rtol=0)


def test_temperature_sharpens() -> None:
    expected = (LOGITS * 2).softmax(-1)
    torch.testing.assert_close(frequencies(Sampling(temperature=0.5)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0, 1e-300])
def test_cold_is_greedy(temperature: float) -> None:
    assert frequencies(Sampling(temperature=temperature)).tolist() == [1, 0, 0, 0]


def test_top_k_keeps_the_best() -> None:
    expected = torch.tensor([0.5, 0, 0.3, 0]) / 0.8
    torch.testing.assert_close(frequencies(Sampling(top_k=2)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, [0]), (0.5, [0]), (0.6, [0, 2]), (0.79, [0, 2])])
def test_top_p_keeps_the_smallest_nucleus(top_p: float, kept: list[int]) -> None:
    assert frequencies(Sampling(top_p=top_p)).nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.1, [0, 1, 2, 3]), (0.3, [0, 2]), (0.7, [0]), (1.0, [0])])
def test_min_p_keeps_what_is_nearly_as_likely(min_p: float, kept: list[int]) -> None:
    found = frequencies(Sampling(min_p=min_p))
    expected = torch.zeros(4)
    expected[kept] = LOGITS[kept].exp()
    torch.testing.assert_close(found, expected / expected.sum(), atol=2e-4, rtol=0)


def test_extreme_uniforms_stay_inside() -> None:
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(LOGITS.expand(2, -1), Sampling(top_k=2), uniforms).tolist() == [0, 2]


def test_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    seen = [torch.tensor([0, 1]), torch.tensor([], dtype=torch.long)]
    assert apply_repetition_penalty(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]]


def test_guidance_moves_away_from_the_unconditional() -> None:
    assert apply_cfg(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3.0).tolist() == [3.0, -2.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"cfg_scale": -0.1},
        {"cfg_scale": True},
    ],
)
def test_bad_settings_name_setting_and_value(bad: dict[str, Any]) -> None:
    [(name, value)] = bad.items()
    with pytest.raises(RequestError, match=f"{name}.*{value}"):
        Sampling(**bad)


def test_numbers_of_numpy_and_whole_floats_are_taken() -> None:
    sampling = Sampling(temperature=np.float32(0.5), top_k=2.0, cfg_scale=np.int64(2))  # type: ignore[arg-type]
    assert sampling == Sampling(temperature=0.5, top_k=2, cfg_scale=2)
    assert type(sampling.top_k) is int and type(sampling.temperature) is float
    assert sample(LOGITS[None], sampling, torch.tensor([0.99])).tolist() == [2]


def test_merge_order() -> None:
    merged = merge_sampling(
        ["text", "image"],
        {"image": Sampling(top_k=8, cfg_scale=3)},
        {"temperature": 0.5, "top_p": None},
        {"text": Sampling(temperature=0)},
    )
    assert merged == {
        "text": Sampling(temperature=0),
        "image": Sampling(temperature=0.5, top_k=8, cfg_scale=3),
    }


def test_merge_refuses_unknown_kinds_and_settings() -> None:
    with pytest.raises(RequestError, match=r"'smell'.*text, image"):
        merge_sampling(["text", "image"], {}, {}, {"smell": Sampling()})
    with pytest.raises(RequestError, match=r"'heat'.*temperature"):
        merge_sampling(["text"], {}, {}, {"text": {"heat": 1}})
