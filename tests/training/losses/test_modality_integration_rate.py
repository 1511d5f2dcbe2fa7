"""Modality Integration Rate: the Fréchet distance in closed form, scale-free, falling as clouds come together."""

import math
from typing import Any

import pytest
import torch

from anytoken.training.config import TrainConfig
from anytoken.training.losses.modality_integration_rate import (
    frechet_distance,
    integration_rate,
    integration_rates,
)
from anytoken.training.metrics import read_metrics
from anytoken.training.trainer import train


def cloud(count: int, centre: float, spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return centre + spread * torch.randn(count, 3, generator=generator, dtype=torch.float64)


def test_the_distance_of_gaussians() -> None:
    one, other = cloud(200_000, 0.0, 1.0), cloud(200_000, 2.0, 3.0, seed=1)
    assert frechet_distance(one, other).item() == pytest.approx(3 * (2.0**2 + (3.0 - 1.0) ** 2), rel=0.02)
    assert frechet_distance(one, one).item() == pytest.approx(0, abs=1e-9)


def test_the_rate_does_not_see_the_scale_and_falls_as_clouds_meet() -> None:
    text = [cloud(500, 1.0, 0.5), cloud(500, 1.0, 0.5, seed=1)]
    far, near = ([cloud(500, centre, 0.5, seed=2)] * 2 for centre in (4.0, 1.5))
    assert integration_rate(text, near) < integration_rate(text, far)
    scaled = integration_rate([7 * layer for layer in text], [7 * layer for layer in far])
    assert scaled == pytest.approx(integration_rate(text, far))


def test_an_outlier_is_left_out() -> None:
    text, other = cloud(500, 1.0, 0.5), cloud(500, 2.0, 0.5, seed=1)
    wild = torch.cat([other, torch.full((1, 3), 1e4, dtype=torch.float64)])
    assert integration_rate([text], [wild]) == pytest.approx(integration_rate([text], [other]), abs=0.1)


def test_modalities_with_too_few_tokens_have_no_rate() -> None:
    hidden = [torch.cat([cloud(100, 1.0, 0.5), cloud(80, 3.0, 0.5, seed=1), cloud(5, 0.0, 1.0, seed=2)])]
    groups = torch.tensor([0] * 100 + [1] * 80 + [2] * 5)
    rates = integration_rates(hidden, groups, ["text", "image", "speech"])
    assert list(rates) == ["image"] and math.isfinite(rates["image"])


def test_it_is_logged_with_the_held_out_losses(recipe: dict[str, Any]) -> None:
    held_out = [{"path": "things", "views": {"text->tile": 1}, "split": "train"}]
    recipe |= {
        "steps": 1,
        "tokens_per_batch": 1024,
        "eval": {"batches": 1, "data": held_out, "modality_integration_rate": True},
    }
    entry = read_metrics(train(TrainConfig.from_dict(recipe)) / "metrics.jsonl")[-1]
    assert math.isfinite(entry["eval"]["modality_integration_rate"]["tile"])
