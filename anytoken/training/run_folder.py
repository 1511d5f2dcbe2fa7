"""Files that a run writes before its first step and after its last; `checkpoint.py` lists them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import torch
import yaml
from tqdm import tqdm

from anytoken.data.mixture import SourceSpec
from anytoken.training.checkpoint import (
    SAVE_ERRORS,
    clear_partial,
    move_final,
    partial_folder,
    save_error,
    saved_states,
    step_of,
)
from anytoken.training.config import TrainConfig
from anytoken.training.initialize import checkpoint_folder
from anytoken.training.lora import base_model
from anytoken.training.metrics import read_metrics
from anytoken.training.report.adapter_card import adapter_card
from anytoken.training.report.html import FACTS
from anytoken.training.report.markdown import write_report
from anytoken.training.run_metadata import check_same_data, run_facts
from anytoken.utils.atomic import write_file

if TYPE_CHECKING:
    from anytoken.training.trainer import StageTrainer


def begin(trainer: StageTrainer, recipe: TrainConfig, sources: list[SourceSpec]) -> None:
    """Write the recipe and the metadata of the run, in one process; ConfigError if it would resume with other data."""
    if trainer.is_world_process_zero():
        _begin(trainer, recipe, sources)
    trainer.accelerator.wait_for_everyone()


def _begin(trainer: StageTrainer, recipe: TrainConfig, sources: list[SourceSpec]) -> None:
    """Write the recipe and the facts of the run; ConfigError if it would resume with other data."""
    stage, folder = trainer.stage, trainer.folder
    clear_partial(folder)
    write_file(folder / "stage.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    facts = run_facts(base_model(trainer.lm), sources, trainer.args.world_size, stage.context, dtype)
    if saved_states(folder):
        check_same_data(json.loads((folder / FACTS).read_text()), facts)
    write_file(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    if stage.contrastive is None:  # a frozen model's features are computed once and kept
        trainer.mfu_per_rate = facts["flops_per_token"] / facts["measured_peak_flops"]


def export(trainer: StageTrainer) -> None:
    """Write the final checkpoint and the report, and remove the states; WriteError on a full disk."""
    best = trainer.best_state()
    if best is not None:
        trainer.load_weights(best)
        if trainer.is_world_process_zero():
            tqdm.write(
                f"exporting the weights of step {step_of(best)}, the best on held-out data", sys.stderr
            )
    try:
        _finish(trainer)
    except SAVE_ERRORS as error:
        raise save_error(trainer.folder, "the final checkpoint", error) from error


def _finish(trainer: StageTrainer) -> None:
    """Write the final checkpoint and the report; the states are no longer needed."""
    final = partial_folder(trainer.folder) / "final"
    with trainer.averaged():
        trainer.save_model(str(final))
    if not trainer.is_world_process_zero():
        return
    if trainer.stage.lora is None and trainer.stage.trainable:
        write_file(final / "sampling.json", _kept(trainer.stage, "sampling.json") or "{}")
        for name in ("chains.json", "best_of.json"):
            if kept := _kept(trainer.stage, name):
                write_file(final / name, kept)
    elif trainer.stage.lora is not None:
        facts = json.loads((trainer.folder / FACTS).read_text(encoding="utf-8"))
        entries = read_metrics(trainer.folder / "metrics.jsonl")
        write_file(final / "README.md", adapter_card(trainer.stage, facts, entries))
    write_report(trainer.folder)
    trainer.page.update(finished=True)
    move_final(trainer.folder)


def _kept(stage: TrainConfig, name: str) -> str | None:
    """A file of defaults of the initial checkpoint."""
    path = None if stage.init_from == "scratch" else checkpoint_folder(stage.init_from) / name
    return path.read_text(encoding="utf-8") if path and path.is_file() else None
