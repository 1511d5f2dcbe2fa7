"""A recipe's data as the mixture wants it: tokenized sets, and views that are written out.

A source may be raw, as a user has it (``data.train=mine.jsonl``): it is tokenized once into the run's own folder,
where a run that goes on finds it again. The view ``auto`` stands for all that its records can teach.
"""

from collections.abc import Sequence
from pathlib import Path

from anytoken.data.mixture import SourceSpec
from anytoken.data.shards import MANIFEST, Shards, tokenize_records
from anytoken.processor import Processor
from anytoken.training.stage import AUTO, Stage, StageError

FOLDER = "shards"


def prepare_sources(stage: Stage, specs: Sequence[SourceSpec], processor: Processor) -> list[SourceSpec]:
    """Tokenize what is raw, with a progress bar, and replace ``auto`` by views; StageError if there are none."""
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


def _tokenized(stage: Stage, path: str, processor: Processor) -> str:
    """The folder of a tokenized set: the path itself, or one in the run's folder that is made if it is not there."""
    if (Path(path) / MANIFEST).is_file():
        return path
    name = "-".join(Path(path).with_suffix("").parts).strip("-/.")
    out = Path(stage.output) / FOLDER / name
    return str(tokenize_records(path, processor.tokenizers, out, workers=stage.threads or 1))


def _all_views(spec: SourceSpec, processor: Processor) -> dict[str, float]:
    """Conversations as they are; of k media of a record all k(k-1) directions, equally often."""
    keys = {key for record in Shards(spec.path, processor.tokenizers).records for key in record}
    kinds = [kind for kind in processor.kinds if kind in keys]
    views = {f"{one}->{other}": 1.0 for one in kinds for other in kinds if one != other}
    if "messages" in keys:
        views["messages"] = max(1.0, float(len(views)))
    if not views:
        raise StageError(
            f"{spec.path} has records of {', '.join(sorted(keys))}: neither messages nor two of "
            f"{', '.join(processor.kinds)}; name its views in the recipe"
        )
    return views
