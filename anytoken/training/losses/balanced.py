"""Losses over hidden states: cross-entropy balanced over modalities, optionally within the grammar.

Only positions with a target go through the head, in chunks (``linear_cross_entropy.py``). With ``grammar_restricted``
the softmax runs over the ids that the grammar allows there (an image code competes only with image codes), as in
decoding, which costs a few thousand logits instead of the whole vocabulary. A z-loss keeps the normaliser near zero
(PaLM, arXiv 2204.02311); the load-balance loss is Switch Transformers' (arXiv 2101.03961), the router z-loss ST-MoE's
(arXiv 2202.08906).

Shapes: N targets, V vocabulary, D model width, E experts, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anytoken.grammar import Grammar
from anytoken.token_space import TokenSpace
from anytoken.training.losses.linear_cross_entropy import Group, Scores, linear_cross_entropy
from anytoken.utils.distributed import sum_over_processes
from anytoken.utils.errors import ConfigError

CONTROL = "control"
ModalityWeights = Literal["equal", "tokens"] | Mapping[str, float]


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
        raise ConfigError(
            f"modality_weights is {weights!r}; use equal, tokens, or a mapping such as {{image: 2}}"
        )
    unknown = set(weights) - set(names)
    if unknown:
        raise ConfigError(f"modality_weights names {sorted(unknown)}; there are {', '.join(names)}")
    default = dict.fromkeys(names, 1.0) | {CONTROL: control_weight}
    return torch.tensor([float({**default, **weights}[name]) for name in names])


@dataclass(frozen=True)
class TargetClasses:
    """Targets sorted by the grammar's loss class: their places in that order, int64 [N], and the size of each class."""

    order: Tensor
    counts: list[int]

    @classmethod
    def of(cls, targets: Tensor, grammar: Grammar) -> "TargetClasses":
        """The classes of targets [N]; computed on the CPU before transfer, so the host never waits for the device."""
        classes = grammar.loss_rows(targets)
        counts = torch.bincount(classes, minlength=len(grammar.class_ranges)).tolist()
        return cls(classes.argsort(stable=True), counts)


def grammar_groups(targets: Tensor, grammar: Grammar, classes: TargetClasses | None = None) -> list[Group]:
    """Targets [N] grouped by the ids that the grammar's loss class of each names: its softmax runs over those.

    Equal to the full softmax with all other logits at minus infinity. classes: if they are known.
    """
    found = classes or TargetClasses.of(targets, grammar)
    members = found.order.split(found.counts)
    return [
        Group(where, ranges)
        for where, ranges in zip(members, grammar.class_ranges, strict=True)
        if len(where)
    ]


@dataclass
class LossParts:
    """Results of one batch: the loss to minimize and, per group, sums for the log (float32 [G]).

    All are of the global batch, the same in every process.
    """

    loss: Tensor
    nll: Tensor
    right: Tensor
    count: Tensor
    terms: dict[str, Tensor]


class BalancedLoss(nn.Module):
    """Cross-entropy over the targets of a packed batch, averaged over modalities, plus the output z-loss.

    With several processes this is the global batch, and all of them must call it.
    """

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
        """Group of each target [N]; an end id counts as text after a text id."""
        ends_text = (targets == self.end) & (previous < self.text_size)
        return self.table[targets].masked_fill(ends_text, 0)

    def forward(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        previous: Tensor,
        classes: TargetClasses | None = None,
    ) -> LossParts:
        """hidden [N, D] at the positions before the targets [N]; previous [N], the ids at those positions.

        classes: of the targets, if known.
        """
        groups = self.groups(targets, previous)
        zero = torch.zeros(len(self.names), device=targets.device)
        count = sum_over_processes(zero.index_add(0, groups, torch.ones_like(groups, dtype=zero.dtype)))
        weights = self._target_weights(count)[groups]
        z_weight = (self.z_loss / count.sum().double().clamp(min=1)).to(count.dtype)
        scores = self._score(hidden, head, targets, weights, z_weight, classes)
        nll, right = (zero.index_add(0, groups, each.float()) for each in (scores.nll, scores.right))
        terms = torch.stack([(weights * scores.nll).sum(), z_weight * scores.log_z.square().sum()])
        # One sum for all that is only logged.
        nll, right, terms = sum_over_processes(torch.cat([nll, right, terms])).split(
            [len(zero), len(zero), 2]
        )
        named = dict(zip(("cross_entropy", "z_loss"), terms, strict=True))
        return LossParts(sum_over_processes(scores.loss), nll, right, count, named)

    def shares(self, hidden: Tensor, head: Tensor, targets: Tensor, previous: Tensor) -> list[Tensor]:
        """The contribution of each present group to the cross-entropy; arguments as for ``forward``."""
        groups = self.groups(targets, previous)
        weights = self._target_weights(torch.bincount(groups, minlength=len(self.names)).float())
        found = []
        for group in groups.unique().tolist():
            where = (groups == group).nonzero().squeeze(1)
            own = weights[group].expand(len(where))
            found.append(self._score(hidden[where], head, targets[where], own).loss)
        return found

    def _score(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        z_weight: float | Tensor = 0.0,
        classes: TargetClasses | None = None,
    ) -> Scores:
        choices = grammar_groups(targets, self.grammar, classes) if self.grammar_restricted else None
        return linear_cross_entropy(hidden, head, targets, weights, z_weight, choices)

    def _target_weights(self, count: Tensor) -> Tensor:
        """The weight of one target of each group in the loss, float32 [G]; the weights of all targets sum to 1."""
        if self.weights is None:
            return (1 / count.sum().clamp(min=1)).expand_as(count)
        weights = self.weights * (count > 0)
        return weights / weights.sum().clamp(min=1e-9) / count.clamp(min=1)


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
