"""Train the DNA tokenizer until all 155 windows, which are its whole data, are reconstructed exactly."""

import math
import time
from pathlib import Path

import torch

from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.dna.vq import DNATokenizer, all_windows
from anytoken.training.optim.take_step import take_step
from anytoken.training.tokenizer.recipe import TokenizerRecipe, write_report

MAX_ROUNDS = 10


def train_dna(tokenizer: DNATokenizer, plan: TokenizerRecipe, out: Path) -> Path:
    """Train in rounds of `steps` until `verify` passes, and save to `out`; returns that folder.

    `batch_size` is rounded up to whole sets of the windows. TokenizerError after ten rounds.
    """
    start, steps = time.perf_counter(), 0
    while steps < MAX_ROUNDS * plan.steps:
        seen = _train_round(tokenizer.train(), plan)
        steps += plan.steps
        if tokenizer.eval().verify():
            tokenizer.freeze_tables()
        report = tokenizer.verify()
        if report:
            break
    else:
        raise TokenizerError(
            f"After {MAX_ROUNDS} rounds of {plan.steps} steps, {len(report.wrong)} of {len(all_windows())} windows "
            "are still lost: give it more steps, or a learning rate nearer 0.003."
        )
    folder = tokenizer.save_pretrained(out)
    found = {"windows": len(all_windows()), "windows_lost": len(report.wrong), "margin": report.margin}
    write_report(folder, plan, tokenizer, steps, time.perf_counter() - start, seen, **found)
    return folder


def _train_round(tokenizer: DNATokenizer, plan: TokenizerRecipe) -> dict[str, float]:
    """One warm-up and cosine decay over `steps` steps; returns the last step's loss and metrics."""
    warm = min(plan.warmup_steps, plan.steps // 5)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=plan.lr, weight_decay=plan.weight_decay)
    windows = all_windows().repeat(math.ceil(plan.batch_size / len(all_windows())), 1)
    for step in range(plan.steps):
        rising = step < warm
        share = (step + 1) / (warm + 1) if rising else 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        loss, seen = tokenizer.training_loss(windows)
        take_step(loss, optimizer, plan.lr * share)
    return {"loss": loss.item(), **seen}
