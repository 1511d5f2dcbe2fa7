"""Experiment trackers: transformers' callbacks report to them (``report_to``) under flat names."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anytoken.training.losses.balanced import bits
from anytoken.utils.errors import ConfigError

FOLDER = "tensorboard"  # of a run


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError for a tracker whose package (of the same name) is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to: {', '.join(missing)} is not installed; run pip install {' '.join(missing)}, or leave it out"
        )


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of the log under flat names, such as ``bits/image``; lists are left out.

    ``bits`` is the mean over modalities. prefix: ``eval_`` is shown as ``eval/``; everything else as ``train/``.
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "groups":
            named = {f"{key}/{group}": one for group, parts in value.items() for key, one in parts.items()}
            found |= scalars(named, prefix)
        elif isinstance(value, Mapping):
            found |= scalars({f"{name}/{key}": one for key, one in value.items()}, prefix)
        elif isinstance(value, int | float):
            found[prefix + name] = value
    if "mean_over_modalities" in metrics:
        found[f"{prefix}bits"] = bits(metrics["mean_over_modalities"])
    return found


def summary_writer(folder: Path, step: int) -> Any:
    """A TensorBoard writer for a run; hides events after ``step``, which will be written again."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / FOLDER), purge_step=step + 1)
