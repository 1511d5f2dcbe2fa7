"""A run's last state in a few small files, to move a run between machines.

``weights_folder`` of a recipe receives, with every saved state, the same state without its optimizer: matrices in
bfloat16, everything else unchanged, in files of at most FILE_BYTES.

    step-1200-1-of-2.safetensors    tensors "weights/FILE/NAME" (long ones in pieces), files as bytes "file/PATH"

A run whose output folder is empty resumes from these files: same recipe, place in the data, schedule, minutes and log.
The optimizer starts fresh, so the losses differ from those of an uninterrupted run. Tokenizers are not included:
the recipe names them, or the checkpoint that it starts from has them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor
from transformers.trainer import SCHEDULER_NAME

from anytoken.training.checkpoint import STATE_FOLDER, partial_folder, saved_states, step_of
from anytoken.training.report.html import FACTS
from anytoken.utils.atomic import write_file
from anytoken.utils.errors import ConfigError

FILE_BYTES = 15 * 2**20
HEADER_BYTES = 2**19  # of a file, set aside for names and shapes
RUN_FILES = ("stage.yaml", FACTS, "metrics.jsonl")
NAME = re.compile(r"step-(\d+)-(\d+)-of-(\d+)\.safetensors")
Named = tuple[str, Tensor]


def write_portable(folder: Path, target: Path) -> None:
    """Write the last state of a run's folder to files in `target`, and remove those of older states."""
    state = saved_states(folder)[-1]
    files = _packed(_contents(folder, state))
    names = [f"step-{step_of(state)}-{n}-of-{len(files)}.safetensors" for n in range(1, len(files) + 1)]
    target.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip(names, files, strict=True):
        write_file(target / name, save(tensors))
    for path in target.iterdir():
        if NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()


def read_portable(source: Path, folder: Path) -> bool:
    """Restore the newest complete state in `source` to a folder without a run; returns whether there was one.

    ConfigError if a file cannot be read.
    """
    files = _newest(source)
    if not files or (folder / "stage.yaml").exists():
        return False
    pieces: dict[str, dict[int, Tensor]] = {}
    for path in files:
        try:
            for name, tensor in load(path.read_bytes()).items():
                whole, _, number = name.rpartition("#")
                pieces.setdefault(whole, {})[int(number)] = tensor
        except SafetensorError as error:
            raise ConfigError(
                f"{path} is damaged ({error}): copy the files of {source} again, or remove them."
            ) from None
    step = int(NAME.fullmatch(files[0].name)[1])  # type: ignore[index]
    state = partial_folder(folder) / f"checkpoint-{step}"
    state.mkdir(parents=True, exist_ok=True)
    weights: dict[str, dict[str, Tensor]] = {}
    run_files: dict[str, bytes] = {}
    for name, found in pieces.items():
        kind, _, rest = name.partition("/")
        parts = [part for _, part in sorted(found.items())]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if kind == "weights":
            file, _, key = rest.partition("/")
            weights.setdefault(file, {})[key] = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        elif rest in RUN_FILES:
            run_files[rest] = tensor.numpy().tobytes()
        else:
            write_file(state / rest, tensor.numpy().tobytes())
    for file, tensors in weights.items():
        save_file(tensors, state / file, metadata={"format": "pt"})
    final = folder / STATE_FOLDER / state.name
    shutil.rmtree(final, ignore_errors=True)
    state.rename(final)
    for name in reversed(RUN_FILES):  # the recipe last: with it, the folder holds a run
        if name in run_files:
            write_file(folder / name, run_files[name])
    return True


def load_schedule_alone(state: Path, optimizer: Any, scheduler: Any) -> None:
    """Restore the schedule of a state without an optimizer, since transformers loads both or neither."""
    if (
        not (state / SCHEDULER_NAME).is_file()
        or any(state.glob("optimizer*"))
        or any(state.glob("global_step*"))
    ):
        return
    scheduler.load_state_dict(torch.load(state / SCHEDULER_NAME, weights_only=True))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _newest(source: Path) -> list[Path]:
    """The files of the last step that has all of them, in order."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for path in source.glob("step-*.safetensors"):
        if match := NAME.fullmatch(path.name):
            step, number, count = map(int, match.groups())
            found.setdefault((step, count), {})[number] = path
    whole = [(key, files) for key, files in found.items() if len(files) == key[1]]
    if not whole:
        return []
    return [path for _, path in sorted(max(whole)[1].items())]


def _contents(folder: Path, state: Path) -> Iterator[Named]:
    """The contents: weights by file and name, and small files as bytes."""
    for path in sorted(state.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                short = tensor.is_floating_point() and tensor.ndim > 1
                yield f"weights/{path.name}/{name}", tensor.bfloat16() if short else tensor
    kept = [folder / name for name in RUN_FILES]
    kept += [path for path in sorted(state.glob("*")) if path.suffix in (".json", ".pth", ".pt")]
    for path in kept:
        if path.is_file() and path.name != "optimizer.pt":
            yield f"file/{path.name}", torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _packed(contents: Iterator[Named]) -> list[dict[str, Tensor]]:
    """Tensors by file, within the size limit: long ones are split along their first axis."""
    files: list[dict[str, Tensor]] = [{}]
    room = limit = FILE_BYTES - HEADER_BYTES
    for name, tensor in contents:
        rows = max(1, limit // max(1, tensor[:1].nbytes)) if tensor.ndim and len(tensor) else 1
        for number, piece in enumerate(tensor.split(rows) if tensor.ndim else [tensor]):
            if piece.nbytes > room:
                files.append({})
                room = limit
            files[-1][f"{name}#{number}"] = piece.clone()
            room -= piece.nbytes
    return files
