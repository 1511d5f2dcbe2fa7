"""Train and measure any tokenizer from its recipe: `anytoken tokenizer train tokenizers/image/recipe.yaml`.

A recipe names the kind, the constructor's settings, where the data is, and how long. The loop is the shortest
that is resumable: batch `n` depends on the seed and `n`, and a checkpoint holds weights, optimiser and `n`.
"""

from __future__ import annotations

import json
import math
import platform
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from anytoken.segments import Image, Speech, Video
from anytoken.tokenizers.base import MODALITIES, Codes, ModalityTokenizer, TokenizerError, load_tokenizer

BUILTIN = ("image", "speech", "video", "dna")


class Recipe(BaseModel):
    """How a tokenizer is trained; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    config: dict[str, Any] = Field(default_factory=dict)
    data: str = ""
    steps: int = Field(2000, ge=1)
    batch_size: int = Field(32, ge=1)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=0)
    seed: int = 0
    threads: int = Field(2, ge=1)
    save_every: int = Field(500, ge=1)
    log_every: int = Field(50, ge=1)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values as YAML, dots go into `config`)."""
    path = Path(path)
    if not path.is_file():
        raise TokenizerError(f"{path} is not a file; expected a recipe such as tokenizers/image/recipe.yaml.")
    return _checked(yaml.safe_load(path.read_text()) or {}, overrides or [], path)


def _checked(raw: dict[str, Any], overrides: list[str], path: Path) -> Recipe:
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise TokenizerError(f"Overrides are key=value; received {item!r}.")
        *parents, leaf = key.split(".")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = yaml.safe_load(value)
    try:
        return Recipe(**raw)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise TokenizerError(f"{path}: {wrong}. Keys: {', '.join(Recipe.model_fields)}.") from error


def train_tokenizer(
    recipe: str | Path, data: str | Path, out: str | Path, overrides: list[str] | None = None
) -> Path:
    """Train by a recipe on the sets in `data`; writes the tokenizer, training.json and metrics.jsonl to `out`.

    Run again after an interruption it goes on from its last checkpoint; a finished one is left as it is.
    """
    recipe_path, data, out = Path(recipe), Path(data), Path(out)
    if not recipe_path.is_file():
        raise TokenizerError(
            f"{recipe_path} is not a file; expected a recipe such as tokenizers/image/recipe.yaml."
        )
    raw = yaml.safe_load(recipe_path.read_text()) or {}
    if raw.get("kind") == "text":
        return _train_text(raw, data, out, overrides or [])
    plan = _checked(raw, overrides or [], recipe_path)
    if plan.kind == "dna":
        return _train_dna(plan, out)
    if plan.kind not in MODALITIES and plan.kind in BUILTIN:
        import_module(f"anytoken.tokenizers.{plan.kind}")
    if plan.kind not in MODALITIES:
        raise TokenizerError(
            f"Unknown tokenizer kind {plan.kind!r}; known: {', '.join(sorted({*BUILTIN, *MODALITIES}))}."
        )
    if (out / "training.json").is_file() and json.loads((out / "training.json").read_text())[
        "recipe"
    ] == plan.model_dump():
        return out
    return _Loop(plan, data, out).run()


class _Loop:
    """One training run: everything that a checkpoint must hold."""

    def __init__(self, plan: Recipe, data: Path, out: Path) -> None:
        from anytoken.tokenizers.batches import batches_for

        torch.set_num_threads(plan.threads)
        torch.manual_seed(plan.seed)
        self.plan, self.out = plan, out
        self.batch = batches_for(plan.kind, data / plan.data, plan.batch_size, plan.seed)
        self.tokenizer = MODALITIES[plan.kind](**plan.config).train()
        self.optimizer = torch.optim.AdamW(
            self.tokenizer.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.95)
        )
        self.step, self.seconds = 0, 0.0
        self.state_path = out / "checkpoint.pt"
        out.mkdir(parents=True, exist_ok=True)
        if self.state_path.is_file():
            self._resume()

    def run(self) -> Path:
        """Train to the end, then save the tokenizer and drop the checkpoint."""
        plan, seen = self.plan, {}
        bar = tqdm(total=plan.steps, initial=self.step, desc=f"{plan.kind} tokenizer", unit="step")
        with (self.out / "metrics.jsonl").open("a") as log:
            while self.step < plan.steps:
                start = time.perf_counter()
                seen = self._train_step()
                self.seconds += time.perf_counter() - start
                self.step += 1
                bar.update()
                if self.step % plan.log_every == 0 or self.step == plan.steps:
                    bar.set_postfix({k: f"{v:.3f}" for k, v in seen.items()})
                    log.write(
                        json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **seen}) + "\n"
                    )
                    log.flush()
                if self.step % plan.save_every == 0:
                    self._checkpoint()
        bar.close()
        self.tokenizer.eval().save_pretrained(self.out)
        report = {
            "recipe": plan.model_dump(), "steps": self.step, "seconds": round(self.seconds, 1), "last": seen,
            "parameters": sum(p.numel() for p in self.tokenizer.parameters()),
            "threads": plan.threads, "machine": platform.machine(), "torch": torch.__version__,
        }  # fmt: skip
        (self.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        self.state_path.unlink(missing_ok=True)
        return self.out

    def _train_step(self) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr * self._schedule(self.step)
        loss, seen = self.tokenizer.training_loss(self.batch(self.step))
        if not torch.isfinite(loss):
            raise TokenizerError(
                f"The loss is {loss.item()} at step {self.step}: lower lr (now {self.plan.lr})."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss.item(), **seen}

    def _schedule(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.plan.warmup_steps))
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.plan.steps)))

    def _checkpoint(self) -> None:
        scratch = self.state_path.with_suffix(".tmp")
        state = {
            "model": self.tokenizer.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "recipe": self.plan.model_dump(),
        }  # fmt: skip
        torch.save(state, scratch)
        scratch.replace(self.state_path)

    def _resume(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        if state["recipe"] != self.plan.model_dump():
            raise TokenizerError(f"{self.state_path} is of another recipe: name another --out, or delete it.")
        self.tokenizer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def _train_text(raw: dict[str, Any], data: Path, out: Path, overrides: list[str]) -> Path:
    from anytoken.tokenizers.text import train_text_tokenizer

    raw = dict(raw)
    for item in overrides:
        key, _, value = item.partition("=")
        if key in raw:  # a pipeline hands every recipe the same overrides; text has no steps
            raw[key] = yaml.safe_load(value)
    return Path(train_text_tokenizer({**raw, "data": str(data)}, out))


def _train_dna(plan: Recipe, out: Path) -> Path:
    from anytoken.tokenizers.dna import train_dna_tokenizer

    return Path(train_dna_tokenizer(plan.model_dump(), out))


# ---- measuring ----


def evaluate_tokenizer(
    tokenizer: str | Path, data: str | Path, count: int = 400, seed: int = 0
) -> dict[str, Any]:
    """Held-out figures of a trained tokenizer: distortion, codebook usage and perplexity, tokens per unit, speed."""
    loaded = load_tokenizer(tokenizer).eval()
    if loaded.kind == "dna":
        return _measure_dna(loaded, Path(data))
    from anytoken.tokenizers.batches import held_out_segments

    segments = held_out_segments(loaded.kind, Path(data), count, seed)
    start = time.perf_counter()
    codes = loaded.encode_batch(segments)
    middle = time.perf_counter()
    outputs = loaded.decode_batch(codes)
    end = time.perf_counter()
    return {
        "kind": loaded.kind, "items": len(segments), "seed": seed, **_usage(codes, loaded.codebook_sizes[0]),
        **_distortion(segments, outputs),
        "tokens_per_item": float(np.mean([len(one) for one in codes])),
        "encode_items_per_second": len(segments) / (middle - start),
        "decode_items_per_second": len(segments) / (end - middle),
    }  # fmt: skip


def _usage(codes: list[Codes], size: int) -> dict[str, float]:
    counts = np.bincount(np.concatenate([one.values[:, 0] for one in codes]), minlength=size)
    share = counts[counts > 0] / counts.sum()
    return {
        "codebook_size": size,
        "codebook_usage": float((counts > 0).mean()),
        "code_perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def _distortion(segments: list[Any], outputs: list[Any]) -> dict[str, float]:
    if isinstance(segments[0], Speech):
        return _speech_distortion(segments, outputs)
    pairs = [
        (a.pixels, b.pixels) if isinstance(a, Image) else (a.frames, b.frames)
        for a, b in zip(segments, outputs, strict=True)
        if isinstance(a, (Image, Video))
    ]
    errors = [((a.astype(np.float64) - b) ** 2).mean() for a, b in pairs]
    flat = [((a.astype(np.float64) - a.mean((0, 1), keepdims=True)) ** 2).mean() for a, _ in pairs]
    return {
        "psnr_db": float(np.mean([10 * math.log10(255**2 / max(e, 1e-6)) for e in errors])),
        "mean_colour_psnr_db": float(np.mean([10 * math.log10(255**2 / max(e, 1e-6)) for e in flat])),
    }


def _speech_distortion(segments: list[Speech], outputs: list[Speech]) -> dict[str, float]:
    seconds = sum(one.seconds for one in segments)
    found: dict[str, float] = {"seconds": seconds}
    try:
        from pystoi import stoi
    except ImportError:  # an optional extra: `pip install anytoken[eval]`
        return found
    scores = []
    for one, other in zip(segments, outputs, strict=True):
        clean = one.resample(other.sample_rate_hz).samples
        if len(clean) > 0.6 * other.sample_rate_hz:  # STOI needs some 30 frames of speech
            scores.append(stoi(clean, other.samples[: len(clean)], other.sample_rate_hz))
    found["stoi"] = float(np.mean(scores)) if scores else float("nan")
    return found


def _measure_dna(tokenizer: ModalityTokenizer, data: Path) -> dict[str, Any]:
    from anytoken.segments import DNA

    path = data / "dna" / "translate.jsonl"
    if not path.is_file():
        raise TokenizerError(f"{path} is missing: --data names the folder of the built sets.")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    bases = [DNA(line["dna"]) for line in lines if line["split"] == "test"]
    codes = tokenizer.encode_batch(bases)
    same = [
        a == b.bases for a, b in zip((one.bases for one in bases), tokenizer.decode_batch(codes), strict=True)
    ]  # type: ignore[attr-defined]
    letters = sum(len(one.bases) for one in bases)
    return {
        "kind": "dna", "items": len(bases), "exact": float(np.mean(same)), "bases": letters,
        "tokens_per_base": sum(len(one) for one in codes) / letters, **_usage(codes, tokenizer.codebook_sizes[0]),
    }  # fmt: skip
