"""Train any tokenizer from its recipe: `anytoken tokenizer train tokenizers/image/recipe.yaml`.

A recipe names the kind, the constructor's settings, where the data is, and how long. The loop is minimal but resumable:
batch `n` depends on the seed and `n`, and a checkpoint holds weights, optimizer and `n`.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from anytoken.tokenizers.base import ModalityTokenizer, TokenizerError, load_tokenizer
from anytoken.tokenizers.dna import DNATokenizer
from anytoken.tokenizers.losses.speech_content import TERMS as CONTENT_TERMS
from anytoken.tokenizers.modules.convnext import ConvNeXtStack
from anytoken.tokenizers.registry import load_modality, modality_class
from anytoken.training.config_parts import OptimizerSpec, ScheduleSpec
from anytoken.training.metrics import MetricsLog
from anytoken.training.optim.lr_schedule import Schedule
from anytoken.training.optim.muon import make_optimizer
from anytoken.training.optim.take_step import take_step
from anytoken.training.report.trackers import summary_writer
from anytoken.training.settings import read_recipe
from anytoken.training.tokenizer.dna import train_dna
from anytoken.training.tokenizer.recipe import TextRecipe, TokenizerRecipe, write_report
from anytoken.training.tokenizer.text import train_text
from anytoken.utils.atomic import write_file
from anytoken.utils.device import math_threads, usable_device

FINAL_FRACTION = 0.02  # of the learning rate, at the end


def train_tokenizer(
    recipe: str | Path, data: str | Path, out: str | Path, overrides: list[str] | None = None
) -> Path:
    """Train by a recipe on the sets in `data`; writes the tokenizer, training.json and metrics.jsonl to `out`, and
    tensorboard/ if that package is installed.

    An interrupted run resumes from its last checkpoint, with the same result as an uninterrupted one; a finished run is
    kept. TokenizerError for an unusable recipe or data.
    """
    recipe_path, data, out = Path(recipe), Path(data), Path(out)
    raw = read_recipe(recipe_path, TokenizerError)
    if raw.get("kind") == "text":
        # A pipeline hands every recipe the same overrides; text has no steps.
        shared = TokenizerRecipe.model_fields.keys() - TextRecipe.model_fields
        own = [one for one in overrides or [] if one.split("=")[0] not in shared]
        return train_text(TextRecipe.load(recipe_path, own), data, out)
    plan = TokenizerRecipe.load(recipe_path, overrides or [])
    report = out / "training.json"
    if report.is_file() and TokenizerRecipe(**json.loads(report.read_text())["recipe"]) == plan:
        return out
    with math_threads(plan.threads):
        return _train(plan, recipe_path, data, out)


def _train(plan: TokenizerRecipe, recipe_path: Path, data: Path, out: Path) -> Path:
    if plan.code:
        load_modality(recipe_path.parent / plan.code)
    torch.manual_seed(plan.seed)
    tokenizer, start = _build(plan), time.perf_counter()
    if isinstance(tokenizer, DNATokenizer):
        return train_dna(tokenizer, plan, out)
    tokenizer.fit(data / plan.data, plan.seed)
    loss, fit = (getattr(type(tokenizer), name) for name in ("training_loss", "fit"))
    if loss is ModalityTokenizer.training_loss and fit is not ModalityTokenizer.fit:
        return _finish(tokenizer, plan, out, 0, time.perf_counter() - start, {})
    return _Loop(tokenizer, plan, data, out).run()


def _build(plan: TokenizerRecipe) -> ModalityTokenizer:
    try:
        tokenizer = modality_class(plan.kind)(**plan.config)
    except TypeError as error:
        raise TokenizerError(f"config of a {plan.kind} tokenizer: {error}.") from error
    if plan.init_from:
        begun, anew = load_tokenizer(plan.init_from), tuple(plan.reinit_prefixes)
        state = tokenizer.adapted_state(begun.state_dict())
        taken = {name: one for name, one in state.items() if not name.startswith(anew)}
        kept = {name: one for name, one in tokenizer.state_dict().items() if name.startswith(anew)}
        try:
            tokenizer.load_state_dict(taken | kept)
        except RuntimeError as error:
            raise TokenizerError(
                f"init_from: the weights of {plan.init_from} do not fit config, which is {plan.config}; "
                f"theirs is {begun.config}. `reinit_prefixes` names weights to reinitialize instead. {error}"
            ) from error
    for part, folder in plan.init_parts.items():
        _take_part(tokenizer, part, folder)
    return tokenizer


def _take_part(tokenizer: ModalityTokenizer, part: str, folder: str) -> None:
    """Take the weights with this prefix from another tokenizer; TokenizerError unless all exist and fit."""
    wanted = {name: one.shape for name, one in tokenizer.state_dict().items() if name.startswith(part)}
    state = load_tokenizer(folder).state_dict()
    taken = {name: state[name] for name in wanted if name in state}
    if not wanted or wanted != {name: one.shape for name, one in taken.items()}:
        raise TokenizerError(
            f"init_parts: {folder} has no weights that fit those of this tokenizer that begin with {part!r}, which are "
            f"{', '.join(f'{name} {list(shape)}' for name, shape in wanted.items()) or 'none'}."
        )
    tokenizer.load_state_dict(taken, strict=False)


def _partly_frozen(tokenizer: ModalityTokenizer, beginnings: list[str]) -> ModalityTokenizer:
    """Freeze the weights with these prefixes; TokenizerError if a prefix matches none, or no weight is left to
    train."""
    names = [name for name, _ in tokenizer.named_parameters()]
    unknown = [one for one in beginnings if not any(name.startswith(one) for name in names)]
    if unknown or (beginnings and all(name.startswith(tuple(beginnings)) for name in names)):
        parts = sorted({name.split(".")[0] + "." for name in names})
        raise TokenizerError(
            f"freeze: {beginnings} must name some of the weights and not all; names begin with {', '.join(parts)}."
        )
    for name, module in tokenizer.named_modules():
        if f"{name}.".startswith(tuple(beginnings)):
            module.eval().requires_grad_(False)
    for name, weight in tokenizer.named_parameters():
        weight.requires_grad_(weight.requires_grad and not name.startswith(tuple(beginnings)))
    return tokenizer


def _finish(
    tokenizer: ModalityTokenizer,
    plan: TokenizerRecipe,
    out: Path,
    steps: int,
    seconds: float,
    seen: dict[str, float],
) -> Path:
    # bfloat16 once and for all: shards and a bundled checkpoint then hold the very same weights, and codes.
    tokenizer.eval().drop_ema_buffers().save_pretrained(out, torch.bfloat16)
    write_report(out, plan, tokenizer, steps, seconds, seen)
    return out


class _Loop:
    """One training run: everything that a checkpoint must hold."""

    def __init__(self, tokenizer: ModalityTokenizer, plan: TokenizerRecipe, data: Path, out: Path) -> None:
        from anytoken.training.tokenizer.batches import KINDS, batches_for

        self.tokenizer, self.plan, self.out = _partly_frozen(tokenizer.train(), plan.freeze), plan, out
        self.device = usable_device(plan.device)
        tokenizer.to(self.device)
        source = data / plan.data, plan.batch_size, plan.seed
        if plan.kind in KINDS:
            self.batch = batches_for(plan.kind, *source, tokenizer.config, self.device)
        else:
            own = tokenizer.training_batches(*source)
            self.batch = lambda step: own(step).to(self.device)
        if plan.pairs:
            self._add_pairs([data / one for one in plan.pairs])
        elif unpaired := [term for term in CONTENT_TERMS if plan.loss.get(term)]:
            raise TokenizerError(
                f"loss: {' and '.join(unpaired)} need `pairs`, JSON lines of recordings with speech, text and voice."
            )
        torch.manual_seed(plan.seed)
        self.critic = self.tokenizer.configure_losses(plan.loss)
        if self.critic is not None:
            self.critic.to(self.device)
        if plan.compile:
            for part in tokenizer.modules():
                if isinstance(part, ConvNeXtStack):
                    part.compile(dynamic=False)
        self.parts = [self.tokenizer] if self.critic is None else [self.tokenizer, self.critic]
        spec = OptimizerSpec(lr=plan.lr, weight_decay=plan.weight_decay)
        trained = {
            "params": [one for part in self.parts for one in part.parameters() if one.requires_grad],
            "weight_decay": plan.weight_decay,
            "fused": self.device.type == "cuda" or None,
        }
        self.optimizer = make_optimizer(spec, cast(PreTrainedModel, tokenizer), [trained])
        warmed = ScheduleSpec(kind="cosine", warmup_steps=plan.warmup_steps, final_fraction=FINAL_FRACTION)
        self.schedule = Schedule(warmed, plan.steps)
        self.step, self.seconds = 0, 0.0
        self.state_path = out / "checkpoint.pt"
        out.mkdir(parents=True, exist_ok=True)
        if self.state_path.is_file():
            self._resume()
        # What was logged after the checkpoint is done again.
        MetricsLog(out / "metrics.jsonl").rewind_to_step(self.step)

    def _add_pairs(self, lists: list[Path]) -> None:
        from anytoken.training.tokenizer.spoken_pairs import spoken_pairs

        if self.plan.kind != "speech":
            raise TokenizerError(f"`pairs` is for speech tokenizers; the recipe's kind is {self.plan.kind}.")
        crops, pairs = self.batch, spoken_pairs(lists, self.plan.batch_size, self.plan.seed)

        def in_turn(step: int) -> Any:
            return pairs(step).to(self.device) if step % 4 else crops(step)

        self.batch = in_turn

    def run(self) -> Path:
        """Train to the end, then save the tokenizer and drop the checkpoint."""
        plan, seen = self.plan, {}
        bar = tqdm(total=plan.steps, initial=self.step, desc=f"{plan.kind} tokenizer", unit="step")
        log, board = MetricsLog(self.out / "metrics.jsonl"), nullcontext()  # type: Any, Any
        if find_spec("tensorboard") is not None:
            board = summary_writer(self.out, self.step)
        with board:
            while self.step < plan.steps:
                start = time.perf_counter()
                seen = self._train_step()
                self.seconds += time.perf_counter() - start
                self.step += 1
                bar.update()
                if self.step % plan.log_every == 0 or self.step == plan.steps:
                    bar.set_postfix({k: f"{v:.3f}" for k, v in seen.items()})
                    log.write({"step": self.step, "seconds": round(self.seconds, 1), **seen})
                    for name, value in seen.items() if hasattr(board, "add_scalar") else ():
                        board.add_scalar(name, value, self.step)
                if self.step % plan.save_every == 0 and self.step < plan.steps:
                    self._checkpoint()
        bar.close()
        _finish(self.tokenizer, plan, self.out, self.step, self.seconds, seen)
        self.state_path.unlink(missing_ok=True)
        return self.out

    def _train_step(self) -> dict[str, float]:
        # What is random in a step (k-means, dead codes replaced) depends on it alone, as its batch does.
        torch.manual_seed(self.plan.seed + self.step)
        batch = self.batch(self.step)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
            loss, seen = self.tokenizer.training_loss(batch)
        if not torch.isfinite(loss):
            raise TokenizerError(
                f"The loss is {loss.item()} at step {self.step}: lower lr (now {self.plan.lr})."
            )
        take_step(loss, self.optimizer, self.plan.lr * self.schedule(self.step), self.tokenizer.parameters())
        return {"loss": loss.item(), **seen}

    def _checkpoint(self) -> None:
        state = {
            "parts": [part.state_dict() for part in self.parts], "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "recipe": self.plan.model_dump(),
        }  # fmt: skip
        write_file(self.state_path, lambda scratch: torch.save(state, scratch))

    def _resume(self) -> None:
        state = torch.load(self.state_path, weights_only=True, map_location=self.device)
        if TokenizerRecipe(**state["recipe"]) != self.plan:
            raise TokenizerError(
                f"{self.state_path} belongs to another recipe: choose another --out, or delete it."
            )
        for part, weights in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
