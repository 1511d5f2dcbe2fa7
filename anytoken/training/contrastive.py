"""Contrastive losses over a batch of pairs: match left and right items, in both directions.

The base is InfoNCE (arXiv 1807.03748) in both directions with a learned temperature (CLIP, 2103.00020). Options of a
recipe's ``contrastive`` change the targets, the weights or the similarities, and add terms; each cites its source. All
use the vectors of the global batch, so every process computes the same loss.

Shapes: N pairs, W width, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Side(NamedTuple):
    """One side of the pairs: unit vectors [N, W]; with token-wise similarity also a unit vector for each token
    [N, T, W], zero where there is none."""

    vectors: Tensor
    tokens: Tensor | None = None


class Scored(NamedTuple):
    """loss: to minimize. nll [N]: of the pairs, mean of both directions. right [N]: share of directions whose nearest
    item is right."""

    loss: Tensor
    nll: Tensor
    right: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """The loss options; ``contrastive`` in a recipe has the same names and documents them."""

    widths: Sequence[int] = ()
    tokenwise: float = 0.0
    intra_modal: float = 0.0
    hard_negatives: float = 0.0
    noise: float = 0.0
    teacher_weight: float = 0.0


def contrastive_loss(
    left: Side,
    right: Side,
    scale: Tensor,
    options: Options,
    targets: tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> Scored:
    """The contrastive loss over both sides of N pairs.

    targets: what left and right items should retrieve, each [N, N] with rows that sum to 1; by default their partner.
    weights: of the pairs [N]. teacher: the targets of a teacher model.
    """
    count = len(left.vectors)
    eye = torch.eye(count, device=scale.device)
    wanted = targets or (eye, eye)
    logits = scale * left.vectors @ right.vectors.T
    weights = torch.ones(count, device=scale.device) if weights is None else weights
    if options.noise:
        weights = weights * noise_weights(logits, options.noise)
    weights = weights / weights.mean().clamp(min=1e-9)
    learnt = wanted
    if teacher is not None:
        learnt = (distilled(wanted[0], teacher[0], options), distilled(wanted[1], teacher[1], options))

    def both(similarities: Tensor) -> Tensor:
        return symmetric_nll(similarities, learnt, eye.bool() | (wanted[0] > 0), options.hard_negatives)

    nll = both(logits)
    widths = [width for width in options.widths if width != left.vectors.shape[1]]
    total = torch.stack(
        [nll, *(both(scale * prefix_similarity(left, right, width)) for width in widths)]
    ).mean(0)
    loss = (weights * total).mean()
    terms = {}
    if options.tokenwise:
        terms["tokenwise"] = (weights * both(scale * token_similarity(left, right))).mean()
        loss = loss + options.tokenwise * terms["tokenwise"]
    if options.intra_modal:
        terms["intra_modal"] = intra_modal_consistency(left.vectors, right.vectors)
        loss = loss + options.intra_modal * terms["intra_modal"]
    rank = torch.stack([nearest_is_right(logits, wanted[0]), nearest_is_right(logits.T, wanted[1])])
    return Scored(loss, nll.detach(), rank.mean(0), {name: term.detach() for name, term in terms.items()})


def symmetric_nll(
    logits: Tensor, targets: tuple[Tensor, Tensor], positive: Tensor, hardness: float = 0.0
) -> Tensor:
    """Cross-entropy of every pair [N], the mean of both directions; positive, bool [N, N]: pairs that are not
    negatives."""
    forward = cross_entropy(logits, targets[0], positive, hardness)
    return (forward + cross_entropy(logits.T, targets[1], positive.T, hardness)) / 2


def cross_entropy(logits: Tensor, targets: Tensor, positive: Tensor, hardness: float = 0.0) -> Tensor:
    """Cross-entropy [N] between target rows and the softmax of logits [N, N].

    hardness: weights negatives by exp(hardness x logit), normalized to mean 1 over a row's negatives; 0 weights them
    equally (Robinson et al., "Contrastive Learning with Hard Negative Samples", arXiv 2010.04592).
    """
    counted = logits
    if hardness:
        nearness = (hardness * logits.detach()).masked_fill(positive, -torch.inf)
        negatives = (~positive).sum(1, keepdim=True).clamp(min=1)
        importance = nearness.log_softmax(1) + negatives.log()
        counted = logits + importance.masked_fill(positive, 0.0)
    return -(targets * (logits - counted.logsumexp(1, keepdim=True))).sum(1)


def equal_targets(groups: Tensor) -> Tensor:
    """Targets [N, N] for several positives: items of the same group [N] share the target evenly.

    (SupCon, arXiv 2004.11362; UniCL, 2204.03610, for images and texts; an image with K languages, 2406.18254.)
    """
    same = (groups[:, None] == groups[None, :]).float()
    return same / same.sum(1, keepdim=True)


def graded_targets(states: Tensor, sharpness: float) -> Tensor:
    """Targets [N, N] graded by the similarity of the querying side's items before training.

    CWCL, "Continuously Weighted Contrastive Loss" (arXiv 2309.14580), weighs by (1 + cosine) / 2 of a frozen encoder.
    states [N, F]: here the backbone's pooled states, centered because a language model's states share a direction;
    weights are raised to the power `sharpness`.
    """
    unit = F.normalize(states.detach() - states.detach().mean(0), dim=1)
    weights = ((1 + unit @ unit.T) / 2).clamp(min=0) ** sharpness
    return weights / weights.sum(1, keepdim=True)


def distilled(targets: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """Targets mixed with what a teacher retrieves.

    Soft targets of a momentum model as in ALBEF (arXiv 2107.07651), or of a larger one: DCD (2407.11802) also holds
    the student's distribution over the batch to the teacher's.
    """
    return (1 - options.teacher_weight) * targets + options.teacher_weight * teacher


def noise_weights(logits: Tensor, sharpness: float) -> Tensor:
    """Weights [N] of noisy pairs: the probability of the pair to the power of `sharpness`.

    Pairs that do not belong together keep a high loss while true ones are learned first (Huang et al., "Learning with
    Noisy Correspondence", NeurIPS 2021; NLIP, arXiv 2212.07086, and NEVLP, 2409.09582, weigh pairs by an estimate
    from their losses).
    """
    forward, backward = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    return (sharpness * (forward + backward).detach() / 2).exp()


def prefix_similarity(left: Side, right: Side, width: int) -> Tensor:
    """Cosines [N, N] of the first dimensions alone (Matryoshka representation learning, arXiv 2205.13147)."""
    cut = [F.normalize(side.vectors[:, :width], dim=1) for side in (left, right)]
    return cut[0] @ cut[1].T


def token_similarity(left: Side, right: Side) -> Tensor:
    """FILIP's token-wise similarity (arXiv 2111.07783), mean of both directions [N, N].

    The mean over tokens of the similarity to the most similar token of the other side.
    """
    assert left.tokens is not None and right.tokens is not None
    real = [side.tokens.square().sum(-1) > 0 for side in (left, right) if side.tokens is not None]
    found = []
    for row, mask in zip(left.tokens, real[0], strict=True):  # one left item at a time: [N, T, T] at most
        similarity = torch.einsum("tw,nsw->nts", row[mask], right.tokens)
        forward = similarity.masked_fill(~real[1][:, None, :], -torch.inf).amax(2).mean(1)
        back = similarity.amax(1)  # [N, S]
        backward = (back * real[1]).sum(1) / real[1].sum(1).clamp(min=1)
        found.append((forward + backward) / 2)
    return torch.stack(found)


def intra_modal_consistency(left: Tensor, right: Tensor) -> Tensor:
    """Mean squared difference between the cosines within the two sides.

    CyCLIP's in-modal and cross-modal consistency (arXiv 2205.14459); without such a term, neighbours within a
    modality are arbitrary ("Cross the Gap", 2502.04263).
    """
    within = (left @ left.T - right @ right.T).square().mean()
    cross = left @ right.T
    return within + (cross - cross.T).square().mean()


def compatibility_loss(
    new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor], scale: Tensor, targets: tuple[Tensor, Tensor]
) -> Tensor:
    """Contrastive loss between projected new vectors (left, right) and an older model's, averaged over its two sides.

    Backward-compatible training for two modalities (XBT, arXiv 2405.14715): an index of old vectors can be queried with
    the new model.
    """
    left, right = ((wanted > 0) for wanted in targets)
    losses = [
        cross_entropy(scale * new[0] @ old[1].T, targets[0], left),
        cross_entropy(scale * new[1] @ old[0].T, targets[1], right),
        *(2 * (1 - (one * other).sum(1)) for one, other in zip(new, old, strict=True)),
    ]
    return torch.stack(losses).mean()


def nearest_is_right(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each row's nearest item has the highest target, float32 [N]."""
    chosen = targets.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    return (chosen >= targets.amax(1) - 1e-6).float()


def retrieval_recall(
    left: Tensor, right: Tensor, positive: Tensor, at: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of left items [N, W] with a positive (bool [N, N]) among their nearest right items, as {"R@1": ...}."""
    order = (left @ right.T).topk(min(max(at), len(right)), dim=1).indices
    hit = positive.gather(1, order)
    return {f"R@{k}": float(hit[:, :k].any(1).float().mean()) for k in at}
