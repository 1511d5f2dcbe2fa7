"""Which parameters a stage trains: name patterns, or only some vocabulary rows."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anytoken.token_space import TokenSpace
from anytoken.utils.errors import ConfigError
from anytoken.utils.hints import nearest

ROWS = "rows:"
TEXT = "text"


def select_trainable(model: PreTrainedModel, patterns: Sequence[str], space: TokenSpace) -> list[str]:
    """Freeze all but the parameters that match a pattern; returns their names.

    A pattern is a shell pattern over parameter names (``*.experts.*``) or ``rows:image``: the vocabulary rows
    of one modality, while other rows of the same matrices keep their values. ConfigError for a pattern that
    matches nothing.
    """
    names = dict(model.named_parameters())
    chosen: set[str] = set()
    row_modalities = [pattern.removeprefix(ROWS) for pattern in patterns if pattern.startswith(ROWS)]
    for pattern in patterns:
        if pattern.startswith(ROWS):
            continue
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ConfigError(
                f"trainable pattern {pattern!r} matches no parameter; names look like {next(iter(names))!r}"
            )
        chosen.update(found)
    for name, parameter in names.items():
        parameter.requires_grad_(name in chosen)
    if row_modalities:
        rows = modality_rows(space, row_modalities)
        vocabulary = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        for name, parameter in names.items():
            if id(parameter) in vocabulary and name not in chosen:
                _train_rows_only(parameter, rows)
                chosen.add(name)
    return sorted(chosen)


def modality_rows(space: TokenSpace, modalities: Sequence[str]) -> list[int]:
    """All vocabulary rows of these modalities: text ids, or codes, open and close ids."""
    rows: list[int] = []
    for name in modalities:
        if name not in space.modality_names:
            raise ConfigError(
                f"no modality {name!r} in the vocabulary{nearest(name, space.modality_names)}; "
                f"there are {', '.join(space.modality_names)}"
            )
        if name == TEXT:
            rows += [id_ for start, stop in space.text_ranges for id_ in range(start, stop)]
            continue
        rows += [space.open_token(name), space.close_token(name)]
        for span in space.ranges:
            if span.kind == "code" and span.modality == name:
                rows += range(span.start, span.stop)
    return sorted(rows)


def _train_rows_only(parameter: nn.Parameter, rows: list[int]) -> None:
    mask = torch.zeros(len(parameter), 1)
    mask[rows] = 1
    parameter.requires_grad_(True)

    def keep_rows(gradient: Tensor) -> Tensor:
        return gradient * mask.to(gradient)

    parameter.register_hook(keep_rows)


def vocabulary_parameters(model: PreTrainedModel) -> set[int]:
    """Identities of the parameters that are looked up by an id: embeddings and the head."""
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None and isinstance(getattr(head, "weight", None), Tensor):
        found.add(id(head.weight))
    return found


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices have weight decay; vectors and the vocabulary (whose frozen rows must not change) have
    none."""
    vocabulary = vocabulary_parameters(model)
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or id(parameter) in vocabulary or "trainable_tokens" in name
            (plain if spared else decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
