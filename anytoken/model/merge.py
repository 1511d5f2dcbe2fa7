"""One model of several fine-tunes: their weights, averaged.

Fine-tunes of one checkpoint mostly lie in one basin of the loss, where an average loses little of what each learned
and costs nothing at inference (model soups, arXiv 2203.05482); UnIVAL does so across modalities (2307.16184).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from anytoken.processor import Processor
from anytoken.utils.errors import CheckpointError

# Settings that say how a model was trained or stored, not what it computes.
NOT_COMPARED = {
    "_name_or_path", "dtype", "output_z_loss_coef", "router_aux_loss_coef", "router_jitter_noise",
    "router_modality_aux_loss_coef", "router_z_loss_coef", "transformers_version",
}  # fmt: skip


def check_mergeable(models: Sequence[tuple[PreTrainedModel, Processor]]) -> None:
    """CheckpointError unless all are one architecture over one token space, tokenizers and their weights included."""
    first, *others = models
    settings, prints = _settings(first[0]), _fingerprints(first[1])
    for lm, processor in others:
        if processor.token_space != first[1].token_space:
            raise CheckpointError(
                f"The token spaces differ: {first[1].token_space} and {processor.token_space}. "
                "Only fine-tunes of one model can be merged."
            )
        changed = [kind for kind, value in _fingerprints(processor).items() if value != prints[kind]]
        if changed:
            raise CheckpointError(
                f"The {' and '.join(changed)} tokenizers differ, so the same id has two meanings; "
                "only models over the same tokenizers can be merged."
            )
        theirs = _settings(lm)
        wrong = [
            name for name in sorted(settings.keys() | theirs.keys()) if settings.get(name) != theirs.get(name)
        ]
        if wrong:
            raise CheckpointError(
                f"The architectures differ: {wrong[0]} is {settings.get(wrong[0])!r} in one and "
                f"{theirs.get(wrong[0])!r} in another ({len(wrong)} in all). "
                "Only fine-tunes of one model can be merged."
            )


@torch.no_grad()
def merge_weights(lms: Sequence[PreTrainedModel], weights: Sequence[float]) -> PreTrainedModel:
    """The first model with every weight the weighted mean over all of them; the others are as they were.

    weights: a share from 0 to 1 for each, 1 together; CheckpointError otherwise. Sums are made in float32.
    """
    shares = [float(weight) for weight in weights]
    if (
        len(shares) != len(lms)
        or not all(0 <= share <= 1 for share in shares)
        or not math.isclose(sum(shares), 1, abs_tol=1e-6)
    ):
        raise CheckpointError(
            f"Give {len(lms)} weights from 0 to 1 that add up to 1, such as 0.5 0.5; received {shares}."
        )
    states = [lm.state_dict() for lm in lms]
    done: set[int] = set()
    for name, target in states[0].items():
        # A tied head is one tensor, two names.
        if target.is_floating_point() and target.data_ptr() not in done:
            done.add(target.data_ptr())
            mean = torch.zeros_like(target, dtype=torch.float32)
            for share, state in zip(shares, states, strict=True):
                mean += share * state[name].float()
            target.copy_(mean)
    return lms[0]


def _settings(lm: PreTrainedModel) -> dict[str, object]:
    return {key: value for key, value in lm.config.to_dict().items() if key not in NOT_COMPARED}


def _fingerprints(processor: Processor) -> dict[str, str]:
    prints = {kind: one.fingerprint() for kind, one in processor.tokenizers.items()}
    return {"text": processor.text_tokenizer.fingerprint(), **prints}
