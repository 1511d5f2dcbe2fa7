"""Prepare a recipe's data for the mixture: tokenized sets and explicit views.

A raw source (``data.train=mine.jsonl``) is tokenized once into the run's folder and reused on resumption. The view
``auto`` stands for all views that the records allow.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from anytoken.data.mixture import Mixture, SourceSpec
from anytoken.data.shards import MANIFEST, Shards, tokenize_records
from anytoken.data.validate import near_names
from anytoken.data.views import auto_views, held_kinds, is_used
from anytoken.processor import Processor
from anytoken.training.config import AUTO, TrainConfig
from anytoken.utils.errors import ConfigError
from anytoken.utils.limits import media_limits

FOLDER = "shards"
log = logging.getLogger(__name__)


def build_mixture(
    stage: TrainConfig, sources: list[SourceSpec], processor: Processor, cfg_dropout: float
) -> Mixture:
    """The mixture of prepared sources that a recipe draws its samples from."""
    learn_all = stage.loss.loss_on == "all"
    drawn = stage.seed, cfg_dropout, learn_all, stage.sampling, stage.tokens_per_batch
    return Mixture(sources, processor, stage.context, *drawn)


def prepare_sources(
    stage: TrainConfig, specs: Sequence[SourceSpec], processor: Processor
) -> list[SourceSpec]:
    """Tokenize raw sources, with a progress bar, and replace ``auto`` by views; ConfigError if there are none."""
    prepared = []
    for spec in stage.sources(specs):
        pair = spec.pair_with
        if pair is not None:
            pair = pair.model_copy(update={"path": _tokenized(stage, pair.path, processor)})
        spec = spec.model_copy(update={"path": _tokenized(stage, spec.path, processor), "pair_with": pair})
        if AUTO in spec.views:
            spec = spec.model_copy(update={"views": _all_views(spec, processor)})
        prepared.append(spec)
    return prepared


def _tokenized(stage: TrainConfig, path: str, processor: Processor) -> str:
    """The folder of a tokenized set: the path itself, or one in the run's folder, created if missing."""
    if (Path(path) / MANIFEST).is_file():
        return path
    out = Path(stage.output) / FOLDER / cache_name(path)
    root, workers = stage.data_root or None, stage.threads or 1
    with media_limits(**stage.limits):
        made = tokenize_records(
            path, processor.tokenizers, out, workers=workers, data_root=root, overwrite=True,
            first_frames=processor.first_frames,
        )  # fmt: skip
    return str(made)


def cache_name(path: str) -> str:
    """A unique folder name for a source path, with the readable end of the path."""
    whole = path if path.startswith("hf:") else str(Path(path).absolute())
    digest = hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', Path(path).name)[:40].strip('-.')}-{digest}"


def _all_views(spec: SourceSpec, processor: Processor) -> dict[str, float]:
    """The views of ``auto``; ConfigError if there are none. Records that no view uses are counted in the log."""
    records = Shards(spec.path, processor.tokenizers).records
    held = [held_kinds(record, processor.kinds) for record in records]
    keys = Counter(key for record in records for key in record)
    hints = near_names(keys, processor.kinds)
    views = auto_views(set(held), processor.kinds)
    if not views or (set(views) == {"->text"} and hints):
        raise ConfigError(
            f"{spec.path} has records of {', '.join(sorted(keys))}: neither messages nor two of "
            f"{', '.join(processor.kinds)}; {' '.join([*hints, 'name its views in the recipe'])}"
        )
    unused = [number for number, one in enumerate(held, start=1) if not is_used(one, views)]
    if unused:
        log.warning(
            "%s: %d of %d records hold a single medium or none and are in no view; the first: record %d",
            spec.path, len(unused), len(held), unused[0],
        )  # fmt: skip
    for hint in hints:
        log.warning("%s: %s", spec.path, hint)
    return views
