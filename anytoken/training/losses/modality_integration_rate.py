"""Modality Integration Rate: the distance of a modality's hidden states from those of text (arXiv 2410.07167).

In every layer both are scaled so that text's norms are 1 on average, tokens whose norm deviates by more than three
standard deviations are dropped, and the Fréchet distance of the two sets is computed; the rate is the logarithm of the
sum over layers. It falls from stage to stage as a modality is integrated.

Shapes: N, M tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 64  # tokens of a modality below which its cloud says nothing


def integration_rate(text: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The rate, from the hidden states of each layer: text [N, D] and the other modality [M, D]."""
    distances = []
    for words, codes in zip(text, other, strict=True):
        scale = words.norm(dim=1).mean().clamp(min=1e-9)
        distances.append(frechet_distance(_inliers(words / scale), _inliers(codes / scale)))
    return float(torch.stack(distances).sum().clamp(min=1e-12).log())


def integration_rates(hidden: Sequence[Tensor], groups: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The rate of each modality with enough tokens, by name.

    hidden: per layer [N, D]; groups: int64 [N], the place of each token's modality in ``names``, of which text is the
    first.
    """
    found = {}
    text = groups == 0
    for place, name in enumerate(names[1:], start=1):
        own = groups == place
        if min(int(text.sum()), int(own.sum())) >= LEAST:
            found[name] = integration_rate(
                *([layer[one].double() for layer in hidden] for one in (text, own))
            )
    return found


def frechet_distance(one: Tensor, other: Tensor) -> Tensor:
    """The squared Fréchet distance of two sets [N, D] and [M, D], each modeled as a Gaussian."""
    first, second = torch.cov(one.T), torch.cov(other.T)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return (one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross


def _inliers(tokens: Tensor) -> Tensor:
    norms = tokens.norm(dim=1)
    return tokens[(norms - norms.mean()).abs() <= 3 * norms.std()]
