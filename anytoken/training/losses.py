"""Losses over hidden states: cross-entropy balanced over modalities, optionally within the grammar.

Only positions with a target meet the head. With ``grammar_restricted`` the softmax runs over the ids the
grammar would allow there (an image code competes with image codes alone), which is what decoding does, and
costs a few thousand logits instead of the whole vocabulary. A z-loss keeps the normaliser near zero (PaLM,
arXiv 2204.02311); the load-balance loss is Switch Transformers' (arXiv 2101.03961), the router z-loss
ST-MoE's (arXiv 2202.08906).

Shapes: N targets, V vocabulary, D model width, E experts, T tokens.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anytoken.grammar import Grammar
from anytoken.token_space import TokenSpace

CONTROL = "control"
Ranges = Sequence[tuple[int, int]]
ModalityWeights = Literal["equal", "tokens"] | Mapping[str, float]


class LossError(ValueError):
    """Loss settings that do not fit the token space."""


def group_names(space: TokenSpace) -> list[str]:
    """The groups a loss is reported for: text, every modality, and the control ids that frame them."""
    return [*space.modality_names, CONTROL]


def group_table(space: TokenSpace) -> Tensor:
    """Group of every id, int64 [V]: codes and close ids are their modality's, other controls "control"."""
    table = space.modality_of(torch.arange(space.vocab_size)).clone()
    control = len(space.modality_names)
    for span in space.ranges:
        if span.kind == "control":
            table[span.start : span.stop] = control
    for index, name in enumerate(space.modality_names):
        if name != "text":
            table[space.close_token(name)] = index
    return table


def group_weights(weights: ModalityWeights, names: Sequence[str], control_weight: float) -> Tensor | None:
    """Weight of each group's mean loss, float32 [G]; None stands for one mean over all targets ("tokens")."""
    if weights == "tokens":
        return None
    if weights == "equal":
        weights = {}
    if isinstance(weights, str):
        raise LossError(
            f"modality_weights is {weights!r}; use equal, tokens, or a mapping such as {{image: 2}}"
        )
    unknown = set(weights) - set(names)
    if unknown:
        raise LossError(f"modality_weights names {sorted(unknown)}; there are {', '.join(names)}")
    default = dict.fromkeys(names, 1.0) | {CONTROL: control_weight}
    return torch.tensor([float({**default, **weights}[name]) for name in names])


def full_log_probs(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score targets under the softmax over the whole vocabulary.

    hidden [N, D], head [V, D], targets [N]. Returns per target the negative log-likelihood, log Z, and
    whether it was the likeliest, all [N], float32.
    """
    return _score(F.linear(hidden, head), targets)


def grammar_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, grammar: Grammar
) -> tuple[Tensor, Tensor, Tensor]:
    """Score targets under the softmax over the rows that the grammar's loss class of each target names.

    Equal to the full softmax with all other logits at minus infinity. A class of one row has no loss.
    Same arguments and results as ``full_log_probs``.
    """
    classes = grammar.loss_rows(targets)
    pieces = _split_rows(head, grammar.class_ranges)
    nll, log_z = (
        hidden.new_zeros(len(targets), dtype=torch.float32),
        hidden.new_zeros(len(targets), dtype=torch.float32),
    )
    right = torch.ones(len(targets), dtype=torch.bool, device=hidden.device)
    for index in torch.unique(classes).tolist():
        ranges = grammar.class_ranges[index]
        if sum(stop - start for start, stop in ranges) == 1:
            continue
        where = torch.nonzero(classes == index).squeeze(1)
        rows = torch.cat([pieces[span] for span in ranges])
        scores = _score(F.linear(hidden[where], rows), _local(targets[where], ranges))
        nll, log_z = nll.index_copy(0, where, scores[0]), log_z.index_copy(0, where, scores[1])
        right = right.index_copy(0, where, scores[2])
    return nll, log_z, right


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float()
    log_z = torch.logsumexp(logits, dim=-1)
    nll = log_z - logits.gather(1, targets[:, None]).squeeze(1)
    return nll, log_z, logits.detach().argmax(-1) == targets


def _split_rows(head: Tensor, class_ranges: Sequence[Ranges]) -> "_Rows":
    cuts = sorted({0, len(head), *(edge for ranges in class_ranges for span in ranges for edge in span)})
    return _Rows(cuts, head.split([stop - start for start, stop in itertools.pairwise(cuts)]))


@dataclass(frozen=True)
class _Rows:
    """The head cut once at every class edge: its gradient is one concatenation, not a full zero a slice."""

    cuts: list[int]
    pieces: tuple[Tensor, ...]

    def __getitem__(self, span: tuple[int, int]) -> Tensor:
        first, last = self.cuts.index(span[0]), self.cuts.index(span[1])
        return torch.cat(self.pieces[first:last]) if last - first > 1 else self.pieces[first]


def _local(targets: Tensor, ranges: Ranges) -> Tensor:
    """Index of each target among the concatenated ranges."""
    starts = torch.tensor([start for start, _ in ranges], device=targets.device)
    sizes = torch.tensor([stop - start for start, stop in ranges], device=targets.device)
    which = torch.bucketize(targets, starts, right=True) - 1
    return targets - starts[which] + (sizes.cumsum(0) - sizes)[which]


@dataclass
class LossParts:
    """What one batch came to: the loss to minimise and, per group, sums for the log (float32 [G])."""

    loss: Tensor
    nll: Tensor
    right: Tensor
    count: Tensor
    terms: dict[str, Tensor]


class BalancedLoss(nn.Module):
    """Cross-entropy over the targets of a packed batch, averaged over modalities, plus the output z-loss."""

    table: Tensor
    weights: Tensor | None

    def __init__(
        self,
        grammar: Grammar,
        modality_weights: ModalityWeights = "equal",
        control_weight: float = 0.1,
        grammar_restricted: bool = True,
        z_loss: float = 1e-4,
    ) -> None:
        super().__init__()
        space = grammar.token_space
        self.grammar, self.z_loss, self.grammar_restricted = grammar, z_loss, grammar_restricted
        self.names = group_names(space)
        self.end, self.text_size = space.end, space.text_size
        self.register_buffer("table", group_table(space), persistent=False)
        self.register_buffer(
            "weights", group_weights(modality_weights, self.names, control_weight), persistent=False
        )

    def groups(self, targets: Tensor, previous: Tensor) -> Tensor:
        """Group of each target [N]; the end id counts as text where it follows a text id."""
        ends_text = (targets == self.end) & (previous < self.text_size)
        return self.table[targets].masked_fill(ends_text, 0)

    def forward(self, hidden: Tensor, head: Tensor, targets: Tensor, previous: Tensor) -> LossParts:
        """hidden [N, D] at the positions before the targets [N]; previous [N], the ids at those positions."""
        if self.grammar_restricted:
            nll, log_z, right = grammar_log_probs(hidden, head, targets, self.grammar)
        else:
            nll, log_z, right = full_log_probs(hidden, head, targets)
        groups = self.groups(targets, previous)
        zero = nll.new_zeros(len(self.names))
        count = zero.index_add(0, groups, torch.ones_like(nll))
        sums = zero.index_add(0, groups, nll)
        cross_entropy = self._average(sums, count)
        z_loss = self.z_loss * log_z.square().mean()
        return LossParts(
            cross_entropy + z_loss,
            sums.detach(),
            zero.index_add(0, groups, right.float()),
            count,
            {"cross_entropy": cross_entropy.detach(), "z_loss": z_loss.detach()},
        )

    def _average(self, sums: Tensor, count: Tensor) -> Tensor:
        if self.weights is None:
            return sums.sum() / count.sum().clamp(min=1)
        weights = self.weights * (count > 0)
        return (weights * sums / count.clamp(min=1)).sum() / weights.sum().clamp(min=1e-9)


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
