"""The folder of a run, written so that a kill at any time leaves its last complete state.

    stage.yaml           the resolved recipe; resuming with another one is an error
    run.json             metadata: code, machine, sizes, checksums of the data
    metrics.jsonl        cut back to the length it had at the state a run resumes from
    tensorboard/         event files, if report_to names it
    report.html          the report, updated with the log
    samples/step-N.json  replies to the recipe's prompts
    diverged/            the batches of a step whose loss or gradient was not finite
    state/checkpoint-N   weights, optimizer, schedule, random state, position in the data and in the meter
    state/partial        what is being written: never read, emptied when a run begins

A finished run has training.md, and the model instead of the states: a checkpoint, or an adapter and its card.
A state is written under ``partial``, flushed to the disk and renamed, so it is whole or not there. One that is
dropped is renamed first too: half of it is never taken for a state. While the run is unfinished, a state of full
training is a checkpoint folder of its own, which ``init_from`` may name.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from anytoken import moved
from anytoken.model.embedding_head import FILE as HEAD_FILE
from anytoken.training.config import TrainConfig
from anytoken.utils.atomic import flush
from anytoken.utils.errors import ConfigError, WriteError

STATE_FOLDER = "state"
KEPT_STATES = 2
PROGRESS = "progress.json"  # the place in the data, in the meter and in the log: the same for every process
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what torch and safetensors say of a full disk
# Settings that may differ when a run resumes: they do not change what a step computes.
FREE_SETTINGS = {
    "output", "save_every", "save_minutes", "weights_folder", "log_every", "threads", "eval", "max_minutes", "samples",
    "reference", "distributed", "gradient_checkpointing", "attention", "compile", "report_to", "early_stopping",
    "keep_best", "loss_guard", "contrastive.cache_states", "contrastive.cache_mb",
}  # fmt: skip
MARKERS = ("config.json", "adapter_config.json")  # moved last: a folder that has one is finished


def saved_states(folder: Path) -> list[Path]:
    """The states a run can resume from, oldest first."""
    return sorted((folder / STATE_FOLDER).glob("checkpoint-*"), key=step_of)


def step_of(state: Path) -> int:
    """The number of finished steps of a state."""
    return int(state.name.split("-")[1])


def read_progress(state: Path) -> dict[str, Any]:
    """The progress file next to a state."""
    return json.loads((state / PROGRESS).read_text())


def partial_folder(folder: Path) -> Path:
    """The folder for incomplete states."""
    return folder / STATE_FOLDER / "partial"


def commit_checkpoint(folder: Path, step: int, kept: Collection[int | None] = ()) -> None:
    """Commit the written state of a step, from which a run can resume; remove the oldest ones except those in
    ``kept``."""
    written = partial_folder(folder) / f"checkpoint-{step}"
    for path in [*written.rglob("*"), written]:
        flush(path)
    final = folder / STATE_FOLDER / written.name
    if final.exists():
        _drop(final)
    written.rename(final)
    flush(final.parent)
    for old in saved_states(folder)[:-KEPT_STATES]:
        if step_of(old) not in kept:
            _drop(old)


def _drop(state: Path) -> None:
    dropped = state.rename(state.with_name(f"dropped-{state.name}"))
    shutil.rmtree(dropped)


def clear_partial(folder: Path) -> None:
    """Remove what a killed process left incomplete."""
    for path in [partial_folder(folder), *(folder / STATE_FOLDER).glob("dropped-*")]:
        shutil.rmtree(path, ignore_errors=True)


def save_error(folder: Path, what: str, error: Exception) -> WriteError:
    """The error for a failed save, after removing its incomplete files."""
    clear_partial(folder)
    states = saved_states(folder)
    last = f"the last whole state is {states[-1]}" if states else "there is no whole state yet"
    return WriteError(
        f"{what} could not be saved in {folder} ({error}); {last}. Free some space and rerun the command"
    )


def move_final(folder: Path) -> None:
    """Move the final checkpoint out of ``partial/final``, the file that marks a finished run last."""
    final = partial_folder(folder) / "final"
    for path in sorted(final.iterdir(), key=lambda path: (path.name in MARKERS, path.name == HEAD_FILE)):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    shutil.rmtree(folder / STATE_FOLDER)


def is_finished(stage: TrainConfig) -> bool:
    """Whether the output folder holds this run, finished; ConfigError if it holds another run or something else."""
    folder = Path(stage.output)
    bare = stage.contrastive is not None and stage.lora is None and not stage.trainable
    done = any((folder / name).is_file() for name in ([HEAD_FILE] if bare else MARKERS))
    if not (folder / "stage.yaml").is_file():
        if done:
            raise ConfigError(
                f"{folder} holds a model that was not made by this recipe; choose another output"
            )
        return False
    before = TrainConfig.from_dict(
        yaml.safe_load((folder / "stage.yaml").read_text()), str(folder / "stage.yaml")
    )
    changed = _differences(before.model_dump(mode="json"), stage.model_dump(mode="json"))
    if changed:
        states = [folder] if done else saved_states(folder)[-1:]
        raise ConfigError(
            f"{folder} holds a run with another {'; '.join(changed)}. Resume with the recipe that it was started with "
            f"({folder / 'stage.yaml'}), or start another run{begin_from(stage, states)}"
        )
    if done:
        # A kill between the last two steps of its end.
        shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
    return done


def begin_from(stage: TrainConfig, states: Sequence[Path]) -> str:
    """The options that start another run, from the last of these states (or finished folders) if there is one.

    A state of full training is a checkpoint that contains its model; a state of an adapter is an adapter.
    """
    output, number = Path(stage.output), 2
    while (free := output.with_name(f"{output.name}_{number}")).exists():
        number += 1
    if not states:
        return f" with output={free}"
    if stage.lora is not None:
        return f" from its weights: lora.start={states[-1]} output={free}"
    made = {"tokenizers": stage.tokenizers, "model": stage.model, "modalities": stage.modalities,
            "replace": stage.replace_tokenizers}  # fmt: skip
    there = "".join(f" {name}={{}}" for name, value in made.items() if value)
    return f" from its weights: init_from={states[-1]}{there} output={free}"


def _differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Every setting that differs, as ``optimizer.lr (0.01 before, 0.001 now)``."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = {key: f"{name}.{key}".strip(".") for key in {**before, **after}}
        found = [
            _differences(before.get(key), after.get(key), whole)
            for key, whole in names.items()
            if whole not in FREE_SETTINGS
        ]
        return [one for group in found for one in group]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [one for place, pair in pairs for one in _differences(*pair, f"{name}.{place}")]
    return [] if before == after else [f"{name} ({before!r} before, {after!r} now)"]


if not TYPE_CHECKING:
    __getattr__ = moved.old_names(__name__)
